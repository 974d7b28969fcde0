"""The pages of the site: one for each notebook and each Markdown file, at the path that it has in the project.

mkdocs calls `on_config`, `on_files` and `on_post_build`. A notebook becomes Markdown: prose as it is, code in fences
that name the module it is exported to, stored outputs below. Formulas become MathML, which browsers draw by themselves.
"""

import base64
import html
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "nbs"
FLOORS = "game protocol expert model engine store play learn show foreign stages runner".split()
SECTIONS = {"forms": "Stage notebooks", "studies": "Studies", "perf": "Speed"}  # what stands below the floors

DIRECTIVE = re.compile(r"^#\|.*\n?", re.MULTILINE)
EXPORTED = re.compile(r"^#\|\s*export", re.MULTILINE)
HIDDEN = re.compile(r"^#\|\s*(hide|default_exp)\b", re.MULTILINE)
MODULE = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]\n]+)\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")
CODE = r"````.*?````|```.*?```|`[^`\n]+`|^    .*?$|<div class=\"output\">.*?</div>"
FORMULA = re.compile(rf"(?P<code>{CODE})|\$\$(?P<block>.+?)\$\$|\$(?=\S)(?P<inline>[^$\n]*\\[^$\n]*)\$",
                     re.DOTALL | re.MULTILINE)
OTHER_HOST = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\">]+|"
                        r"url\(\"?https?:[^)]+")


def sources() -> list[Path]:
    "The notebooks and Markdown files that become pages."
    files = [*ROOT.glob("*.md"), ROOT / "configs" / "README.md", *NOTEBOOKS.rglob("*.ipynb"), *NOTEBOOKS.rglob("*.md")]
    return sorted(path for path in files if ".ipynb_checkpoints" not in path.parts)


def page(path: Path) -> str:
    "Where the page of a source lies in the site; a README is the front page of its folder."
    name = path.relative_to(ROOT).with_suffix(".md").as_posix()
    return name.removesuffix("README.md") + "index.md" if path.name == "README.md" else name


def cells(path: Path) -> list[dict]:
    "The cells of a notebook, each source as one string."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell | {"source": "".join(cell["source"])} for cell in notebook["cells"]]


def title(path: Path) -> str:
    "The first heading of a notebook."
    prose = "\n".join(cell["source"] for cell in cells(path) if cell["cell_type"] == "markdown")
    return re.search(r"^# (.+)$", prose, re.MULTILINE)[1]


def on_config(config):
    "Build the navigation: floor by floor from the ground up, then what stands beside them."
    folders: dict[str, list[dict]] = {}
    for path in sources():
        if path.suffix == ".ipynb":
            folder = path.parent.relative_to(NOTEBOOKS).as_posix()
            folders.setdefault(folder, []).append({title(path): page(path)})
    ground = [room for room in folders.pop(".") if "nbs/index.md" not in room.values()]
    order = [*FLOORS, *SECTIONS]
    floors = [{"ground": ground}]
    for name in sorted(folders, key=order.index):
        front = NOTEBOOKS / name / "README.md"
        floors.append({SECTIONS.get(name, name): [page(front)] * front.is_file() + folders[name]})
    first = [{"Overview": "index.md"}, {"Tour": "nbs/index.md"}, {"Map": "CONTRIBUTING.md"}]
    last = [{"Configs": "configs/index.md"}, {"Log of trials": "nbs/LOG.md"}, {"Changes": "CHANGELOG.md"}]
    config.nav = first + floors + last
    return config


def on_files(files, config):
    "Add the pages, and the pictures that Markdown files show."
    known = {page(path) for path in sources()}
    for path in sources():
        text = as_markdown(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page(path), content=relinked(with_mathml(text), path, known)))
    for picture in [*NOTEBOOKS.rglob("*.png"), *(ROOT / "docs").glob("*.png")]:
        files.append(File.generated(config, picture.relative_to(ROOT).as_posix(), abs_src_path=str(picture)))
    return files


def on_post_build(config):
    "Keep the theme from loading scripts from elsewhere (for old browsers, for diagrams); check that nothing else does."
    site = Path(config.site_dir)
    for script in (site / "assets" / "javascripts").glob("*.js"):
        text = script.read_text(encoding="utf-8")
        script.write_text(re.sub(r"https://unpkg\.com/[\w@./-]+", "about:blank", text), encoding="utf-8")
    for built in [*site.rglob("*.html"), *site.rglob("*.css")]:
        if request := OTHER_HOST.search(built.read_text(encoding="utf-8")):
            raise PluginError(f"{built.relative_to(site)} asks another host: {request[0][:200]}")


def as_markdown(path: Path) -> str:
    "A notebook as Markdown, without hidden cells."
    parts, module = [], ""
    for cell in cells(path):
        if named := MODULE.search(cell["source"]):
            module = f"qwen_vl_kit.{named[1]}"
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"])
        elif cell["cell_type"] == "code" and not HIDDEN.search(cell["source"]):
            parts += [fence(cell["source"], module), *map(as_html, cell["outputs"])]
    return "\n\n".join(parts) + "\n"


def fence(source: str, module: str) -> str:
    "Code without its directives, headed by the module that it is exported to."
    code = DIRECTIVE.sub("", source).strip()
    heading = f' title="{module}"' if EXPORTED.search(source) else ""
    return f"````python{heading}\n{code}\n````" if code else ""


def as_html(output: dict) -> str:
    "A stored output: a picture, HTML or text."
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        png = "".join(data["image/png"]).strip()
        pixels = int.from_bytes(base64.b64decode(png[:64])[16:20])
        width = min(pixels, 1000)
        body = f'<img alt="picture" width="{width}" src="data:image/png;base64,{png}">'
    elif "text/html" in data:
        body = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))  # a blank line would end the block
    else:
        body = f"<pre>{html.escape(''.join(data['text/plain']))}</pre>"
    return f'<div class="output">{body}</div>'


def with_mathml(text: str) -> str:
    "Formulas between dollars, outside of code, as MathML."
    def drawn(match: re.Match) -> str:
        if match["code"]:
            return match["code"]
        return convert(match["block"] or match["inline"], display="block" if match["block"] else "inline")
    return FORMULA.sub(drawn, text)


def relinked(text: str, path: Path, known: set[str]) -> str:
    "Lead links between sources from page to page; a link to a file that is not a page becomes plain words."
    here, folder = path.parent.relative_to(ROOT).as_posix(), posixpath.dirname(page(path)) or "."

    def link(match: re.Match) -> str:
        picture, words, target, anchor = match.groups(default="")
        if picture or not target:
            return match[0]
        whole = posixpath.normpath(posixpath.join(here, target))
        there = [place for place in (page(ROOT / whole), posixpath.normpath(f"{whole}/index.md")) if place in known]
        return f"[{words}]({posixpath.relpath(there[0], folder)}{anchor})" if there else words
    return LINK.sub(link, text)
