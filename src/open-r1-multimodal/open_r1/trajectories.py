"""The record of one completion: what the trainer writes down a line each, and the report and the tests read.

A new number of a completion is a field here, which the report has as a column at once, and a curve in
`report/curves.py`. No torch.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, NamedTuple, get_type_hints

_LARGEST = 2**53  # integers up to it survive a trip through JSON

Fields = dict[str, "Check"]


def is_integer(value: Any) -> bool:
    """Whether it is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 that JSON keeps."""
    return is_integer(value) and 0 <= value <= _LARGEST


def is_number(value: Any) -> bool:
    """Whether it is a number; NaN and the infinities, which Python writes into JSON, are."""
    return isinstance(value, float) or (is_integer(value) and abs(value) <= _LARGEST)


def is_usable(value: Any) -> bool:
    """Whether it is a number that can be averaged and drawn."""
    return is_number(value) and abs(value) <= _LARGEST  # false for NaN


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_texts_or_null(value: Any) -> bool:
    return value is None or _are_texts(value)


def _are_rewards(value: Any) -> bool:
    return isinstance(value, dict) and all(reward is None or is_number(reward) for reward in value.values())


def _are_spans(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(span, list) and len(span) == 2 and all(map(is_count, span)) for span in value
    )


class Check(NamedTuple):
    """What must hold of a field in a file, and how an error calls that."""

    holds: Callable[[Any], bool]
    what: str


TEXT, TEXT_OR_NULL = Check(_is_text, "text"), Check(_is_text_or_null, "text or null")
FLAG = Check(lambda value: isinstance(value, bool), "true or false")


@dataclass(kw_only=True)
class Completion:
    """One completion of a rollout. Fields with a default may be absent from a file: older runs have not all of them."""

    step: Annotated[int, Check(is_count, "a number of steps")]
    prompt: Annotated[str, TEXT]
    images: Annotated[list[str], Check(_are_texts, "a list of paths")]
    solution: Annotated[str | None, TEXT_OR_NULL] = None
    options: Annotated[list[str] | None, Check(_are_texts_or_null, "a list of texts or null")] = None
    completion: Annotated[str, TEXT]
    rewards: Annotated[dict[str, float | None], Check(_are_rewards, "numbers or null by name")]  # null: none given
    advantage: Annotated[float, Check(is_number, "a number")]
    length: Annotated[int, Check(is_count, "a number of tokens")]
    ended: Annotated[bool, FLAG]
    reflections: Annotated[list[list[int]] | None, Check(_are_spans, "pairs of offsets")] = None
    considered: Annotated[str | None, TEXT_OR_NULL] = None
    self_corrected: Annotated[bool, FLAG] = False
    group: Annotated[int, Check(is_count, "a number")] = 0  # of one prompt's completions; counts anew in every rollout

    def to_row(self) -> dict[str, Any]:
        """As a line of a file holds it."""
        return dict(vars(self))


_HINTS = get_type_hints(Completion, include_extras=True)
_CHECKS: Fields = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}
OPTIONAL: Fields = {each.name: _CHECKS[each.name] for each in fields(Completion) if each.default is not MISSING}
REQUIRED: Fields = {name: check for name, check in _CHECKS.items() if name not in OPTIONAL}
# The numbers among the fields -> their types; but for `group`, which means nothing without its rollout.
NUMBERS = {name: hint.__origin__ for name, hint in _HINTS.items() if hint.__origin__ in (int, float, bool)}
del NUMBERS["group"]
