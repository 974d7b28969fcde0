"The command, as a real process: exit codes, one-line errors, resume, and what is left behind."

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import QVK, SMALL, one_line, qvk

from qwen_vl_kit.config import STAGES
from qwen_vl_kit.core import root
from qwen_vl_kit.runner import notebook, run
from qwen_vl_kit.runner.commands import main
from qwen_vl_kit.runner.notebook import RunFailed
from qwen_vl_kit.runner.run import run_all
from qwen_vl_kit.settings import Stage

pytestmark = pytest.mark.process


def test_a_stage_leaves_its_notebook_page_metrics_and_manifest(collected):
    folder = collected / "collect"
    assert {path.name for path in folder.iterdir()} == {
        "rollouts.db",
        "metrics.jsonl",
        "run.ipynb",
        "run.html",
        "manifest.json",
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["config"]["horizon"], manifest["numbers"]["episodes"]) == ("s5", 3)
    assert "iVBOR" in (folder / "run.html").read_text()  # pictures are in the page itself
    assert qvk("verify", collected)[0] == 0


def test_a_finished_stage_is_passed_over_and_another_config_refused(collected):
    before = (collected / "collect" / "manifest.json").read_bytes()
    assert qvk("collect", *SMALL, "--out", collected)[::2] == (0, "collect    already done\n")
    code, _, error = qvk("collect", *SMALL, "--set", "seed=9", "--out", collected)
    assert code == 2 and "an output folder of another run" in one_line(error) and "--force" in error
    assert (collected / "collect" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "sets", [['teacher="model"', 'model="tinyy"'], ['student="outputs/none"', 'teacher="expert"'], ['judge_model="x"']]
)
def test_force_deletes_nothing_while_the_input_is_bad(collected, sets):
    before = {path: path.read_bytes() for path in collected.rglob("*") if path.is_file()}
    code, _, error = qvk(
        "collect", *SMALL, "--force", *(word for one in sets for word in ("--set", one)), "--out", collected
    )
    assert code == 2 and one_line(error)
    assert {path: path.read_bytes() for path in collected.rglob("*") if path.is_file()} == before


def test_the_run_of_all_stages_does_a_stale_one_again(tmp_path, capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(
        run, "run_stage", lambda stage, *args, **_: bool(ran.append((stage, args[3]))) or stage == "benchmark"
    )
    monkeypatch.setattr(run, "state", lambda stage, *_: "stale" if stage == "benchmark" else "done")
    run_all("configs/demo", str(tmp_path))
    assert ran == [(stage, stage in ("benchmark", "report")) for stage in STAGES]
    assert "note: benchmark was made from other inputs than there are now, and is done again" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["grpo.horizon=t9", "sft.horizon=t9", "export.form=plain"])
def test_a_run_whose_stages_have_different_prompts_is_refused_before_anything_is_played(tmp_path, setting):
    code, said, error = qvk("run", "configs/demo", "--out", tmp_path / "run", "--set", setting)
    assert (code, said) == (2, "") and "is for another prompt than the rows that collect makes: " in one_line(error)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_loaded_leaves_nothing_in_the_way(tmp_path):
    sets = ["--set", 'teacher="model"', "--set", 'model="tinyy"']
    code, _, error = qvk("collect", *SMALL, *sets, "--out", tmp_path / "run")
    assert code == 2 and "did you mean 'tiny'?" in one_line(error) and not (tmp_path / "run").exists()


def test_a_truncated_store_is_bad_input_and_leaves_nothing(collected, tmp_path):
    torn = tmp_path / "rollouts.db"
    torn.write_bytes((collected / "collect" / "rollouts.db").read_bytes()[:5000])
    code, said, error = qvk(
        "export", "--config", "configs/demo", "--set", f'traces="{torn}"', "--out", tmp_path / "run"
    )
    assert (code, said) == (2, "") and str(torn) in one_line(error)
    assert not (tmp_path / "run" / "export").exists()


def test_a_row_whose_image_does_not_decode_is_bad_input(tmp_path):
    from qwen_vl_kit.protocol.turns import answer, messages, prompt_hash
    from qwen_vl_kit.runner.configs import load_config
    protocol = load_config("configs/demo", "collect")
    said = [
        *messages(protocol, ["data:image/png;base64,AAAA"], []),
        {"role": "assistant", "content": answer(protocol, ["do"], "x")},
    ]
    shown = protocol.model_dump(include=set(type(protocol).__mro__[1].model_fields))
    row = {"messages": said, "metadata": {"prompt_hash": prompt_hash(protocol), "protocol": shown, "seed": 1}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    sets = ["--set", f'train="{tmp_path}/train.jsonl"', "--set", f'val="{tmp_path}/train.jsonl"']
    code, _, error = qvk("sft", "--config", "configs/demo", *sets, "--out", tmp_path / "run")
    assert code == 2 and "train.jsonl:1" in one_line(error), error
    assert not (tmp_path / "run" / "sft").exists()


def test_ctrl_c_exits_130_and_a_later_call_goes_on(tmp_path):
    command = [
        "collect",
        "--config",
        "configs/demo",
        "--set",
        "seeds=0-99",
        "--set",
        "concurrency=4",
        "--out",
        str(tmp_path),
    ]
    heard = lambda: signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs, and so their children, do not hear Ctrl-C
    started = subprocess.Popen([*QVK, *command], cwd=root(), stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    metrics = tmp_path / "collect" / ".work" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n")):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.wait(60) == 130
    assert started.stderr.read().splitlines()[-1] == "qvk: interrupted; the same command resumes where it stopped"
    assert metrics.is_file() and not (tmp_path / "collect" / "manifest.json").exists()
    code, _, error = qvk("export", "--config", "configs/demo", "--out", tmp_path)
    assert code == 2 and "is unfinished, and export reads it" in one_line(error)
    assert qvk(*command)[0] == 0
    with (tmp_path / "collect" / "metrics.jsonl").open() as rows:
        assert len({json.loads(row)["seed"] for row in rows}) == 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_command_loads_is_no_traceback(tmp_path, number):
    (tmp_path / "pydantic.py").write_text(
        "import signal; print('loading', flush=True); signal.pause()"
    )  # the longest to load, and longer
    heard = lambda: signal.signal(number, signal.SIG_DFL)
    started = subprocess.Popen(
        [*QVK, "check", "configs/demo"],
        cwd=root(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root())])},
    )
    assert started.stdout.readline() == "loading\n"
    started.send_signal(number)
    assert (started.wait(60), started.stderr.read()) == (128 + number, "qvk: interrupted; nothing was begun\n")


@pytest.mark.parametrize(
    "args, says",
    [
        (["run", "configs/none"], "configs/none: no such folder"),
        (["run", "configs/demo", "--from", "grpo", "--to", "sft"], "grpo comes after sft"),
        (["run", "configs/demo", "--set", "sft.lerning_rate=1"], "did you mean 'learning_rate'?"),
        (["run", "configs/demo", "--set", "grpo.group_size=1"], "--set: key 'group_size'"),
        (["sft", "--config", "configs/demo/stf.toml"], "no such file; did you mean 'sft.toml'?"),
        (["sft", "--config", "configs/seed/crafter_rl_qwen3vl_2b.toml"], "is for grpo, not for sft"),
        (["check", "configs/demo/sft.toml", "--set", "epochs"], "write --set key=value"),
        (["show", "outputs/none"], "no such folder"),
        (["verify", "outputs/none"], "no such folder"),
        (["benchmrk"], "see qvk --help"),
        (
            ["sft", "--env-file", "keys", "--config", "configs/demo"],
            "unrecognized arguments: --env-file keys; see qvk --help",
        ),
        (
            ["train", "--type", "rl", "--config", "configs/seed/crafter_rl_qwen3vl_2b.toml", "--dataset", "x"],
            "--dataset: GRPO plays the game itself",
        ),
        (["sft"], "required: --config"),
        (
            ["eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--env-file", "/path/to/.env"],
            "/path/to/.env: cannot be read",
        ),
        (
            ["train", "--type", "rl", "--config", "configs/seed/crafter_qwen3vl_2b_gpt4o.toml"],
            "is for sft, not for grpo",
        ),
        (
            ["eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--seeds", ""],
            "--seeds: cannot read seeds from ''",
        ),
        (
            ["eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--seeds", "0-99999999999"],
            "--seeds: seeds '0-99999999999' are more",
        ),
        (
            ["eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--trace-db", "rollouts.db"],
            "put a folder before it",
        ),
        (["eval", "--config", "nowhere.toml"], f"{root()}/nowhere.toml: no such file"),
        (["collect", "--config", "configs/demo", "--env-file", "no.env"], f"{root()}/no.env: cannot be read"),
        (["collect", "--config", "configs/demo", "--out", "settings.ini/x"], "is a file; name another folder"),
        (
            ["eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--trace-db", "x.sqlite"],
            "always called rollouts.db",
        ),
    ],
)
def test_bad_input_exits_2_with_one_line(args, says, capsys, monkeypatch):
    monkeypatch.chdir(root())
    assert main(args) == 2
    out, error = capsys.readouterr()
    assert out == "" and says in one_line(error)


def test_a_teacher_without_its_key_names_the_variable(tmp_path):
    code, _, error = qvk("eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--seeds", "0-1",
                         "--trace-db", tmp_path / "traces" / "rollouts.db", without=["OPENAI_"])
    assert code == 2 and "OPENAI_API_KEY" in one_line(error)
    assert not (tmp_path / "traces").exists()


def test_the_seeds_lines_reach_the_stages(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(root())
    called = []
    monkeypatch.setattr(
        run, "run_stage", lambda stage, settings, out, *_, **__: called.append((stage, settings, Path(out)))
    )
    db = tmp_path / "traces" / "rollouts.db"
    for args in (
        ["eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--seeds", "0-99", "--trace-db", str(db)],
        ["filter", "--config", "configs/seed/filter_vision_test.toml"],
        ["train", "--type", "sft", "--config", "configs/seed/crafter_qwen3vl_2b_gpt4o.toml"],
        ["train", "--config", "configs/seed/crafter_rl_qwen3vl_2b.toml"],
    ):
        assert main(args) == 0
    (eval_, collect, traces), (filter_, _, rows), (sft, settings, adapter), (rl, rl_settings, rl_adapter) = called
    assert (eval_, filter_, sft, rl) == ("collect", "export", "sft", "grpo")
    assert (collect.seeds, collect.teacher, collect.model, collect.horizon, traces) == (
        "0-99",
        "model",
        "gpt-4o-mini",
        "t50",
        db.parent,
    )
    assert (
        rows == Path(settings.train).parent
        if Path(settings.train).is_absolute()
        else rows == root() / Path(settings.train).parent
    )
    assert adapter == root() / rl_settings.adapter
    assert rl_adapter.name == "qwen3vl_2b_crafter_rl_iter20"


def test_check_prints_every_value_and_tells_notices_apart(capsys, monkeypatch):
    monkeypatch.chdir(root())
    assert main(["check", "configs/seed"]) == 0
    out, error = capsys.readouterr()
    assert "kl_coeff" not in out and "beta = 0.1" in out and "value_clip_range" in error


def test_notices_are_told_before_a_run_and_only_of_what_may_run(tmp_path, capsys, monkeypatch):
    ran, done = [], {"collect", "export", "grpo"}  # grpo follows on sft, so it may have to run again
    monkeypatch.setattr(run, "run_stage", lambda stage, *_, noted, **__: bool(ran.append((stage, noted))))
    monkeypatch.setattr(run, "state", lambda stage, *_: "done" if stage in done else "new")
    monkeypatch.setattr(Stage, "notices", property(lambda settings: [type(settings).__name__]))
    run_all("configs/demo", str(tmp_path), last="benchmark")
    assert capsys.readouterr().err.splitlines() == ["note: SFTConfig", "note: GRPOConfig", "note: BenchmarkConfig"]
    assert ran == [(stage, True) for stage in list(STAGES)[:5]]
    done.update(STAGES)
    run_all("configs/demo", str(tmp_path))
    assert not capsys.readouterr().err


def test_a_crash_exits_1_and_keeps_the_notebook(tmp_path, collected, capsys, monkeypatch):
    monkeypatch.chdir(root())

    def broken(form, values, folder, threads):
        raise RunFailed("OSError: disk full; see run.ipynb")

    monkeypatch.setattr(notebook, "execute", broken)
    assert main(["collect", *SMALL, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "qvk: OSError: disk full; see run.ipynb"
    assert (tmp_path / "collect" / ".work").is_dir()  # so that no stage reads it


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A project of its own with a subfolder `work`, in which the user stands; what would run is noted as (stage,
    settings, out)."""
    called = []
    monkeypatch.setattr(
        run, "run_stage", lambda stage, settings, out, *_, **__: called.append((stage, settings, Path(out)))
    )
    monkeypatch.delenv("QVK_ROOT", raising=False)
    (tmp_path / "configs").symlink_to(root() / "configs")
    (tmp_path / "desk" / "rows").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[qvk]\noutputs = 50% off\n")
    monkeypatch.chdir(tmp_path / "desk")
    return called


def test_paths_of_a_command_are_seen_from_where_it_is_given(elsewhere, tmp_path):
    work, rows = (
        tmp_path / "desk",
        "desk/rows",
    )  # told from the project's folder, so that a config is the same from everywhere
    for name in ("rows/train.jsonl", "rows/val.jsonl", "rows/a.db", "other.db"):
        (work / name).write_text("")
    (tmp_path / "other.db").write_text("")
    sft = "configs/seed/crafter_qwen3vl_2b_gpt4o.toml"
    for line, stage, out, fields in (
        ("collect --config ../configs/demo --out here", "collect", work / "here/collect", {}),
        ("collect --config configs/demo --out ./new/../here/", "collect", work / "here/collect", {}),
        ("collect --config configs/demo", "collect", tmp_path / "50% off/demo/collect", {"student": ""}),
        (
            "eval --config configs/seed/eval_gpt4o_vision_proper.toml --trace-db t/rollouts.db",
            "collect",
            work / "t",
            {"model": "gpt-4o-mini"},
        ),
        (
            f"train --config {sft} --dataset rows/train.jsonl",
            "sft",
            tmp_path / "lora_adapters/qwen3vl_2b_crafter_gpt4o",
            {"train": f"{rows}/train.jsonl", "val": ""},
        ),
        (
            f"train --config {sft}",
            "sft",
            tmp_path / "lora_adapters/qwen3vl_2b_crafter_gpt4o",  # a TOML's paths are the project's
            {"train": "traces/gpt4o_vision_100/sft/train.jsonl"},
        ),
        (
            "sft --config configs/demo --set train=rows/train.jsonl --set val=../desk/rows/val.jsonl",
            "sft",
            tmp_path / "50% off/demo/sft",
            {"train": f"{rows}/train.jsonl", "val": f"{rows}/val.jsonl", "model": "tiny"},
        ),
        (
            "export --config configs/demo --set traces=['rows/a.db','other.db']",
            "export",
            tmp_path / "50% off/demo/export",
            {"traces": [f"{rows}/a.db", "desk/other.db"]},
        ),
        (
            "benchmark --config configs/demo --set sft_adapter=rows --set grpo_adapter=none",
            "benchmark",
            tmp_path / "50% off/demo/benchmark",
            {"sft_adapter": rows, "grpo_adapter": str(tmp_path / "none")},
        ),
        (
            "collect --config configs/demo --set student=configs",
            "collect",
            tmp_path / "50% off/demo/collect",
            {"student": "configs"},
        ),
    ):
        assert main(line.split()) == 0, line
        did, settings, place = elsewhere.pop()
        assert (did, place, {name: getattr(settings, name) for name in fields}) == (stage, out, fields), line


def test_a_store_is_made_where_the_user_stands(collected, tmp_path):
    (tmp_path / "x").mkdir()
    store = os.path.relpath(collected / "collect" / "rollouts.db", tmp_path / "x")
    done = subprocess.run([*QVK, "merge", "new/all.db", store], cwd=tmp_path / "x", capture_output=True, text=True,
                          env=os.environ | {"QVK_ROOT": str(root()), "PYTHONPATH": str(root())})
    assert done.returncode == 0 and "3 episodes copied" in done.stdout and (tmp_path / "x/new/all.db").is_file(), (
        done.stderr
    )


@pytest.mark.parametrize(
    "out, says",
    [
        ("a\udcff", "not UTF-8"),
        ("x" * 300, "file name too long; give it a shorter name"),
        ("circle", "symbolic links"),
        ("file", "is a file; name another folder"),
        ("nowhere", "there is a file of that name"),
    ],
)
def test_names_that_cannot_be_are_one_line(tmp_path, out, says, capsys, monkeypatch):
    monkeypatch.setattr(notebook, "execute", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("not here")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.chdir(root())
    assert main(["collect", *SMALL, "--out", f"{tmp_path}/{out}"]) == 2
    assert says in one_line(capsys.readouterr().err) and sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(
    subprocess.run(["sh", "-c", "unshare -rm true"], capture_output=True).returncode != 0,
    reason="no disk can be mounted here",
)
def test_a_finished_stage_needs_no_disk_that_can_be_written(collected, tmp_path):
    mounted = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && ! touch "$0/x" 2>/dev/null && exec "$@"'
    for words in (
        ["collect", *SMALL, "--out", collected],
        ["verify", collected],
        ["export", "--config", "configs/demo", "--set", f"traces={collected}/collect/rollouts.db", "--out", tmp_path],
    ):
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mounted, collected, *QVK, *words], cwd=root(), capture_output=True, text=True
        )
        assert done.returncode == 0 and (words[0] != "collect" or "already done" in done.stderr), done.stderr


def test_config_and_env_file_are_looked_for_where_the_user_stands(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(run, "run_stage", lambda stage, settings, *_, **__: called.append(settings.seeds))
    monkeypatch.setenv("QVK_ROOT", str(root()))
    monkeypatch.setenv("QVK_TEST_B", "")
    monkeypatch.delenv("QVK_TEST_B")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "collect.toml").write_text('seeds = "7"\n')
    (tmp_path / "keys").write_text("QVK_TEST_B=here\n")
    assert main(["collect", "--config", "collect.toml", "--env-file", "keys"]) == 0
    assert called == ["7"] and os.environ["QVK_TEST_B"] == "here"
