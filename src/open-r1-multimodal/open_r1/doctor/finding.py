"""The result of a check, and the list of checks of a family."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
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

    verdict: Verdict
    what: str
    remedy: str = ""
    family: str = ""
    name: str = ""


Check = Callable[[Any], Iterator[Finding]]  # of a run: several findings, or none
Checks = tuple[Check, ...]  # of a family, in their order


def passed(what: str) -> Finding:
    """All is well."""
    return Finding(Verdict.PASS, what)


def warned(what: str, remedy: str) -> Finding:
    """A run would go on, and might disappoint."""
    return Finding(Verdict.WARN, what, remedy)


def failed(what: str, remedy: str = "") -> Finding:
    """A run would fail, or learn something else than is meant."""
    return Finding(Verdict.FAIL, what, remedy)


def skipped(why: str) -> Finding:
    """Not looked at."""
    return Finding(Verdict.SKIP, why)
