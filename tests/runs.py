"What tests of training share: a student that has learned a little, and what a run has left."

from pathlib import Path

from qwen_vl_kit.config import CollectConfig, ExportConfig, SFTConfig
from qwen_vl_kit.core import read_jsonl
from qwen_vl_kit.stages import collect, export, sft


def student(place: Path) -> Path:
    "An adapter that has seen a few of the teacher's episodes: its replies hold actions, so there is something to learn by playing."
    collect.run(CollectConfig(seeds="0-7", prompt="brief", render_size=144, horizon="s20"), place / "collect")
    export.run(ExportConfig(val_fraction=0.25), place / "export")
    sft.run(SFTConfig(model="tiny", max_steps=40, eval_steps=40, batch_size=16, sequence_length=128, learning_rate=2e-3, eval_rows=16, threads=1),
            place / "sft")
    return place / "sft" / "adapter"


def told(out: Path) -> list[dict]:
    "The metrics of a run without what measures time."
    return [{name: value for name, value in row.items() if "second" not in name} for row in read_jsonl(out / "metrics.jsonl")]


def lora(out: Path) -> dict:
    "The adapter's weights."
    from safetensors.numpy import load_file
    return load_file(out / "adapter" / "adapter_model.safetensors")


def alike(ours: dict, theirs: dict) -> None:
    "Both have the same weights, to the last bit."
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)
