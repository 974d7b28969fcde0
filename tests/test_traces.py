"""The trace store and the export, given what they should never be given: damaged files, killed writers, rivals, wrong frames."""

import base64
import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from qwen_vl_kit.config import ExportConfig, Protocol
from qwen_vl_kit.core import InputError, read_json, read_jsonl
from qwen_vl_kit.foreign.synth import import_synth, timestamp
from qwen_vl_kit.game.images import Png, decode_png, frame_hash, png
from qwen_vl_kit.model.encode import decode_url
from qwen_vl_kit.protocol.episodes import Decision, Episode, Turn
from qwen_vl_kit.stages import export
from qwen_vl_kit.store import provenance, traces
from qwen_vl_kit.store.rows import read_rows
from qwen_vl_kit.store.schema import _MIGRATIONS, _VIEW, SCHEMA
from qwen_vl_kit.store.traces import Store, _unpriced, load_episodes, merge_stores, protocol_of, read_sessions, spent

PROTOCOL = Protocol(prompt="brief", render_size=64)


def played(seed, turns=5, member=0, size=64, model="random"):
    "An episode of noise, the same for the same seed."
    frames = np.random.default_rng(seed).integers(0, 255, (turns, size, size, 3), dtype=np.uint8)
    return Episode(seed, "s50", model, member, [
        Turn(i, i, frames[i], "facing up", Decision(["do"], "a tree", "a tree -> do", usage={"prompt_tokens": 9, "usd": 0.0002}), ["do"],
             [1.0 if i == 2 else 0.0], ["collect_wood"] if i == 2 else []) for i in range(turns)])


def stored(path, seeds=(1, 2, 3), **kwargs):
    with Store(path) as store:
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
    for use in (lambda: list(load_episodes(db)), lambda: traces.episodes(db), lambda: Store(db)):
        with pytest.raises(InputError) as error:
            use()
        assert one_line(error).startswith(str(db))


def test_damaged_pages_are_told(db):
    whole = bytearray(db.read_bytes())
    whole[4096:3 * 4096] = b"\xff" * 8192
    db.write_bytes(whole)
    with pytest.raises(InputError, match="damaged"):
        list(load_episodes(db))


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
            Store(path)
        assert path.read_bytes() == before  # refused, and left as it was


def test_a_frame_that_comes_with_its_name_is_not_decoded(tmp_path, monkeypatch):
    decoded, known, plain = [], played(1), played(1)
    for episode, encoded in ((known, Png), (plain, png)):
        for turn in episode.turns:
            turn.frame = encoded(turn.frame)
    monkeypatch.setattr(traces, "decode_png", lambda data: decoded.append(data) or decode_png(data))
    rows = []
    for name, episode, expected in (("arrays.db", played(1), 0), ("known.db", known, 0), ("plain.db", plain, 5)):
        with Store(tmp_path / name) as store:
            store.begin("demo", PROTOCOL)
            store.add(episode)
        assert len(decoded) == expected
        with contextlib.closing(sqlite3.connect(tmp_path / name)) as connection:
            rows.append(connection.execute("SELECT *, typeof(png) FROM frames ORDER BY hash").fetchall())
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 5 and rows[0][0][1:3] == (64, 64)


def test_changed_pixels_are_noticed(db):
    name = traces.turns(db)["frame"][0]
    swap = png(np.zeros((64, 64, 3), np.uint8))
    connection = sqlite3.connect(db)
    connection.execute("UPDATE frames SET png = ? WHERE hash = ?", (swap, name))
    connection.commit()
    connection.close()
    for use in (lambda: list(load_episodes(db)), lambda: traces.frame(db, name), lambda: exported(db)):
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
    with Store(db) as store:
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
        assert len(list(load_episodes(path, frames=False))) >= 5  # a reader beside the writer
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    table = traces.episodes(path)
    assert len(table) > last and set(table["turns"]) == {20}
    with Store(path) as store:
        assert store.done("demo") == {(seed, 0) for seed in range(len(table))}
        store.begin("demo", PROTOCOL)
        store.add(played(20_000))
    assert [name.name for name in tmp_path.iterdir()] == ["rollouts.db"]


def test_a_rival_writer_is_told(db):
    rival = sqlite3.connect(db, isolation_level=None)
    rival.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, match="another process is writing"):
        Store(db, wait=0.1)
    rival.execute("ROLLBACK")
    rival.close()
    Store(db).close()


def test_a_reader_does_not_keep_a_writer_out(db):
    reading = load_episodes(db)
    assert next(reading).seed == 1
    with Store(db) as store:
        store.begin("other", PROTOCOL)
    assert [episode.seed for episode in reading] == [2, 3]


def test_a_table_is_of_one_moment(db, monkeypatch):
    unpriced = _unpriced
    with Store(db) as store:
        store.begin("demo", PROTOCOL)

        def meanwhile(connection):
            store.add(played(9))
            return unpriced(connection)

        monkeypatch.setattr(traces, "_unpriced", meanwhile)
        assert list(traces.episodes(db)["seed"]) == [1, 2, 3]
    monkeypatch.undo()
    assert list(traces.episodes(db)["seed"]) == [1, 2, 3, 9]


def test_nothing_is_stored_twice_nor_under_another_prompt(db):
    with Store(db) as store:
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
    with Store(path) as store:
        store.begin("demo", PROTOCOL)
        for member in range(4):
            store.add(played(1, member=member))
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM frames").fetchone()[0] == 5
    connection.close()
    assert traces.episodes(path)["usd"].sum() == pytest.approx(20 * 0.0002)


def test_a_cost_is_kept_to_the_last_digit(tmp_path):
    for i, usd in enumerate([0.000435, Decimal("0.00000015"), "12.3456789012", 0, None]):
        episode = played(i, turns=1)
        episode.turns[0].decision.usage["usd"] = usd
        with Store(tmp_path / "costs.db") as store:
            store.begin("demo", PROTOCOL)
            store.add(episode)
    assert spent(tmp_path / "costs.db") == Decimal("0.000435") + Decimal("0.00000015") + Decimal("12.3456789012")
    for usd in (float("nan"), -1, "much"):
        episode = played(9, turns=1)
        episode.turns[0].decision.usage["usd"] = usd
        with Store(tmp_path / "costs.db") as store, pytest.raises(InputError, match="is no amount of dollars"):
            store.begin("demo", PROTOCOL)
            store.add(episode)


def test_each_episode_knows_the_code_it_was_played_with(db, monkeypatch):
    monkeypatch.setattr(provenance, "provenance", lambda **more: {"commit": "the next one", **more})
    with Store(db) as store:
        store.begin("demo", PROTOCOL, {"model": "Qwen/Qwen3-VL-2B-Instruct", "revision": "abc"})
        store.add(played(9))
    with contextlib.closing(sqlite3.connect(db)) as connection:
        told = [json.loads(text) for (text,) in connection.execute("SELECT provenance FROM sessions JOIN sources s ON s.id = source")]
    assert len({source["commit"] for source in told}) == 2 and told[-1]["revision"] == "abc" and told[-1]["render_size"] == 64


def test_the_time_of_a_run_is_summed_over_its_sessions(tmp_path, monkeypatch):
    clock = iter([100.0, 103.0, 104.0, 900.0, 902.0])  # begin, two episodes; begin again, one more
    monkeypatch.setattr(traces.time, "monotonic", lambda: next(clock))
    for seeds in ((1, 2), (3,)):
        with Store(tmp_path / "rollouts.db") as store:
            store.begin("demo", PROTOCOL)
            for seed in seeds:
                store.add(played(seed))
            total = store.seconds("demo")
    assert total == 6.0 == traces.episodes(tmp_path / "rollouts.db")["wall"].sum()


@pytest.mark.parametrize("stage", ["collect", "benchmark"])
def test_a_stage_that_goes_on_counts_the_seconds_of_all_its_sessions(tmp_path, stage):
    from qwen_vl_kit.config import BenchmarkConfig, CollectConfig
    from qwen_vl_kit.stages import benchmark, collect
    module, arms = (collect, {"teacher": "random"}) if stage == "collect" else (benchmark, {"arms": ["random"]})
    config = (CollectConfig if stage == "collect" else BenchmarkConfig)(prompt="brief", render_size=18, horizon="s4", seeds="1000000-1000001", **arms)
    assert module.run(config, tmp_path).seconds < 100
    with contextlib.closing(sqlite3.connect(tmp_path / "rollouts.db")) as connection:
        connection.execute("UPDATE sessions SET wall = 1000")  # it was a slow machine
        connection.commit()
    result = module.run(config.model_copy(update={"seeds": "1000000-1000002"}), tmp_path)
    assert result.numbers["earlier_seconds"] == 2000 and 2000 < result.seconds < 2100
    last = list(read_jsonl(tmp_path / "metrics.jsonl"))[-1]
    assert 2000 < last["seconds"] < 2100 and last["step"] == (3 if stage == "collect" else 1)


# ---- yesterday's files

SCHEMA_1 = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE runs (run TEXT PRIMARY KEY, provenance TEXT NOT NULL);
CREATE TABLE prompts (hash TEXT PRIMARY KEY, protocol TEXT NOT NULL, system TEXT NOT NULL);
CREATE TABLE frames (hash TEXT PRIMARY KEY, width INTEGER NOT NULL, height INTEGER NOT NULL, png BLOB NOT NULL);
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs, arm TEXT NOT NULL, seed INTEGER NOT NULL, member INTEGER NOT NULL,
    horizon TEXT NOT NULL, model TEXT NOT NULL, prompt TEXT NOT NULL REFERENCES prompts, created REAL NOT NULL,
    UNIQUE (run, arm, seed, member));
CREATE TABLE turns (
    session INTEGER NOT NULL REFERENCES sessions, turn INTEGER NOT NULL, step INTEGER NOT NULL, frame TEXT REFERENCES frames,
    text TEXT NOT NULL, reply TEXT NOT NULL, reason TEXT NOT NULL, actions TEXT NOT NULL, executed TEXT NOT NULL,
    rewards TEXT NOT NULL, unlocked TEXT NOT NULL, valid INTEGER NOT NULL, done INTEGER NOT NULL, dead INTEGER NOT NULL,
    prompt_tokens INTEGER, image_tokens INTEGER, completion_tokens INTEGER, micro_usd INTEGER, latency REAL, seconds REAL NOT NULL,
    token_ids BLOB, logprobs BLOB,
    PRIMARY KEY (session, turn)) WITHOUT ROWID;
CREATE VIEW episodes AS SELECT s.id AS session, s.run, s.arm, s.seed, s.member, s.horizon, s.model, s.prompt AS prompt_hash,
    sum((SELECT total(value) FROM json_each(t.rewards))) AS reward, sum(json_array_length(t.unlocked)) AS achievements,
    sum(json_array_length(t.executed)) AS steps, count(*) AS turns, max(t.dead) AS died, sum(1 - t.valid) AS invalid,
    sum(t.prompt_tokens) AS prompt_tokens, sum(t.image_tokens) AS image_tokens, sum(t.completion_tokens) AS completion_tokens,
    sum(t.seconds) AS seconds, total(t.micro_usd) / 1e6 AS usd
FROM sessions s JOIN turns t ON t.session = s.id GROUP BY s.id ORDER BY s.id;
INSERT INTO about VALUES ('format', 'qwen_vl_kit traces'), ('schema', '1');
PRAGMA user_version = 1;
"""


@pytest.fixture
def old(db, tmp_path):
    "A store of schema 1 with the episodes of `db`; the second of its seeds is the benchmark's."
    path = tmp_path / "old.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA_1)
        connection.execute("ATTACH ? AS new", (str(db),))
        connection.execute("INSERT INTO runs SELECT 'demo', provenance FROM new.sources")
        for table in ("prompts", "frames"):
            connection.execute(f"INSERT INTO {table} SELECT * FROM new.{table}")
        connection.execute("INSERT INTO sessions SELECT id, run, arm, seed + 1000000 * (seed = 2), member, horizon, model, prompt, created "
                           "FROM new.sessions")
        columns = [row[1] for row in connection.execute("PRAGMA main.table_info(turns)")]
        values = ", ".join("round(usd * 1e6)" if name == "micro_usd" else name for name in columns)
        connection.execute(f"INSERT INTO turns SELECT {values} FROM new.turns")
        connection.commit()
    return path


def columns(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name")]
        return {name: connection.execute(f"PRAGMA table_info({name})").fetchall() for name in tables}


def test_a_store_of_the_previous_schema_is_read_and_left_as_it_is(old, db):
    before = old.read_bytes()
    assert [e.turns[2].frame.tolist() for e in load_episodes(old)] == [e.turns[2].frame.tolist() for e in load_episodes(db)]
    assert traces.episodes(old)["split"].tolist() == ["train", "test", "train"]
    assert spent(old) == Decimal("0.0030") and len(traces.turns(old)) == 15
    assert exported(old, splits=["test"], val_fraction=0).numbers["train_rows"] == 5
    assert old.read_bytes() == before


def test_a_store_of_the_previous_schema_is_migrated_when_it_is_written_to(old, db):
    with Store(old) as store:
        store.begin("demo", PROTOCOL)
        store.add(played(9))
        with pytest.raises(InputError, match="stored already"):
            store.add(played(1))
    assert columns(old) == columns(db)
    with contextlib.closing(sqlite3.connect(old)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT count(*) FROM sessions WHERE source IS NULL").fetchone() == (0,)
    assert list(traces.episodes(old)["seed"]) == [1, 1_000_002, 3, 9]
    assert spent(old) == Decimal("0.0040")


def test_a_store_of_schema_2_counts_cached_tokens_once_it_is_written_to(db):
    before, free = columns(db), played(9)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DROP VIEW episodes")
        connection.execute("ALTER TABLE turns DROP COLUMN cached_tokens")
        connection.execute("ALTER TABLE sessions DROP COLUMN start")
        view = _VIEW.replace("sum(t.cached_tokens) AS cached_tokens, ", "").replace(", s.start", "")
        connection.executescript(view + "PRAGMA user_version = 2")
    kept, fingerprint = db.read_bytes(), traces.fingerprint(db)
    assert len(list(load_episodes(db))) == 3 and traces.episodes(db)["cached_tokens"].isna().all() and db.read_bytes() == kept
    free.turns[0].decision.usage["cached_tokens"] = 4
    with Store(db) as store:
        store.begin("demo", PROTOCOL)
        assert traces.fingerprint(db) == fingerprint
        store.add(free)
    assert columns(db) == before
    assert traces.episodes(db)["cached_tokens"].tolist()[-1] == 4 == list(load_episodes(db))[-1].usage("cached_tokens")
    assert "cached_tokens" not in list(load_episodes(db))[0].turns[0].decision.usage


def test_a_store_of_schema_3_knows_no_taken_over_turns_until_it_is_written_to(db):
    before, late = columns(db), played(9)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DROP VIEW episodes")
        connection.execute("ALTER TABLE sessions DROP COLUMN start")
        connection.executescript(_VIEW.replace(", s.start", "") + "PRAGMA user_version = 3")
    assert [episode.start for episode in load_episodes(db)] == [0, 0, 0]
    late.start = 2
    with Store(db) as store:
        store.begin("demo", PROTOCOL)
        store.add(late)
    assert columns(db) == before
    assert traces.episodes(db)["start"].tolist() == [0, 0, 0, 2] == [episode.start for episode in load_episodes(db)]


def test_a_migration_that_fails_changes_nothing(old, monkeypatch):
    before = old.read_bytes()
    monkeypatch.setitem(_MIGRATIONS, 1, _MIGRATIONS[1] + "; INSERT INTO nowhere VALUES (1)")
    with pytest.raises(InputError, match="no such table: nowhere"):
        Store(old)
    monkeypatch.undo()
    assert columns(old)["turns"] != [] and len(list(load_episodes(old))) == 3
    assert old.stat().st_size == len(before)


# ---- several stores


def test_two_halves_are_merged_into_the_whole(tmp_path):
    parts = [stored(tmp_path / name, seeds) for name, seeds in (("a.db", (1, 2)), ("b.db", (3, 4)))]
    assert merge_stores(tmp_path / "all.db", *parts) == {"episodes": 4, "known": 0}
    assert merge_stores(tmp_path / "all.db", *parts) == {"episodes": 0, "known": 4}
    assert traces.fingerprint(tmp_path / "all.db") == traces.fingerprint(stored(tmp_path / "once.db", (1, 2, 3, 4)))
    times = [traces.episodes(path)[["seed", "created", "wall"]].values.tolist() for path in (*parts, tmp_path / "all.db")]
    assert times[0] + times[1] == times[2]


def test_old_stores_are_merged_too(old, tmp_path):
    assert merge_stores(tmp_path / "all.db", old)["episodes"] == 3
    assert spent(tmp_path / "all.db") == Decimal("0.0030")


def test_merging_never_takes_one_play_for_another(db, tmp_path):
    other = stored(tmp_path / "other.db", (3,), turns=4)  # seed 3 of the same run, but shorter
    before = traces.fingerprint(db)
    with pytest.raises(InputError, match="seed 3, member 0 was played differently there; keep the files apart"):
        merge_stores(db, other)
    with Store(tmp_path / "prompt.db") as store:
        store.begin("demo", Protocol(prompt="brief", render_size=64, history=1))
        store.add(played(8))
    with pytest.raises(InputError, match="run 'demo' was played with another prompt there"):
        merge_stores(db, tmp_path / "prompt.db")
    assert traces.fingerprint(db) == before


def test_damage_does_not_spread_by_merging(db, tmp_path):
    bad = stored(tmp_path / "bad.db", (7, 8))
    with contextlib.closing(sqlite3.connect(bad)) as connection:
        name = connection.execute("SELECT frame FROM turns WHERE session = 2 AND turn = 3").fetchone()[0]
        connection.execute("UPDATE frames SET png = ? WHERE hash = ?", (png(np.zeros((64, 64, 3), np.uint8)), name))
        connection.commit()
    with pytest.raises(InputError, match="bad.db: frame .* is not what was stored"):
        merge_stores(db, bad)
    assert list(traces.episodes(db)["seed"]) == [1, 2, 3, 7]  # what was whole came in, the damaged one did not


# ---- disks that are full, files that are closed


def test_a_full_disk_is_told_and_keeps_what_is_stored(db):
    with Store(db) as store:
        store.begin("demo", PROTOCOL)
        store._sqlite.execute(f"PRAGMA max_page_count = {store._sqlite.execute('PRAGMA page_count').fetchone()[0] + 2}")
        with pytest.raises(InputError, match="the disk is full; free some space") as error:
            store.add(played(9))
        one_line(error)
    assert len(list(load_episodes(db))) == 3


LIMITED = """
import resource, sys
from test_traces import PROTOCOL, InputError, played, traces
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with traces.Store(sys.argv[1]) as store:
        store.begin("demo", PROTOCOL)
        for seed in range(100):
            store.add(played(seed))
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [1_000, 20_000, 400_000])
def test_a_file_that_may_not_grow_is_told_in_one_line(tmp_path, limit):
    path, here = tmp_path / "rollouts.db", Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path), str(limit)], cwd=here, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(here.parent)})
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{path}: "), done.stderr
    with Store(path) as store:  # and it goes on when there is room again
        store.begin("demo", PROTOCOL)
        stored = len(store.done("demo"))
        store.add(played(stored))
    assert set(traces.episodes(path)["turns"]) == {5} and (limit < 400_000 or stored > 1)


def as_nobody(act):
    "What `act()` says in a process that has no rights of root's."
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        try:
            os.setuid(65534)
            said = str(act())
        except InputError as error:
            said = f"InputError: {error}"
        except BaseException as error:
            said = f"escaped: {error!r}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give its rights away")
def test_files_without_rights_are_told(tmp_path):
    import tempfile
    with tempfile.TemporaryDirectory(dir="/tmp") as place:  # pytest's own folders are closed to others
        path = stored(Path(place) / "rollouts.db")
        os.chmod(place, 0o755)
        os.chmod(path, 0o444)
        assert as_nobody(lambda: len(list(load_episodes(path)))) == "3"
        assert as_nobody(lambda: Store(path)).startswith(f"InputError: {path}: not writable; check the rights")
        assert "its folder cannot be made (Permission denied)" in as_nobody(lambda: Store(Path(place) / "new" / "rollouts.db"))
        os.chmod(path, 0o000)
        assert as_nobody(lambda: traces.episodes(path)).startswith(f"InputError: {path}: cannot be opened")


# ---- traces of synth-ai, with the tables of its 0.2.17

SYNTH = """
CREATE TABLE session_traces (session_id VARCHAR PRIMARY KEY, created_at DATETIME NOT NULL, num_timesteps INTEGER NOT NULL,
    num_events INTEGER NOT NULL, num_messages INTEGER NOT NULL, metadata TEXT, experiment_id VARCHAR, embedding VECTOR);
CREATE TABLE session_timesteps (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL, step_id VARCHAR NOT NULL,
    step_index INTEGER NOT NULL, turn_number INTEGER, started_at DATETIME, completed_at DATETIME, num_events INTEGER,
    num_messages INTEGER, step_metadata TEXT, UNIQUE(session_id, step_id));
CREATE TABLE events (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL, timestep_id INTEGER, event_type VARCHAR NOT NULL,
    system_instance_id VARCHAR, event_time FLOAT, message_time INTEGER, created_at DATETIME, model_name VARCHAR, provider VARCHAR,
    input_tokens INTEGER, output_tokens INTEGER, total_tokens INTEGER, cost_usd INTEGER, latency_ms INTEGER, span_id VARCHAR,
    trace_id VARCHAR, call_records TEXT, reward FLOAT, terminated BOOLEAN, truncated BOOLEAN, system_state_before TEXT,
    system_state_after TEXT, metadata TEXT, event_metadata TEXT, embedding VECTOR,
    CHECK (event_type IN ('cais', 'environment', 'runtime')));
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL, timestep_id INTEGER, message_type VARCHAR NOT NULL,
    content TEXT NOT NULL, timestamp DATETIME, event_time FLOAT, message_time INTEGER, metadata TEXT, embedding VECTOR,
    CHECK (message_type IN ('user', 'assistant', 'system', 'tool_use', 'tool_result')));
CREATE TABLE outcome_rewards (id INTEGER PRIMARY KEY AUTOINCREMENT, session_id VARCHAR NOT NULL, total_reward INTEGER NOT NULL,
    achievements_count INTEGER NOT NULL, total_steps INTEGER NOT NULL, created_at DATETIME NOT NULL, reward_metadata TEXT);
CREATE TABLE event_rewards (id INTEGER PRIMARY KEY AUTOINCREMENT, event_id INTEGER NOT NULL, session_id VARCHAR NOT NULL, message_id INTEGER,
    turn_number INTEGER, reward_value FLOAT NOT NULL, reward_type VARCHAR, "key" VARCHAR, annotation TEXT, source VARCHAR,
    created_at DATETIME NOT NULL);
"""


def synth(path, sessions=2, turns=3, size=64, states=True, by_metadata=True, text=False, change=lambda connection: None):
    "A database as synth-ai writes it: gpt-4o-mini plays; turn 1 reaches collect_wood, the session's end knows of wake_up too."
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(SYNTH)
        for s in range(sessions):
            session = f"run-{s}"
            told = {"run_id": session, "env_name": "crafter", "policy_name": "crafter-react", "seed": 40 + s, "task_split": None,
                    "official_score": 0.7, "judge_scores": {"quality": 0.25 + s}, "model": "gpt-4o-mini"}
            connection.execute("INSERT INTO session_traces VALUES (?, ?, ?, ?, ?, ?, NULL, NULL)",
                               (session, f"2025-10-2{s}T10:00:00", turns, 2 * turns, 3 * turns, json.dumps(told)))
            connection.execute("INSERT INTO outcome_rewards VALUES (NULL, ?, 2, 2, ?, '2025-10-20', ?)",
                               (session, 2 * turns, json.dumps({"final_achievements": ["collect_wood", "wake_up"]})))
            for turn in range(turns):
                synth_turn(connection, session, turn, size, states, by_metadata, text)
        change(connection)
        connection.commit()
    return path


def synth_turn(connection, session, turn, size, states, by_metadata, text):
    step = connection.execute("INSERT INTO session_timesteps (session_id, step_id, step_index, turn_number) VALUES (?, ?, ?, ?)",
                              (session, f"decision_{turn}", turn, turn)).lastrowid
    where = json.dumps({"turn": turn, "step_id": f"decision_{turn}"} if by_metadata else {})
    frame = np.random.default_rng([turn, len(session)]).integers(0, 255, (size, size, 3), dtype=np.uint8)
    url = "data:image/png;base64," + base64.b64encode(png(frame)).decode()
    parts = [{"type": "text", "text": "=== CRAFTER GAME STATE ==="}] * text + [{"type": "image_url", "image_url": {"url": url}}]
    done = [{"tool_name": "interact_many", "arguments": {"actions": ["move_right", "do"][: 1 + (turn != 2)]}}]
    record = [{"output_tool_calls": [{"name": "interact_many", "arguments_json": '{"actions": ["move_right", "do"]}', "index": 0}],
               "output_text": None}]
    for kind, content in (("system", json.dumps({"role": "system", "text": "You play", "content": "You play Crafter."})),
                          ("user", json.dumps({"role": "user", "text": "", "content": parts})), ("assistant", json.dumps(done))):
        connection.execute("INSERT INTO messages (session_id, timestep_id, message_type, content, metadata) VALUES (?, ?, ?, ?, ?)",
                           (session, step, kind, content, where))
    connection.execute("INSERT INTO events (session_id, timestep_id, event_type, model_name, provider, input_tokens, output_tokens, "
                       "cost_usd, latency_ms, call_records, metadata) VALUES (?, ?, 'cais', 'gpt-4o-mini', 'custom', 3800, 21, 0, 900, ?, ?)",
                       (session, step, json.dumps(record), where))

    def state(after):
        reached = "collect_wood" if turn + after > 1 else "none"
        return json.dumps({"text": f"=== CRAFTER GAME STATE ===\nStep: {2 * (turn + after)}/10000\nAchievements: {reached}\n"}) if states else None

    event = connection.execute("INSERT INTO events (session_id, timestep_id, event_type, reward, terminated, truncated, system_state_before, "
                               "system_state_after, metadata) VALUES (?, ?, 'environment', ?, 0, 0, ?, ?, ?)",
                               (session, step, float(turn == 1), state(0), state(1), where)).lastrowid
    if turn == 1:
        connection.execute("INSERT INTO event_rewards (event_id, session_id, turn_number, reward_value, reward_type, annotation, created_at) "
                           "VALUES (?, ?, 1, 1, 'unique_achievement_delta', ?, '2025')",
                           (event, session, json.dumps({"achievements": ["collect_wood"]})))


@pytest.mark.parametrize("shape", [{}, {"states": False}, {"by_metadata": False}, {"text": True}])
def test_a_database_of_synth_ai_is_read_in(tmp_path, shape):
    count = import_synth(synth(tmp_path / "v3.db", **shape), tmp_path / "rollouts.db")
    assert count == {"episodes": 2, "turns": 6, "known": 0, "skipped": {}}
    (session, episode), _ = read_sessions(tmp_path / "rollouts.db")
    assert (episode.seed, episode.model, session["scores"]) == (40, "gpt-4o-mini", {"quality": 0.25, "official": 0.7})
    assert [turn.unlocked for turn in episode.turns] == [[], ["collect_wood"], ["wake_up"]]  # the end knew of one more
    assert [turn.reward for turn in episode.turns] == [0, 1, 0] and [turn.step for turn in episode.turns] == [0, 2, 4]
    assert [turn.altered for turn in episode.turns] == [False, False, True]  # what was done in turn 2 is not what was sampled
    assert episode.usage("prompt_tokens") == 11_400 and episode.usage("seconds") == pytest.approx(2.7) and not episode.usage("usd")
    assert (protocol_of(tmp_path / "rollouts.db").observe, bool(episode.turns[0].text)) == \
        (("both", True) if shape.get("text") else ("image", False))
    with contextlib.closing(sqlite3.connect(tmp_path / "rollouts.db")) as connection:
        assert json.loads(connection.execute("SELECT provenance FROM sources").fetchone()[0])["system_prompt"] == "You play Crafter."


def test_what_was_read_in_keeps_its_own_time(tmp_path):
    def spoil(connection):
        connection.execute("UPDATE session_traces SET created_at = 'yesterday' WHERE session_id = 'run-2'")
        connection.execute("UPDATE session_traces SET created_at = '2025-10-22 12:00:00.500+02:00' WHERE session_id = 'run-1'")
    db = tmp_path / "rollouts.db"
    assert import_synth(synth(tmp_path / "v3.db", sessions=3, change=spoil), db)["skipped"] == {"its time cannot be read": 1}
    created = [timestamp(moment) for moment in ("2025-10-20T10:00Z", "2025-10-22T10:00:00.5Z")]
    assert [session["created"] for session, _ in read_sessions(db)] == created
    assert traces.episodes(db)["wall"].tolist() == pytest.approx([2.7, 2.7])  # not what reading them in took
    assert exported(db, since="2025-10-21", val_fraction=0).numbers["episodes"] == 1


def test_what_was_read_in_can_be_exported_in_another_form(tmp_path):
    db = tmp_path / "rollouts.db"
    import_synth(synth(tmp_path / "v3.db"), db)
    rows = list(read_rows(exported(db, form="plain", val_fraction=0).out / "train.jsonl"))
    assert {row["messages"][2]["content"] for row in rows} == {"move_right, do"} and len(rows) == 6
    assert exported(db, scored_by="quality", min_judge_score=1.0, val_fraction=0).numbers["episodes"] == 1


def test_a_second_import_doubles_nothing(tmp_path):
    path, db = synth(tmp_path / "v3.db"), tmp_path / "rollouts.db"
    import_synth(path, db)
    before = traces.fingerprint(db)
    assert import_synth(path, db)["known"] == 2 and traces.fingerprint(db) == before


def test_a_session_that_cannot_be_read_does_not_take_the_others_along(tmp_path):
    def spoil(connection):
        connection.execute("UPDATE session_traces SET metadata = 'null' WHERE session_id = 'run-0'")
        connection.execute("UPDATE messages SET content = replace(content, 'base64,', 'base64,!') WHERE session_id = 'run-1'")
        connection.execute("DELETE FROM messages WHERE session_id = 'run-2'")
        connection.execute("UPDATE messages SET content = substr(content, 1, 40) || '…' WHERE session_id = 'run-3' AND message_type = 'assistant'")

    count = import_synth(synth(tmp_path / "v3.db", sessions=5, change=spoil), tmp_path / "rollouts.db")
    assert count["episodes"] == 2 and sum(count["skipped"].values()) == 3 and "it names no seed" in count["skipped"]
    cut = next(load_episodes(tmp_path / "rollouts.db"))
    assert cut.seed == 43 and cut.turns[0].decision.actions == ["move_right", "do"]  # the call's own record was whole


def test_other_files_are_no_database_of_synth_ai(tmp_path, db):
    whole = synth(tmp_path / "v3.db").read_bytes()
    (tmp_path / "cut.db").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.db").write_text("no database " * 500)
    for path, words in ((tmp_path / "cut.db", "damaged"), (tmp_path / "text.db", "not a trace store"), (tmp_path / "none.db", "no such file"),
                        (db, "not a trace database of synth-ai v3")):
        with pytest.raises(InputError, match=words) as error:
            import_synth(path, tmp_path / "rollouts.db")
        one_line(error)


@pytest.mark.parametrize("target", ["all.db", "new/all.db"])
def test_what_fails_leaves_no_target(tmp_path, db, target):
    "Neither an empty nor a partial store; one that was there stays as it was."
    def unreadable(connection):
        connection.execute("UPDATE session_traces SET metadata = 'null'")

    target, torn = tmp_path / target, tmp_path / "torn.db"
    torn.write_bytes(db.read_bytes()[:-5000])
    spoilt = tmp_path / "spoilt.db"  # whole for SQLite, so it is found out only when its last episode is copied
    spoilt.write_bytes(db.read_bytes())
    with sqlite3.connect(spoilt) as connection:
        connection.execute("UPDATE turns SET rewards = '[' WHERE session = (SELECT max(id) FROM sessions)")
    for fails in (lambda: merge_stores(target, db, tmp_path / "none.db"), lambda: merge_stores(target, db, torn),
                  lambda: merge_stores(target, spoilt), lambda: import_synth(db, target),
                  lambda: import_synth(tmp_path / "none.db", target),
                  lambda: import_synth(synth(tmp_path / "v3.db", change=unreadable), target)):
        with pytest.raises(InputError):
            fails()
        assert not target.exists() and not (tmp_path / "new").exists() and not list(tmp_path.glob("all.db*"))
        (tmp_path / "v3.db").unlink(missing_ok=True)
    merge_stores(target, db)
    before = traces.fingerprint(target)
    with pytest.raises(InputError):
        merge_stores(target, torn)
    assert traces.fingerprint(target) == before


def test_a_store_made_before_unpriced_was_told_from_nothing_is_read_alike(tmp_path):
    unpriced = Decision(["do"], "x", "x -> do", usage={"prompt_tokens": 9, "completion_tokens": 2, "seconds": 0.1})
    free = Decision(["do"], "x", "x -> do")
    with Store(tmp_path / "a.db") as store:
        store.begin("demo", Protocol(prompt="brief", render_size=64, observe="text"))
        for seed, decision in enumerate((unpriced, free)):
            store.add(Episode(seed, "s50", "m", turns=[Turn(0, 0, None, "", decision, ["do"], [0.0])]))
    with sqlite3.connect(tmp_path / "a.db") as connection:
        assert connection.execute("SELECT usd FROM episodes").fetchall() == [(None,), (0.0,)]
    for view in ("", "total(t.usd) AS usd"):
        if view:
            with sqlite3.connect(tmp_path / "a.db") as connection:
                [(made,)] = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'episodes'").fetchall()
                connection.execute("DROP VIEW episodes")
                connection.execute(re.sub(r"CASE .* END AS usd", view, made))
        for table in (traces.episodes(tmp_path / "a.db"), traces.turns(tmp_path / "a.db")):
            assert table.usd.isna().tolist() == [True, False] and table.usd[1] == 0


def test_the_commands_merge_and_import(tmp_path, capsys):
    from qwen_vl_kit.run import main
    assert main(["import-synth", str(synth(tmp_path / "v3.db")), "--out", str(tmp_path / "a.db")]) == 0
    assert main(["merge", str(tmp_path / "all.db"), str(tmp_path / "a.db")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/a.db: 2 episodes, 6 turns; 0 were there already, 0 left out", f"{tmp_path}/all.db: 2 episodes copied, 0 were there already"]
    assert main(["merge", str(tmp_path / "all.db"), str(tmp_path / "none.db")]) == 2
    assert capsys.readouterr().err == f"qvk: {tmp_path}/none.db: no such file; check the path, or run the stage that writes it\n"


def test_paths_are_looked_for_where_the_user_stands(tmp_path, monkeypatch, capsys):
    from qwen_vl_kit.core import root
    from qwen_vl_kit.run import main
    home, here = root(), tmp_path / "here"
    here.mkdir()
    synth(here / "v3.db"), stored(here / "a.db", (1,)), stored(here / "b.db", (2,))
    (here / "collect.toml").write_text('seeds = "7"\n')
    (here / "run").mkdir()
    monkeypatch.setenv("QVK_ROOT", str(home))
    monkeypatch.chdir(here)
    assert main(["merge", "all.db", "a.db", "b.db"]) == 0
    assert main(["merge", "all.db", "a.db"]) == 0
    assert sorted(traces.episodes(here / "all.db").seed) == [1, 2]
    assert main(["import-synth", "v3.db", "--out", str(here / "new.db")]) == 0 and (here / "new.db").is_file()
    assert main(["check", "collect.toml"]) == 0
    capsys.readouterr()
    for command in ("verify", "show", "plan", "run"):
        assert main([command, "run"]) == 2
        assert str(here / "run") in capsys.readouterr().err, command  # found, and no run of ours
        assert main([command, "nowhere"]) == 2
        assert str(home / "nowhere") in capsys.readouterr().err


# ---- export


def exported(db, **settings):
    return export.run(ExportConfig(traces=str(db), **settings), db.parent / "export")


def test_a_seed_is_on_one_side_only(tmp_path):
    path = tmp_path / "rollouts.db"
    with Store(path) as store:
        store.begin("demo", PROTOCOL)
        for seed in range(10):
            for member in range(3):
                store.add(played(seed, member=member, turns=2))
    out = exported(path, val_fraction=0.3).out
    sides = [{row["metadata"]["seed"] for row in read_rows(out / f"{side}.jsonl")} for side in ("train", "val")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(10)) and len(sides[1]) == 3


def test_every_image_is_the_frame_that_was_seen(db):
    out = exported(db).out
    for row in read_rows(out / "train.jsonl"):
        parts = [part for part in row["messages"][1]["content"] if part["type"] == "image_url"]
        assert len(parts) == 1
        assert frame_hash(decode_url(parts[0]["image_url"]["url"])) == row["metadata"]["frame"]
        assert row["metadata"]["prompt_hash"] == read_json(out / "stats.json")["prompt_hash"]


def test_rules_explain_an_empty_result(db):
    for settings, words in (({"min_achievements": 5}, "min_achievements dropped 3"), ({"models": ["gpt"]}, "models dropped 3"),
                            ({"seeds": "900-905"}, "seeds dropped 3"), ({"min_reward": 99.0}, "min_reward dropped 3")):
        with pytest.raises(InputError, match=words):
            exported(db, **settings)
    assert not (db.parent / "export").exists()


def test_shuffle_limit_and_seed_act(db):
    def order(**settings):
        rows = read_rows(exported(db, val_fraction=0, **settings).out / "train.jsonl")
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
        list(read_rows(path))
    row = json.loads(lines[0])
    row["messages"][1]["content"][0]["image_url"]["url"] = ""
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match="train.jsonl:1: the image is not a PNG data URL"):
        list(read_rows(path))
