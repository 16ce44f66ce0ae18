"""The front page names every file with a caption, and no file that is not there; what documents link to exists."""

import re

import pytest

from open_r1.base.prompts import REPO_ROOT

PACKAGE = REPO_ROOT / "src/open-r1-multimodal/open_r1"
README = (REPO_ROOT / "README.md").read_text()
MAP = README.partition("## Map\n")[2].partition("\nContributions")[0]
FOLDERS, MODULES = MAP.split("### The package")
DOCUMENTS = sorted([*REPO_ROOT.glob("*.md"), *(REPO_ROOT / "docs").glob("*.md"), REPO_ROOT / "configs/README.md"])
FILES = r"(?<![\w/])(?:open_r1|tests|scripts|configs|docs|src)/[\w./-]*\.(?:py|sh|md|yaml|jsonl|png)"


def names(text: str) -> list[str]:
    """The files and folders that a part of the map names."""
    return re.findall(r"`([\w./-]+(?:\.\w+|/))`", text)


def test_the_front_page_is_short():
    assert len(README.splitlines()) < 130


@pytest.mark.parametrize(
    "module",
    [str(path.relative_to(PACKAGE)) for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"],
)
def test_every_module_has_a_caption(module):
    assert re.search(rf"`{re.escape(module)}`[^`·]{{8,}}", MODULES), f"{module} is not in the README's map"


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
        assert (REPO_ROOT / name).exists() or (PACKAGE.parent / name).exists(), name
