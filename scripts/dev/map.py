"""Write docs/map.md: what each room of the package holds, and each file, in the first lines of their docstrings.

python scripts/dev/map.py
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src/open-r1-multimodal/open_r1"
# from what imports nothing of the package to what imports all of it
ROOMS = [
    "base",
    "settings",
    "answers",
    "tasks",
    "world",
    "models",
    "engines",
    "evaluation",
    "reporting",
    "running",
    "trainer",
    "doctor",
]
HEAD = """# Map of the package

Written by `python scripts/dev/map.py` from the first lines of docstrings in `src/open-r1-multimodal/open_r1`. The rooms
(subpackages) are in the order of imports: a room imports only rooms above it. The files beside the rooms import any.
"""


def docstring(path: Path) -> str:
    """The docstring of a module."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def caption(path: Path) -> str:
    """A file's line in the map."""
    return f"- `{path.name}`: {docstring(path).splitlines()[0]}"


def captions(folder: Path) -> list[str]:
    """The lines of a folder's files, and under the name of each folder in it the lines of that one's."""
    lines = [(path.name, [caption(path)]) for path in folder.glob("*.py") if path.name != "__init__.py"]
    for path in folder.glob("*/__init__.py"):
        first = docstring(path).splitlines()[0]
        inside = [f"  {line}" for line in captions(path.parent)]
        lines.append((path.parent.name, [f"- `{path.parent.name}/`: {first}", *inside]))
    return [line for _, part in sorted(lines) for line in part]


def write_map() -> str:
    """The map as Markdown."""
    parts = [HEAD]
    for room in ROOMS:
        about = " ".join(docstring(PACKAGE / room / "__init__.py").split())
        parts.append("\n".join([f"## {room}/", "", about, "", *captions(PACKAGE / room), ""]))
    files = sorted(path for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
    parts.append("\n".join(["## Beside the rooms", "", *map(caption, files), ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs/map.md").write_text(write_map())
