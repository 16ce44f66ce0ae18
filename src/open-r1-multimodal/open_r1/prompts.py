"""The texts that the model is asked with. Chat templates themselves are Jinja files in `configs/chat_templates`."""

from collections.abc import Sequence
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parents[3]
CHAT_TEMPLATE_DIR = REPO_ROOT / "configs" / "chat_templates"

IMAGE_PLACEHOLDER = "<image>"  # ShareGPT's mark for "an image goes here"


def join_options(options: Sequence[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b or c"`, as SAT's questions list their options."""
    *head, last = options
    return f"{', '.join(head)} or {last}" if head else last


def sat_question(question: str, options: Sequence[str]) -> str:
    """The text of a SAT question, word for word as the paper trained on it."""
    return f"Answer in natural language. {question} Choose between the following options: {join_options(options)}"


def load_chat_template(name_or_path: str) -> str:
    """Read a chat template: a file's path, or the name of one in `configs/chat_templates` (`base`, `instruct`).

    Raises:
        FileNotFoundError: when there is neither such a file nor such a name.
    """
    for path in (Path(name_or_path), CHAT_TEMPLATE_DIR / f"{name_or_path}.jinja"):
        if path.is_file():
            return path.read_text(encoding="utf-8")
    known = ", ".join(sorted(path.stem for path in CHAT_TEMPLATE_DIR.glob("*.jinja")))
    raise FileNotFoundError(f"chat_template: no file {name_or_path!r} and no template of that name (known: {known})")
