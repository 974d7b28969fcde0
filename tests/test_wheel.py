"The wheel, installed where there is no clone: what it declares, what it holds, and a run from `qvk new` to the report."

import ast
import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions

import pytest
from commands import qvk

from qwen_vl_kit.core import root

SMALL = {
    "collect.seeds": "0-7",
    "horizon": "s10",
    "sft.max_steps": 4,
    "sft.eval_steps": 4,
    "sft.batch_size": 8,
    "sft.eval_rows": 8,
    "grpo.iterations": 1,
    "grpo.groups": 2,
    "grpo.group_size": 2,
    "grpo.batch_size": 20,
    "grpo.gradient_accumulation_steps": 1,
    "benchmark.seeds": "1000000-1000001",
}


def test_every_imported_package_is_declared():
    "In `dependencies`, or in an extra where the import is optional."
    project = tomllib.loads((root() / "pyproject.toml").read_text())["project"]
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    declared = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in project["dependencies"] + extras}
    optional = {"flash_attn", "tensorboard", "wandb", "mlflow", "trackio"}  # used where they are installed
    distributions, missing = packages_distributions(), set()
    for path in (root() / "qwen_vl_kit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for package in (
                {name.partition(".")[0] for name in names} - sys.stdlib_module_names - optional - {"qwen_vl_kit"}
            ):
                provided = distributions.get(package, [package])
                if not declared & {name.lower().replace("_", "-") for name in provided}:
                    missing.add(f"{package} ({path.name})")
    assert not missing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the project."
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints")
    for name in ("qwen_vl_kit", "configs", "nbs/forms"):
        shutil.copytree(root() / name, source / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root() / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        place,
        ".",
    ]
    subprocess.run(command, cwd=source, check=True)
    [built] = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    "An empty folder, and the environment variables under which Python finds the unpacked wheel before anything else."
    site, folder = wheel.parent / "site", tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(site)
    return folder, {"PYTHONPATH": os.pathsep.join([str(site)]), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_the_wheel_holds_forms_and_configs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("nbs/forms", "*.ipynb"), ("configs", "*/*.toml"), ("qwen_vl_kit", "**/*.py")):
        inside = "forms" if folder == "nbs/forms" else "configs" if folder == "configs" else ""
        found = [path.relative_to(root() / folder).as_posix() for path in (root() / folder).glob(pattern)]
        assert found and {f"qwen_vl_kit/{inside}/{name}".replace("//", "/") for name in found} <= names
    assert "qwen_vl_kit/tiny/model.safetensors" in names


@pytest.mark.slow
@pytest.mark.process
def test_without_a_clone_a_new_folder_of_configs_is_run_to_its_report(elsewhere):
    folder, variables = elsewhere
    command = dict(cwd=folder, without=["QVK_", "PYTHON"], **variables)
    imported = subprocess.run(
        [sys.executable, "-c", "import qwen_vl_kit; print(qwen_vl_kit.__file__)"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    assert variables["PYTHONPATH"] in imported.stdout, "the clone was imported, not the wheel"
    new = qvk("new", "my-run", **command)
    assert new.code == 0 and "qvk run my-run" in new.out, new.err
    assert {path.name for path in (folder / "my-run").iterdir()} == {
        path.name for path in (root() / "configs" / "demo").iterdir()
    }
    again = qvk("new", "my-run", **command)
    assert again.code == 2 and "my-run" in again.err  # nothing is overwritten
    done = qvk(
        "run", "my-run", *(word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")), **command
    )
    assert done.code == 0, done.out + done.err
    [report] = folder.rglob("report/run.html")
    assert str(report.relative_to(folder)) in done.out
    rows = csv.DictReader(open(report.parents[1] / "benchmark" / "arms.csv"))
    assert [row["arm"] for row in rows] == ["random", "base", "sft", "grpo", "expert"]
