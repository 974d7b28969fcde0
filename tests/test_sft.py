"""SFT as a user meets it: killed, full of errors, on several processes, with whole weights, chosen by playing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import QVK, one_line, qvk
from runs import alike, figures, kill_when, lora

from qwen_vl_kit.config import BenchmarkConfig, CollectConfig, ExportConfig, SFTConfig
from qwen_vl_kit.core import InputError, TrainingStopped, read_jsonl
from qwen_vl_kit.learn import devices, sft_fit, trackers
from qwen_vl_kit.learn.batches import Rows
from qwen_vl_kit.learn.devices import plan_processes, sharding_arguments
from qwen_vl_kit.learn.sft_fit import sft_rows
from qwen_vl_kit.learn.trackers import TRACKERS
from qwen_vl_kit.model.loading import load_model
from qwen_vl_kit.model.lora import lora_config
from qwen_vl_kit.play.rollout import rollout
from qwen_vl_kit.protocol.episodes import Decision
from qwen_vl_kit.protocol.turns import data_url
from qwen_vl_kit.stages import benchmark, collect, export, sft
from qwen_vl_kit.store import traces

pytestmark = [pytest.mark.slow, pytest.mark.process]

PLAY = dict(prompt="brief", render_size=144, horizon="s12")
FAST = dict(
    model="random:tiny",
    sequence_length=128,
    bf16=False,
    threads=1,
    batch_size=8,
    max_steps=6,
    eval_steps=2,
    eval_rows=8,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "A folder with a small collection and its rows."
    place = tmp_path_factory.mktemp("rows")
    collect.run(CollectConfig(seeds="0-7", **PLAY), place / "collect")
    export.run(ExportConfig(val_fraction=0.25), place / "export")
    return {"train": str(place / "export" / "train.jsonl"), "val": str(place / "export" / "val.jsonl")}


def test_killed_and_resumed_it_learns_the_same(rows, tmp_path):
    config = SFTConfig(**FAST, **rows)
    whole = sft.run(config, tmp_path / "whole")
    program = "from qwen_vl_kit import config\nfrom qwen_vl_kit.stages import sft\n" \
        f"sft.run(config.SFTConfig(**{config.model_dump()!r}), {str(tmp_path / 'killed')!r})"
    metrics = tmp_path / "killed" / "metrics.jsonl"
    kill_when(lambda: metrics.is_file() and '"step":3' in metrics.read_text(), [sys.executable, "-c", program])
    resumed = sft.run(config, tmp_path / "killed")
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert resumed.numbers == whole.numbers
    alike(lora(tmp_path / "killed"), lora(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "killed" / "adapter")  # killed once more, between its last update and its end
    sft.run(config, tmp_path / "killed")
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    alike(lora(tmp_path / "killed"), lora(tmp_path / "whole"))


def test_validation_rows_are_those_beside_the_training_rows(rows, tmp_path):
    for settings in (rows | {"val": ""}, rows):
        train, val = sft_rows(SFTConfig(**settings), tmp_path / "sft")
        assert (str(train.path), str(val.path)) == (rows["train"], rows["val"])
    (tmp_path / "train.jsonl").write_text(
        "\ufeff" + Path(rows["train"]).read_text(), encoding="utf-8"
    )  # a mark, as some editors leave one
    assert len(Rows(tmp_path / "train.jsonl").rows) == len(Rows(rows["train"]).rows)
    with pytest.raises(InputError, match=f"{tmp_path}/val.jsonl: no such file"):
        sft_rows(SFTConfig(train=str(tmp_path / "train.jsonl")), Path(rows["train"]).parents[1] / "sft")


def test_checkpoints_of_other_rows_are_not_gone_on_with(rows, tmp_path):
    first = sft.run(SFTConfig(**FAST, **rows), tmp_path / "sft")
    fewer = tmp_path / "train.jsonl"
    fewer.write_text("".join(Path(rows["train"]).read_text().splitlines(True)[:40]))
    (tmp_path / "sft" / "adapter" / "qvk.json").unlink()
    again = sft.run(SFTConfig(**FAST, **rows | {"train": str(fewer)}), tmp_path / "sft")
    assert [row["step"] for row in figures(again.out) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert again.numbers["rows"] == 40 and again.numbers["val_loss"] != first.numbers["val_loss"]


def same_curves(one: Path, two: Path) -> None:
    "Two runs learned the same."
    for name in ("loss", "val_loss", "val_token_accuracy", "val_action_accuracy"):
        ours, theirs = ([(row["step"], row[name]) for row in figures(out) if name in row] for out in (one, two))
        assert [row[0] for row in ours] == [row[0] for row in theirs] and ours
        assert [row[1] for row in ours] == pytest.approx([row[1] for row in theirs], abs=5e-6), name
    ours, theirs = lora(one), lora(two)
    assert ours.keys() == theirs.keys() and all(abs(ours[name] - theirs[name]).max() < 1e-5 for name in ours)


TAUGHT = FAST | {
    "model": "tiny",
    "eval_rows": 13,
}  # 12 of 24: no multiple of 2 x 8; and it has something right from the start


def test_two_processes_learn_what_one_does(rows, tmp_path):
    one = sft.run(SFTConfig(**TAUGHT, **rows), tmp_path / "one")
    two = sft.run(SFTConfig(**TAUGHT | {"batch_size": 4, "processes": 2}, **rows), tmp_path / "two")
    same_curves(one.out, two.out)
    counts = [[(row["samples"], row["tokens"]) for row in figures(out) if "loss" in row] for out in (one.out, two.out)]
    assert counts[0] == counts[1] and one.numbers["val_token_accuracy"] > 0
    assert two.numbers["processes"] == 2 and two.numbers["samples"] == one.numbers["samples"]


@pytest.mark.extras
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_deepspeed_two_processes_learn_what_one_does(rows, tmp_path, stage):
    pytest.importorskip("deepspeed")
    one = sft.run(SFTConfig(**TAUGHT, **rows), tmp_path / "one")
    two = sft.run(
        config := SFTConfig(**TAUGHT | {"batch_size": 4, "processes": 2, "deepspeed_stage": stage}, **rows),
        tmp_path / "two",
    )
    same_curves(one.out, two.out)
    assert list((two.out / "checkpoints").glob("checkpoint-6/global_step6/*optim*")), "DeepSpeed was not at work"
    shutil.rmtree(two.out / "checkpoints" / "checkpoint-6")  # as if it had been killed while it wrote
    again = sft.run(config, two.out)
    same_curves(one.out, again.out)
    assert again.numbers["parameters"] == one.numbers["parameters"]


def test_what_cannot_be_shared_is_refused_before_anything_starts(rows, tmp_path, monkeypatch):
    for module in (devices, trackers):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(devices, "gpu_count", lambda: 0)
    for values, expected in (
        ({"deepspeed_stage": 3}, "DeepSpeed, which is not installed; make gpu"),
        ({"fsdp": True}, "this machine has none"),
        ({"report_to": "wandb"}, "the package wandb, which is not installed; pip install wandb"),
    ):
        with pytest.raises(InputError, match=expected) as caught:
            sft.run(SFTConfig(**FAST | {"processes": 2}, **values, **rows), tmp_path / "sft")
        assert "\n" not in str(caught.value) and not (tmp_path / "sft").exists()


def test_fsdp_divides_the_layers(monkeypatch, tmp_path):
    "What accelerate is told on a machine with two GPUs; without any it ignores it."
    import trl
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from peft import get_peft_model

    from qwen_vl_kit.learn.sft_trainer import sft_arguments

    monkeypatch.setattr(devices, "gpu_count", lambda: 2)
    config = SFTConfig(**FAST | {"fsdp": True, "processes": 2})
    assert plan_processes(config) == (2, [])
    args = trl.SFTConfig(**sft_arguments(config, tmp_path, 5), **sharding_arguments(config, 2))
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    assert (
        plugin.fsdp_version == 2
        and plugin.reshard_after_forward is True
        and plugin.state_dict_type.name == "FULL_STATE_DICT"
    )
    model = get_peft_model(load_model("random:tiny").model, lora_config(4, 8))
    plugin.set_auto_wrap_policy(model)
    wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
    names = [type(module).__name__ for module in model.modules() if wraps(module)]
    assert set(names) == {"Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"}


def test_checkpoints_of_another_division_are_refused(rows, tmp_path):
    done = sft.run(SFTConfig(**FAST, **rows), tmp_path / "sft")
    before = sorted(str(path) for path in done.out.rglob("*"))
    with pytest.raises(InputError, match="are of one process, and this is 2 processes with nothing divided"):
        sft.run(SFTConfig(**FAST | {"batch_size": 4, "processes": 2}, **rows), tmp_path / "sft")
    assert sorted(str(path) for path in done.out.rglob("*")) == before


@pytest.mark.extras
@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_gets_the_figures(rows, tmp_path, name):
    pytest.importorskip(name)
    out, config = tmp_path / "here" / "sft", SFTConfig(**FAST | {"max_steps": 2, "report_to": name}, **rows)
    program = "from qwen_vl_kit import config\nfrom qwen_vl_kit.stages import sft\n" \
        f"sft.run(config.SFTConfig(**{config.model_dump()!r}), {str(out)!r})"
    (tmp_path / "here").mkdir()
    environment = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(out / "tracker"),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "here",
        check=True,
        capture_output=True,
        env=os.environ | environment,
    )
    written = b"".join(path.read_bytes() for path in (out / "tracker").rglob("*") if path.is_file())
    assert all(word in written for word in (b"tokens_per_second", b"action_accuracy", b"loss", b"usd"))
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["sft"]


def test_accumulated_batches_are_one_batch(rows, tmp_path):
    "The loss is a mean over tokens, and rows differ in length."
    sft.run(SFTConfig(**FAST, **rows), tmp_path / "one")
    sft.run(SFTConfig(**FAST | {"batch_size": 2, "gradient_accumulation_steps": 4}, **rows), tmp_path / "two")
    losses = [[row["loss"] for row in figures(out) if "loss" in row] for out in (tmp_path / "one", tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], abs=2e-6)


def test_turns_of_an_episode_are_one_conversation(rows, tmp_path):
    processor = load_model("random:tiny").processor
    for window, length, counts in ((3, 512, {3}), (0, 2048, {12}), (0, 512, {4})):  # 12 turns of about 115 tokens
        found = [
            [m["role"] for m in row["messages"]].count("assistant")
            for row in Rows(rows["train"]).join(processor, length, window).rows
        ]
        assert sum(found) == len(Rows(rows["train"]).rows) and max(found) in counts, found
    result = sft.run(
        SFTConfig(**FAST | {"window": 3, "sequence_length": 1024, "batch_size": 4}, **rows), tmp_path / "sft"
    )
    assert result.numbers["rows"] == len(Rows(rows["train"]).rows) and 0 <= result.numbers["val_action_accuracy"] <= 1


def test_a_row_that_does_not_fit_is_told_before_the_model_is_loaded(rows, tmp_path, monkeypatch):
    lines = Path(rows["train"]).read_text().splitlines()
    lines[6] = lines[6].replace("->", "tree " * 100 + "->")
    long = tmp_path / "train.jsonl"
    long.write_text("\n\n".join(lines))
    monkeypatch.setattr(sft_fit, "load_model", None)
    with pytest.raises(
        InputError, match=r"train.jsonl:13: a row of \d+ tokens does not fit a sequence of 128; raise sequence_length"
    ):
        sft.run(SFTConfig(**FAST, **rows | {"train": str(long)}), tmp_path / "sft")
    assert not (tmp_path / "sft").exists()


def test_rows_of_other_makers_are_trained_on(rows, tmp_path):
    """Without a picture, with two of another size, with one as flat as can be, with an answer in parts and with a
    tool call: all in one batch."""
    def made(*pictures, **answer):
        shown = [{"type": "image", "image": data_url(np.zeros(shape, np.uint8))} for shape in pictures]
        messages = [
            {"role": "system", "content": "play"},
            {"role": "user", "content": [*shown, {"type": "text", "text": "now"}] if shown else "now"},
            {"role": "assistant", **answer},
        ]
        return json.dumps({"messages": messages, "metadata": {"prompt_hash": "theirs"}})

    call = {"function": {"name": "act", "arguments": {"actions": ["do"]}}}
    file = tmp_path / "theirs.jsonl"
    file.write_text(
        "\n".join(
            [
                made(content="do"),
                made((100, 75, 3), (32, 32, 3), content=[{"type": "text", "text": "do"}]),
                made((1, 1, 3), content="noop"),
                made((3, 90, 3), content=None, tool_calls=[call]),
            ]
        )
    )
    done = sft.run(
        SFTConfig(**FAST | {"batch_size": 4, "max_steps": 1, "train": str(file), "val": str(file)}), tmp_path / "sft"
    )
    assert done.numbers["rows"] == 4 and done.numbers["prompt_hash"] == "theirs" and done.numbers["val_loss"] > 0


def test_an_error_in_one_of_several_processes_is_told(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(Rows, "check_lengths", lambda *_: None)  # which would tell it here
    config = SFTConfig(**FAST | {"processes": 2, "sequence_length": 64, "batch_size": 4}, **rows)
    with pytest.raises(InputError, match="does not fit a sequence of 64; raise sequence_length"):
        sft.run(config, tmp_path / "two")


def test_whole_weights_are_trained_and_played(rows, tmp_path):
    from safetensors.torch import load_file, save_file

    result = sft.run(SFTConfig(**FAST | {"variety": "full", "learning_rate": 1e-3}, **rows), tmp_path / "sft")
    assert result.numbers["parameters"]["trained"] == result.numbers["parameters"]["total"]
    base, trained = load_model("random:tiny"), load_model("random:tiny", adapter=tmp_path / "sft" / "adapter")
    pairs = zip(base.model.parameters(), trained.model.parameters())
    assert all(not a.equal(b) for a, b in pairs if a.ndim > 1)
    with pytest.raises(InputError, match="whole weights"):
        load_model("random:tiny", adapter=tmp_path / "sft" / "adapter", trainable=True)
    played = benchmark.run(
        BenchmarkConfig(**PLAY, model="random:tiny", arms=["sft"], seeds="1000000-1000001", bf16=False),
        tmp_path / "benchmark",
    )
    assert played.numbers
    for checkpoint in (tmp_path / "sft" / "checkpoints").glob("checkpoint-*"):
        seen = dict(arms=["sft"], sft_adapter=str(checkpoint), seeds="0", bf16=False)
        with pytest.raises(InputError, match="seed 0 was trained on by the adapter of arm sft"):
            benchmark.run(BenchmarkConfig(**PLAY, model="random:tiny", **seen), tmp_path / "seen")
        assert load_model("random:tiny", adapter=checkpoint).model
    weights = tmp_path / "sft" / "adapter" / "model.safetensors"
    held = load_file(weights)
    save_file({name: weight for name, weight in held.items() if "layers.1.mlp" not in name}, weights, {"format": "pt"})
    with pytest.raises(InputError, match=r"3 missing \(.*layers\.1\.mlp"):
        load_model("random:tiny", adapter=tmp_path / "sft" / "adapter")


def test_a_student_plays_and_the_expert_says_what_it_would_do(rows, tmp_path):
    adapter = sft.run(SFTConfig(**FAST, **rows), tmp_path / "sft").out / "adapter"
    config = CollectConfig(seeds="40-43", student=str(adapter), noise=0.0, **PLAY)
    collect.run(config, tmp_path / "dagger" / "collect")
    turns = traces.turns(tmp_path / "dagger" / "collect" / "rollouts.db")
    assert (
        set(turns.reason.str.len() > 0) == {True}
        and (turns.actions.map(tuple) != turns.executed.map(tuple)).mean() > 0.5
    )
    written = list(
        read_jsonl(export.run(ExportConfig(val_fraction=0.25), tmp_path / "dagger" / "export").out / "train.jsonl")
    )
    said = {(row["metadata"]["seed"], row["metadata"]["turn"]): row["messages"][2]["content"] for row in written}
    answers = {(turn.seed, turn.turn): "-> " + ", ".join(turn.actions) for turn in turns.itertuples()}
    assert said and all(text.endswith(answers[key]) for key, text in said.items())
    with pytest.raises(InputError, match="trained with prompt"):
        collect.run(CollectConfig(**dict(config) | {"history": 2}), tmp_path / "other")
    with pytest.raises(InputError, match="made for random:tiny"):
        collect.run(CollectConfig(**dict(config) | {"model": "tiny"}), tmp_path / "other")
    with pytest.raises(InputError, match="only the expert"):
        collect.run(CollectConfig(**dict(config) | {"teacher": "random"}), tmp_path / "other")


def test_the_kept_adapter_is_the_one_that_played_best(rows, tmp_path):
    config = SFTConfig(**FAST | {"best_by": "dev.achievement_rate", "dev_seeds": "900000-900001"}, **rows)
    result = sft.run(config, tmp_path / "sft")
    played = {row["step"]: row["dev_achievement_rate"] for row in figures(result.out) if "dev_achievement_rate" in row}
    assert sorted(played) == [2, 4, 6] and played[result.numbers["kept_update"]] == max(played.values())
    with pytest.raises(InputError, match="dev_seeds names none"):
        sft.run(SFTConfig(**FAST | {"best_by": "dev.achievement_rate"}, **rows), tmp_path / "none")


def test_training_that_diverges_stops_and_keeps_its_checkpoints(rows, tmp_path):
    config = SFTConfig(
        **FAST | {"learning_rate": 1e30, "max_grad_norm": 1e30, "warmup_ratio": 0.0, "scheduler": "constant"}, **rows
    )
    with pytest.raises(TrainingStopped, match=r"not a finite number at step \d+.*lower learning_rate"):
        sft.run(config, tmp_path / "sft")
    assert not (tmp_path / "sft" / "adapter").exists() and figures(tmp_path / "sft")


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (lambda row: row["messages"][1]["content"].pop(0), "0 images where 1 is promised"),
        (
            lambda row: row["messages"][1]["content"].insert(0, row["messages"][1]["content"][0]),
            "2 images where 1 is promised",
        ),
        (lambda row: row["metadata"].update(prompt_hash="0" * 64), "prompt 00000000 where"),
    ],
)
def test_rows_that_are_not_what_they_say(rows, tmp_path, spoil, expected):
    lines = Path(rows["train"]).read_text().splitlines()
    row = json.loads(lines[1])
    spoil(row)
    lines[1] = json.dumps(row)
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=expected) as caught:
        sft.run(SFTConfig(**FAST, **rows | {"train": str(tmp_path / "train.jsonl")}), tmp_path / "sft")
    assert "train.jsonl" in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "sft").exists()


def test_rows_of_single_actions_are_refused_where_plans_are_to_be_learned(rows, tmp_path):
    given = [word for name, path in rows.items() for word in ("--set", f"{name}={path}")]
    code, said, error = qvk("sft", "--config", "configs/demo", *given, "--set", "horizon=t50", "--out", tmp_path)
    assert (code, said) == (2, "") and "its rows are of horizon s12, and t50 is to be learned" in one_line(error), error
    assert not (tmp_path / "sft").exists()


def test_rows_of_a_teacher_that_does_not_plan_are_noted_before_training(tmp_path, capsys):
    "The teacher is one that gives a single action where four are allowed."
    def single(policy, situations):
        return [Decision(["do"], "wait", "wait -> do") for _ in situations]

    protocol = CollectConfig(**PLAY | {"horizon": "t6"})
    (tmp_path / "collect").mkdir()
    teacher = type("Single", (), {"name": "single", "act": single})()
    with traces.Store(tmp_path / "collect" / "rollouts.db") as store:
        store.begin("collect", protocol)
        rollout(teacher, protocol, [1, 2, 3], sink=lambda episode: store.add(episode, arm="single"), keep=False)
    export.run(ExportConfig(val_fraction=0.34), tmp_path / "export")
    config = SFTConfig(**FAST | {"max_steps": 1, "eval_steps": 1}, horizon="t6")
    notice = "each of the 12 answers to learn has one action, where t6 has room for 4"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sft, "fit", lambda *_: pytest.fail("begun"))
        with pytest.raises(pytest.fail.Exception, match="begun"):
            sft.run(config, tmp_path / "sft")
    assert f"note: {notice}" in capsys.readouterr().err
    assert sft.run(config, tmp_path / "sft").numbers["notices"][0].startswith(notice)


def test_on_the_command_line_a_killed_run_goes_on(rows, tmp_path):
    values = [f"{name}={json.dumps(value)}" for name, value in {**FAST, **rows, "horizon": PLAY["horizon"]}.items()]
    line = [
        "sft",
        "--config",
        "configs/demo",
        "--out",
        str(tmp_path),
        *(word for value in values for word in ("--set", value)),
    ]
    metrics = tmp_path / "sft" / ".work" / "metrics.jsonl"
    kill_when(lambda: metrics.is_file() and '"step":3' in metrics.read_text(), [*QVK, *line])
    done = qvk(*line)
    assert done.code == 0, done.err
    assert [row["step"] for row in figures(tmp_path / "sft") if "loss" in row] == [1, 2, 3, 4, 5, 6]
