"Episodes and stores made by hand, for tests of the trace store, the export and what reads them."

import numpy as np

from qwen_vl_kit.config import ExportConfig, Protocol
from qwen_vl_kit.protocol.episodes import Decision, Episode, Turn
from qwen_vl_kit.stages import export
from qwen_vl_kit.store.rows import read_rows
from qwen_vl_kit.store.traces import Store

PROTOCOL = Protocol(prompt="brief", render_size=64)
WALK = ["move_left", "do", "move_up", "do", "move_right", "noop"]


def noise_episode(seed, turns=5, member=0, size=64, model="random"):
    """An episode whose frames are noise, the same for the same seed; turn 2 unlocks collect_wood, each turn costs
    0.0002 dollars."""
    frames = np.random.default_rng(seed).integers(0, 255, (turns, size, size, 3), dtype=np.uint8)
    return Episode(
        seed,
        "s50",
        model,
        member,
        [
            Turn(
                i,
                i,
                frames[i],
                "facing up",
                Decision(["do"], "a tree", "a tree -> do", usage={"prompt_tokens": 9, "usd": 0.0002}),
                ["do"],
                [1.0 if i == 2 else 0.0],
                ["collect_wood"] if i == 2 else [],
            )
            for i in range(turns)
        ],
    )


def noise_store(path, seeds=(1, 2, 3), **kwargs):
    "A store with one such episode for each seed, of the run `demo`."
    return write_store(path, *(noise_episode(seed, **kwargs) for seed in seeds))


def episode(seed, actions=WALK, unlocks=None, frames=None, model="a", invalid=(), reason="a tree", member=0, size=64):
    "An episode of one action a turn; `unlocks` by turn, each worth 1; `frames` names the picture of each turn."
    turns = []
    for i, action in enumerate(actions):
        frame = np.random.default_rng([seed if frames is None else 0, i if frames is None else ord(frames[i])])
        unlocked = (unlocks or {}).get(i, [])
        decision = Decision([action], reason, f"{reason} -> {action}", valid=i not in invalid)
        turns.append(
            Turn(
                i,
                i,
                frame.integers(0, 255, (size, size, 3), dtype=np.uint8),
                "",
                decision,
                [action],
                [float(len(unlocked))],
                unlocked,
            )
        )
    return Episode(seed, "s50", model, member, turns)


def write_store(path, *episodes, run="demo", protocol=PROTOCOL, scores=None):
    "A store with these episodes; `scores` of judges by seed."
    with Store(path) as store:
        store.begin(run, protocol)
        for one in episodes:
            store.add(one, scores=(scores or {}).get(one.seed))
    return path


def run_export(db, out=None, **settings):
    "The export of one store or of several."
    stores = [str(path) for path in db] if isinstance(db, list) else str(db)
    return export.run(
        ExportConfig(traces=stores, **settings), out or (db[0] if isinstance(db, list) else db).parent / "export"
    )


def rows(result, side="train"):
    "The rows that an export wrote."
    return list(read_rows(result.out / f"{side}.jsonl"))
