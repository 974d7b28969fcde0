"""More than a thousand damaged files: each is read as if nothing were wrong, or refused in one line. No traceback
ever escapes."""

import json
import random
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from stores import PROTOCOL, episode, write_store
from synth_traces import write_synth

from qwen_vl_kit.config import ExportConfig
from qwen_vl_kit.core import InputError, dumps
from qwen_vl_kit.foreign.synth import import_synth
from qwen_vl_kit.stages import export
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.merge import merge_stores
from qwen_vl_kit.store.rows import read_rows
from qwen_vl_kit.store.traces import Store, fingerprint, load_episodes, protocol_of, read_sessions, total_usd

pytestmark = pytest.mark.slow

WEIRD = [
    None,
    "",
    "x",
    "-1",
    "1e999",
    "[",
    "[]",
    "[1]",
    '["do"',
    '{"a": 1}',
    '["' + "a" * 999 + '"]',
    b"\xff\xfe",
    b"",
    0,
    -1,
    2**62,
    1e308,
    "\u0000",
    "[[[[",
]


def with_bytes(whole: bytes, dice: random.Random) -> bytes:
    "A file with something done to its bytes."
    data, at = bytearray(whole), dice.randrange(len(whole))
    kind = dice.randrange(6)
    if kind == 0:  # some bytes are others
        for _ in range(dice.choice([1, 3, 30, 300])):
            data[dice.randrange(len(data))] = dice.randrange(256)
    elif kind == 1:  # cut short
        del data[at:]
    elif kind == 2:  # a piece is zero
        data[at:at + dice.choice([4, 512, 4096])] = bytes(dice.choice([4, 512, 4096]))
    elif kind == 3:  # a piece is missing
        del data[at:at + dice.choice([1, 100, 4096])]
    elif kind == 4:  # a piece stands in another's place
        other = dice.randrange(len(data))
        data[at:at + 1024] = data[other:other + 1024]
    else:  # the header is damaged
        data[dice.randrange(min(100, len(data)))] ^= 1 << dice.randrange(8)
    return bytes(data)


def with_values(path, dice: random.Random) -> None:
    "A database in which some values are none that anybody would have stored."
    with closing(sqlite3.connect(path)) as connection:
        tables = [
            name
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            )
        ]
        for _ in range(dice.randrange(1, 4)):
            table = dice.choice(tables)
            column = dice.choice([row[1] for row in connection.execute(f"PRAGMA table_info({table})")])
            value = dice.choice(["?", "?", "?", "CAST(? AS TEXT)"])
            try:
                connection.execute(f'UPDATE {table} SET "{column}" = {value} WHERE random() % 2', (dice.choice(WEIRD),))
            except sqlite3.Error:  # a constraint
                continue
        connection.commit()


def with_json(line: str, dice: random.Random) -> str:
    "A row in which some values are others."
    row = json.loads(line)
    for _ in range(dice.randrange(1, 4)):
        place, key = row, dice.choice(list(row))
        while isinstance(place[key], (dict, list)) and place[key] and dice.random() < 0.8:
            place = place[key]
            key = dice.choice(list(place)) if isinstance(place, dict) else dice.randrange(len(place))
        if dice.random() < 0.2:
            del place[key]
            break
        place[key] = dice.choice(
            [
                None,
                0,
                "",
                "x",
                [],
                {},
                [[]],
                {"type": "image_url"},
                {"url": 3},
                "data:image/png;base64,AAAA",
                True,
                "\ud800",
            ]
        )
    return json.dumps(row)


def written(path, episodes):
    with Store(path) as store:
        store.begin("more", PROTOCOL)
        store.add(episodes[0])


USES = {
    "load": lambda path, out: list(load_episodes(path)),
    "hashes": lambda path, out: list(read_sessions(path, frames="hash")),
    "tables": lambda path, out: (traces.episodes(path), traces.turns(path)),
    "fingerprint": lambda path, out: fingerprint(path),
    "spent": lambda path, out: (total_usd(path), protocol_of(path)),
    "merge": lambda path, out: merge_stores(out / "all.db", path),
    "write": lambda path, out: written(path, [episode(77, ["do"], size=18)]),
    "export": lambda path, out: export.run(ExportConfig(traces=str(path)), out / "export"),
    "export all": lambda path, out: export.run(
        ExportConfig(
            traces=str(path),
            drop_loops=True,
            best_share=0.9,
            dedupe=True,
            stratify=True,
            since="2020-01-01",
            unlock_window=3,
            splits=["train"],
            max_repeated_actions=50,
            min_judge_score=-9.0,
            scored_by="rubric",
            required_achievements=["collect_wood"],
        ),
        out / "export",
    ),
}


def read(path):
    return list(read_rows(path))


def survives(what: str, act, *given) -> bool:
    """Whether `act(*given)` did its work; an `InputError` of one line is as good. Anything else is a failure that
    says what was done."""
    try:
        act(*given)
        return True
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, (what, str(error))
        return False
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@pytest.fixture(scope="module")
def place():
    "A folder in memory where there is one: a thousand stores are made durable, and that is not what is tried here."
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(place):
    "A small store, as bytes."
    made = [episode(seed, ["do", "noop", "move_left"], unlocks={1: ["collect_wood"]}, size=18) for seed in range(3)]
    db = write_store(
        place / "rollouts.db",
        *made,
        protocol=PROTOCOL.model_copy(update={"render_size": 18}),
        scores={1: {"rubric": 0.5}},
    )
    return db.read_bytes()


def test_seven_hundred_damaged_stores(whole, place):
    dice, fine = random.Random(1), 0
    for number in range(700):
        name = list(USES)[number % len(USES)]
        out = place / str(number)
        out.mkdir()
        path = out / "rollouts.db"
        by_value = number % 3 == 0
        path.write_bytes(whole if by_value else with_bytes(whole, dice))
        if by_value:
            with_values(path, dice)
        fine += survives(f"{name} of damaged store {number}", USES[name], path, out)
    assert 70 < fine < 630  # some damage is in places that do not matter, and much is not


def test_a_hundred_and_fifty_damaged_databases_of_synth_ai(place):
    dice, whole = random.Random(2), write_synth(place / "v3.db", sessions=2, turns=2, size=18).read_bytes()
    for number in range(150):
        path = place / f"{number}.db"
        path.write_bytes(whole if number % 2 else with_bytes(whole, dice))
        if number % 2:
            with_values(path, dice)
        survives(f"damaged database {number}", import_synth, path, place / "read" / f"{number}.db")


def test_three_hundred_damaged_files_of_rows(whole, place):
    result = export.run(ExportConfig(traces=str(place / "rollouts.db")), place / "export")
    lines = (result.out / "train.jsonl").read_text().splitlines()
    dice, fine, path = random.Random(3), 0, place / "rows.jsonl"
    for number in range(300):
        if number % 2:
            some = [with_json(line, dice) if dice.random() < 0.5 else line for line in lines]
            path.write_text("\n".join(some) + "\n")
        else:
            path.write_bytes(with_bytes("\n".join(lines).encode(), dice))
        fine += survives(f"damaged rows {number}", read, path)
    assert fine < 200
    for line in (
        "[" * 100_000,
        '{"a":' * 100_000,
        "null",
        "1" * 5000,
        '"' + "\\ud800" * 9 + '"',
        dumps({"messages": [[]] * 3}),
    ):
        path.write_text(line + "\n")
        assert not survives(line[:20], read, path)
