"""The teacher: it plays well, from what it has seen and nothing else, and it can say what it would do in states it
would never get into."""

import pickle
import random
from itertools import product

import pytest

from qwen_vl_kit.core import InputError
from qwen_vl_kit.expert.expert import Expert
from qwen_vl_kit.expert.explore import explore
from qwen_vl_kit.expert.field import search
from qwen_vl_kit.expert.goals import GOALS, Offer, offers
from qwen_vl_kit.expert.memory import ROW, Memory
from qwen_vl_kit.expert.moves import Move
from qwen_vl_kit.expert.reasons import GOAL_NAMES
from qwen_vl_kit.expert.survival import NEEDS, seek_shelter
from qwen_vl_kit.game.rules import ACHIEVEMENTS, ACTIONS
from qwen_vl_kit.game.world import World


def homeless(budget):
    "The teacher without closed rooms."
    return Expert(budget, needs=tuple(need for need in NEEDS if need is not seek_shelter))


def play(seed, budget, steps=None, teacher=Expert):
    world, expert = World(18, steps or budget), teacher(budget)
    world.reset(seed)
    while not world.done:
        world.step(expert.act(world).actions[0])
    return world


@pytest.mark.parametrize("budget, least", [(50, 7.0), (200, 15.5)])
def test_it_plays_well_in_short_episodes(budget, least):
    made = [len(play(seed, budget).unlocked) for seed in range(700, 716)]
    assert sum(made) / len(made) > least, made


@pytest.mark.slow
def test_it_lives_for_days_and_gets_what_takes_long():
    worlds = [play(seed, 10_000, steps=900) for seed in range(700, 710)]
    assert {name for world in worlds for name in world.unlocked} == set(ACHIEVEMENTS)
    assert sum(len(world.unlocked) for world in worlds) / len(worlds) > 17.5
    others = [play(seed, 10_000, steps=900, teacher=homeless) for seed in range(700, 710)]
    lived, without = (sum(world._game.clock for world in group) for group in (worlds, others))
    assert lived > 1.2 * without, (lived, without)


def test_it_makes_tools_at_the_edge_of_the_map_too():
    "In the first row and column crafter finds no table nearby, though one is beside the player."
    world, expert = World(18, 40), Expert(budget=40)
    world.reset(5)
    game = world._game
    for x in range(4):
        for y in range(8):
            game.map[x, y] = "grass"
            if (creature := game.map[x, y][1]) is not None:
                game.map.remove(creature)
    game.map[1, 3] = "table"
    game.map.move(game.player, (0, 4))
    game.player.inventory["wood"] = 5
    while not world.done:
        world.step(expert.act(world).actions[0])
    assert {"make_wood_pickaxe", "make_wood_sword"} <= set(world.unlocked)


def test_it_goes_looking_when_it_is_hungry_and_nothing_is_unknown():
    world, expert = World(18, 600), Expert(budget=10_000)
    world.reset(700)
    for _ in range(120):
        world.step(expert.act(world).actions[0])
    game = world._game
    known = expert.memory.materials
    known.update({x * ROW + y: "grass" for x in range(64) for y in range(64) if x * ROW + y not in known})
    for creature in list(game.map.objects):
        if type(creature).__name__ == "Cow":
            game.map.remove(creature)
    expert.memory.cows.clear()
    game.player.inventory["food"], places = 2, set()
    for _ in range(40):
        game.player.health = 9
        assert not world.step(expert.act(world).actions[0]).done
        places.add(game.player.pos)
    assert len(places) > 12, places


def test_another_episode_finds_nothing_of_the_last_one():
    expert, world, fresh = Expert(budget=200), World(18), World(18)
    world.reset(1)
    for _ in range(60):
        world.step(expert.act(world).actions[0])
    fresh.reset(2)
    fresh.step("noop")
    assert expert.act(fresh) == Expert(budget=200).act(fresh)


@pytest.mark.parametrize("settings", [{"budget": 0}, {"budget": "50"}, {"noise": -1.0}, {"actions": 0}])
def test_settings_are_checked(settings):
    with pytest.raises(InputError):
        Expert(**settings)


def test_it_labels_states_that_it_would_not_get_into():
    """Random play gets hurt, lost and walled in; a fresh teacher, put there in the middle, and one that watched, both
    have an answer."""
    for seed in range(6):
        world, watching, chance = World(18, 400), Expert(budget=10_000), random.Random(seed)
        world.reset(seed)
        while not world.done:
            for decision in (watching.act(world), Expert(budget=10_000).act(world)):
                assert decision.actions[0] in ACTIONS and decision.reason.split("; ")[1] in GOAL_NAMES
            world.step(chance.randrange(17))


def test_it_does_not_see_beyond_the_window():
    "Whatever the unseen part of the map is made of, the decision is the same, until it comes into sight."
    chance = random.Random(0)
    for seed in range(8):
        world, expert = World(18), Expert(budget=200)
        world.reset(seed)
        for _ in range(30):
            world.step(expert.act(world).actions[0])
        decision, other = expert.act(world), World(18)
        other.restore(world.snapshot())
        known, size = set(expert.memory.materials), world._game.map.area
        hidden = [(x, y) for x in range(size[0]) for y in range(size[1]) if x * ROW + y not in known]
        assert len(hidden) > 2000
        for x, y in hidden:
            other._game.map[x, y] = chance.choice(["water", "diamond", "tree", "lava", "table"])
        assert expert.act(other) == decision


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
    def reasons(seed, noise=0.7):
        world, expert, chance = World(18, 40), Expert(budget=40, noise=noise, seed=seed), random.Random(0)
        world.reset(3)
        out = []
        while not world.done:
            out.append(expert.act(world).reason)
            world.step(chance.choice(ACTIONS[1:6]))
        return out

    assert reasons(1) == reasons(1) != reasons(2)
    assert reasons(1, noise=0) == reasons(2, noise=0)


def test_a_goal_of_ones_own_is_taken_when_it_is_the_cheapest():
    world = World(18, 60)
    world.reset(3)

    def idle(price):
        return lambda memory, field: Offer(price, "noop", "here", lambda: Move("noop"))

    usual = Expert(60).act(world)
    assert usual.actions != ["noop"]
    assert Expert(60, goals=(*GOALS, idle(1000.0))).act(world) == usual
    assert Expert(60, goals=(*GOALS, idle(0.1))).act(world).actions == ["noop"]


def test_goals_and_moves_change_nothing():
    "Whatever is offered, and whichever offer is worked out, memory and field stay as they were."
    for budget in (200, 10_000):
        world, expert = World(18, 400), Expert(budget)
        world.reset(16)
        while not world.done:
            world.step(expert.act(world).actions[0])
            if world._game.clock % 20 == 0 and not world.done:
                memory = Memory(world.view(), budget)
                field = search(memory)
                before = pickle.dumps((vars(memory), field))
                for offer in [*offers(memory, field), explore(memory, field)]:
                    assert offer.goal in GOAL_NAMES and offer.move().action in ACTIONS
                assert pickle.dumps((vars(memory), field)) == before


def play_turns(seed: int, turns: int = 50, noise: float = 0.0) -> World:
    "The world after some turns of up to four actions; a disturbed plan is carried on, and the next turn looks again."
    world, expert, chance = World(18, 4 * turns), Expert(budget=4 * turns, actions=4), random.Random(seed)
    world.reset(seed)
    for turn in range(turns):
        for action in expert.act(world, turn).actions:
            if world.step(chance.choice(ACTIONS) if chance.random() < noise else action).done:
                return world
    return world


def test_plans_of_four_actions_are_worth_much_more_than_single_actions():
    worlds = [play_turns(seed) for seed in range(700, 712)]
    assert sum(len(world.unlocked) for world in worlds) / len(worlds) > 14  # 8 in 50 single actions
    disturbed = [play_turns(seed, noise=0.1) for seed in range(700, 712)]
    assert sum(len(world.unlocked) for world in disturbed) / len(disturbed) > 11


def test_a_plan_knows_no_more_than_the_screen_has_shown():
    "Two worlds that look the same so far, and differ in the unseen part of the map and in their dice, get one plan."
    chance = random.Random(0)
    for seed in range(6):
        world, expert = World(18), Expert(budget=200, actions=4)
        world.reset(seed)
        for _ in range(8):
            for action in expert.act(world).actions:
                world.step(action)
        snapshot, other = world.snapshot(), World(18)
        plan = expert.act(world)
        assert 1 <= len(plan.actions) <= 4 and world.snapshot() == snapshot
        other.restore(snapshot)
        size = other._game.map.area
        for x, y in product(range(size[0]), range(size[1])):
            if x * ROW + y not in expert.memory.materials:
                other._game.map[x, y] = chance.choice(("grass", "water", "lava", "stone"))
        other._game.map.random.seed(seed)
        assert expert.act(other).actions == plan.actions


def test_any_state_has_a_plan_and_turns_are_counted():
    for seed in range(4):
        world, watching, chance = World(18, 200), Expert(budget=200, actions=4), random.Random(seed)
        world.reset(seed)
        while not world.done:
            fresh = Expert(budget=200, actions=4)
            for decision in (watching.act(world), fresh.act(world)):
                assert set(decision.actions) <= set(ACTIONS) and decision.reason.split("; ")[1] in GOAL_NAMES
            assert fresh.turn == world._game.clock // 4
            for _ in range(chance.randrange(1, 5)):
                if not world.done:
                    world.step(chance.randrange(17))
        assert watching.turn > fresh.turn  # its turns were not all of four actions
    watching.act(world, turn=49)
    assert watching.memory.left == 4
