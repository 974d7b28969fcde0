"""kill -9 at twenty moments of a collection: what comes out is what an uninterrupted one gives, byte for byte."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys

import pytest

from qwen_vl_kit.config import ExportConfig
from qwen_vl_kit.core import read_jsonl, root
from qwen_vl_kit.stages import export
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.traces import fingerprint

pytestmark = [pytest.mark.slow, pytest.mark.process]

# Each life is a process of its own, forked from one that has imported everything; it ends by a real SIGKILL. Half of
# the lives are ended
# from outside, some while after a number of episodes has been stored; the other half by the count of SQLite's
# statements.
LIVES = """
import contextlib, json, os, random, signal, sqlite3, sys
from pathlib import Path
from qwen_vl_kit.stages import collect
from qwen_vl_kit.config import CollectConfig

killed, whole = map(Path, sys.argv[1:])
config = CollectConfig(prompt="brief", render_size=18, horizon="s50", seeds="0-49", concurrency=3)
dice, (heard, told) = random.Random(7), os.pipe()

def stored():
    try:
        with contextlib.closing(sqlite3.connect(f"file:{killed / 'rollouts.db'}?mode=ro", uri=True)) as reader:
            return reader.execute("SELECT count(*) FROM sessions").fetchone()[0]
    except sqlite3.OperationalError:
        return 0

def live(out, statements=0):
    if pid := os.fork():
        return pid
    add, connect, left = collect.Store.add, sqlite3.connect, iter(range(statements))
    def audible(store, *args, **kwargs):
        add(store, *args, **kwargs)
        os.write(told, b".")
    def mortal(*args, **kwargs):  # dies before the so manieth statement, most of which are within a transaction
        connection = connect(*args, **kwargs)
        connection.set_trace_callback(lambda _: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))
        return connection
    if statements:
        sqlite3.connect = mortal
    else:
        collect.Store.add = audible
    collect.run(config, out)
    os._exit(0)

# whatever is loaded or compiled at first use is there for every life
collect.rollout(collect.teacher_policy(config), config, [1000])
deaths = []
while len(deaths) < 20:
    if len(deaths) % 2:
        # at most 31 in all: the end is never reached before the last kill
        wanted = 3 * len(deaths) // 2 + dice.randrange(4) - stored()
        pid = live(killed)
        for _ in range(wanted):
            os.read(heard, 1)
        for _ in range(dice.randrange(5_000)):
            os.stat(killed)
        os.kill(pid, signal.SIGKILL)
    else:
        pid = live(killed, dice.randrange(1, 500))
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    os.write(told, b".")
    os.read(heard, 1000)  # what it said and nobody waited for
    deaths.append(stored())
print(json.dumps({"deaths": deaths, "ends": [os.waitpid(live(out), 0)[1] for out in (killed, whole)]}))
"""


def test_twenty_kills_lose_nothing_and_store_nothing_twice(tmp_path):
    killed, whole = tmp_path / "killed" / "collect", tmp_path / "whole" / "collect"
    killed.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", LIVES, str(killed), str(whole)],
        cwd=root(),
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ends"] == [0, 0] and len(told["deaths"]) == 20
    assert (
        told["deaths"] == sorted(told["deaths"]) and len(set(told["deaths"])) > 5
    )  # never fewer than before, at many moments
    for out in (killed, whole):
        table = traces.episodes(out / "rollouts.db")
        assert sorted(table["seed"]) == list(range(50)) and set(table["turns"]) == {50}
        assert [path.name for path in sorted(out.iterdir())] == ["metrics.jsonl", "rollouts.db"]
        assert sorted(row["seed"] for row in read_jsonl(out / "metrics.jsonl")) == list(range(50))
    with contextlib.closing(sqlite3.connect(killed / "rollouts.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    assert fingerprint(killed / "rollouts.db") == fingerprint(whole / "rollouts.db")
    rows = [
        export.run(ExportConfig(), run / "export").out / "train.jsonl"
        for run in (tmp_path / "killed", tmp_path / "whole")
    ]
    assert rows[0].read_bytes() == rows[1].read_bytes()
