"""Reads a result file of the evaluation, ours or the reference's, and checks it whole before it is used."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from open_r1.answers.checker import is_blank
from open_r1.answers.statistics import TOTAL, Row, gold_index
from open_r1.base.errors import Mistake
from open_r1.base.fields import (
    COUNT,
    FLAG,
    NAME,
    SHARE,
    TEXT,
    Check,
    Fields,
    are,
    check,
    is_integer,
    is_share,
    is_text,
    is_usable,
    maybe,
)
from open_r1.base.files import read_json

ROUNDING = 1e-9  # by which a computed bound may leave [0, 1]


def _is_option(value: Any) -> bool:
    return is_text(value) and not is_blank(value)


def _is_interval(value: Any) -> bool:
    return are(is_usable)(value) and len(value) == 2 and -ROUNDING <= value[0] <= value[1] <= 1 + ROUNDING


def _are_shares(value: Any) -> bool:
    return isinstance(value, dict) and all(NAME.holds(name) and is_share(share) for name, share in value.items())


def _is_prompt(value: Any) -> bool:
    return isinstance(value, dict) and NAME.holds(value.get("name")) and NAME.holds(value.get("style"))


OPTIONS = Check(lambda value: are(_is_option)(value) and len(value) > 0, "a list of texts, none of them blank")
ID = Check(lambda value: is_text(value) or is_integer(value), "a text or a whole number")
INTERVAL = Check(_is_interval, "two numbers from 0 to 1, the lower one first")
# A response: what every file has, and what the evaluation writes beside it, also before it is judged.
ROW: Fields = {"question": TEXT, "options": OPTIONS, "task": NAME, "ground_truth": TEXT, "response": TEXT}
ROW_OPTIONAL: Fields = {
    "id": ID,
    "rotation": COUNT,
    "type": maybe(NAME),
    "source": maybe(NAME),
    "truncated": FLAG,
    "error": maybe(TEXT),
}
ABOUT: Fields = {
    "benchmark": NAME,
    "parser": NAME,
    "prompt": maybe(Check(_is_prompt, "an object with a name and a style")),
}
SCORE: Fields = {"accuracy": SHARE, "n": COUNT, "interval": INTERVAL, "chance": SHARE}
SHARES: Fields = {"unparsable_share": SHARE, "truncated_share": SHARE}
SHARES_OPTIONAL: Fields = {"unread_shares": Check(_are_shares, "shares by name")}


def read_result(path: Path) -> dict[str, Any]:
    """A result file, or a plain list of rows as its `results`.

    Raises:
        OSError, ValueError: missing, or something else; one line that names the file, the row and the field.
    """
    content = read_json(path)
    result = {"results": content} if isinstance(content, list) else check(content, {}, ABOUT, path)
    check_rows(result.get("results"), path)
    return result


def read_scored(path: Path) -> dict[str, Any]:
    """A result file with its scores. Raises what `read_result` raises."""
    result = read_result(path)
    if "scores" not in result:
        raise Mistake(f"{path}: no scores in it; score it with test_qwen2vl_CVBench.py --precomputed_json {path}")
    for number, row in enumerate(result["results"]):
        check(row, {"correct": FLAG}, {}, f"{path}: row {number}")
    for name, score in check(result["scores"], {TOTAL: Check(bool, "a score")}, {}, f"{path}: scores").items():
        check({"name": name}, {"name": NAME}, {}, f"{path}: scores")
        check(score, SCORE, {"bounds": INTERVAL}, f"{path}: scores: {name}")
    check(result.get("shares"), SHARES, SHARES_OPTIONAL, f"{path}: shares")
    return result


def check_rows(rows: Any, origin: object) -> list[Row]:
    """The rows, if that is what they are, each with its right option and none there twice.

    Raises:
        ValueError: something else; the message names the origin and the row.
    """
    if not isinstance(rows, list) or not rows:
        raise Mistake(f"{origin}: no list of responses; expected a result of test_qwen2vl_CVBench.py, or its rows")
    first: dict[Hashable, int] = {}  # of a question: its first row
    seen: set[tuple[Hashable, int]] = set()
    for number, row in enumerate(rows):
        where = f"{origin}: row {number}"
        check(row, ROW, ROW_OPTIONAL, where)
        try:
            gold_index(row)
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
