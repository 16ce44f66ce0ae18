"""Reads a result file of the evaluation, ours or the reference's, and checks it whole before it is used."""

from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from open_r1.answers.statistics import TOTAL, AskedRow, Row, right_answer
from open_r1.base.errors import Mistake
from open_r1.base.fields import Count, Expected, Flag, Name, Record, Share, Text, check
from open_r1.base.files import read_json

ROUNDING = 1e-9  # by which a computed bound may leave [-1, 1]


def _must_be_interval(bounds: list[float]) -> list[float]:
    low, high = bounds
    if not -1 - ROUNDING <= low <= high <= 1 + ROUNDING:
        raise ValueError
    return bounds


Interval = Annotated[
    list[float],
    Field(min_length=2, max_length=2),
    AfterValidator(_must_be_interval),
    Expected("two numbers from -1 to 1, the lower one first"),
]
ScoreValue = Annotated[float, Field(ge=-1, le=1), Expected("a number from -1 to 1")]  # below chance, if adjusted for it


class ResultRow(AskedRow):
    """A response: what every file has, and what an evaluation writes beside it, judged or not."""

    response: Text
    id: Annotated[int | Text, Expected("a text or a whole number")] = 0
    rotation: Count = 0
    truncated: Flag = False
    error: Annotated[Text | None, Expected("text or null")] = None


class AnsweredRow(ResultRow):
    """A row of an evaluation under way."""

    id: Annotated[int | Text, Expected("a text or a whole number")]
    rotation: Count


class JudgedRow(Record):
    """What a row has beside its response once it is judged."""

    correct: Flag
    credit: Share = 0


class PromptTemplate(Record):
    """The template of an evaluation's prompts."""

    name: Name
    style: Name


class About(Record):
    """What a result file says of the evaluation; a file of the reference's says nothing."""

    benchmark: Name = ""
    parser: Name = ""
    prompt: Annotated[PromptTemplate | None, Expected("an object with a name and a style")] = None


class Score(Record):
    """One score, all in [0, 1], or in [-1, 1] if it is adjusted for chance."""

    accuracy: ScoreValue
    n: Count
    interval: Interval
    chance: Share
    bounds: Interval = Field(default=[0, 1])


class ScoredResult(Record):
    """What a result file has once it is scored."""

    scores: dict[Name, Score]


class Shares(Record):
    """What went wrong with responses."""

    unparsable_share: Share
    truncated_share: Share
    unread_shares: Annotated[dict[Name, Share], Expected("shares by name")] = Field(default={})


def read_result(path: Path) -> dict[str, Any]:
    """A result file, or a plain list of rows as its `results`.

    Raises:
        OSError, Mistake: missing, or something else; one line that names file, row and field.
    """
    result = read_json(path)
    if isinstance(result, list):
        result = {"results": result}
    check(About, result, path)
    check_rows(result.get("results"), path)
    return result


def read_scored(path: Path) -> dict[str, Any]:
    """A result file with its scores. Raises what `read_result` raises."""
    result = read_result(path)
    if "scores" not in result:
        raise Mistake(f"{path}: no scores in it; score it with test_qwen2vl_CVBench.py --precomputed_json {path}")
    for number, row in enumerate(result["results"]):
        check(JudgedRow, row, f"{path}: row {number}")
    check(ScoredResult, result, path)
    if TOTAL not in result["scores"]:
        raise Mistake(f"{path}: scores: missing {TOTAL}")
    check(Shares, result.get("shares"), f"{path}: shares")
    return result


def check_rows(rows: Any, origin: object) -> list[Row]:
    """The rows, if that is what they are, each with its right option and none there twice.

    Raises:
        Mistake: something else; the message names the origin and the row.
    """
    if not isinstance(rows, list) or not rows:
        raise Mistake(f"{origin}: no list of responses; expected a result of test_qwen2vl_CVBench.py, or its rows")
    first: dict[Hashable, int] = {}  # of a question: its first row
    seen: set[tuple[Hashable, int]] = set()
    for number, row in enumerate(rows):
        where = f"{origin}: row {number}"
        check(ResultRow, row, where)
        try:
            right_answer(row)
        except Mistake as error:
            raise Mistake(f"{where}: {error}") from error
        if "id" not in row:
            continue
        key = row["id"], row.get("rotation", 0)
        same = first.setdefault(row["id"], number)
        if key in seen or rows[same]["question"] != row["question"]:
            raise Mistake(f"{where}: has the id {row['id']!r} of row {same}; two questions need two ids")
        seen.add(key)
    return rows
