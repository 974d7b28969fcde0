"README, CONTRIBUTING and the notebooks in git: what they say works, and they hold what a reader needs and no more."

import json
import re
import shlex
import subprocess
import sys

import pytest

from qwen_vl_kit.core import root

README = (root() / "README.md").read_text()
LIBRARY = [path for path in sorted((root() / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in path.parts]


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1000


@pytest.mark.process
def test_the_readmes_code_draws_its_picture(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "docs").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    picture = root() / "docs" / "film.png"
    assert f"]({picture.relative_to(root())})" in README and picture.stat().st_size < 100_000
    assert (tmp_path / "docs" / "film.png").read_bytes() == picture.read_bytes()


def test_the_readmes_commands_are_commands():
    from qwen_vl_kit.runner.commands import parser

    commands = re.findall(r"^    qvk (.*?)(?:  +.*)?$", README, re.MULTILINE)
    assert len(commands) > 10
    for words in map(shlex.split, commands):
        parser().parse_args(words)
        for path in re.findall(r"configs/[\w/.]+", " ".join(words)):
            assert (root() / path).exists(), path


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "configs/README.md",
    "nbs/studies/README.md",
    "nbs/perf/README.md",
    "tests/README.md",
]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = root() / name
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def prose(path) -> str:
    "The Markdown of a page or a notebook."
    if path.suffix == ".md":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("path", [*LIBRARY, *(root() / page for page in PAGES)], ids=lambda path: path.stem)
def test_notebooks_that_are_named_exist(path):
    text = prose(path)
    for target in re.findall(r"\]\((?!https?:)([^)#]+\.ipynb)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`(nbs/[\w/]+\.ipynb)`", text):
        assert (root() / target).exists(), target


def test_the_map_has_every_room():
    lines = re.findall(r"^\| `?(\w+)`? \| .*? \| (.*?) \|$", (root() / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rooms = {(floor, room) for floor, names in lines for room in names.split(", ")}
    for path in LIBRARY:
        if number := re.match(r"\d+\w?_(\w+)", path.stem):
            floor = path.parent.name if path.parent.name != "nbs" else "ground"
            assert floor == "forms" or (floor, number[1]) in rooms, (
                f"{floor}/{number[1]} is not in the map of CONTRIBUTING.md"
            )


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(root() / "nbs")))
def test_a_notebook_keeps_the_outputs_of_tagged_cells_and_small_pictures(path):
    for cell in json.loads(path.read_text())["cells"]:
        outputs = cell.get("outputs", [])
        kept = "keep" in cell["metadata"].get("tags", [])
        assert kept or not outputs, f"cell {cell['id']}: only cells tagged keep have outputs; make fresh removes them"
        assert outputs or not kept, (
            f"cell {cell['id']} has no outputs; make outputs NB={path.relative_to(root())} stores them"
        )
        for output in outputs:
            assert output["output_type"] != "error" and output.get("name") != "stderr", cell["id"]
            assert len(output.get("data", {}).get("image/png", "")) * 3 // 4 < 100_000, (
                f"cell {cell['id']}: a picture of 100 KB or more"
            )
