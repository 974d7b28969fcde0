"""A real language model that is no Qwen3-VL, behind a real server of other makers: it plays by words, as an arm of the
benchmark and as a teacher.

`make test-llama` runs this file, and installs the server into an environment of its own."""

import csv
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import Outcome, qvk
from llama_server import MODEL
from servers import ServerProcess

from qwen_vl_kit.config import ArmConfig, BenchmarkConfig, CollectConfig, to_toml
from qwen_vl_kit.core import read_json, read_jsonl
from qwen_vl_kit.stages import benchmark, collect
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.traces import load_episodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif("LLAMA_PYTHON" not in os.environ, reason="needs llama.cpp's server; make test-llama runs this"),
]

WORDS = dict(prompt="rules", observe="text", render_size=18, max_new_tokens=12)
HORIZONS = {"t3": 3, "s2": 2}  # turns of each
SEEDS = 4


def llama(log: Path, *context: str) -> ServerProcess:
    "The server, not yet started. LLAMA_PYTHON is the Python that it runs in."
    line = [os.environ["LLAMA_PYTHON"], str(Path(__file__).with_name("llama_server.py"))]
    return ServerProcess(lambda port: [*line, str(port), *context], log)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with llama(tmp_path_factory.mktemp("server") / "llama.log") as running:
        yield running


@pytest.fixture
def at(monkeypatch):
    "Point the environment at an endpoint."
    for name in ("OPENAI_API_KEY", "OPENAI_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    return lambda server: monkeypatch.setenv("OPENAI_BASE_URL", server.url)


def two_arms(seeds: int = SEEDS, **arm) -> BenchmarkConfig:
    "Random play and the text model, which is asked once for each turn."
    table = ArmConfig(model=MODEL, engine="server", retries=1, call_seconds=600.0, **arm)
    return BenchmarkConfig(**WORDS, arms=["random", "text"], horizons=[*HORIZONS], arm={"text": table}, threads=1,
                           seeds=f"1000000-{1000000 + seeds - 1}")


def table(out: Path) -> dict:
    "The rows of arms.csv by arm and horizon."
    return {(row["arm"], row["horizon"]): row for row in csv.DictReader((out / "arms.csv").open())}


def played(out: Path) -> dict:
    "(arm, horizon, seed): the session that stored the episode."
    stored = traces.episodes(out / "rollouts.db")
    return {(row.arm, row.horizon, row.seed): row.session for row in stored.itertuples()}


def test_a_text_model_is_an_arm_beside_random_play(server, at, tmp_path):
    at(server)
    result = benchmark.run(two_arms(concurrency=2), tmp_path)
    rows, notices = table(tmp_path), result.numbers["notices"]
    assert list(rows) == [(arm, horizon) for arm in ("random", "text") for horizon in HORIZONS]
    asked = SEEDS * sum(HORIZONS.values())
    assert len(played(tmp_path)) == 2 * 2 * SEEDS and result.numbers["calls"] == asked + 1  # and one to probe
    for horizon, turns in HORIZONS.items():
        row, random = rows["text", horizon], rows["random", horizon]
        assert row["model"] == MODEL and int(row["turns"]) == SEEDS * turns
        decisions = [turn.decision for episode in load_episodes(tmp_path / "rollouts.db", arm="text")
                     if episode.horizon == horizon for turn in episode.turns]
        unusable = sum(not decision.valid for decision in decisions)
        assert float(row["invalid_rate"]) == pytest.approx(unusable / len(decisions), abs=1e-6)
        assert all(decision.valid or decision.actions == ["noop"] for decision in decisions)
        cut_off = sum(decision.usage["completion_tokens"] == WORDS["max_new_tokens"] for decision in decisions)
        line = f"text ({horizon}): {cut_off} of {SEEDS * turns} replies were cut off; raise max_new_tokens"
        assert cut_off > 0 and line in notices
        assert all(decision.usage["prompt_tokens"] > 300 for decision in decisions)  # the rules, in words
        assert len({decision.text for decision in decisions}) > 1
        assert row["usd"] == "" and float(random["usd"]) == 0 and float(random["invalid_rate"]) == 0
    # without a price, what was used is counted and what it cost is not known
    assert result.numbers["usd"] is None
    used = {row["unit"]: row["quantity"] for row in result.usage}
    assert used["prompt_tokens"] > 300 * asked and 0 < used["completion_tokens"] <= 12 * (asked + 1)


def kill_at_the_second_episode(server: ServerProcess, out: Path, *command) -> Outcome:
    "How a benchmark ended whose server was killed when its journal had a call for the text model's second episode."
    journal = out / ".work" / "calls" / "text.jsonl"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(qvk, *command, OPENAI_BASE_URL=server.url)
        while not running.done() and not (journal.is_file() and '"key":[1000001,' in journal.read_text()):
            time.sleep(0.02)
        assert not running.done(), "it had ended before the server was killed"
        server.kill()
        return running.result()


def test_a_server_that_is_killed_takes_its_arm_alone_and_the_same_command_completes_it(at, tmp_path):
    (tmp_path / "benchmark.toml").write_text(to_toml(two_arms(seeds=8, concurrency=1)))
    command = ("benchmark", "--config", tmp_path / "benchmark.toml", "--out", tmp_path / "run")
    out = tmp_path / "run" / "benchmark"
    server = llama(tmp_path / "llama.log")
    with server:
        failed = kill_at_the_second_episode(server, out, *command)
        assert failed.code == 1
        last = failed.err.splitlines()[-1]
        assert last.startswith("qvk: benchmark: the table lacks 1 of its 2 rows (text: ") and "are lost" in last
        assert {arm for arm, _ in table(out)} == {"random"}
        assert list(read_json(out / "manifest.json")["numbers"]["failed_arms"]) == ["text"]
        before = played(out)
        server.start()
        done = qvk(*command, OPENAI_BASE_URL=server.url)
    assert done.code == 0, done.err
    assert [*table(out)] == [(arm, horizon) for arm in ("random", "text") for horizon in HORIZONS]
    after = played(out)
    assert before.items() <= after.items() and len(after) == 2 * 2 * 8
    assert any(arm == "text" for arm, _, _ in before) and len(before) < len(after)
    assert "failed_arms" not in read_json(out / "manifest.json")["numbers"]
    assert qvk("verify", tmp_path / "run").code == 0


def test_a_prompt_longer_than_the_models_context_is_told_in_the_endpoints_words(at, tmp_path):
    with llama(tmp_path / "llama.log", "256") as server:
        at(server)
        result = benchmark.run(two_arms(), tmp_path / "out")
    assert "maximum context length is 256 tokens" in result.numbers["failed_arms"]["text"]
    assert {arm for arm, _ in table(tmp_path / "out")} == {"random"} and result.numbers["calls"] == 1


def test_a_text_model_teaches_by_calling_a_tool(server, at, tmp_path):
    "llama.cpp holds the model to the tool's schema, and does not say when a call is cut off in its middle."
    at(server)
    config = CollectConfig(**WORDS | {"max_new_tokens": 28}, form="tool", teacher="model", engine="server", model=MODEL,
                           seeds="0-2", horizon="t4", noise=0.0, max_reprompts=1, concurrency=2, call_seconds=600.0)
    numbers, episodes = collect.run(config, tmp_path).numbers, list(load_episodes(tmp_path / "rollouts.db"))
    decisions = [turn.decision for episode in episodes for turn in episode.turns]
    assert sorted(episode.seed for episode in episodes) == [0, 1, 2] and len(decisions) == numbers["turns"] == 12
    valid = [decision for decision in decisions if decision.valid]
    assert valid and numbers["invalid"] == len(decisions) - len(valid)
    assert all(1 <= len(decision.actions) <= 4 for decision in valid)
    assert all(decision.cut_off for decision in decisions if not decision.valid)
    lost = sum(decision.cut_off for decision in decisions)
    cut_off = [f"{lost} of 12 replies were cut off; raise max_new_tokens"] * bool(lost)
    assert [line for line in numbers.get("notices", []) if "no usable action" not in line] == cut_off
    assert numbers["calls"] == 1 + 12 + numbers["asked_again"] and numbers["usd"] is None
    assert numbers["asked_again"] >= numbers["invalid"]  # what is unusable is asked for once more
    assert [row["usd"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [None] * 3
