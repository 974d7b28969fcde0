"""What a short collection, SFT and GRPO of `tiny` give, update by update, as recorded in invariant.json.

A change that is meant to leave the training alone leaves these rows as they are. One that is meant to change it
records them again, and says so in its commit:

    .venv/bin/python tests/test_invariant.py
"""

import json
import platform
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from qwen_vl_kit.config import CollectConfig, ExportConfig, GRPOConfig, SFTConfig
from qwen_vl_kit.core import digest, read_jsonl
from qwen_vl_kit.stages import collect, export, grpo, sft
from qwen_vl_kit.store.traces import fingerprint

pytestmark = pytest.mark.slow

RECORD = Path(__file__).with_name("invariant.json")
PROTOCOL = dict(prompt="brief", render_size=144, horizon="s20", progress=True)
TRAINING = dict(
    model="tiny", threads=1, sequence_length=192, bf16=False
)  # in 16 bits, processors differ in the third digit
TIMES = re.compile("second|usd|mfu|memory|flops", re.IGNORECASE)  # what depends on the machine's speed and load


def cpu() -> str:
    "The processor's name; on one type, the same program rounds the same way."
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def machine() -> dict[str, str]:
    "What the last digits depend on."
    return {"cpu": cpu()} | {name: version(name) for name in ("torch", "transformers", "trl")}


def metrics(out: Path) -> list[dict]:
    "The metrics of a stage without those that measure time."
    return [
        {name: value for name, value in row.items() if not TIMES.search(name)}
        for row in read_jsonl(out / "metrics.jsonl")
    ]


def run(out: Path) -> dict:
    "The three stages on a few seeds: their metrics, and the digests of what they wrote."
    collect.run(CollectConfig(**PROTOCOL, seeds="0-23"), out / "collect")
    export.run(ExportConfig(val_fraction=0.25), out / "export")
    sft.run(
        SFTConfig(
            **TRAINING,
            max_steps=40,
            eval_steps=20,
            eval_rows=32,
            batch_size=32,
            learning_rate=2e-3,
            lora_rank=16,
            lora_alpha=32,
        ),
        out / "sft",
    )
    grpo.run(
        GRPOConfig(
            **TRAINING,
            **PROTOCOL,
            iterations=3,
            groups=4,
            group_size=4,
            batch_size=40,
            learning_rate=1e-4,
            seeds="50-99",
            max_new_tokens=16,
        ),
        out / "grpo",
    )
    files = [
        "export/train.jsonl",
        "export/val.jsonl",
        "sft/adapter/adapter_model.safetensors",
        "grpo/adapter/adapter_model.safetensors",
    ]
    stores = ["collect/rollouts.db", "grpo/rollouts.db"]
    return {
        "machine": machine(),
        "sft": metrics(out / "sft"),
        "grpo": metrics(out / "grpo"),
        "digests": {name: digest(out / name) for name in files} | {name: fingerprint(out / name) for name in stores},
    }


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    return json.loads(json.dumps(run(tmp_path_factory.mktemp("invariant"))))


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_training_gives_the_recorded_figures_at_every_update(now, stage):
    recorded = json.loads(RECORD.read_text())
    if recorded["machine"] == now["machine"]:
        assert now[stage] == recorded[stage]
    else:
        assert [row["step"] for row in now[stage]] == [row["step"] for row in recorded[stage]]
        for ours, theirs in zip(now[stage], recorded[stage]):
            assert ours == pytest.approx(theirs, rel=3e-5, abs=1e-5), (
                f"step {ours['step']}"
            )  # the norms of gradients need the first


def test_the_files_are_the_recorded_ones_to_the_last_byte(now):
    recorded = json.loads(RECORD.read_text())
    if recorded["machine"] != now["machine"]:
        pytest.skip(f"recorded on another machine: {recorded['machine']}")
    assert now["digests"] == recorded["digests"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        record = run(Path(folder))
    rows = {stage: "[\n  " + ",\n  ".join(map(json.dumps, record[stage])) + "\n ]" for stage in ("sft", "grpo")}
    parts = {name: json.dumps(record[name], indent=2) for name in ("machine", "digests")} | rows
    RECORD.write_text(
        "{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n"
    )  # one row a line
    print(f"recorded in {RECORD}")
