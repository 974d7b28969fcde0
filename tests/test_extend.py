"""More of the same: a finished run in a folder is asked for more seeds. Only these are played and paid for, and what
the folder holds then is what one run of all of them gives; asked for others, it is refused."""

import csv
import json
from pathlib import Path

import pytest
from commands import QVK, SMALL, one_line, qvk
from runs import kill_when
from servers import PLAY, Endpoint, refuses, says
from stores import noise_episode, run_export

from qwen_vl_kit.config import BenchmarkConfig, CollectConfig
from qwen_vl_kit.core import OverBudget, read_jsonl
from qwen_vl_kit.runner.configs import load_config
from qwen_vl_kit.stages import collect
from qwen_vl_kit.stages.benchmark import arm_row, write_csv
from qwen_vl_kit.store import manifest, traces
from qwen_vl_kit.store.traces import fingerprint

pytestmark = pytest.mark.process

EXPERT = ["--config", "configs/demo", "--set", "horizon=s50", "--set", "concurrency=3"]
EVAL = "configs/seed/eval_gpt4o_vision_proper.toml"


def numbers(out: Path) -> dict:
    "The numbers in a manifest."
    return json.loads((out / "manifest.json").read_text())["numbers"]


def contents(out: Path) -> dict:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_collection_in_parts_is_one_collection(tmp_path, noise):
    settings = dict(prompt="brief", render_size=144, horizon="s50", noise=noise, concurrency=2)
    for name, parts in {"parts": ["4-5", "0-5", "0-7"], "whole": ["0-7"]}.items():
        for seeds in parts:
            result = collect.run(CollectConfig(seeds=seeds, **settings), tmp_path / name / "collect")
    stores = [tmp_path / name / "collect" / "rollouts.db" for name in ("parts", "whole")]
    assert fingerprint(stores[0]) == fingerprint(stores[1])
    rows = [run_export(store).out / "train.jsonl" for store in stores]
    assert rows[0].read_bytes() == rows[1].read_bytes()
    assert "earlier_episodes" not in result.numbers  # the whole


def test_more_seeds_are_played_alone_through_a_kill_and_the_rest_follows(tmp_path):
    command = ["collect", *EXPERT, "--out", str(tmp_path)]
    out, work = tmp_path / "collect", tmp_path / "collect" / ".work"
    assert qvk(*command, "--set", "seeds=0-9").code == 0
    assert qvk("export", "--config", "configs/demo", "--out", tmp_path).code == 0
    played = [row["seed"] for row in read_jsonl(out / "metrics.jsonl")]
    before = contents(out)
    lines = lambda: (work / "metrics.jsonl").read_text().count("\n") if (work / "metrics.jsonl").is_file() else 0
    kill_when(lambda: lines() > 12, [*QVK, *command, "--set", "seeds=0-79"])
    assert {path: data for path, data in contents(out).items() if work not in path.parents and path.name != ".lock"} \
        == before  # until the larger one is whole, the smaller one is
    fewer = qvk(*command, "--set", "seeds=0-8")  # neither of the finished run nor of the unfinished one
    assert fewer.code == 2 and "which are not asked for" in one_line(fewer.err), fewer.err
    code, _, error = qvk(*command, "--set", "seeds=0-79")
    assert code == 0, error
    rows = list(read_jsonl(out / "metrics.jsonl"))
    assert [row["seed"] for row in rows[:10]] == played and sorted(row["seed"] for row in rows) == list(range(80))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    made = numbers(out)
    assert (made["episodes"], made["turns"]) == (80, sum(row["turns"] for row in rows))
    assert 10 < made["earlier_episodes"] < 80
    whole = load_config("configs/demo", "collect", ["horizon=s50", "seeds=0-79"])
    assert fingerprint(collect.run(whole, tmp_path / "whole").out / "rollouts.db") == fingerprint(out / "rollouts.db")
    assert manifest.verify(tmp_path)[0] == "export: input collect/rollouts.db is not what collect says it wrote"
    (tmp_path / "benchmark").mkdir()
    write_csv(tmp_path / "benchmark" / "arms.csv", [arm_row("random", [noise_episode(7)])])
    shown = qvk("show", tmp_path)
    assert shown.code == 0 and "note: export was made from other inputs than there are now" in shown.err, shown.err
    stale = qvk("export", "--config", "configs/demo", "--out", tmp_path)
    assert stale.code == 2 and "was made from other inputs than there are now" in one_line(stale.err)


@pytest.mark.parametrize("seeds", ["0-1", "1-5", "7"])
def test_what_is_stored_and_not_asked_for_is_refused_and_left_command(collected, seeds):
    before = contents(collected)
    code, said, error = qvk("collect", *SMALL, "--set", f'seeds="{seeds}"', "--out", collected)
    assert (code, said) == (2, "")
    assert f'collect: an output folder of another run, with seeds = "0-2", which "{seeds}" does not extend; name ' \
        "another folder with --out" in one_line(error) and "give --force to write it anew, which deletes" in error
    assert contents(collected) == before


def test_a_run_of_several_stages_follows_a_collection_that_grows(tmp_path):
    command = ["run", "configs/demo", "--to", "export", "--set", "horizon=s5", "--out", tmp_path]
    assert qvk(*command, "--set", "collect.seeds=0-3").code == 0
    code, _, error = qvk(*command, "--set", "collect.seeds=0-7")
    assert code == 0 and "episodes 8 (4 of them before)" in error and "already done" not in error, error
    stats = numbers(tmp_path / "export")
    assert stats["train_rows"] + stats["val_rows"] == 8 * 5 and manifest.verify(tmp_path) == []


def test_more_seeds_of_a_benchmark_are_played_by_every_arm(tmp_path):
    command = ["benchmark", "--config", "configs/demo", "--set", 'arms=["random", "expert"]', "--set", "horizon=s10"]
    for name, parts in {"parts": ["1000000-1000001", "1000000-1000004"], "whole": ["1000000-1000004"]}.items():
        for seeds in parts:
            done = qvk(*command, "--set", f"seeds={seeds}", "--out", tmp_path / name)
            assert done.code == 0, done.err
    parts, whole = (tmp_path / name / "benchmark" for name in ("parts", "whole"))
    assert fingerprint(parts / "rollouts.db") == fingerprint(whole / "rollouts.db")
    assert (parts / "episodes.csv").read_bytes() == (whole / "episodes.csv").read_bytes()
    tables = [[row | {"seconds": ""} for row in csv.DictReader((out / "arms.csv").open())] for out in (parts, whole)]
    assert tables[0] == tables[1] and {row["episodes"] for row in tables[0]} == {"5"}
    assert BenchmarkConfig(**json.loads((parts / "manifest.json").read_text())["config"]).seeds == "1000000-1000004"
    fewer = qvk(*command, "--set", "seeds=1000000", "--out", tmp_path / "parts")
    assert fewer.code == 2 and 'which "1000000" does not extend' in one_line(fewer.err)


# ---- a teacher that is paid


def test_the_seeds_own_line_goes_on_with_more_seeds_and_pays_for_nothing_twice(tmp_path):
    "The document's first step: first some seeds, then all, killed in between, with its own place and its env-file."
    place, many = tmp_path / "traces" / "gpt4o_vision_100", 40
    line = ["eval", "--config", EVAL, "--trace-db", place / "rollouts.db", "--env-file", tmp_path / "env",
            "--set", 'horizon="t3"', "--set", "budget_usd=5"]
    command = lambda *args: qvk(*args, timeout=120, without=["OPENAI_"])
    with Endpoint(lambda number, body: says() if number < many else "hang") as endpoint:
        (tmp_path / "env").write_text(f"OPENAI_API_KEY=k\nOPENAI_BASE_URL={endpoint.url}\n")
        assert command(*line, "--seeds", "0-9").code == 0
        assert len(endpoint.bodies) == 31  # three turns each, and the probe
        # both calls that the TOML lets be out at once hang: all others have been answered, and the answers read
        kill_when(lambda: len(endpoint.bodies) == many + 2, [*QVK, *map(str, line), "--seeds", "0-19"])
        endpoint.answer = lambda number, body: says()
        asked = len(endpoint.bodies)
        assert "already done" in command(*line, "--seeds", "0-9").err and len(endpoint.bodies) == asked
        code, _, error = command(*line, "--seeds", "0-19")
        assert code == 0, error
        made = json.loads((place / "manifest.json").read_text())
        # the kill loses these two alone; each session may ask first what a turn costs, unless that is known
        assert 60 + 2 + 2 <= made["numbers"]["calls"] == len(endpoint.bodies) <= 60 + 2 + 3
        assert made["numbers"]["estimated_calls_of_the_rest"] == 60 - (many - 2)
        assert [row["quantity"] for row in made["usage"]] == endpoint.tokens
        assert (made["numbers"]["episodes"], made["numbers"]["turns"]) == (20, 60)
        sent = [row["key"] for row in read_jsonl(place / "calls.jsonl") if "key" in row]
        assert {seed for seed, *_ in sent[31:]} == set(range(10, 20))  # the first ten are not asked about again
        whole = load_config(EVAL, "collect", ['horizon="t3"', "seeds=0-19"])
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("OPENAI_API_KEY", "k")
            patched.setenv("OPENAI_BASE_URL", endpoint.url)
            other = collect.run(whole, tmp_path / "whole")
    assert fingerprint(place / "rollouts.db") == fingerprint(other.out / "rollouts.db")
    assert sorted(row["seed"] for row in read_jsonl(place / "metrics.jsonl")) == list(range(20))
    assert "already done" in command(*line, "--seeds", "0-19").err
    refused = command(*line, "--seeds", "0-9")
    assert refused.code == 2 and 'seeds = "0-19", which "0-9" does not extend; name another folder with --trace-db' \
        in one_line(refused.err)


def test_a_budget_counts_what_was_spent_before_more_was_asked_for(tmp_path, monkeypatch):
    "Four episodes of four turns and a probe are 17 calls; 30 leave room for a probe and three episodes more."
    with Endpoint() as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        collect.run(CollectConfig(**PLAY, seeds="0-3"), tmp_path)
        with pytest.raises(OverBudget, match="the budget of 30 calls would be passed.* of 10 episodes are stored"):
            collect.run(CollectConfig(**PLAY, seeds="0-9", budget_calls=30), tmp_path)
        assert len(endpoint.bodies) == 30
        result = collect.run(CollectConfig(**PLAY, seeds="0-9", budget_calls=60), tmp_path)
    assert result.numbers["episodes"] == 10 and result.numbers["calls"] == len(endpoint.bodies) <= 60


def test_notices_are_of_all_that_is_stored(tmp_path, monkeypatch):
    "The first part has replies that were cut off, the second has none."
    with Endpoint(lambda number, body: says(finish="length") if number else says()) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        first = collect.run(CollectConfig(**PLAY, seeds="0-1"), tmp_path).numbers["notices"]
        assert first == ["8 of 8 replies were cut off; raise max_new_tokens"]
        endpoint.answer = lambda number, body: says()
        more = collect.run(CollectConfig(**PLAY, seeds="0-2"), tmp_path)
        assert more.numbers["notices"] == ["8 of 12 replies were cut off; raise max_new_tokens"]
        endpoint.answer = lambda number, body: refuses(500)
        assert collect.run(CollectConfig(**PLAY, seeds="0-2"), tmp_path).numbers["notices"] == more.numbers["notices"]
    assert int(traces.episodes(tmp_path / "rollouts.db")["cut_off"].sum()) == 8
