"""What stands in a file is checked before a command uses it: result files, unfinished work, question sets.

Each damage is one line that names the file, the row and the field; nothing of it reaches a terminal unescaped.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.base.files import append_rows, to_json
from open_r1.evaluation.results import read_result, read_scored
from open_r1.evaluation.run import collect_answered, make_result, partial_paths
from open_r1.tasks.benchmarks import BENCHMARKS, read
from open_r1.world import __main__ as world
from open_r1.world.parquet import cvbench_row, write_cvbench
from open_r1.world.scene import LEVELS
from support import load_script

ROTATED = [("left", "right"), ("right", "left")]
HALF = "\ud800"  # a character
DEEP = b"[" * 99_999


def make_rows(count: int = 6) -> list[dict]:
    """Responses to questions in two rotations each, not judged yet."""
    return [
        {
            **{"id": number // 2, "rotation": number % 2, "question": f"question {number // 2}?"},
            **{"options": list(ROTATED[number % 2]), "task": "Where", "type": "2D", "source": None},
            **{"ground_truth": "left", "response": "<answer>left</answer>" if number else "?", "truncated": False},
        }
        for number in range(count)
    ]


def make_scored() -> dict:
    about = {"benchmark": "SAT-val", "prompt": {"name": "base", "style": "reasoning", "template": "{{ style }}"}}
    return make_result(make_rows(), about, "lenient")


def refused(reads: Callable, *arguments: object) -> str:
    """The one line with which something is refused."""
    with pytest.raises((OSError, Mistake)) as caught:
        reads(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- result files ---------------------------------------------------------------------------------


def test_a_result_of_ours_and_one_of_the_reference_are_taken(tmp_path):
    (tmp_path / "ours.json").write_bytes(to_json(make_scored(), indent=1))
    assert read_scored(tmp_path / "ours.json") == make_scored()
    keys = ("question", "options", "task", "ground_truth", "response")
    rows = [{key: row[key] for key in keys} | {"model_answer": None, "correct": False} for row in make_rows()]
    for number, content in enumerate([{"results": rows, "accuracy": 0.5, "args": {"bs": 1}}, rows]):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
        assert read_result(tmp_path / f"{number}.json")["results"] == rows


@pytest.mark.parametrize(
    "text, message",
    [
        (b'{"results": [', "not JSON"),
        (b'{"model": "\xe9"}', "not JSON ('utf-8' codec can't decode byte 0xe9"),
        (DEEP, "not JSON (nested too deep)"),
        (b"null", "expected an object"),
        (b'{"results": {}}', "no list of responses"),
    ],
    ids=range(5),
)
def test_what_is_no_result_file(tmp_path, text, message):
    path = tmp_path / "result.json"
    path.write_bytes(text)
    assert refused(read_result, path).startswith(f"{path}: {message}")


def change(*path: str | int, **fields: object) -> Callable[[dict], None]:
    """A change of what lies on a path in a result; a field that is ... is deleted."""

    def apply(result: dict) -> None:
        for key in path:
            result = result[key]
        for name, value in fields.items():
            result.pop(name, None) if value is ... else result.__setitem__(name, value)

    return apply


def in_row(**fields: object) -> Callable[[dict], None]:
    return change("results", 2, **fields)


DAMAGES = [
    (in_row(task=..., options=...), "row 2: missing options, task"),
    (in_row(options=[1, 2]), "row 2: options: "),
    (in_row(options=["left", "\u200b"]), "row 2: options: "),
    (in_row(ground_truth="up"), "row 2: the right answer 'up' is none of its 2 options"),
    (in_row(response=3), "row 2: response: "),
    (in_row(task="Where\x1b[2J"), "row 2: task: "),
    (in_row(task=HALF), "row 2: task: "),
    (in_row(source={}), "row 2: source: "),
    (in_row(id=[1]), "row 2: id: "),
    (in_row(rotation=10**400), "row 2: rotation: "),
    (in_row(truncated="no"), "row 2: truncated: "),
    (in_row(id=0), "row 2: has the id 0 of row 0; two questions need two ids"),  # of another question
    (change("results", 3, rotation=0), "row 3: has the id 1 of row 2; two questions need two ids"),
    (in_row(correct="yes"), "row 2: correct: "),
    (change(prompt="base"), "prompt: "),
    (change(benchmark=["SAT-val"]), "benchmark: "),
    (change(scores=...), "no scores in it; score it with test_qwen2vl_CVBench.py"),
    (change("scores", Total=...), "scores: missing Total"),
    (change("scores", Where=0.5), "scores: Where: expected an object"),
    (change("scores", **{"\x1b]0;x\x07": {}}), "scores: name: "),
    (change("scores", "Total", chance=...), "scores: Total: missing chance"),
    (change("scores", "Total", accuracy="0.5"), "scores: Total: accuracy: "),
    (change("scores", "Total", accuracy=float("nan")), "scores: Total: accuracy: "),
    (change("scores", "Total", accuracy=59.5), "scores: Total: accuracy: "),
    (change("scores", "Total", interval=[0.7, 0.3]), "scores: Total: interval: "),
    (change("shares", unread_shares={"\x1b": 0}), "shares: unread_shares: "),
]


@pytest.mark.parametrize("damage, message", DAMAGES, ids=range(len(DAMAGES)))
def test_a_damaged_result_is_refused_with_its_place(tmp_path, damage, message):
    result = make_scored()
    damage(result)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    told = refused(read_scored, path)
    assert told.startswith(f"{path}: {message}") and told.isprintable(), told


def test_half_a_character_in_a_response_is_scored_and_written(tmp_path, monkeypatch, capsys):
    rows = [row | {"response": f"{HALF} <answer>left</answer>"} for row in make_rows()]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    options = ["--precomputed_json", str(tmp_path / "x.json"), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["", *options, "--benchmark", "SAT-val"])
    load_script(REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py").main()
    assert "6 responses: 0.0% without" in capsys.readouterr().out
    written = read_scored(tmp_path / "out/x.json")
    assert written["scores"]["Total"]["accuracy"] == 1 and written["results"][0]["response"] == rows[0]["response"]


def test_names_are_text_in_the_chart_and_escaped_on_the_terminal(tmp_path, monkeypatch, capsys):
    result = make_scored()
    result["scores"]["$\\frac{$"] = result["scores"]["Total"]
    path = tmp_path / "$_{$\x1b]0;own\x07.json"
    path.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["", str(path), str(path), "--chart", str(tmp_path / "chart.svg")])
    load_script(REPO_ROOT / "scripts/compare.py").main()
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b]0;own\\x07" in out and "| $\\frac{$ |" in out
    assert "<svg" in (tmp_path / "chart.svg").read_text()


# --- unfinished work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        (b"[1]", "expected an object"),
        (b"{}", "missing question, options, task, ground_truth, response, id, rotation"),
        (b'{"id": ', "damaged ("),
        (DEEP, "damaged ("),
    ],
    ids=range(4),
)
def test_unfinished_work_that_is_damaged(tmp_path, line, message):
    partial = tmp_path / "result.partial0.jsonl"
    settings = {"benchmark": "SAT-val"}
    good = make_rows()[1] | {"error": None, "response": "half"}
    append_rows(partial, [settings, good])
    assert collect_answered(tmp_path / "result.json", settings) == {(0, 1): good}
    with partial.open("ab") as file:
        file.write(line + b"\n" + to_json(good))
    assert refused(collect_answered, tmp_path / "result.json", settings).startswith(f"{partial}: line 3: {message}")


def test_unfinished_work_of_something_else(tmp_path):
    (tmp_path / "result.partial0.jsonl").write_text("[1]\n[2]\n")
    assert "partial0.jsonl: line 1: expected an object" in refused(collect_answered, tmp_path / "result.json", {})
    (tmp_path / "result.partial0.jsonl").write_text('{"benchmark": "VSR"}\n{}\n')
    assert collect_answered(tmp_path / "result.json", {}) == {} and not partial_paths(tmp_path / "result.json")


# --- question sets --------------------------------------------------------------------------------

IMAGE = {"bytes": b"", "path": None}
BLINK = {"idx": "1", "sub_task": "Depth", "question": "?", "prompt": "?", "choices": ["a", "b"], "answer": "(A)"}
BLINK |= {f"image_{number}": IMAGE for number in (1, 2, 3, 4)}
VSR = {"caption": "?", "image": "a", "label": 1, "relation": "on"}


@pytest.mark.parametrize(
    "benchmark, changes, message",
    [
        ("CV-Bench", {"answer": None}, "answer: "),
        ("CV-Bench", {"answer": "(F)"}, "the right answer '(F)' is none of its 2 options (idx 1)"),
        ("CV-Bench", {"choices": [None]}, "choices: "),
        ("CV-Bench", {"choices": ["left", " "]}, "options: expected a list of texts, none of them blank"),
        ("CV-Bench", {"task": "\x1b[2J"}, "task: "),
        ("CV-Bench", {"idx": 0}, "has the idx 0 of {path}: row 0; two questions need two"),
        ("BLINK", {"answer": "hidden"}, "the right answer 'hidden' is none of its 2 options"),
        ("BLINK", {"sub_task": None}, "sub_task: "),
        ("VSR", {"caption": HALF}, "caption: "),
        ("VSR", {"label": 2}, "label: "),
        ("VSR", {"image": {"bytes": [1]}}, "image: "),
        ("VSR", {"relation": None}, "relation: "),
    ],
    ids=range(12),
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, benchmark, changes, message):
    cvbench = cvbench_row(0, 3, LEVELS["easy"], "3D")
    first = {"CV-Bench": cvbench, "BLINK": BLINK, "VSR": VSR}[benchmark]
    rows = [first, first | ({"idx": 1} if benchmark == "CV-Bench" else {"idx": "2"}) | changes]
    path = tmp_path / ("rows.jsonl" if benchmark == "VSR" else "rows.parquet")
    if benchmark == "VSR":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    told = refused(read, BENCHMARKS[benchmark], str(path))
    assert told.startswith(f"{path}: row 1: {message.format(path=path)}"), told


def test_what_is_no_question_set(tmp_path):
    def refuse(path: Path | str, message: str, benchmark: str = "CV-Bench") -> None:
        told = refused(read, BENCHMARKS[benchmark], str(path))
        assert message in told and str(path) in told, told

    refuse(tmp_path / "no", "no such file or folder")
    refuse("~nobody/set", "no such file or folder")
    refuse("nobody/nothing-of-this-name", "neither here nor to be had from the Hub")
    refuse(tmp_path, "no test_2d.parquet in it; give a single file")
    write_cvbench(tmp_path, 8, 3, LEVELS["easy"])
    path = tmp_path / "test_2d.parquet"
    refuse(path, "no column question_type, correct_answer, answers, image_bytes; is this SAT-val?", "SAT-val")
    table = pq.read_table(path)
    path.write_bytes(path.read_bytes()[:-100])
    refuse(path, "not a parquet file that can be read")
    broken = pa.array([b"\xff"] * len(table)).cast(pa.binary()).view(pa.string())  # no UTF-8
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", broken), path)
    refuse(path, "not a parquet file that can be read")
    lines = tmp_path / "test.jsonl"
    for line, message in (
        (b'{"a": "\xe9"}', "not a JSON file"),
        (DEEP, "line 1: not JSON"),
        (b"[1]", "row 0: expected"),
    ):
        lines.write_bytes(line + b"\n")
        refuse(lines, message, "VSR")


# --- options that are seen before anything is made ------------------------------------------------


@pytest.mark.parametrize(
    "run, arguments, message",
    [
        (world.main, "--output {folder}/w --rows 1 --schema cvbench", "--rows 1: cvbench has 2 files, and each needs"),
        ("scripts/benchmark.py", "stpe", "{{data,eval,step}}"),
        ("scripts/ask.py", "--model x --max_new_tokens 0", "--max_new_tokens: expected a number above 0, not '0'"),
        ("scripts/benchmark.py", "eval --bs -1", "--bs: expected a number above 0, not '-1'"),
        ("scripts/benchmark.py", "eval --mean_tokens 0", "--mean_tokens: expected a number above 0, not '0'"),
        ("scripts/benchmark.py", "--json {folder}/no/x.json data", "--json: {folder}/no/x.json: no folder {folder}/no"),
    ],
)
def test_a_wrong_option_is_seen_first(tmp_path, monkeypatch, capsys, run, arguments, message):
    monkeypatch.setattr(sys, "argv", ["", *arguments.format(folder=tmp_path).split()])
    with pytest.raises(SystemExit) as left:
        (load_script(REPO_ROOT / run).main if isinstance(run, str) else run)()
    assert left.value.code == 2 and message.format(folder=tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
