"The speed measurements outside the package: exported from nbs/perf, and reached by `qvk perf` in a clone only."
import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from qwen_vl_kit.core import root

BENCHMARKS, NOTEBOOKS = root() / "benchmarks", root() / "nbs" / "perf"
WRITTEN_BY_HAND = {"__init__", "__main__"}


def test_modules_are_what_the_notebooks_export(tmp_path):
    spec = importlib.util.spec_from_file_location("tidy", root() / "nbs" / "tidy.py")
    tidy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tidy)
    tidy.export_benchmarks(tmp_path / "benchmarks")
    modules = {path.stem for path in BENCHMARKS.glob("*.py")} - WRITTEN_BY_HAND
    assert modules == {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    for module in modules:
        fresh, stored = ((folder / f"{module}.py").read_text() for folder in (tmp_path / "benchmarks", BENCHMARKS))
        cells = [re.split(r"(?m)^# %% .*/nbs/perf/", text)[1:] for text in (fresh, stored)]
        assert cells[0] == cells[1], f"benchmarks/{module}.py: run nbs/tidy.py"


@pytest.mark.process
def test_perf_is_the_benchmarks_command():
    code = "import sys; from qwen_vl_kit.runner.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "perf", "stor"], capture_output=True, text=True, cwd=root())
    assert (done.returncode, done.stdout) == (2, "") and "did you mean 'store'?" in done.stderr


@pytest.mark.process
def test_without_a_clone_perf_says_where_benchmarks_are(tmp_path):
    shutil.copytree(root() / "qwen_vl_kit", tmp_path / "qwen_vl_kit", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
        "from qwen_vl_kit.runner.cli import main; sys.exit(main(['perf', 'store']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1) and "clone" in done.stderr


def test_the_package_does_not_import_benchmarks():
    for path in (root() / "qwen_vl_kit").rglob("*.py"):
        assert not re.search(r"(?m)^\s*(from|import) benchmarks", path.read_text()), path
