"""The texts of SAT's questions, and where chat templates are (Jinja files in `configs/chat_templates`)."""

from collections.abc import Sequence
from pathlib import Path

from open_r1.base.errors import REPO_ROOT, MissingFile, Mistake

CHAT_TEMPLATE_DIR = REPO_ROOT / "configs" / "chat_templates"

IMAGE_PLACEHOLDER = "<image>"  # ShareGPT's mark for "an image goes here"


def join_options(options: Sequence[str]) -> str:
    """`["a", "b", "c"]` -> `"a, b or c"`, as SAT's questions list their options."""
    *head, last = options
    return f"{', '.join(head)} or {last}" if head else last


def sat_question(question: str, options: Sequence[str]) -> str:
    """The text of a SAT question, word for word as the paper trained on it."""
    return f"Answer in natural language. {question} Choose between the following options: {join_options(options)}"


def check_text(text: str, control_tokens: Sequence[str]) -> None:
    """Raise Mistake for a text that is empty, holds half a character, or spells a control token.

    The model's tokenizer would take such a token for the chat template's own.
    """
    if not text.strip():
        raise Mistake("the text is empty")
    if spelled := [token for token in control_tokens if token in text]:
        raise Mistake(f"the text holds {spelled[0]}, a control token of the model; write it otherwise")
    if without_surrogates(text) != text:
        raise Mistake("the text holds half a character (a lone surrogate)")


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for every half of a character, which neither a tokenizer nor a file takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def load_chat_template(name_or_path: str, folder: str = "") -> str:
    """Read a chat template: a file's path, or the name of one in `configs/chat_templates` (`base`, `instruct`).

    Args:
        name_or_path: of the template.
        folder: below `configs/chat_templates`, with the templates of a family that has image tokens or turn markers of
            its own.
    """
    templates = CHAT_TEMPLATE_DIR / folder
    for path in (Path(name_or_path), templates / f"{name_or_path}.jinja"):
        if path.is_file():
            try:
                return path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise Mistake(f"chat_template: {path}: not UTF-8 ({error})") from error
    known = ", ".join(sorted(path.stem for path in templates.glob("*.jinja")))
    raise MissingFile(f"chat_template: no file {name_or_path!r} and no template of that name (known: {known})")
