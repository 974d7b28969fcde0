"""The house: stage notebooks define nothing and hold the config's fields; rooms import downwards; every module has
its notebook."""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from qwen_vl_kit.config import STAGES
from qwen_vl_kit.core import root

NOTEBOOKS = root() / "nbs"
FLOORS = [
    "core",
    "settings",
    "config",
    "process",
    "game",
    "protocol",
    "expert",
    "model",
    "engine",
    "store",
    "play",
    "learn",
    "show",
    "foreign",
    "stages",
    "runner",
]


def default_exp(path: Path) -> str:
    "The module that a library notebook exports to, dotted below the package; empty if it exports none."
    found = re.search(r"#\| default_exp ([\w.]+)", "\n".join(cell.source for cell in code(path)))
    return found[1] if found else ""


def library() -> dict[str, Path]:
    """Every room and its notebook, from the ground up: floors in the order of `FLOORS`, the rooms of a floor in the
    order of their numbers."""
    paths = [path for path in NOTEBOOKS.rglob("[0-9][0-9]*_*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    rooms = [(room, path) for path in paths if (room := default_exp(path))]
    return dict(sorted(rooms, key=lambda pair: (FLOORS.index(pair[0].split(".")[0]), pair[1].name)))



def code(path: Path) -> list:
    "The code cells of a notebook."
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def test_there_is_one_stage_notebook_a_stage():
    assert sorted(path.stem for path in (NOTEBOOKS / "forms").glob("*.ipynb")) == \
        sorted(f"{number}_{stage}" for number, stage in enumerate(STAGES, 1))


@pytest.mark.parametrize("number, stage", list(enumerate(STAGES, 1)))
def test_parameters_are_the_fields_and_defaults_of_the_config(number, stage):
    [cell] = [
        cell
        for cell in code(NOTEBOOKS / "forms" / f"{number}_{stage}.ipynb")
        if "parameters" in cell.metadata.get("tags", [])
    ]
    assert cell.source.splitlines()[0] == 'out = ""'
    values = {}
    exec(cell.source, values)
    fields = {name: field.default for name, field in STAGES[stage].model_fields.items()}
    found = {name: value for name, value in values.items() if name != "__builtins__"}
    assert list(found.items()) == list({"out": "", **fields}.items())


@pytest.mark.parametrize("path", sorted((NOTEBOOKS / "forms").glob("*.ipynb")), ids=lambda path: path.stem)
def test_stage_notebooks_define_and_export_nothing(path):
    for cell in code(path):
        assert "#| export" not in cell.source and "default_exp" not in cell.source
        defined = [
            node
            for node in ast.walk(ast.parse(cell.source))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda))
        ]
        assert not defined, ast.unparse(defined[0])


ROOMS = library()
RANKS = {room: rank for rank, room in enumerate(ROOMS)}


def test_every_room_has_one_module_and_every_module_one_room():
    package = root() / "qwen_vl_kit"
    modules = {".".join(path.relative_to(package).with_suffix("").parts) for path in package.rglob("*.py")}
    assert {module for module in modules if module.split(".")[-1] not in ("__init__", "_modidx")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_below(room):
    tree = ast.parse((root() / "qwen_vl_kit" / f"{room.replace('.', '/')}.py").read_text())
    floor = room.split(".")[:-1]
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").startswith("qwen_vl_kit")):
            continue
        base = floor[:len(floor) + 1 - node.level] if node.level else []
        module = ".".join([*base, *(node.module or "").removeprefix("qwen_vl_kit").strip(".").split(".")]).strip(".")
        for imported in [module] if module in RANKS else [f"{module}.{alias.name}".strip(".") for alias in node.names]:
            assert imported in RANKS and RANKS[imported] < RANKS[room], f"{room} imports {imported}"


# by room, what may be imported; World and so on as types
OF_THE_GAME = {"description": {"GAME"}, "images": None, "world": {"World", "Observation", "View"}}


@pytest.mark.parametrize("room", [room for room in ROOMS if FLOORS.index(room.split(".")[0]) > FLOORS.index("game")
                                  and not room.startswith("expert.")])
def test_above_its_floor_the_game_is_one_description(room):
    tree = ast.parse((root() / "qwen_vl_kit" / f"{room.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and re.search(r"(^|\.)game(\.|$)", node.module or ""):
            names, allowed = {alias.name for alias in node.names}, OF_THE_GAME.get(node.module.split(".")[-1], set())
            assert allowed is None or names <= allowed, f"{room} imports {names} from {node.module}: ask GAME"
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "World" not in calls, f"{room} makes a World: ask GAME.world"


def test_importing_the_package_and_the_command_loads_nothing_heavy():
    import subprocess
    import sys

    heavy = [
        "torch",
        "transformers",
        "trl",
        "peft",
        "datasets",
        "pandas",
        "matplotlib",
        "papermill",
        "nbconvert",
        "IPython",
        "numpy",
        "httpx2",
        "openai",
        "huggingface_hub",
        "safetensors",
        "bitsandbytes",
    ]
    said = (
        "import sys, qwen_vl_kit, qwen_vl_kit.runner.cli, qwen_vl_kit.runner.commands; "
        f"qwen_vl_kit.runner.commands.parser(); print([m for m in {heavy} if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
