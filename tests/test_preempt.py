"""A machine that is taken away: SIGTERM and SIGHUP end `qvk` as Ctrl-C does, whoever of its processes they reach, and
the same command then ends with what an undisturbed one gives."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import termios
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from commands import QVK, one_line, qvk
from runs import SMALL_GRPO, alike, figures, lora, student
from servers import PLAY, Endpoint, by_seed

from qwen_vl_kit.config import CollectConfig, ExportConfig, GRPOConfig, SFTConfig, to_toml
from qwen_vl_kit.core import InputError, root
from qwen_vl_kit.stages import collect, export, grpo, sft
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.traces import fingerprint

pytestmark = [pytest.mark.slow, pytest.mark.process]

TERM, HUP = signal.SIGTERM, signal.SIGHUP
GAMES = dict(prompt="brief", render_size=144)


def line(stage: str, settings, place: Path) -> list[str]:
    "The command that runs one stage into `place`."
    place.mkdir(exist_ok=True)
    (place / f"{stage}.toml").write_text(to_toml(settings))
    return [stage, "--config", str(place / f"{stage}.toml"), "--out", str(place)]


def alone(process: psutil.Process, number: int) -> None:
    "As `kill` does."
    process.send_signal(number)


def hastily(process: psutil.Process, number: int) -> None:
    "With a SIGTERM at its heels."
    process.send_signal(number)
    process.send_signal(TERM)


def everyone(process: psutil.Process, number: int) -> None:
    "As Slurm does."
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def by_default() -> None:
    "What a login shell leaves its commands with, wherever these tests were started."
    for number in (signal.SIGINT, TERM, HUP):
        signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def started(words: list[str], scratch: Path, ready: Callable[[], bool], seconds: float = 200, **options):
    "`qvk` in a process of its own, with `scratch` for its temporary files, from the moment when it is `ready()`."
    scratch.mkdir(exist_ok=True)
    mark = uuid.uuid4().hex
    options = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "preexec_fn": by_default} | options
    variables = os.environ | {"TMPDIR": str(scratch), "QVK_TEST_MARK": mark, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*QVK, *words], cwd=root(), text=True, env=variables, start_new_session=True, **options)
    limit = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < limit, process.stderr and process.stderr.read()
        time.sleep(0.01)
    try:
        yield process
        process.wait(seconds)
        assert left(mark) == []
        assert [path.name for path in scratch.glob("tmp*/")] == []
    finally:
        for one in left(mark):
            one.kill()
        process.wait()


def left(mark: str) -> list[psutil.Process]:
    "The processes that a command has started, directly or not, and that are still there."
    found = []
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if one.environ().get("QVK_TEST_MARK") == mark and one.status() != psutil.STATUS_ZOMBIE:
                found.append(one)
    return found


def preempt(words: list[str], place: Path, ready: Callable[[], bool], number: signal.Signals, send: Callable) -> None:
    "Start a command, end it by a signal when it is `ready()`, and see that it ends as it should."
    with started(words, place / "scratch", ready) as process:
        send(psutil.Process(process.pid), number)
        error = process.stderr.read()
    assert process.returncode == 128 + number, error
    assert one_line(error) == f"qvk: interrupted by {number.name}; the same command resumes where it stopped"


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def test_a_collection_goes_on(tmp_path):
    config = CollectConfig(seeds="0-99", concurrency=4, horizon="s50", **GAMES)
    words, metrics = line("collect", config, tmp_path), tmp_path / "collect" / ".work" / "metrics.jsonl"
    for number, send in ((TERM, alone), (TERM, everyone), (HUP, alone), (HUP, everyone), (HUP, hastily)):
        before = count(metrics)
        preempt(words, tmp_path, lambda: count(metrics) > before + 2, number, send)  # noqa: B023
        assert count(metrics) > before + 2
    done = qvk(*words)
    assert done.code == 0, done.err
    collect.run(config, tmp_path / "whole")
    assert fingerprint(tmp_path / "collect" / "rollouts.db") == fingerprint(tmp_path / "whole" / "rollouts.db")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict:
    "A small collection's rows."
    place = tmp_path_factory.mktemp("rows")
    collect.run(CollectConfig(seeds="0-7", horizon="s12", **GAMES), place / "collect")
    export.run(ExportConfig(val_fraction=0.25), place / "export")
    return {"train": str(place / "export" / "train.jsonl"), "val": str(place / "export" / "val.jsonl")}


def resumes_alike(words: list[str], out: Path, train: Callable[[Path], object]) -> None:
    "Give the command again: its training in `out` ends with the figures and weights of an undisturbed one."
    done = qvk(*words)
    assert done.code == 0, done.err
    whole = out.with_name("whole")
    train(whole)
    assert figures(out) == figures(whole)
    alike(lora(out), lora(whole))


@pytest.mark.parametrize(
    "processes, ways", [(1, ((TERM, alone), (HUP, everyone))), (2, ((TERM, everyone), (HUP, alone)))]
)
def test_sft_goes_on(rows, tmp_path, processes, ways):
    config = SFTConfig(
        model="random:tiny",
        sequence_length=128,
        bf16=False,
        threads=1,
        batch_size=4,
        max_steps=16,
        eval_steps=2,
        eval_rows=8,
        processes=processes,
        **rows,
    )
    words, metrics = line("sft", config, tmp_path), tmp_path / "sft" / ".work" / "metrics.jsonl"
    for step, (number, send) in zip((3, 9), ways):
        preempt(words, tmp_path, lambda: metrics.is_file() and f'"step":{step},' in metrics.read_text(), number, send)  # noqa: B023
        assert (metrics.parent / "checkpoints" / f"checkpoint-{step - 1}").is_dir()
    resumes_alike(words, tmp_path / "sft", lambda whole: sft.run(config, whole))


def test_grpo_goes_on(tmp_path):
    config = GRPOConfig(adapter=str(student(tmp_path)), **SMALL_GRPO | GAMES | {"horizon": "s20"})
    place = tmp_path / "run"
    words, db = line("grpo", config, place), place / "grpo" / ".work" / "rollouts.db"

    def has_played(iteration: str) -> bool:
        with contextlib.suppress(InputError):  # the store is just being made
            return db.is_file() and iteration in set(traces.episodes(db).get("arm", ()))
        return False

    preempt(words, place, lambda: has_played("grpo-0001"), TERM, everyone)
    preempt(words, place, lambda: has_played("grpo-0002"), HUP, alone)
    resumes_alike(words, place / "grpo", lambda whole: grpo.run(config, whole))


def test_a_kernel_that_starts_is_ended(tmp_path):
    words = line("collect", CollectConfig(seeds="0", horizon="s5", **GAMES), tmp_path)
    scratch = tmp_path / "scratch"
    preempt(words, tmp_path, lambda: any(scratch.glob("tmp*.json")), TERM, alone)


def test_calls_that_hang_are_left(tmp_path, monkeypatch):
    "Four calls are in flight and never answered; what was answered before is not asked again."
    config, answered, limit = CollectConfig(**PLAY | {"seeds": "0-5"}), [], 0
    words, lock = line("collect", config, tmp_path), threading.Lock()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")

    def answer(number, body):
        with lock:
            if len(answered) < limit:
                answered.append(body["seed"])
                return by_seed(number, body)
        return "hang"

    for number, send in ((TERM, alone), (HUP, everyone)):
        limit += 6
        with Endpoint(answer) as endpoint:
            monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
            all_hang = lambda: endpoint.busy == 4 and len(answered) == limit  # noqa: B023
            preempt(words, tmp_path, all_hang, number, send)
    with Endpoint(by_seed) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        done = qvk(*words)
        assert done.code == 0, done.err
        asked = [body["seed"] for body in endpoint.bodies]
        collect.run(config, tmp_path / "whole")
    assert len(set(answered + asked)) == 6 * 4
    assert fingerprint(tmp_path / "collect" / "rollouts.db") == fingerprint(tmp_path / "whole" / "rollouts.db")


def test_a_terminal_that_closes_ends_it(tmp_path):
    words = line("collect", CollectConfig(seeds="0-99", horizon="s50", **GAMES), tmp_path)
    metrics = tmp_path / "collect" / ".work" / "metrics.jsonl"
    ours, theirs = pty.openpty()

    def log_in() -> None:
        by_default()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    ends = dict(stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=log_in)
    with started(words, tmp_path / "scratch", lambda: count(metrics) > 2, **ends) as process:
        os.close(theirs)
        os.close(ours)
    assert process.returncode == 129


def test_under_nohup_it_outlives_the_terminal(tmp_path):
    words = line("collect", CollectConfig(seeds="0-49", horizon="s50", **GAMES), tmp_path)
    metrics = tmp_path / "collect" / ".work" / "metrics.jsonl"
    nohup = dict(preexec_fn=lambda: signal.signal(HUP, signal.SIG_IGN))
    with started(words, tmp_path / "scratch", lambda: count(metrics) > 2, **nohup) as process:
        everyone(psutil.Process(process.pid), HUP)
        error = process.stderr.read()
    assert process.returncode == 0, error
