"""The trace store and the export, given what they should never be given: damaged files, killed writers, rivals, wrong frames."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_vl_kit import export, traces
from qwen_vl_kit.config import ExportConfig, Protocol
from qwen_vl_kit.core import InputError, read_json
from qwen_vl_kit.episodes import Decision, Episode, Turn
from qwen_vl_kit.models import decode_url

PROTOCOL = Protocol(prompt="brief", render_size=64)


def played(seed, turns=5, member=0, size=64, model="random"):
    "An episode of noise, the same for the same seed."
    frames = np.random.default_rng(seed).integers(0, 255, (turns, size, size, 3), dtype=np.uint8)
    return Episode(seed, "s50", model, member, [
        Turn(i, i, frames[i], "facing up", Decision(["do"], "a tree", "a tree -> do", usage={"prompt_tokens": 9, "usd": 0.0002}), ["do"],
             [1.0 if i == 2 else 0.0], ["collect_wood"] if i == 2 else []) for i in range(turns)])


def stored(path, seeds=(1, 2, 3), **kwargs):
    with traces.Store(path) as store:
        store.begin("demo", PROTOCOL)
        for seed in seeds:
            store.add(played(seed, **kwargs))
    return path


@pytest.fixture
def db(tmp_path):
    return stored(tmp_path / "rollouts.db")


def one_line(error):
    assert "\n" not in str(error.value), str(error.value)
    return str(error.value)


# ---- files that are not, or no longer, a store


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9, 0.9999])
def test_a_store_cut_short_is_told_in_one_line(db, share):
    whole = db.read_bytes()
    db.write_bytes(whole[:int(len(whole) * share)])
    for use in (lambda: list(traces.load(db)), lambda: traces.episodes(db), lambda: traces.Store(db)):
        with pytest.raises(InputError) as error:
            use()
        assert one_line(error).startswith(str(db))


def test_damaged_pages_are_told(db):
    whole = bytearray(db.read_bytes())
    whole[4096:3 * 4096] = b"\xff" * 8192
    db.write_bytes(whole)
    with pytest.raises(InputError, match="damaged"):
        list(traces.load(db))


def test_other_files_are_refused(tmp_path):
    text, other, newer = tmp_path / "text.db", tmp_path / "other.db", stored(tmp_path / "newer.db")
    text.write_text("seed,reward\n" * 500)
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE session_traces (session_id TEXT)")
    connection.close()
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for path, words in ((text, "not a trace store"), (other, "not a trace store"), (newer, "newer version"),
                        (tmp_path / "none.db", "no such file")):
        with pytest.raises(InputError, match=words) as error:
            traces.episodes(path)
        one_line(error)
    for path in (text, other, newer):
        before = path.read_bytes()
        with pytest.raises(InputError):
            traces.Store(path)
        assert path.read_bytes() == before  # refused, and left as it was


def test_changed_pixels_are_noticed(db):
    name = traces.turns(db)["frame"][0]
    swap = traces.png(np.zeros((64, 64, 3), np.uint8))
    connection = sqlite3.connect(db)
    connection.execute("UPDATE frames SET png = ? WHERE hash = ?", (swap, name))
    connection.commit()
    connection.close()
    for use in (lambda: list(traces.load(db)), lambda: traces.frame(db, name), lambda: exported(db)):
        with pytest.raises(InputError, match="is not what was stored"):
            use()
    assert not list(db.parent.glob("export/*"))  # the export left nothing half-written


# ---- writers that fail, die, or meet


@pytest.mark.parametrize("spoil", [
    lambda turn: turn.rewards.append(float("nan")),
    lambda turn: setattr(turn, "frame", turn.frame.astype(float)),
    lambda turn: setattr(turn, "frame", b"no picture"),
])
def test_an_episode_is_whole_or_absent(db, spoil):
    before, bad = traces.fingerprint(db), played(9)
    spoil(bad.turns[4])
    with traces.Store(db) as store:
        store.begin("demo", PROTOCOL)
        with pytest.raises(InputError):
            store.add(bad)
    assert traces.fingerprint(db) == before  # no session, no turn, no frame of it


WRITER = """
import sys
from test_traces import PROTOCOL, played, traces
store = traces.Store(sys.argv[1])
store.begin("demo", PROTOCOL)
for seed in range(10_000):
    store.add(played(seed, turns=20))
    print(seed, flush=True)
"""


def test_a_killed_writer_leaves_whole_episodes_and_can_go_on(tmp_path):
    path = tmp_path / "rollouts.db"
    here = Path(__file__).parent
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=here, stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": str(here.parent)})
    try:
        for _ in range(5):
            last = int(writer.stdout.readline())
        assert len(list(traces.load(path, frames=False))) >= 5  # a reader beside the writer
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    table = traces.episodes(path)
    assert len(table) > last and set(table["turns"]) == {20}
    with traces.Store(path) as store:
        assert store.done("demo") == {(seed, 0) for seed in range(len(table))}
        store.begin("demo", PROTOCOL)
        store.add(played(20_000))
    assert [name.name for name in tmp_path.iterdir()] == ["rollouts.db"]


def test_a_rival_writer_is_told(db):
    rival = sqlite3.connect(db, isolation_level=None)
    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, match="another process is writing"):
        traces.Store(db, wait=0.1)
    rival.execute("ROLLBACK")
    rival.close()
    traces.Store(db).close()


def test_a_reader_does_not_keep_a_writer_out(db):
    reading = traces.load(db)
    assert next(reading).seed == 1
    with traces.Store(db) as store:
        store.begin("other", PROTOCOL)
    assert [episode.seed for episode in reading] == [2, 3]


def test_nothing_is_stored_twice_nor_under_another_prompt(db):
    with traces.Store(db) as store:
        with pytest.raises(InputError, match="no run begun"):
            store.add(played(7))
        store.begin("demo", PROTOCOL)
        with pytest.raises(InputError, match="stored already"):
            store.add(played(1))
        store.add(played(1, member=1))
        with pytest.raises(InputError, match="was played with prompt"):
            store.begin("demo", Protocol(prompt="brief", render_size=64, history=0))
    assert list(traces.episodes(db)["member"]) == [0, 0, 0, 1]


def test_two_runs_have_one_fingerprint(db, tmp_path):
    assert traces.fingerprint(stored(tmp_path / "again.db")) == traces.fingerprint(db)
    assert traces.fingerprint(stored(tmp_path / "other.db", seeds=(1, 2, 4))) != traces.fingerprint(db)


def test_frames_are_kept_once_and_money_is_not_rounded_away(tmp_path):
    path = tmp_path / "group.db"
    with traces.Store(path) as store:
        store.begin("demo", PROTOCOL)
        for member in range(4):
            store.add(played(1, member=member))
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM frames").fetchone()[0] == 5
    connection.close()
    assert traces.episodes(path)["usd"].sum() == pytest.approx(20 * 0.0002)


# ---- export


def exported(db, **settings):
    return export.run(ExportConfig(traces=str(db), **settings), db.parent / "export")


def test_a_seed_is_on_one_side_only(tmp_path):
    path = tmp_path / "rollouts.db"
    with traces.Store(path) as store:
        store.begin("demo", PROTOCOL)
        for seed in range(10):
            for member in range(3):
                store.add(played(seed, member=member, turns=2))
    out = exported(path, val_fraction=0.3).out
    sides = [{row["metadata"]["seed"] for row in export.read_rows(out / f"{side}.jsonl")} for side in ("train", "val")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(10)) and len(sides[1]) == 3


def test_every_image_is_the_frame_that_was_seen(db):
    out = exported(db).out
    for row in export.read_rows(out / "train.jsonl"):
        parts = [part for part in row["messages"][1]["content"] if part["type"] == "image_url"]
        assert len(parts) == 1
        assert traces.frame_hash(decode_url(parts[0]["image_url"]["url"])) == row["metadata"]["frame"]
        assert row["metadata"]["prompt_hash"] == read_json(out / "stats.json")["prompt_hash"]


def test_rules_explain_an_empty_result(db):
    for settings, words in (({"min_achievements": 5}, "min_achievements dropped 3"), ({"models": ["gpt"]}, "models dropped 3"),
                            ({"seeds": "900-905"}, "seeds dropped 3"), ({"min_reward": 99.0}, "min_reward dropped 3")):
        with pytest.raises(InputError, match=words):
            exported(db, **settings)
    assert not (db.parent / "export").exists()


def test_shuffle_limit_and_seed_act(db):
    def order(**settings):
        rows = export.read_rows(exported(db, val_fraction=0, **settings).out / "train.jsonl")
        return [(row["metadata"]["seed"], row["metadata"]["turn"]) for row in rows]

    plain = order(shuffle=False)
    assert plain == sorted(plain) and len(plain) == 15
    assert order() == order() != plain and sorted(order()) == plain
    assert order(seed=1) != order()
    assert {seed for seed, _ in order(limit=1)} == {1}


def test_frames_of_another_size_are_refused(tmp_path):
    with pytest.raises(InputError, match="is 32x32, not 64 pixels square"):
        exported(stored(tmp_path / "rollouts.db", size=32))


def test_a_torn_row_is_told_with_its_line(db):
    path = exported(db).out / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:len(lines[3]) // 2]]))
    with pytest.raises(InputError, match="train.jsonl:4"):
        list(export.read_rows(path))
    row = json.loads(lines[0])
    row["messages"][1]["content"][0]["image_url"]["url"] = ""
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match="train.jsonl:1: the image is not a PNG data URL"):
        list(export.read_rows(path))
