"""The result of a check, and the list of checks of a family."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check came out. Only a failure keeps a run from starting; SKIP was not looked at."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes:
        family, name: of the check; `examine` fills them in.
        what: was found, with its figure.
        remedy: what to do about it.
    """

    verdict: Status
    what: str
    remedy: str = ""
    family: str = ""
    name: str = ""


Check = Callable[[Any], Iterator[Finding]]  # of a run: several findings, or none
Checks = tuple[Check, ...]  # of a family, in their order


def passed(what: str) -> Finding:
    """All is well."""
    return Finding(Status.PASS, what)


def warned(what: str, remedy: str) -> Finding:
    """A run would go on, and might disappoint."""
    return Finding(Status.WARN, what, remedy)


def failed(what: str, remedy: str = "") -> Finding:
    """A run would fail, or learn something else than is meant."""
    return Finding(Status.FAIL, what, remedy)


def skipped(why: str) -> Finding:
    """Not looked at."""
    return Finding(Status.SKIP, why)
