"The teacher: it plays well, from what it has seen and nothing else, and it can say what it would do in states it would never get into."

import random

import pytest

from qwen_vl_kit.env import ACHIEVEMENTS, ACTIONS, World
from qwen_vl_kit.expert import GOALS, Expert


def play(seed, budget, steps=None):
    world, expert = World(18, steps or budget), Expert(budget)
    world.reset(seed)
    while not world.done:
        world.step(expert.act(world).actions[0])
    return world


@pytest.mark.parametrize("budget, least", [(50, 7.0), (200, 15.5)])
def test_it_plays_well_in_short_episodes(budget, least):
    made = [len(play(seed, budget).unlocked) for seed in range(700, 716)]
    assert sum(made) / len(made) > least, made


def test_it_lives_for_days_and_gets_what_takes_long():
    "Without shelters nearly all are dead by step 300, and nobody has ever eaten a plant."
    worlds = [play(seed, 10_000, steps=900) for seed in range(700, 710)]
    assert sum(world.dead for world in worlds) <= 7
    assert {name for world in worlds for name in world.unlocked} == set(ACHIEVEMENTS)
    assert sum(len(world.unlocked) for world in worlds) / len(worlds) > 17.5


def test_it_labels_states_that_it_would_not_get_into():
    "Random play gets hurt, lost and walled in; a fresh teacher, put there in the middle, and one that watched, both have an answer."
    for seed in range(6):
        world, watching, chance = World(18, 400), Expert(budget=10_000), random.Random(seed)
        world.reset(seed)
        while not world.done:
            for decision in (watching.act(world), Expert(budget=10_000).act(world)):
                assert decision.actions[0] in ACTIONS and decision.reason.split("; ")[1] in GOALS
            world.step(chance.randrange(17))


def test_it_does_not_see_beyond_the_window():
    "Whatever the unseen part of the map is made of, the decision is the same, until it comes into sight."
    chance = random.Random(0)
    for seed in range(8):
        world, expert = World(18), Expert(budget=200)
        world.reset(seed)
        for _ in range(30):
            world.step(expert.act(world).actions[0])
        said, other = expert.act(world), World(18)
        other.restore(world.snapshot())
        seen, size = set(expert.seen), world._game.map.area
        hidden = [(x, y) for x in range(size[0]) for y in range(size[1]) if x * 256 + y not in seen]
        assert len(hidden) > 2000
        for x, y in hidden:
            other._game.map[x, y] = chance.choice(["water", "diamond", "tree", "lava", "table"])
        assert expert.act(other) == said


def test_it_never_walks_into_lava():
    "Surrounded by it, every step of the way."
    for seed in range(4):
        world, expert = World(18, 120), Expert(budget=10_000)
        world.reset(seed)
        for x in range(64):
            for y in range(64):
                if (x + 2 * y) % 5 == 0 and (x, y) != world._game.player.pos:
                    world._game.map[x, y] = "lava"
        while not world.done:
            action = expert.act(world).actions[0]
            before = world.view()
            world.step(action)
            if action.startswith("move_"):
                way = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[action.removeprefix("move_")]
                assert before.materials.get(way) != "lava"


def test_noise_makes_teachers_differ_and_a_seed_repeats_them():
    def told(seed):
        world, expert = World(18, 40), Expert(budget=40, noise=0.7, seed=seed)
        world.reset(3)
        out = []
        while not world.done:
            out.append(expert.act(world).reason)
            world.step(expert.random.choice(ACTIONS[1:6]))
        return out

    assert told(1) == told(1) != told(2)
