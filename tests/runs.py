"What tests of training share: a student that has learned a little, and what a run has left."

import signal
import subprocess
import time
from pathlib import Path

import psutil

from qwen_vl_kit.config import CollectConfig, ExportConfig, SFTConfig
from qwen_vl_kit.core import read_jsonl, root
from qwen_vl_kit.stages import collect, export, sft

# GRPO of a few episodes, on what a `student` has learned
SMALL_GRPO = dict(
    model="tiny",
    groups=2,
    group_size=3,
    iterations=3,
    batch_size=16,
    max_new_tokens=16,
    seeds="50-99",
    sequence_length=128,
    learning_rate=1e-3,
    bf16=False,
    threads=1,
)


def student(place: Path) -> Path:
    """An adapter that has seen a few of the teacher's episodes: its replies hold actions, so there is something to
    learn by playing."""
    collect.run(CollectConfig(seeds="0-7", prompt="brief", render_size=144, horizon="s20"), place / "collect")
    export.run(ExportConfig(val_fraction=0.25), place / "export")
    sft.run(
        SFTConfig(
            model="tiny",
            max_steps=40,
            eval_steps=40,
            batch_size=16,
            sequence_length=128,
            learning_rate=2e-3,
            eval_rows=16,
            threads=1,
        ),
        place / "sft",
    )
    return place / "sft" / "adapter"


def figures(out: Path) -> list[dict]:
    "The metrics of a run without what measures time."
    return [
        {name: value for name, value in row.items() if "second" not in name}
        for row in read_jsonl(out / "metrics.jsonl")
    ]


def lora(out: Path) -> dict:
    "The adapter's weights."
    from safetensors.numpy import load_file
    return load_file(out / "adapter" / "adapter_model.safetensors")


def alike(ours: dict, theirs: dict) -> None:
    "Both have the same weights, to the last bit."
    assert ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def kill_when(ready, command: list[str], seconds: float = 200) -> None:
    "Start a process in the project's folder and kill it, with all that it has started, as soon as `ready()`."
    process = subprocess.Popen(command, cwd=root(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and process.poll() is None and not ready():
        time.sleep(0.01)
    assert process.poll() is None, "it had ended before it was killed"
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    assert process.wait() == -signal.SIGKILL
