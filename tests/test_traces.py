"""The trace store, given what it should never be given: damaged files, killed writers, rivals, wrong frames, full
disks."""

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
from commands import one_line
from stores import PROTOCOL, noise_episode, noise_store, run_export

from qwen_vl_kit.config import Protocol
from qwen_vl_kit.core import InputError, read_jsonl
from qwen_vl_kit.game.images import Png, decode_png, png
from qwen_vl_kit.protocol.episodes import Decision, Episode, Turn
from qwen_vl_kit.store import provenance, traces
from qwen_vl_kit.store.merge import merge_stores
from qwen_vl_kit.store.schema import _MIGRATIONS, _VIEW, SCHEMA
from qwen_vl_kit.store.traces import Store, _sessions_without_price, load_episodes, total_usd


@pytest.fixture
def db(tmp_path):
    return noise_store(tmp_path / "rollouts.db")


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
    text, other, newer = tmp_path / "text.db", tmp_path / "other.db", noise_store(tmp_path / "newer.db")
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
    decoded, known, plain = [], noise_episode(1), noise_episode(1)
    for episode, encoded in ((known, Png), (plain, png)):
        for turn in episode.turns:
            turn.frame = encoded(turn.frame)
    monkeypatch.setattr(traces, "decode_png", lambda data: decoded.append(data) or decode_png(data))
    rows = []
    for name, episode, expected in (("arrays.db", noise_episode(1), 0), ("known.db", known, 0), ("plain.db", plain, 5)):
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
    for use in (lambda: list(load_episodes(db)), lambda: traces.load_frame(db, name), lambda: run_export(db)):
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
    before, bad = traces.fingerprint(db), noise_episode(9)
    spoil(bad.turns[4])
    with Store(db) as store:
        store.begin("demo", PROTOCOL)
        with pytest.raises(InputError):
            store.add(bad)
    assert traces.fingerprint(db) == before  # no session, no turn, no frame of it


WRITER = """
import sys
from stores import PROTOCOL, noise_episode

from qwen_vl_kit.store import traces
store = traces.Store(sys.argv[1])
store.begin("demo", PROTOCOL)
for seed in range(10_000):
    store.add(noise_episode(seed, turns=20))
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
        assert store.stored_keys("demo") == {(seed, 0) for seed in range(len(table))}
        store.begin("demo", PROTOCOL)
        store.add(noise_episode(20_000))
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
    unpriced = _sessions_without_price
    with Store(db) as store:
        store.begin("demo", PROTOCOL)

        def meanwhile(connection):
            store.add(noise_episode(9))
            return unpriced(connection)

        monkeypatch.setattr(traces, "_sessions_without_price", meanwhile)
        assert list(traces.episodes(db)["seed"]) == [1, 2, 3]
    monkeypatch.undo()
    assert list(traces.episodes(db)["seed"]) == [1, 2, 3, 9]


def test_nothing_is_stored_twice_nor_under_another_prompt(db):
    with Store(db) as store:
        with pytest.raises(InputError, match="no run begun"):
            store.add(noise_episode(7))
        store.begin("demo", PROTOCOL)
        with pytest.raises(InputError, match="stored already"):
            store.add(noise_episode(1))
        store.add(noise_episode(1, member=1))
        with pytest.raises(InputError, match="was played with prompt"):
            store.begin("demo", Protocol(prompt="brief", render_size=64, history=0))
    assert list(traces.episodes(db)["member"]) == [0, 0, 0, 1]


def test_two_runs_have_one_fingerprint(db, tmp_path):
    assert traces.fingerprint(noise_store(tmp_path / "again.db")) == traces.fingerprint(db)
    assert traces.fingerprint(noise_store(tmp_path / "other.db", seeds=(1, 2, 4))) != traces.fingerprint(db)


def test_frames_are_kept_once_and_money_is_not_rounded_away(tmp_path):
    path = tmp_path / "group.db"
    with Store(path) as store:
        store.begin("demo", PROTOCOL)
        for member in range(4):
            store.add(noise_episode(1, member=member))
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT count(*) FROM frames").fetchone()[0] == 5
    connection.close()
    assert traces.episodes(path)["usd"].sum() == pytest.approx(20 * 0.0002)


def test_a_cost_is_kept_to_the_last_digit(tmp_path):
    for i, usd in enumerate([0.000435, Decimal("0.00000015"), "12.3456789012", 0, None]):
        episode = noise_episode(i, turns=1)
        episode.turns[0].decision.usage["usd"] = usd
        with Store(tmp_path / "costs.db") as store:
            store.begin("demo", PROTOCOL)
            store.add(episode)
    assert total_usd(tmp_path / "costs.db") == Decimal("0.000435") + Decimal("0.00000015") + Decimal("12.3456789012")
    for usd in (float("nan"), -1, "much"):
        episode = noise_episode(9, turns=1)
        episode.turns[0].decision.usage["usd"] = usd
        with Store(tmp_path / "costs.db") as store, pytest.raises(InputError, match="is not an amount of dollars"):
            store.begin("demo", PROTOCOL)
            store.add(episode)


def test_each_episode_knows_the_code_it_was_played_with(db, monkeypatch):
    monkeypatch.setattr(provenance, "provenance", lambda **more: {"commit": "the next one", **more})
    with Store(db) as store:
        store.begin("demo", PROTOCOL, {"model": "Qwen/Qwen3-VL-2B-Instruct", "revision": "abc"})
        store.add(noise_episode(9))
    with contextlib.closing(sqlite3.connect(db)) as connection:
        told = [
            json.loads(text)
            for (text,) in connection.execute("SELECT provenance FROM sessions JOIN sources s ON s.id = source")
        ]
    assert (
        len({source["commit"] for source in told}) == 2
        and told[-1]["revision"] == "abc"
        and told[-1]["render_size"] == 64
    )


def test_the_time_of_a_run_is_summed_over_its_sessions(tmp_path, monkeypatch):
    clock = iter([100.0, 103.0, 104.0, 900.0, 902.0])  # begin, two episodes; begin again, one more
    monkeypatch.setattr(traces.time, "monotonic", lambda: next(clock))
    for seeds in ((1, 2), (3,)):
        with Store(tmp_path / "rollouts.db") as store:
            store.begin("demo", PROTOCOL)
            for seed in seeds:
                store.add(noise_episode(seed))
            total = store.seconds("demo")
    assert total == 6.0 == traces.episodes(tmp_path / "rollouts.db")["wall"].sum()


@pytest.mark.parametrize("stage", ["collect", "benchmark"])
def test_a_stage_that_goes_on_counts_the_seconds_of_all_its_sessions(tmp_path, stage):
    from qwen_vl_kit.config import BenchmarkConfig, CollectConfig
    from qwen_vl_kit.stages import benchmark, collect
    module, arms = (collect, {"teacher": "random"}) if stage == "collect" else (benchmark, {"arms": ["random"]})
    config = (CollectConfig if stage == "collect" else BenchmarkConfig)(
        prompt="brief", render_size=18, horizon="s4", seeds="1000000-1000001", **arms
    )
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
    id INTEGER PRIMARY KEY, run TEXT NOT NULL REFERENCES runs, arm TEXT NOT NULL, seed INTEGER NOT NULL,
    member INTEGER NOT NULL,
    horizon TEXT NOT NULL, model TEXT NOT NULL, prompt TEXT NOT NULL REFERENCES prompts, created REAL NOT NULL,
    UNIQUE (run, arm, seed, member));
CREATE TABLE turns (
    session INTEGER NOT NULL REFERENCES sessions, turn INTEGER NOT NULL, step INTEGER NOT NULL,
    frame TEXT REFERENCES frames,
    text TEXT NOT NULL, reply TEXT NOT NULL, reason TEXT NOT NULL, actions TEXT NOT NULL, executed TEXT NOT NULL,
    rewards TEXT NOT NULL, unlocked TEXT NOT NULL, valid INTEGER NOT NULL, done INTEGER NOT NULL, dead INTEGER NOT NULL,
    prompt_tokens INTEGER, image_tokens INTEGER, completion_tokens INTEGER, micro_usd INTEGER, latency REAL,
    seconds REAL NOT NULL,
    token_ids BLOB, logprobs BLOB,
    PRIMARY KEY (session, turn)) WITHOUT ROWID;
CREATE VIEW episodes AS SELECT s.id AS session, s.run, s.arm, s.seed, s.member, s.horizon, s.model,
    s.prompt AS prompt_hash,
    sum((SELECT total(value) FROM json_each(t.rewards))) AS reward, sum(json_array_length(t.unlocked)) AS achievements,
    sum(json_array_length(t.executed)) AS steps, count(*) AS turns, max(t.dead) AS died, sum(1 - t.valid) AS invalid,
    sum(t.prompt_tokens) AS prompt_tokens, sum(t.image_tokens) AS image_tokens,
    sum(t.completion_tokens) AS completion_tokens,
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
        connection.execute(
            "INSERT INTO sessions SELECT id, run, arm, seed + 1000000 * (seed = 2), member, horizon, "
            "model, prompt, created "
            "FROM new.sessions"
        )
        columns = [row[1] for row in connection.execute("PRAGMA main.table_info(turns)")]
        values = ", ".join("round(usd * 1e6)" if name == "micro_usd" else name for name in columns)
        connection.execute(f"INSERT INTO turns SELECT {values} FROM new.turns")
        connection.commit()
    return path


_FROM_SCHEMA_5 = ", total(t.cut_off * (t.turn >= s.start)) AS cut_off"  # in the view
_FROM_SCHEMA_4 = ", s.start" + _FROM_SCHEMA_5


def columns(path):
    with contextlib.closing(sqlite3.connect(path)) as connection:
        tables = [
            name
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY name"
            )
        ]
        return {name: connection.execute(f"PRAGMA table_info({name})").fetchall() for name in tables}


def test_a_store_of_the_previous_schema_is_read_and_left_as_it_is(old, db):
    before = old.read_bytes()
    assert [e.turns[2].frame.tolist() for e in load_episodes(old)] == [
        e.turns[2].frame.tolist() for e in load_episodes(db)
    ]
    assert traces.episodes(old)["split"].tolist() == ["train", "test", "train"]
    assert total_usd(old) == Decimal("0.0030") and len(traces.turns(old)) == 15
    assert run_export(old, splits=["test"], val_fraction=0).numbers["train_rows"] == 5
    assert old.read_bytes() == before


def test_a_store_of_the_previous_schema_is_migrated_when_it_is_written_to(old, db):
    with Store(old) as store:
        store.begin("demo", PROTOCOL)
        store.add(noise_episode(9))
        with pytest.raises(InputError, match="stored already"):
            store.add(noise_episode(1))
    assert columns(old) == columns(db)
    with contextlib.closing(sqlite3.connect(old)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA,)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("SELECT count(*) FROM sessions WHERE source IS NULL").fetchone() == (0,)
    assert list(traces.episodes(old)["seed"]) == [1, 1_000_002, 3, 9]
    assert total_usd(old) == Decimal("0.0040")


def test_a_store_of_schema_2_counts_cached_tokens_once_it_is_written_to(db):
    before, free = columns(db), noise_episode(9)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DROP VIEW episodes")
        connection.execute("ALTER TABLE turns DROP COLUMN cached_tokens")
        connection.execute("ALTER TABLE sessions DROP COLUMN start")
        connection.execute("ALTER TABLE turns DROP COLUMN cut_off")
        view = _VIEW.replace("sum(t.cached_tokens) AS cached_tokens, ", "").replace(_FROM_SCHEMA_4, "")
        connection.executescript(view + "PRAGMA user_version = 2")
    kept, fingerprint = db.read_bytes(), traces.fingerprint(db)
    assert (
        len(list(load_episodes(db))) == 3
        and traces.episodes(db)["cached_tokens"].isna().all()
        and db.read_bytes() == kept
    )
    free.turns[0].decision.usage["cached_tokens"] = 4
    with Store(db) as store:
        store.begin("demo", PROTOCOL)
        assert traces.fingerprint(db) == fingerprint
        store.add(free)
    assert columns(db) == before
    assert traces.episodes(db)["cached_tokens"].tolist()[-1] == 4 == list(load_episodes(db))[-1].usage("cached_tokens")
    assert "cached_tokens" not in list(load_episodes(db))[0].turns[0].decision.usage


def test_a_store_of_schema_3_knows_no_taken_over_turns_until_it_is_written_to(db):
    before, late = columns(db), noise_episode(9)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DROP VIEW episodes")
        connection.execute("ALTER TABLE sessions DROP COLUMN start")
        connection.execute("ALTER TABLE turns DROP COLUMN cut_off")
        connection.executescript(_VIEW.replace(_FROM_SCHEMA_4, "") + "PRAGMA user_version = 3")
    assert [episode.start for episode in load_episodes(db)] == [0, 0, 0]
    late.start = 2
    with Store(db) as store:
        store.begin("demo", PROTOCOL)
        store.add(late)
    assert columns(db) == before
    assert traces.episodes(db)["start"].tolist() == [0, 0, 0, 2] == [episode.start for episode in load_episodes(db)]


def test_a_store_of_schema_4_knows_no_reply_that_was_cut_off_until_it_is_written_to(db):
    before, cut = columns(db), noise_episode(9)
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.execute("DROP VIEW episodes")
        connection.execute("ALTER TABLE turns DROP COLUMN cut_off")
        connection.executescript(_VIEW.replace(_FROM_SCHEMA_5, "") + "PRAGMA user_version = 4")
    assert traces.episodes(db)["cut_off"].tolist() == [0, 0, 0] == [episode.cut_off for episode in load_episodes(db)]
    cut.start = 1
    for turn in cut.turns[:3]:
        turn.decision.cut_off = True
    with Store(db) as store:
        store.begin("demo", PROTOCOL)
        store.add(cut)
    assert columns(db) == before
    assert traces.episodes(db)["cut_off"].tolist() == [0, 0, 0, 2] == [episode.cut_off for episode in load_episodes(db)]


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
    parts = [noise_store(tmp_path / name, seeds) for name, seeds in (("a.db", (1, 2)), ("b.db", (3, 4)))]
    assert merge_stores(tmp_path / "all.db", *parts) == {"episodes": 4, "known": 0}
    assert merge_stores(tmp_path / "all.db", *parts) == {"episodes": 0, "known": 4}
    assert traces.fingerprint(tmp_path / "all.db") == traces.fingerprint(
        noise_store(tmp_path / "once.db", (1, 2, 3, 4))
    )
    times = [
        traces.episodes(path)[["seed", "created", "wall"]].values.tolist() for path in (*parts, tmp_path / "all.db")
    ]
    assert times[0] + times[1] == times[2]


def test_old_stores_are_merged_too(old, tmp_path):
    assert merge_stores(tmp_path / "all.db", old)["episodes"] == 3
    assert total_usd(tmp_path / "all.db") == Decimal("0.0030")


def test_merging_never_takes_one_play_for_another(db, tmp_path):
    other = noise_store(tmp_path / "other.db", (3,), turns=4)  # seed 3 of the same run, but shorter
    before = traces.fingerprint(db)
    with pytest.raises(InputError, match="seed 3, member 0 was played differently there; keep the files apart"):
        merge_stores(db, other)
    with Store(tmp_path / "prompt.db") as store:
        store.begin("demo", Protocol(prompt="brief", render_size=64, history=1))
        store.add(noise_episode(8))
    with pytest.raises(InputError, match="run 'demo' was played with another prompt there"):
        merge_stores(db, tmp_path / "prompt.db")
    assert traces.fingerprint(db) == before


def test_damage_does_not_spread_by_merging(db, tmp_path):
    bad = noise_store(tmp_path / "bad.db", (7, 8))
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
            store.add(noise_episode(9))
        one_line(error)
    assert len(list(load_episodes(db))) == 3


LIMITED = """
import resource, sys
from stores import PROTOCOL, noise_episode
from qwen_vl_kit.core import InputError
from qwen_vl_kit.store import traces
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    with traces.Store(sys.argv[1]) as store:
        store.begin("demo", PROTOCOL)
        for seed in range(100):
            store.add(noise_episode(seed))
except InputError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.parametrize("limit", [1_000, 20_000, 400_000])
def test_a_file_that_may_not_grow_is_told_in_one_line(tmp_path, limit):
    path, here = tmp_path / "rollouts.db", Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(limit)],
        cwd=here,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(here.parent)},
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{path}: "), (
        done.stderr
    )
    with Store(path) as store:  # and it goes on when there is room again
        store.begin("demo", PROTOCOL)
        stored = len(store.stored_keys("demo"))
        store.add(noise_episode(stored))
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
        path = noise_store(Path(place) / "rollouts.db")
        os.chmod(place, 0o755)
        os.chmod(path, 0o444)
        assert as_nobody(lambda: len(list(load_episodes(path)))) == "3"
        assert as_nobody(lambda: Store(path)).startswith(f"InputError: {path}: not writable; check the permissions")
        assert "its folder cannot be made (Permission denied)" in as_nobody(
            lambda: Store(Path(place) / "new" / "rollouts.db")
        )
        os.chmod(path, 0o000)
        assert as_nobody(lambda: traces.episodes(path)).startswith(f"InputError: {path}: cannot be opened")


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
