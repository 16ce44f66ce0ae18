"""Checks the fields of JSON files: the type of each, and one line that names a field of another type."""

from collections.abc import Callable
from typing import Any, NamedTuple

from open_r1.base.errors import Mistake

_LARGEST = 2**53  # integers up to it survive a trip through JSON


class Check(NamedTuple):
    """What must hold of a field in a file, and how an error calls that."""

    holds: Callable[[Any], bool]
    what: str


Fields = dict[str, Check]


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


def is_share(value: Any) -> bool:
    """Whether it is a number from 0 to 1."""
    return is_usable(value) and 0 <= value <= 1


def is_text(value: Any) -> bool:
    """Whether it is a string; half a character (a lone surrogate), which JSON can hold, may be in it."""
    return isinstance(value, str)


def is_name(value: Any) -> bool:
    """Whether it can head a column: letters to see, nothing that moves a terminal's cursor."""
    return is_text(value) and value.isprintable() and bool(value.strip())


def is_prose(value: Any) -> bool:
    """Whether it is text that a tokenizer takes: no half characters."""
    return is_text(value) and not any("\ud800" <= character <= "\udfff" for character in value)


def are(each: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether it is a list of such values."""
    return lambda value: isinstance(value, list) and all(map(each, value))


def maybe(check: Check) -> Check:
    """The same or null."""
    return Check(lambda value: value is None or check.holds(value), f"{check.what} or null")


COUNT = Check(is_count, "a whole number from 0")
FLAG = Check(lambda value: isinstance(value, bool), "true or false")
NAME = Check(is_name, "a name of printable letters")
PROSE = Check(is_prose, "text")
SHARE = Check(is_share, "a number from 0 to 1")
TEXT = Check(is_text, "text")


def check(record: Any, required: Fields, optional: Fields, origin: object) -> dict[str, Any]:
    """The record, if it is an object whose fields hold what they must.

    Raises:
        ValueError: it is not; one line that names the origin and the field.
    """
    if not isinstance(record, dict):
        raise Mistake(f"{origin}: expected an object")
    if missing := [name for name in required if name not in record]:
        raise Mistake(f"{origin}: missing {', '.join(missing)}")
    for name, (holds, what) in {**required, **optional}.items():
        if name in record and not holds(record[name]):
            raise Mistake(f"{origin}: {name}: expected {what}")
    return record
