"""Exchanges responses with lmms-eval (0.7.2): one JSON line a question, as its `--log_samples` writes them.

Source of the fields: `EvolvingLMMs-Lab/lmms-eval`, 75571cf, `evaluator.py` and `loggers/evaluation_tracker.py`.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from string import ascii_uppercase
from typing import Annotated, Any

from open_r1.answers.checker import bare_gold
from open_r1.answers.statistics import TOTAL, Row, credit, judge_row, response_shares, score, wilson
from open_r1.base.errors import Mistake
from open_r1.base.fields import Count, Expected, Record, Text, check
from open_r1.base.files import replace_file, to_json
from open_r1.evaluation.results import check_rows
from open_r1.tasks.benchmarks import BENCHMARKS, find_benchmark
from open_r1.tasks.benchmarks.base import behind_letters, lettered
from open_r1.tasks.examples import read_list

THEIRS = f"{TOTAL}, as lmms-eval scored it"
NAME = re.compile(r".*_samples_(?P<task>\w+)")
# The keys under which lmms-eval's metrics hold the group of a question, and what its answer earned.
GROUPS = ("sub_task", "question_type", "l2_category", "task", "category", "type")
CREDITS = ("score", "is_correct", "overall", "accuracy", "MRA:.5:.95:.05")


class Sample(Record):
    """The fields of a line that are read."""

    doc_id: Count
    target: Text
    input: Text
    filtered_resps: Annotated[Text | list[Text], Expected("text, or a list of texts")]


def write_samples(path: Path, result: Mapping[str, Any], prompts: Mapping[tuple[Any, int], str]) -> Path:
    """Write a result's responses beside it, `{name}_samples_{task}.jsonl`; returns the new file's path.

    Args:
        prompts: by id and rotation; without one `input` is the question and its options.
    """
    benchmark = find_benchmark(result["benchmark"])
    task, metric = benchmark.lmms or (benchmark.name.lower().replace("-", "_"), "accuracy")
    target = path.with_name(f"{path.stem}_samples_{task}.jsonl")
    samples = []
    for number, row in enumerate(result["results"]):
        options = behind_letters(row["options"], ".")
        asked = prompts.get((row.get("id"), row.get("rotation", 0)), "\n".join([row["question"], *options]))
        entry = {"id": row.get("id", number), "gt_content": row["ground_truth"], "pred_parsed": row["model_answer"]}
        entry |= {"pred": row["response"], "sub_task": row["task"], "is_correct": row["correct"], "score": credit(row)}
        sample = {"doc_id": number, "target": row["ground_truth"], "input": asked, metric: entry}
        sample |= {"resps": [row["response"]], "filtered_resps": row["response"]}
        sample |= {"token_counts": [{"output_tokens": row["tokens"]} if "tokens" in row else None]}
        sample |= {"doc_hash": hashlib.sha256(asked.encode(errors="backslashreplace")).hexdigest()}
        samples.append(sample)
    replace_file(target, b"".join(map(to_json, samples)))
    return target


def read_samples(path: Path) -> dict[str, Any]:
    """A file of lmms-eval's, read anew by our checker, as `read_scored` returns results.

    Its prompts name the options, so that it needs no data set. One more score, `THEIRS`, is the mean of what lmms-eval
    gave each response.

    Raises:
        OSError, Mistake: missing, or something else; one line that names the file and the line.
    """
    name = NAME.fullmatch(path.stem)
    if name is None:
        raise Mistake(f"{path}: not a name that lmms-eval gives, ..._samples_TASK.jsonl")
    rows, theirs = [], []
    for number, line in enumerate(read_list(path)):
        sample = check(Sample, line, f"{path}: row {number}")
        metrics = [value for value in line.values() if isinstance(value, dict)]
        rows.append(to_row(sample, name["task"], metrics))
        theirs.append(first_of(CREDITS, metrics, int | float))
    rows = [judge_row(row, "lenient") for row in check_rows(rows, path)]
    known = [one for one in BENCHMARKS.values() if one.lmms and name["task"].startswith(one.lmms[0])]
    rules = {"combinations": known[0].combinations, "adjusted": known[0].adjusted} if known else {}
    scores = score(rows, **rules)
    if all(earned is not None and 0 <= earned <= 1 for earned in theirs):
        mean = sum(theirs) / len(theirs)
        interval = list(wilson(sum(theirs), len(theirs)))
        scores[THEIRS] = {**scores[TOTAL], "accuracy": mean, "interval": interval, "bounds": [mean, mean]}
    about = {"benchmark": name["task"], "parser": "lenient"}
    return {**about, "scores": scores, "shares": response_shares(rows), "results": rows}


def to_row(sample: Sample, task: str, metrics: list[dict[str, Any]]) -> Row:
    """A line of lmms-eval's as a row to be judged."""
    response = sample.filtered_resps
    row = {
        "id": sample.doc_id,
        "rotation": 0,
        "question": f"{task} {sample.doc_id}",
        "options": list(lettered(sample.input)),
        "task": first_of(GROUPS, metrics, str) or task,
        "response": response if isinstance(response, str) else "".join(response[:1]),
    }
    target = bare_gold(sample.target, None)
    letter = re.match(r"\W*([A-Z])(?!\w)", target)
    if row["options"] and letter:
        target = f"({letter[1]})"
    elif row["options"] and target.isdecimal() and int(target) < len(row["options"]):
        target = f"({ascii_uppercase[int(target)]})"
    return {**row, "ground_truth": target}


def first_of(names: tuple[str, ...], metrics: list[dict[str, Any]], kind: Any) -> Any:
    """The first field of these names and this type in any of the metrics; None without one."""
    return next((one[name] for name in names for one in metrics if isinstance(one.get(name), kind)), None)
