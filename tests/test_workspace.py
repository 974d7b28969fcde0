"""The folder of a stage when a run in it fails, is interrupted, is killed or fills the disk: old outputs stay, work
is resumed, files move once."""

import errno
import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
from commands import SMALL, one_line
from stores import noise_store

from qwen_vl_kit.config import GRPOConfig
from qwen_vl_kit.core import MANIFEST, WORK, InputError, Result, root
from qwen_vl_kit.runner import notebook, run, workspace
from qwen_vl_kit.runner.commands import main
from qwen_vl_kit.runner.notebook import RunFailed
from qwen_vl_kit.runner.run import run_stage
from qwen_vl_kit.runner.workspace import CONFIG, prepare, settle, state
from qwen_vl_kit.store import manifest
from qwen_vl_kit.store.traces import episodes

pytestmark = pytest.mark.process

CALLS = ('{"call":1,"model":"m","worst":[9,9],"key":[],"again":0}\n'
         '{"call":1,"billed":false,"answered":false}\n')  # one that was refused
NOTEBOOK = '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'


def contents(folder: Path, work: bool = True) -> dict:
    "Every file below a folder, hidden ones too, by relative name; without those in `.work` folders if not `work`."
    files = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {path: data for path, data in files.items() if work or ".work" not in path.parts}


@pytest.fixture
def finished(collected, tmp_path):
    "A copy of a finished collection, with a file of the user's and a folder of another stage inside."
    out = tmp_path / "traces" / "x"
    shutil.copytree(collected / "collect", out)
    (out / "notes.txt").write_text("mine")
    (out / "sft").mkdir()
    (out / "sft" / "train.jsonl").write_text("rows")
    return out


def executes(monkeypatch, *, raises=None, files=(), store=0, ends=False):
    "Let a stage's notebook write `files`, a `store` of so many episodes, and, if it `ends`, its manifest; then raise."
    def execute(form, values, folder, threads):
        assert {path.name for path in folder.iterdir()} >= {CONFIG} and "/.work" not in values["out"]
        for name, text in {"run.ipynb": NOTEBOOK, **dict(files)}.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        if store:
            noise_store(folder / "rollouts.db", range(store))
        if ends:
            stage, settings = ends
            manifest.write(folder, Result(stage, folder, 1.0), settings)
        if raises:
            raise raises
    monkeypatch.setattr(notebook, "execute", execute)


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        OSError(errno.ENOSPC, "No space left on device"),
        BrokenPipeError(),
        RuntimeError("a bug"),
        InputError("no rows"),
        RunFailed("RuntimeError: broken; see run.ipynb"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_force_deletes_nothing_when_the_run_does_not_end(finished, small, monkeypatch, error):
    before = contents(finished)
    executes(monkeypatch, raises=error, files={"calls.jsonl": CALLS})
    with pytest.raises(type(error)):
        run_stage("collect", small, finished, force=True)
    assert contents(finished, work=False) == before and state("collect", small, finished) == "done"
    if isinstance(error, RunFailed):  # its notebook is there to be looked at
        assert (finished / ".work" / "run.ipynb").read_text() == NOTEBOOK
    else:
        assert contents(finished) == before


def test_what_a_failed_run_has_played_is_resumed_by_the_same_config_refused_to_another_and_discarded_by_force(
    finished, small, monkeypatch
):
    before, other = contents(finished), small.model_copy(update={"seed": 5})
    executes(monkeypatch, raises=KeyboardInterrupt(), store=2)
    with pytest.raises(KeyboardInterrupt):
        run_stage("collect", other, finished, force=True)
    assert contents(finished, work=False) == before
    assert [state("collect", config, finished) for config in (small, other)] == ["done", "incomplete"]
    with pytest.raises(InputError, match="holds an unfinished run whose config differs \\(seed\\)"):
        state("collect", small.model_copy(update={"seed": 6}), finished)

    def resumed(form, values, folder, threads):
        assert (folder / "rollouts.db").is_file()
        manifest.write(folder, Result("collect", folder, 1.0), other)

    monkeypatch.setattr(notebook, "execute", resumed)
    assert run_stage("collect", other, finished)
    assert state("collect", other, finished) == "done" and not (finished / ".work").exists()
    assert (finished / "notes.txt").read_text() == "mine" and (finished / "sft" / "train.jsonl").read_text() == "rows"
    executes(monkeypatch, raises=KeyboardInterrupt(), store=1)
    for _ in range(2):  # the second one begins with an empty folder
        with pytest.raises(KeyboardInterrupt):
            run_stage("collect", small, finished, force=True)
    assert len(episodes(finished / ".work" / "rollouts.db")) == 1


@pytest.mark.parametrize(
    "error",
    [RunFailed("KeyError: 'a'", Path("somewhere/.work/run.ipynb")), InputError("no table")],
    ids=["broken", "input"],
)
def test_a_stage_whose_page_fails_is_done(finished, small, monkeypatch, error):
    executes(monkeypatch, raises=error, files={"metrics.jsonl": "new"}, ends=("collect", small))
    with pytest.raises(RunFailed, match="see .*/x/run.ipynb"):
        run_stage("collect", small, finished, force=True)
    assert state("collect", small, finished) == "done" and not (finished / ".work").exists()
    assert (finished / "metrics.jsonl").read_text() == "new" and not (finished / "rollouts.db").exists()


def test_what_stands_in_a_folder_without_a_manifest_stays(tmp_path, small, monkeypatch):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("copied here")
    before = contents(tmp_path)
    executes(monkeypatch, raises=InputError("no rows"))
    with pytest.raises(InputError, match="no rows"):
        run_stage("collect", small, tmp_path, force=True)
    assert contents(tmp_path) == before


@pytest.fixture
def trained(tmp_path):
    "A finished GRPO of one iteration, and its config."
    config = GRPOConfig(model="tiny", iterations=1)
    for name in (
        "adapter/weights",
        "rollouts.db",
        "metrics.jsonl",
        "run.ipynb",
        "run.html",
        "checkpoints/checkpoint-9/weights",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    manifest.write(tmp_path, Result("grpo", tmp_path, 1.0), config)
    return tmp_path, config


def test_a_finished_run_that_is_extended_and_does_not_end_is_finished_still(trained, monkeypatch):
    out, config = trained
    before, more = contents(out), config.model_copy(update={"iterations": 2})
    for error in (KeyboardInterrupt(), InputError("the judge refuses"), OSError(errno.ENOSPC, "full")):
        executes(monkeypatch, raises=error, files={"metrics.jsonl": "one more line, and no checkpoint"})
        with pytest.raises(type(error)):
            run_stage("grpo", more, out)
        assert contents(out) == before
    executes(monkeypatch, raises=KeyboardInterrupt(), files={"checkpoints/checkpoint-18/weights": "new"})
    with pytest.raises(KeyboardInterrupt):
        run_stage("grpo", more, out)
    assert contents(out, work=False) == before
    assert [state("grpo", settings, out) for settings in (config, more)] == ["done", "incomplete"]
    executes(monkeypatch, files={"adapter/weights": "new"}, ends=("grpo", more))
    assert run_stage("grpo", more, out) and manifest.verify(out) == []
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-18", "checkpoint-9"]


def test_only_checkpoints_are_linked(trained):
    out, config = trained
    work = prepare("grpo", config.model_copy(update={"iterations": 2}), out, resume=True)
    links = {path.relative_to(work).as_posix(): path.stat().st_nlink for path in work.rglob("*") if path.is_file()}
    assert links == {CONFIG: 1, "metrics.jsonl": 1, "rollouts.db": 1, "checkpoints/checkpoint-9/weights": 2}


# ---- kill -9

CHANGES = ("unlink", "rename", "replace", "rmdir", "mkdir", "link")


def killed_at(step: int, act) -> bool:
    """Do `act` in a process of its own, which kills itself before it changes the disk for the so manieth time;
    whether it was killed."""
    if pid := os.fork():
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    try:
        left = iter(range(step))

        def counting(call):
            def counted(*args, **kwargs):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return counted

        for name in CHANGES:
            setattr(os, name, counting(getattr(os, name)))
        act()
    finally:
        os._exit(0)


def test_a_run_over_a_finished_one_that_is_killed_anywhere_leaves_the_old_outputs_or_the_new_ones(
    finished, small, monkeypatch
):
    executes(
        monkeypatch, files={"metrics.jsonl": "new", "calls.jsonl": "", "deep/er/file": "new"}, ends=("collect", small)
    )
    monkeypatch.setattr(run, "check_access", lambda *_: None)
    kept, home = finished.parent / "kept", contents(finished)
    shutil.copytree(finished, kept)
    mine = {Path("notes.txt"), Path("sft/train.jsonl")}
    old = new = step = 0
    while True:
        shutil.rmtree(finished)
        shutil.copytree(kept, finished)
        killed = killed_at(step, lambda: run_stage("collect", small, finished, force=True))
        succeeded = (
            workspace.has_succeeded(finished) or contents(finished, work=False).get(Path("metrics.jsonl")) == b"new"
        )
        if not succeeded:
            assert contents(finished, work=False).items() >= home.items(), step
        assert run_stage("collect", small, finished) is False, step  # done, whichever it is
        left = {path: data for path, data in contents(finished, work=False).items() if path.name != ".lock"}
        assert {path: left[path] for path in mine} == {path: home[path] for path in mine}, step
        if succeeded:
            assert set(left) - mine == {
                Path(name)
                for name in ("metrics.jsonl", "calls.jsonl", "deep/er/file", "run.ipynb", "manifest.json", "run.html")
            }, step
            assert not (finished / ".work").exists(), step
        else:
            assert left == home, step
        old, new, step = old + (not succeeded), new + succeeded, step + 1
        if not killed:
            break
    assert old > 10 and new > 10


def test_an_extension_that_is_killed_while_it_is_prepared_begins_again(trained):
    out, config = trained
    more, before, step = config.model_copy(update={"iterations": 2}), contents(out), 0
    while killed_at(step, lambda: prepare("grpo", more, out, resume=True)):
        assert contents(out, work=False) == before, step
        assert state("grpo", more, out) == "incomplete", step
        settle(out)
        work = prepare("grpo", more, out, resume=True)
        assert {path.name for path in work.iterdir()} == {CONFIG, "checkpoints", "metrics.jsonl", "rollouts.db"}, step
        assert (work / "checkpoints" / "checkpoint-9" / "weights").read_text() == "checkpoints/checkpoint-9/weights"
        workspace.discard(out)
        step += 1
    assert step > 4


# ---- two at once, names and disks


def test_of_two_that_start_together_one_runs(tmp_path, small, monkeypatch):
    began, end, ran = threading.Event(), threading.Event(), []

    def slow(form, values, folder, threads):
        ran.append(folder)
        began.set()
        assert end.wait(30)
        raise RunFailed("ended")

    def first():
        with pytest.raises(RunFailed):
            run_stage("collect", small, tmp_path)

    monkeypatch.setattr(notebook, "execute", slow)
    monkeypatch.setattr(run, "state", lambda *_: "new")  # both have looked before either began
    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert began.wait(30)
        for force in (False, True):
            with pytest.raises(InputError, match="is being written by another process"):
                run_stage("collect", small, tmp_path, force)
    finally:
        end.set()
        thread.join()
    assert len(ran) == 1 and (tmp_path / ".work" / CONFIG).is_file()


def test_only_folders_that_the_command_made_are_taken_away(tmp_path, small, monkeypatch):
    executes(monkeypatch, raises=InputError("no such file", "rollouts.db"))
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir(mode=0o750)
    link.symlink_to(there)
    for out in (there, link, tmp_path / "new" / "x" / "sft"):
        with pytest.raises(InputError, match="no such file"):
            run_stage("collect", small, out)
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"} and not any(there.iterdir())


def test_a_refused_folder_says_what_force_would_delete(collected, small):
    with pytest.raises(InputError, match="another run") as error:
        state("collect", small.model_copy(update={"seed": 9}), collected / "collect", "--trace-db")
    reason = str(error.value)
    assert (
        "--trace-db" in reason
        and "qvk merge" in reason
        and "deletes metrics.jsonl, rollouts.db" in reason
        and "--out" not in reason
    )


def test_a_full_disk_is_one_line_and_keeps_what_was_played(tmp_path, small, monkeypatch, capsys):
    work = tmp_path / "collect" / ".work"
    full = OSError(errno.ENOSPC, "No space left on device", str(work / "rollouts.db"))
    executes(monkeypatch, raises=full, files={"rollouts.db": "played"})
    monkeypatch.chdir(root())
    assert main(["collect", *SMALL, "--out", str(tmp_path)]) == 2
    assert one_line(capsys.readouterr().err).endswith(
        "rollouts.db: no space left on device; free some space, then give the same command again"
    )
    assert (work / "rollouts.db").is_file() and (work / CONFIG).is_file()


@pytest.mark.parametrize("step", ["prepare", "write_json"])
def test_force_onto_a_full_disk_deletes_nothing(finished, small, monkeypatch, step):
    place = run if step == "prepare" else workspace
    first = getattr(place, step)

    def full(*args, **kwargs):
        if step == "prepare":  # part of it is there
            first(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(place, step, full)
    before = contents(finished)
    with pytest.raises(InputError, match="no space left on device"):
        run_stage("collect", small, finished, force=True)
    assert contents(finished) == before


def test_no_file_of_a_finished_stage_names_the_folder_it_was_written_in(collected):
    files = contents(collected)
    assert (
        len(files) == 5 and [path for path, data in files.items() if b".work" in data.replace(b".workspace", b"")] == []
    )
    notebook_json = json.loads(files[Path("collect/run.ipynb")])
    parameters = "".join(
        "".join(cell["source"])
        for cell in notebook_json["cells"]
        if "injected-parameters" in cell["metadata"].get("tags", [])
    )
    assert f'out = "{collected / "collect"}"' in parameters


DAMAGED = ["", "null", "[]", "{}", '{"config": 5, "inputs": {}, "outputs": {}, "began_with": {}}']


@pytest.mark.parametrize("name", [MANIFEST, f"{WORK}/{CONFIG}"])
@pytest.mark.parametrize("text", DAMAGED)
def test_a_record_that_was_damaged_by_hand_is_one_line(trained, name, text):
    "It is refused with what to do, and no traceback."
    out, config = trained
    (out / WORK / "checkpoints").mkdir(parents=True)
    (out / name).write_text(text)
    with pytest.raises(InputError, match=f"{re.escape(name)}: .*--force"):
        state("grpo", config, out)


def test_verify_says_that_a_move_was_interrupted(trained, capsys):
    "What the manifests say cannot be compared with files that are on their way."
    out, config = trained
    prepare("grpo", config, out)
    (out / WORK / CONFIG).unlink()
    (out / MANIFEST).rename(out / WORK / MANIFEST)
    assert main(["verify", str(out.parent)]) == 2
    line = one_line(capsys.readouterr().err)
    assert "its files have not all moved up; give the command that was interrupted again" in line
    settle(out)
    assert main(["verify", str(out)]) == 0
