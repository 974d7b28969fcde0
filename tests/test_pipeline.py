"""The whole pipeline as a user starts it, on the smallest data that can fail: real processes, real kernels, the real
model."""
import csv
import shutil

import pytest
from commands import qvk

from qwen_vl_kit.config import BenchmarkConfig, CollectConfig, ExportConfig, Protocol
from qwen_vl_kit.core import InputError, digest, read_json, root
from qwen_vl_kit.engine.base import Sampling
from qwen_vl_kit.engine.hf import HFEngine
from qwen_vl_kit.model.loading import load_model
from qwen_vl_kit.play.policies import EnginePolicy
from qwen_vl_kit.play.rollout import rollout
from qwen_vl_kit.show import viewer
from qwen_vl_kit.show.viewer import best_viewer
from qwen_vl_kit.stages import benchmark, collect, export, report
from qwen_vl_kit.store.traces import fingerprint

pytestmark = [pytest.mark.slow, pytest.mark.process]

SMALL = [
    "--set",
    'collect.seeds="0-23"',
    "--set",
    'horizon="s20"',
    "--set",
    "sft.max_steps=40",
    "--set",
    "sft.eval_steps=20",
    "--set",
    "sft.batch_size=32",
    "--set",
    "grpo.iterations=1",
    "--set",
    "grpo.groups=2",
    "--set",
    "grpo.group_size=4",
    "--set",
    "grpo.batch_size=80",
    "--set",
    'benchmark.seeds="1000000-1000003"',
]
PLAY = dict(prompt="brief", render_size=144, horizon="s20", progress=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A finished small run of configs/demo."
    out = tmp_path_factory.mktemp("runs") / "it's a {run}, 50% [of] #1 (é)?"
    done = qvk("run", "configs/demo", "--out", out, *SMALL, PYTHONWARNINGS="ignore")
    assert done.code == 0, done.out + done.err
    return out, done


def test_the_run_ends_with_the_table_and_a_report(demo):
    out, done = demo
    rows = list(csv.DictReader(open(out / "benchmark" / "arms.csv")))
    assert [row["arm"] for row in rows] == ["random", "base", "sft", "grpo", "expert"]
    assert all(float(row["low"]) <= float(row["achievement_rate"]) <= float(row["high"]) for row in rows)
    assert "expert" in done.out and str(out / "report" / "run.html") in done.out
    assert (out / "report" / "run.html").stat().st_size > 100_000  # plots and film strips are inside
    assert "base64" not in done.out + done.err


def test_one_prompt_from_teacher_to_table(demo):
    out, _ = demo
    hashes = {
        read_json(out / "export" / "stats.json")["prompt_hash"],
        *(read_json(out / s / "adapter" / "qvk.json")["prompt_hash"] for s in ("sft", "grpo")),
        *(read_json(out / s / "manifest.json")["numbers"]["prompt_hash"] for s in ("collect", "benchmark")),
    }
    assert len(hashes) == 1


def test_a_second_call_repeats_nothing(demo):
    out, _ = demo
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert qvk("run", "configs/demo", "--out", out, *SMALL).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_verify_tells_a_changed_table(demo):
    out, _ = demo
    assert qvk("verify", out).code == 0
    table = out / "benchmark" / "arms.csv"
    whole = table.read_bytes()
    table.write_bytes(whole.replace(b"random", b"Random"))
    verified = qvk("verify", out)
    table.write_bytes(whole)
    assert verified.code != 0 and "arms.csv" in verified.out + verified.err


def test_another_prompt_is_refused(demo, tmp_path):
    out, _ = demo
    config = BenchmarkConfig(
        **{**PLAY, "history": 2}, model="tiny", arms=["sft"], sft_adapter=str(out / "sft" / "adapter")
    )
    with pytest.raises(InputError, match="was trained with prompt"):
        benchmark.run(config, tmp_path / "benchmark")
    assert not list((tmp_path / "benchmark").glob("*.csv"))


def test_the_tour_plays_the_demos_adapter_as_it_was_trained(demo, tmp_path, monkeypatch):
    import papermill
    out, _ = demo
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "demo").symlink_to(out)
    (tmp_path / "configs").symlink_to(root() / "configs")
    shutil.copy(root() / "settings.ini", tmp_path)
    tour = root() / "nbs" / "index.ipynb"
    monkeypatch.setenv("QVK_ROOT", str(tmp_path))  # where it looks for outputs/demo
    made = papermill.execute_notebook(tour, None, kernel_name="python3", cwd=tmp_path, progress_bar=False)
    printed = "".join(
        output.text for cell in made.cells for output in cell.get("outputs", ()) if output.output_type == "stream"
    )
    shown = "".join(
        output.data.get("text/html", "")
        for cell in made.cells
        for output in cell.get("outputs", ())
        if "data" in output
    )
    assert "with the demo's SFT adapter" in printed and "achievements an episode" in printed
    assert all(f">{arm}</td>" in shown for arm in ("random", "base", "sft", "grpo", "expert"))


def test_an_adapter_in_a_notebook_is_played_under_its_own_prompt_or_not_at_all(demo):
    out, _ = demo
    for stage in ("sft", "grpo"):
        protocol = Protocol.from_adapter(out / stage)
        assert protocol == Protocol(**PLAY)
        engine = HFEngine(load_model("tiny", adapter=out / stage / "adapter"))
        player = EnginePolicy(engine, protocol, Sampling(max_new_tokens=16), "tiny")
        assert rollout(player, protocol, [1000000])[0].turns
        other = Protocol(**PLAY | {"progress": False})
        with pytest.raises(InputError, match="progress = true and not false"):
            EnginePolicy(engine, other, Sampling())
        with pytest.raises(InputError, match="progress = true and not false"):
            rollout(player, other, [1000000])


def test_the_report_does_not_show_an_adapter_under_another_prompt(demo, tmp_path):
    out, _ = demo
    for name in ("benchmark", "sft"):
        shutil.copytree(out / name, tmp_path / name)
    assert report.trained_model(tmp_path)["prompt_hash"] and best_viewer(tmp_path)
    card = tmp_path / "sft" / "adapter" / "qvk.json"
    card.write_text(card.read_text().replace(read_json(card)["prompt_hash"], "0" * 64))
    for draw in (report.trained_model, best_viewer, viewer.films):
        with pytest.raises(InputError, match="arm sft was played with prompt .*; run the benchmark again"):
            draw(tmp_path)


def test_two_runs_give_the_same_traces_rows_and_table(demo, tmp_path):
    out, _ = demo
    for run in (tmp_path / "one", tmp_path / "two"):
        collect.run(CollectConfig(**PLAY, seeds="0-5"), run / "collect")
        export.run(ExportConfig(val_fraction=0.2), run / "export")
        config = BenchmarkConfig(
            **PLAY,
            model="tiny",
            arms=["sft"],
            sft_adapter=str(out / "sft" / "adapter"),
            seeds="1000000-1000003",
            max_new_tokens=16,
        )
        benchmark.run(config, run / "benchmark")
    one, two = tmp_path / "one", tmp_path / "two"
    assert fingerprint(one / "collect" / "rollouts.db") == fingerprint(two / "collect" / "rollouts.db")
    assert fingerprint(one / "benchmark" / "rollouts.db") == fingerprint(two / "benchmark" / "rollouts.db")
    for name in ("export/train.jsonl", "export/val.jsonl", "benchmark/episodes.csv"):
        assert digest(one / name) == digest(two / name)
    rows = [list(csv.DictReader(open(run / "benchmark" / "arms.csv"))) for run in (one, two)]
    assert [row | {"seconds": ""} for row in rows[0]] == [row | {"seconds": ""} for row in rows[1]]
