"The world: the same in every process, and byte for byte the game that crafter plays."
import copy
import hashlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from benchmarks import main
from benchmarks.equality import Pair, ReproducibleStock, play_both
from benchmarks.race import NotComparable
from qwen_vl_kit.core import InputError
from qwen_vl_kit.game import paint
from qwen_vl_kit.game import world as game_world
from qwen_vl_kit.game.gym import gym_world
from qwen_vl_kit.game.images import decode_png, png
from qwen_vl_kit.game.paint import _fade_table, _night_loop, _night_sum, _vignette, painter, uses_numba
from qwen_vl_kit.game.rules import ACTIONS
from qwen_vl_kit.game.world import _DEATH, World
from qwen_vl_kit.game.worldgen import _compile_loop, _noise, _noise3

EPISODE = """
import hashlib, sys
import numpy as np
from qwen_vl_kit.game.world import World

def episode(seed, others=()):
    world, digest = World(size=54, length=230), hashlib.sha256()
    digest.update(world.reset(seed).frame.tobytes())
    actions = np.random.RandomState(seed).randint(0, 17, 320).tolist()
    while not world.done:
        for other in others:
            if other.done:
                other.reset(other.seed + 1)
            other.step(actions[0]).observation.frame
        step = world.step(actions.pop())
        words = f"{step.reward} {step.info} {step.unlocked} {step.observation.text}"
        digest.update(step.observation.frame.tobytes() + words.encode())
    return f"{step.observation.step} {digest.hexdigest()} {hashlib.sha256(world.snapshot()).hexdigest()}"
"""
ALONE = EPISODE + "print(episode(10))"
LITTERED = """
junk = [bytearray(n % 977) for n in range(200_000)]
del junk[::3]
import random, json, benchmarks.equality
junk += [object() for _ in range(50_000)]
""" + ALONE
AMONG_OTHERS = EPISODE + """
others = [World(size) for size in (18, 99)] + [World(27, area=(20, 40))]
for seed, other in enumerate(others):
    other.reset(seed)
episode(3)
print(episode(10, others))
"""
PLACES = {"hash seed 0": (ALONE, {"PYTHONHASHSEED": "0"}), "hash seed 4242": (ALONE, {"PYTHONHASHSEED": "4242"}),
          "another allocator": (ALONE, {"PYTHONHASHSEED": "1", "PYTHONMALLOC": "malloc"}),
          "littered memory, other imports": (LITTERED, {"PYTHONHASHSEED": "2"}),
          "among other worlds": (AMONG_OTHERS, {"PYTHONHASHSEED": "3", "PYTHONMALLOC": "malloc"}),
          "without numba": (ALONE, {"QVK_NUMBA": "0", "PYTHONHASHSEED": "5"})}


def test_an_episode_is_the_same_in_every_process():
    "Hash seeds, addresses, allocators and neighbours differ; frames, rewards and the final state must not."
    told = {}
    for name, (code, settings) in PLACES.items():
        process = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **settings}, stdout=subprocess.PIPE, text=True, check=True
        )
        told[name] = process.stdout.split()
    assert all(len(words) == 3 and int(words[0]) > 200 for words in told.values())  # well into the night
    assert len(set(map(tuple, told.values()))) == 1, told


def test_worlds_side_by_side_play_as_they_do_alone():
    def play(world, steps):
        for action in np.random.RandomState(world.seed).randint(0, 17, steps).tolist():
            if not world.done:
                assert world.step(action).observation.frame.any()
            yield world.snapshot()
    worlds = [World(size, area=area) for size, area in ((18, (64, 64)), (63, (64, 64)), (36, (30, 17)), (18, (64, 64)))]
    for world, seed in zip(worlds, (1, 2, 3, 1)):
        world.reset(seed)
    together = list(zip(*(play(world, 60) for world in worlds)))[-1]
    alone = []
    for world, seed in zip(worlds, (1, 2, 3, 1)):
        world.reset(seed)
        alone.append(list(play(world, 60))[-1])
    assert together == tuple(alone) and together[0] == together[3] != together[1]


def test_worlds_in_threads_play_as_they_do_alone():
    def play(seed):
        world = World(64)
        digest = hashlib.sha256(world.reset(seed).frame.tobytes())
        for action in np.random.RandomState(seed).randint(0, 17, 150).tolist():
            if not world.done:
                digest.update(world.step(action).observation.frame.tobytes())
        return digest.hexdigest()
    alone = [play(seed) for seed in range(6)]
    painter.cache_clear()  # so that all tiles are drawn anew, by whoever needs them first
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(play, range(6))) == alone


def tour(seed):
    "Actions that walk about, fight, gather, build and sleep: more of the game than uniform draws reach."
    random = np.random.RandomState(seed)
    for _ in range(60):
        for action in (
            [int(random.randint(1, 5))] * int(random.randint(1, 6)) + [5] * 3 + [int(random.randint(0, len(ACTIONS)))]
        ):
            yield ACTIONS[action]


@pytest.mark.parametrize("seed, size, start", [(0, 72, 0), (4, (100, 91), 140), (9, 63, 200), (2, 18, 5_000)])
def test_every_frame_equals_stock_crafter(seed, size, start):
    """200 steps by day (from 0) and by night (clock set forward before the first step).

    Crafter counts its time in steps only, so setting both clocks forward brings the night without playing through
    the day."""
    pair = Pair(seed, size)
    pair.set(clock=start)
    dark = 0
    for _, action in zip(range(200), tour(seed)):
        pair.set(health=9)  # or the night would end it early
        step = pair.step(action)
        dark += step.observation.daylight < 0.5
        if step.done:
            break
    assert step.observation.step == start + 200 and 50 < dark < 150


@pytest.mark.parametrize("area", [(9, 9), (10, 25), (25, 10), (31, 47), (64, 96), (130, 12)])
def test_other_areas_equal_stock_crafter(area):
    pair = Pair(5, (45, 40), area)
    for number, action in zip(range(120), tour(5)):
        pair.set(health=9, clock=140 if number == 60 else None)
        if pair.step(action).done:
            break
    assert number > 30
    other = World(18)
    other.restore(pair.world.snapshot())
    assert other.tiles() == pair.world.tiles() and other.snapshot() == pair.world.snapshot()


EVERYTHING = (
    "by night",
    "asleep",
    "asleep by night",
    "deaths",
    "unlocked: eat_plant",
    "unlocked: wake_up",
    *(
        f"in sight: {name}"
        for name in (
            "cow",
            "zombie",
            "skeleton",
            "arrow",
            "plant",
            "plant-ripe",
            "table",
            "furnace",
            "lava",
            "iron",
            "diamond",
        )
    ),
    *(
        f"held: {name}"
        for name in ("wood_pickaxe", "stone_pickaxe", "iron_pickaxe", "wood_sword", "stone_sword", "iron_sword")
    ),
)


@pytest.mark.slow
def test_long_play_equals_stock_crafter_with_everything_in_it():
    """Plays on until it has met everything, 600 steps a seed; `python -m benchmarks equality` does the same with more
    seeds and steps."""
    counts, seed = play_both(4, 100, size=27, mortal=True), 3
    while missing := [what for what in EVERYTHING if not counts[what]]:
        assert seed < 60, missing
        counts += play_both(seed, 600, size=63)
        seed += 5
    assert counts["steps compared"] >= 700


def test_a_difference_is_found_and_reported(capsys, monkeypatch):
    pair = Pair(1, 27)
    pair.world._game.map.random.uniform()
    with pytest.raises(NotComparable, match="seed 1, step 1: another"):
        pair.step("noop")
    monkeypatch.setattr(
        game_world, "_DEATH", {kind: (1.0, 0) for kind in _DEATH}
    )  # creatures vanish sooner than crafter has it
    assert main(["equality", "--seeds", "1", "--steps", "60"]) == 1
    assert "the games differ: seed 1, step" in capsys.readouterr().err


def test_sleep_and_items_are_drawn_as_crafter_draws_them():
    pair = Pair(1, 81)
    pair.set(energy=3, wood=9, iron_sword=1, diamond=4)
    for action in ["sleep", "noop", "move_left", "place_table", "sleep"]:
        step = pair.step(action)
    assert step.observation.sleeping and step.observation.text.startswith("asleep")


def test_the_window_at_the_edge_of_the_map():
    pair = Pair(2, 72)
    for game in (pair.stock._world, pair.world._game.map):
        for x in range(32):
            game[x, 32] = "path"
            if game[x, 32][1]:
                game.remove(game[x, 32][1])
    for _ in range(40):
        step = pair.step("move_left")
        if step.done or step.info["position"][0] < 3:
            break
    assert "void" in pair.world.tiles() and (-4, 0) not in pair.world.view().materials


def test_tiles_and_view_say_the_same():
    world = World(18)
    world.reset(6)
    for action in tour(6):
        if world.step(action).done:
            break
        view, tiles = world.view(), world.tiles()
        assert len(tiles) == 63 and tiles[31] == "player"
        for place, name in enumerate(tiles):
            offset = (place % 9 - 4, place // 9 - 3)
            if offset != (0, 0):
                assert name == view.creatures.get(offset, view.materials.get(offset, "void"))


def test_branches_from_a_snapshot_are_independent_and_equal():
    world = World(27)
    world.reset(8)
    for _ in range(30):
        world.step("move_right")
    saved, ends = world.snapshot(), []
    for other in (world, World((45, 30), length=90), World(27, area=(20, 20))):
        assert other.restore(saved).step == 30
        for action in tour(8):
            if other.done or other.step(action).observation.step >= 90:
                break
        ends.append((other.snapshot(), other.unlocked))
    assert ends[0] == ends[1] == ends[2]
    assert world.restore(saved).step == 30 and world.snapshot() == saved


def test_lit_tiles_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(paint, "_LIT_BYTES", 100_000)
    painter.cache_clear()
    frames = []
    for _ in range(2):
        world = World(64)
        world.reset(3)
        frames.append([world.step("noop").observation.frame for _ in range(100)])
        bank = painter(64, 64).bank
        assert sum(lights.nbytes for lights, _ in bank.lights.values()) <= 100_000
    assert np.array_equal(*frames)
    painter.cache_clear()


# --- numba


@pytest.mark.skipif(not uses_numba(), reason="numba is not installed, or switched off")
def test_compiled_loops_give_the_same_bytes():
    from opensimplex import OpenSimplex
    random = np.random.default_rng(0)
    for width, height in ((18, 14), (63, 49), (99, 70), (288, 224)):
        for light in (0.0, 0.1, 0.33, 0.4999):
            ground, grain = (
                random.integers(0, 256, (height, width, 3), np.uint8),
                random.integers(0, 256, (height, width), np.uint8),
            )
            out = np.empty_like(ground)
            _compile_loop(_night_loop)(ground, grain, light, _vignette(height, width), _fade_table(), out)
            assert np.array_equal(out, _night_sum(ground, grain, light))
    for seed in range(5):
        simplex, (x, y) = OpenSimplex(seed), random.uniform(0, 64, (2, 5000))
        x[::2] //= 1  # whole numbers lie on the lattice, where a last bit decides
        for z in range(9):
            assert np.array_equal(_noise(simplex, x, y, z), _noise3(simplex, x, y, z))


@pytest.mark.parametrize(
    "blocked", ["import os; os.environ['QVK_NUMBA'] = '0'", "import sys; sys.modules['numba'] = None"]
)
def test_it_works_without_numba(blocked):
    code = (
        f"{blocked}; from qwen_vl_kit.game import paint, world; "
        "print(paint.uses_numba(), world.World(18).reset(1).step)"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split() == ["False", "0"]


# --- gymnasium


def test_the_gymnasium_world_keeps_its_contract():
    pytest.importorskip("gymnasium")
    from gymnasium.utils.env_checker import check_env
    from gymnasium.vector import SyncVectorEnv
    check_env(gym_world(36), skip_render_check=True)
    game, stock = gym_world((45, 36), length=40, area=(30, 20)), ReproducibleStock(8, (45, 36), (30, 20), length=40)
    frame, _ = game.reset(seed=8)
    assert game.observation_space.contains(frame) and np.array_equal(frame, stock.reset())
    terminated = truncated = False
    while not (terminated or truncated):
        action = game.action_space.sample()
        frame, reward, terminated, truncated, info = game.step(action)
        theirs, their_reward, done, their_info = stock.step(action)
        assert np.array_equal(frame, theirs) and (reward, terminated or truncated) == (their_reward, done)
        assert info["inventory"] == their_info["inventory"] and info["achievements"] == their_info["achievements"]
    assert truncated != terminated and np.array_equal(game.render(), frame)
    frames, _ = SyncVectorEnv([lambda: gym_world(18)] * 2).reset(seed=[1, 2])
    assert np.array_equal(frames[1], World(18).reset(2).frame)


def moments():
    "Worlds as they are begun, at night, before the end, after it, on a small map, and before the first reset."
    for seed, area, steps in ((3, (64, 64), 5), (1, (64, 64), 190), (9, (9, 40), 30), (2, (64, 64), 0)):
        world = World(36, length=250, area=area)
        world.reset(seed)
        for _, action in zip(range(steps), tour(seed)):
            if not world.done:
                world._game.player.health = 9
                world.step(action)
        yield world
    ended = World(36, length=1)
    ended.reset(4)
    ended.step(0)
    yield from (ended, World((45, 36), length=7, area=(20, 30)))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda world: pickle.loads(pickle.dumps(world))])
def test_a_copy_of_a_world_plays_the_same_game_by_itself(duplicate):
    def play(world):
        if world.seed is None:
            world.reset(6)
        frames = []
        for action in np.random.RandomState(0).randint(0, 17, 60).tolist():
            if not world.done:
                step = world.step(action)
                frames.append((step.observation.frame.tobytes(), step.reward, step.unlocked, step.done, str(step.info)))
        return frames, world.snapshot()
    for world in moments():
        other = duplicate(world)
        assert (other.seed, other.size, other.length, other.area) == (world.seed, world.size, world.length, world.area)
        before = world.snapshot() if world.seed is not None else None
        played = play(other)
        assert before is None or world.snapshot() == before  # it has not moved
        assert play(world) == played


def test_gymnasium_makes_copies_and_spreads_it():
    gymnasium = pytest.importorskip("gymnasium")
    if "Test-v0" not in gymnasium.registry:
        gymnasium.register("Test-v0", "qwen_vl_kit.game.gym:gym_world", kwargs={"size": 36})
    made = gymnasium.make("Test-v0", render_mode="rgb_array")
    made.reset(seed=8)
    for action in (1, 2, 5, 5, 3):
        made.step(action)
    assert made.render().shape == (36, 36, 3)
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        twin = copy.deepcopy(made)
        for _ in range(2):  # the episode at hand, and the next one of the series
            for action in np.random.RandomState(1).randint(0, 17, 30).tolist():
                theirs, ours = (env.step(action) for env in (other, twin))
                assert np.array_equal(theirs[0], ours[0]) and theirs[1:] == ours[1:]
            assert other.reset()[1] == twin.reset()[1]
    assert gymnasium.make("Test-v0").unwrapped.render_mode == "rgb_array"
    silent = gymnasium.make("Test-v0", render_mode=None)
    assert silent.reset(seed=8)[0].shape == (36, 36, 3) and silent.render() is None
    assert len(gymnasium.make_vec("Test-v0", 2, render_mode="rgb_array").reset(seed=1)[0]) == 2
    spread = gymnasium.vector.AsyncVectorEnv(
        [lambda: made.unwrapped] * 2, context="spawn"
    )  # cloudpickle carries it to both
    try:
        assert all(np.array_equal(frame, made.render()) for frame in spread.call("render"))
    finally:
        spread.close()
    with pytest.raises(InputError, match="unknown render_mode 'ansi'"), pytest.warns(UserWarning, match="ansi"):
        gymnasium.make("Test-v0", render_mode="ansi")


def test_death_terminates_and_does_not_truncate():
    pytest.importorskip("gymnasium")
    game = gym_world(18, length=1)
    game.reset(seed=1)
    game.world._game.player.inventory.update(health=1, food=0)
    game.world._game.player._recover = -15
    assert game.step(0)[2:4] == (True, False)


def test_without_gymnasium_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['gymnasium'] = None\nfrom qwen_vl_kit import core\nfrom qwen_vl_kit.game import gym\n"
        "try: gym.gym_world()\nexcept core.InputError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert told.strip() == "gymnasium is not installed; pip install 'qwen_vl_kit[gym]'"


# --- bad input


@pytest.mark.parametrize(
    "action, says",
    [
        ("move_lft", "did you mean 'move_left'"),
        (17, "from 0 to 16"),
        (-1, "from 0 to 16"),
        (True, "from 0 to 16"),
        (1.0, "from 0 to 16"),
        (None, "from 0 to 16"),
    ],
)
def test_unknown_actions_are_refused_and_change_nothing(action, says):
    world = World(18)
    world.reset(1)
    before = world.snapshot()
    with pytest.raises(InputError, match=says):
        world.step(action)
    assert world.snapshot() == before


def test_a_step_after_the_end_is_refused():
    world = World(18, length=1)
    with pytest.raises(InputError, match="reset"):
        world.step(0)
    world.reset(1)
    assert world.step(0).done
    with pytest.raises(InputError, match="the episode is over; call reset"):
        world.step(0)
    dead = World(18)
    dead.reset(1)
    dead._game.player.health = 0
    with pytest.raises(InputError, match="the episode is over"):
        dead.step(0)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"size": 17}, "17x17 is too small; give 18 to 4096 pixels a side"),
        ({"size": (64, 9)}, "64x9 is too small"),
        ({"size": "big"}, "cannot read a frame size"),
        ({"size": 64.0}, "cannot read a frame size"),
        ({"length": -1}, "as a length"),
        *(
            ({"area": area}, "impossible area")
            for area in [
                (8, 64),
                (64, 8),
                (0, 0),
                (-9, -9),
                (64,),
                (64, 64, 64),
                64,
                1e9,
                (9.5, 9),
                "ab",
                None,
                (10**6, 10**6),
                (True, 9),
            ]
        ),
    ],
)
def test_impossible_worlds_are_refused_in_one_line(settings, says):
    with pytest.raises(InputError, match=says) as error:
        World(**settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "bad, says",
    [
        (b"", "not a snapshot"),
        (b"qwen_vl_kit world 1 crafter 1.8.3\n..", "another version"),
        (b"qwen_vl_kit world 2 crafter 1.8.2\n..", "another version"),
        ("cut", "damaged"),
        ("text", "not a snapshot"),
    ],
)
def test_foreign_snapshots_are_told_in_one_line(bad, says):
    world = World(18)
    world.reset(0)
    with pytest.raises(InputError, match=says) as error:
        world.restore(world.snapshot()[:-20] if bad == "cut" else bad)
    assert "\n" not in str(error.value)
    world.step(0)  # the game that was there goes on


def test_png_is_lossless_at_any_shape():
    for shape in [(1, 1), (17, 33), (144, 144)]:
        frame = hashlib.shake_256(str(shape).encode()).digest(3 * shape[0] * shape[1])
        frame = np.frombuffer(frame, np.uint8).reshape(*shape, 3)
        assert np.array_equal(decode_png(png(frame)), frame)
