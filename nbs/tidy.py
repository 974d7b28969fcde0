"""What git holds of the notebooks: freshly exported modules, clean cells, and outputs where a reader needs to see them.

    .venv/bin/python nbs/tidy.py                      # export and clean; exit code 1 if a file changed (make fresh)
    .venv/bin/python nbs/tidy.py --run NOTEBOOK ...   # run a notebook first and store its outputs (make outputs NB=...)

The outputs of code cells with the tag `keep` stay, all others are removed. A stored picture has less than 100 KB.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGEST_PNG = 100_000  # bytes


def notebooks() -> list[Path]:
    "All notebooks of the project."
    return sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, notebook: dict) -> None:
    "As nbdev writes it."
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def keeps(cell: dict) -> bool:
    "Whether the outputs of this cell belong in git."
    return "keep" in cell["metadata"].get("tags", ())


def size(png: str | list[str]) -> int:
    "Bytes of a picture in base64."
    return len("".join(png)) * 3 // 4


def strip(path: Path) -> None:
    "Remove the outputs of all cells but those tagged `keep`."
    notebook = read(path)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and not keeps(cell):
            cell["outputs"] = []
    write(path, notebook)


def small(png: str) -> str:
    "A picture (base64) in 256 colours if it would be too large otherwise."
    if size(png) < LARGEST_PNG:
        return png
    from PIL import Image

    buffer = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def clean_output(output: dict) -> dict:
    "An output without what differs from run to run (counts, metadata, addresses); large pictures made smaller."
    output = {key: value for key, value in output.items() if key not in ("metadata", "execution_count")}
    if "image/png" in output.get("data", {}):
        output["data"].pop("image/jpeg", None)  # Pillow's pictures show themselves in both forms
    for kind, value in output.get("data", {}).items():
        if kind == "image/png":
            output["data"][kind] = small(value)
        elif isinstance(value, str):
            output["data"][kind] = re.sub(r" at 0x[0-9a-f]+", "", value).splitlines(keepends=True)
    if "text" in output:
        output["text"] = output["text"].splitlines(keepends=True)
    if output["output_type"] != "stream":
        output["metadata"] = {}
    if output["output_type"] == "execute_result":
        output["execution_count"] = None
    return output


def run(path: Path) -> None:
    "Run a notebook in its folder and store the outputs of its cells tagged `keep`, without stderr."
    import nbformat
    from nbclient import NotebookClient

    notebook, executed = read(path), nbformat.read(path, 4)
    for cell in executed.cells:
        if re.search(r"^#\|\s*eval:\s*false", cell.source, re.MULTILINE):
            cell.source = ""
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(executed, timeout=600, kernel_name="python3", resources=resources).execute()
    for cell, result in zip(notebook["cells"], executed.cells):
        if cell["cell_type"] == "code":
            outputs = json.loads(json.dumps([output for output in result.outputs if output.get("name") != "stderr"]))
            cell["outputs"] = list(map(clean_output, outputs)) if keeps(cell) else []
    write(path, notebook)


def too_large(path: Path) -> list[str]:
    "A line for each stored picture of 100 KB or more."
    found = []
    for cell in read(path)["cells"]:
        for output in cell.get("outputs", ()):
            png = output.get("data", {}).get("image/png", "")
            if size(png) >= LARGEST_PNG:
                found.append(f"{path.relative_to(ROOT)}: the picture of cell {cell['id']} has {size(png):,} bytes, "
                             f"the limit is {LARGEST_PNG:,}")
    return found


def export_benchmarks(folder: Path = ROOT / "benchmarks") -> None:
    """Export nbs/perf/NAME.ipynb to `folder`/NAME.py.

    nbdev exports to one package only, the one that is installed. So the cells of the benchmarks have a directive of
    their own, `#| benchmark` in place of `#| export`, which `nbdev-export` passes over.
    """
    from nbdev.export import ExportModuleProc
    from nbdev.maker import ModuleMaker
    from nbdev.process import NBProcessor

    class BenchmarkCells(ExportModuleProc):
        _benchmark_ = ExportModuleProc._export_

    for path in sorted((ROOT / "nbs" / "perf").glob("*.ipynb")):
        cells = BenchmarkCells()
        NBProcessor(path, cells).process()
        maker = ModuleMaker(dest=folder, name=path.stem, nb_path=path)
        maker.make(cells.modules["#"], cells.in_all["#"], lib_path=folder)


def state() -> dict[Path, str]:
    "The digest of every notebook and module."
    files = [*notebooks(), *(ROOT / "qwen_vl_kit").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="+", type=Path, default=[], metavar="NOTEBOOK", help="first store their outputs")
    args = parser.parse_args()
    for path in args.run:
        run(path.resolve())
    os.chdir(ROOT)  # nbdev looks for its settings from here
    before = state()
    from nbdev.clean import nbdev_clean
    from nbdev.doclinks import nbdev_export

    nbdev_export.__wrapped__()
    export_benchmarks()
    nbdev_clean.__wrapped__()
    for path in notebooks():
        strip(path)
    after = state()
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    for path in changed:
        print(f"changed: {path.relative_to(ROOT)}; commit notebook and module together", file=sys.stderr)
    large = [line for path in notebooks() for line in too_large(path)]
    for line in large:
        print(line, file=sys.stderr)
    return 1 if large or (changed and not args.run) else 0


if __name__ == "__main__":
    sys.exit(main())
