"The house: stage notebooks define nothing and hold the config's fields; rooms import downwards; every module has its notebook."

import ast
import re
from pathlib import Path

import nbformat
import pytest

from qwen_vl_kit import config
from qwen_vl_kit.core import root

NOTEBOOKS = root() / "nbs"
HANDS_OVER = {("run", "perf")}  # `qvk perf` is perf's own command; nothing of perf is used
ROOMS = {path.stem.split("_", 1)[1]: place for place, path in enumerate(sorted(NOTEBOOKS.glob("[0-9][0-9]*_*.ipynb")))}


def code(path: Path) -> list:
    "The code cells of a notebook."
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_there_is_one_stage_notebook_a_stage():
    assert sorted(path.stem for path in (NOTEBOOKS / "stages").glob("*.ipynb")) == \
        sorted(f"{number}_{stage}" for number, stage in enumerate(config.STAGES, 1))


@pytest.mark.parametrize("number, stage", list(enumerate(config.STAGES, 1)))
def test_parameters_are_the_fields_and_defaults_of_the_config(number, stage):
    [cell] = [cell for cell in code(NOTEBOOKS / "stages" / f"{number}_{stage}.ipynb") if "parameters" in cell.metadata.get("tags", [])]
    assert cell.source.splitlines()[0] == 'out = ""'
    values = {}
    exec(cell.source, values)
    fields = {name: field.default for name, field in config.STAGES[stage].model_fields.items()}
    found = {name: value for name, value in values.items() if name != "__builtins__"}
    assert list(found.items()) == list({"out": "", **fields}.items())


@pytest.mark.parametrize("path", sorted((NOTEBOOKS / "stages").glob("*.ipynb")), ids=lambda path: path.stem)
def test_stage_notebooks_define_and_export_nothing(path):
    for cell in code(path):
        assert "#| export" not in cell.source and "default_exp" not in cell.source
        defined = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))]
        assert not defined, ast.unparse(defined[0])


def test_every_room_has_one_module_and_every_module_one_room():
    named = [re.search(r"#\| default_exp (\w+)", "\n".join(cell.source for cell in code(path)))[1]
             for path in sorted(NOTEBOOKS.glob("[0-9][0-9]*_*.ipynb"))]
    assert named == list(ROOMS)
    modules = {path.stem for path in (root() / "qwen_vl_kit").glob("*.py")} - {"__init__", "_modidx"}
    assert modules == set(named)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_below(room):
    tree = ast.parse((root() / "qwen_vl_kit" / f"{room}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level == 1 or (node.module or "").startswith("qwen_vl_kit")):
            module = (node.module or "").removeprefix("qwen_vl_kit").lstrip(".")
            for imported in [module] if module else [alias.name for alias in node.names]:
                if (room, imported) not in HANDS_OVER:
                    assert imported in ROOMS and ROOMS[imported] < ROOMS[room], f"{room} imports {imported}"


def test_importing_the_package_and_the_command_loads_nothing_heavy():
    import subprocess
    import sys
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "pandas", "matplotlib", "papermill", "nbconvert", "IPython", "numpy", "httpx2",
             "openai", "huggingface_hub", "safetensors", "bitsandbytes"]
    said = f"import sys, qwen_vl_kit, qwen_vl_kit.cli, qwen_vl_kit.run; qwen_vl_kit.run.parser(); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.strip() == "[]"
