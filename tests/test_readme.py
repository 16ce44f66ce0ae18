"""The front page and the map name what is there, imports go one way, and what documents link to exists."""

import ast
import graphlib
import importlib.util
import re
from pathlib import Path

import pytest

from open_r1.base.errors import REPO_ROOT

PACKAGE = REPO_ROOT / "src/open-r1-multimodal/open_r1"
README = (REPO_ROOT / "README.md").read_text()
MAP = README.partition("## Map\n")[2].partition("\nContributions")[0]
FOLDERS, MODULES = MAP.split("### The package")
DOCUMENTS = sorted([*REPO_ROOT.glob("*.md"), *(REPO_ROOT / "docs").glob("*.md"), REPO_ROOT / "configs/README.md"])
FILES = r"(?<![\w/])(?:(?:open_r1|tests|scripts|configs|docs|src)/[\w./-]*\.(?:py|sh|md|yaml|jsonl|png)|test_\w+\.py)"
FILES_ARE_IN = (REPO_ROOT, PACKAGE.parent, REPO_ROOT / "tests", REPO_ROOT / "src/eval")


def names(text: str) -> list[str]:
    """The files and folders that a part of the map names."""
    return re.findall(r"`([\w./-]+(?:\.\w+|/))`", text)


def test_the_map_of_the_package_is_the_one_that_docstrings_give():
    """`python scripts/dev/map.py` writes it anew."""
    spec = importlib.util.spec_from_file_location("map_script", REPO_ROOT / "scripts/dev/map.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (REPO_ROOT / "docs/map.md").read_text() == script.write_map()
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(script.ROOMS) == set(re.findall(r"^- `(\w+)/`", MODULES, re.MULTILINE))


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports when it is imported itself."""
    tree = ast.parse(path.read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If | ast.FunctionDef)]
    later = {node for block in blocks for node in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in later]
    return {
        name
        for node in nodes
        if (node.module or "").startswith("open_r1")
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }


def test_no_room_imports_one_below_it():
    """In the order of docs/map.md; files beside the rooms may import any."""
    order = re.findall(r"^## (\w+)/$", (REPO_ROOT / "docs/map.md").read_text(), re.MULTILINE)
    for number, room in enumerate(order):
        for path in (PACKAGE / room).rglob("*.py"):
            below = {
                name for name in imported(path) if name.split(".")[1:2] and name.split(".")[1] in order[number + 1 :]
            }
            assert not below, f"{path} imports {below}"


def test_imports_of_the_package_have_no_circle():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        graph[".".join(parts).removesuffix(".__init__")] = imported(path)
    graphlib.TopologicalSorter({name: found & set(graph) for name, found in graph.items()}).prepare()


@pytest.mark.parametrize("folder, suffixes", [("scripts", ".py .sh"), ("docs", ".md"), ("src/eval", ".py")])
def test_every_script_and_document_is_in_the_map(folder, suffixes):
    files = {path.name for path in (REPO_ROOT / folder).iterdir() if path.suffix in suffixes.split()}
    assert files - set(names(FOLDERS)) == set()


def test_what_the_map_names_is_there():
    for line in re.split(r"^- ", FOLDERS, flags=re.MULTILINE)[1:]:
        folder, *inside = names(line)
        assert [name for name in inside if not (REPO_ROOT / folder / name).exists()] == []
    assert [name for name in names(MODULES.split("\n", 1)[1]) if not (PACKAGE / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO_ROOT)))
def test_what_documents_name_is_there(document):
    """Links, their headings, and the repository's files in the text."""
    text = document.read_text()
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        path = document.parent / target if target else document
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
    for name in re.findall(FILES, text.replace(MAP, "")):
        assert any((folder / name).exists() for folder in FILES_ARE_IN), name
