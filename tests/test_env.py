"The world: the same in every process, and byte for byte the game that crafter plays."
import hashlib
import os
import subprocess
import sys

import crafter
import numpy as np
import pytest

from qwen_vl_kit.core import InputError
from qwen_vl_kit.env import ACTIONS, GRAIN, World, decode_png, night_noise, png

EPISODE = """
import hashlib, sys
import numpy as np
from qwen_vl_kit.env import World
world, digest = World(size=54, length=230), hashlib.sha256()
digest.update(world.reset(10).frame.tobytes())
actions = np.random.RandomState(10).randint(0, 17, 320).tolist()
while not world.done:
    step = world.step(actions.pop())
    digest.update(step.observation.frame.tobytes() + f"{step.reward} {step.info} {step.unlocked} {step.observation.text}".encode())
print(step.observation.step, digest.hexdigest(), hashlib.sha256(world.snapshot()).hexdigest())
"""


def test_an_episode_is_the_same_in_every_process():
    "Hash seeds and addresses differ between processes; frames, rewards and the final state must not."
    told = [subprocess.Popen([sys.executable, "-c", EPISODE], env={**os.environ, "PYTHONHASHSEED": salt}, stdout=subprocess.PIPE, text=True)
            for salt in ("0", "1", "4242")]
    told = [process.communicate()[0].split() for process in told]
    assert len(told[0]) == 3 and int(told[0][0]) > 200  # well into the night
    assert told[0] == told[1] == told[2]


class Stock(crafter.Env):
    "crafter itself with the two cures it needs to be repeatable: creatures by birth, night noise from outside the game."

    def __init__(self, seed, size):
        super().__init__(seed=seed, size=size)
        self._local_view._noise = self._noise

    def _noise(self, canvas, amount, stddev):
        number = hash((self._seed, self._episode)) % (2 ** 31 - 1)
        mask = amount * self._local_view._vignette(canvas.shape, stddev)[..., None]
        grain = 32 + GRAIN * night_noise(number, self._step, *canvas.shape[1::-1]).T[..., None]  # crafter's canvas is (width, height)
        return (1 - mask) * canvas + mask * grain

    def _balance_object(self, chunk, objs, *args):
        place = {id(obj): number for number, obj in enumerate(self._world._objects)}
        super()._balance_object(chunk, sorted(objs, key=lambda obj: place[id(obj)]), *args)


def tour(seed):
    "Actions that walk about, fight, gather, build and sleep: more of the game than uniform draws reach."
    random = np.random.RandomState(seed)
    for _ in range(60):
        yield from [int(random.randint(1, 5))] * int(random.randint(1, 6)) + ["do"] * 3 + [int(random.randint(0, len(ACTIONS)))]


@pytest.mark.parametrize("seed, size, start", [(0, (72, 72), 0), (4, (100, 91), 140), (9, (63, 63), 200)])
def test_every_frame_equals_stock_crafter(seed, size, start):
    """200 steps by day (from 0) and by night (clock set forward before the first step).

    Crafter counts its time in steps only, so setting both clocks forward brings the night without playing through the day.
    """
    stock, world = Stock(seed, size), World(size)
    assert np.array_equal(world.reset(seed).frame, stock.reset())
    stock._step = world._game.clock = start
    dark = 0
    for number, action in zip(range(200), tour(seed)):
        stock._player.health = world._game.player.health = 9  # or the night would end it early
        frame, reward, done, info = stock.step(ACTIONS.index(action) if isinstance(action, str) else action)
        step = world.step(action)
        assert np.array_equal(step.observation.frame, frame), number
        assert (step.reward, step.done, step.info["discount"]) == (reward, done, info["discount"])
        assert step.observation.inventory == info["inventory"] and step.info["achievements"] == info["achievements"]
        assert step.info["position"] == tuple(info["player_pos"])
        dark += step.observation.daylight < 0.5
        if done:
            break
    assert number == 199 and 50 < dark < 150


def test_sleep_and_items_are_drawn_as_crafter_draws_them():
    stock, world = Stock(1, (81, 81)), World(81)
    stock.reset()
    world.reset(1)
    for player in (stock._player, world._game.player):
        player.inventory.update(energy=3, wood=9, iron_sword=1, diamond=4)
    for action in ["sleep", "noop", "move_left", "place_table", "sleep"]:
        frame, *_ = stock.step(ACTIONS.index(action))
        step = world.step(action)
        assert np.array_equal(step.observation.frame, frame)
    assert step.observation.sleeping and step.observation.text.startswith("asleep")


def test_the_window_at_the_edge_of_the_map():
    stock, world = Stock(2, (72, 72)), World(72)
    stock.reset()
    world.reset(2)
    for game in (stock._world, world._game.map):
        for x in range(32):
            game[x, 32] = "path"
            if game[x, 32][1]:
                game.remove(game[x, 32][1])
    for _ in range(40):
        frame, *_ = stock.step(1)
        step = world.step("move_left")
        assert np.array_equal(step.observation.frame, frame)
        if step.done or step.info["position"][0] < 3:
            break
    assert "void" in world.tiles() and (-4, 0) not in world.view().materials


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
    for other in (world, World((45, 30), length=90), World(27)):
        assert other.restore(saved).step == 30
        for action in tour(8):
            if other.done or other.step(action).observation.step >= 90:
                break
        ends.append((other.snapshot(), other.unlocked))
    assert ends[0] == ends[1] == ends[2]
    assert world.restore(saved).step == 30 and world.snapshot() == saved


@pytest.mark.parametrize("bad, says", [(b"", "not a snapshot"), (b"qwen_vl_kit world 0 crafter 9\n..", "another version"),
                                       ("cut", "damaged")])
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
