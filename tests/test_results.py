"""What stands in a file is checked before a command uses it: result files, question sets, unfinished work.

Each damage is one line that names the file, the row and the field; nothing of it reaches a terminal unescaped.
"""

import json
import sys
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_r1.base.files import append_rows, to_json
from open_r1.base.prompts import REPO_ROOT
from open_r1.evaluate.results import read_result, read_scored
from open_r1.evaluate.run import collect, make_result, partial_paths
from open_r1.tasks.benchmarks import BENCHMARKS, read
from open_r1.world import __main__ as world
from open_r1.world.parquet import write_cvbench
from open_r1.world.scene import LEVELS
from support import load_script

ROTATED = [("left", "right"), ("right", "left")]
HALF = "\ud800"  # a character


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
    with pytest.raises((OSError, ValueError)) as caught:
        reads(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- result files -----------------------------------------------------------------------------------------------


def test_a_result_of_ours_and_one_of_the_reference_are_taken(tmp_path):
    (tmp_path / "ours.json").write_bytes(to_json(make_scored(), indent=1))
    assert read_scored(tmp_path / "ours.json") == make_scored()
    keys = ("question", "options", "task", "ground_truth", "response", "model_answer", "correct")
    rows = [
        {"model_answer": None, "correct": False, **{key: row[key] for key in keys if key in row}} for row in make_rows()
    ]
    for number, content in enumerate([{"results": rows, "accuracy": 0.5, "args": {"bs": 1}}, rows]):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
        assert read_result(tmp_path / f"{number}.json")["results"] == rows


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "not JSON"),
        (b'{"results": [', "not JSON"),
        (b'{"model": "\xe9"}', "not JSON ('utf-8' codec can't decode byte 0xe9"),
        (b"\xef\xbb\xbf[]", "not JSON (Unexpected UTF-8 BOM"),
        (b"[" * 99_999, "not JSON (nested too deep)"),
        (b"7" * 9_999, "not JSON (Exceeds the limit"),
        (b"7", "expected an object"),
        (b"null", "expected an object"),
        (b"[]", "no list of responses"),
        (b"{}", "no list of responses"),
        (b'{"results": {}}', "no list of responses"),
    ],
)
def test_what_is_no_result_file(tmp_path, text, message):
    path = tmp_path / "result.json"
    path.write_bytes(text)
    assert refused(read_result, path).startswith(f"{path}: {message}")


ROWS = [
    ({"question": None}, "question: expected text"),
    ({"options": "left"}, "options: expected a list of texts"),
    ({"options": []}, "options: expected a list of texts"),
    ({"options": [1, 2]}, "options: expected a list of texts"),
    ({"options": ["left", ""]}, "options: expected a list of texts, none of them blank"),
    ({"options": [" ", "left"]}, "options: expected a list of texts, none of them blank"),
    ({"options": ["left", "\u200b"]}, "options: expected a list of texts, none of them blank"),
    ({"ground_truth": ["left"]}, "ground_truth: expected text"),
    ({"ground_truth": "up"}, "ground_truth: 'up' is none of its 2 options"),
    ({"ground_truth": "(C)"}, "ground_truth: '(C)' is none of its 2 options"),
    ({"response": 3}, "response: expected text"),
    ({"task": ["Where"]}, "task: expected a name"),
    ({"task": "Where\x1b[2J"}, "task: expected a name"),
    ({"task": "a\nb"}, "task: expected a name"),
    ({"task": HALF}, "task: expected a name"),
    ({"task": " "}, "task: expected a name"),
    ({"type": 2}, "type: expected a name"),
    ({"source": {}}, "source: expected a name"),
    ({"id": [1]}, "id: expected a text or a whole number"),
    ({"id": None}, "id: expected a text or a whole number"),
    ({"id": float("nan")}, "id: expected a text or a whole number"),
    ({"rotation": -1}, "rotation: expected a whole number"),
    ({"rotation": 10**400}, "rotation: expected a whole number"),
    ({"truncated": "no"}, "truncated: expected true or false"),
    ({"error": 1}, "error: expected text or null"),
    ({"id": 0}, "has the id 0 of row 0; two questions need two ids"),  # of another question
    ({"id": 1, "rotation": 1}, "has the id 1 of row 2; two questions need two ids"),
]


@pytest.mark.parametrize("changes, message", ROWS, ids=lambda value: ascii(value)[:40])
def test_a_row_that_is_something_else_is_named(tmp_path, changes, message):
    rows, number = make_rows(), 4 if "rotation" in changes else 2
    rows[number] |= {"id": 1, "question": "question 1?", **changes}
    (tmp_path / "result.json").write_text(json.dumps(rows))
    told = refused(read_result, tmp_path / "result.json")
    assert told.startswith(f"{tmp_path}/result.json: row {number}: {message}"), told


def test_a_row_without_a_field_is_named(tmp_path):
    rows = make_rows()
    del rows[5]["task"], rows[5]["options"]
    (tmp_path / "result.json").write_text(json.dumps(rows))
    assert refused(read_result, tmp_path / "result.json").endswith("result.json: row 5: missing options, task")


def change(*path: str | int, **fields: object) -> Callable[[dict], None]:
    """A change of what lies on a path in a result; a field that is ... is deleted."""

    def apply(result: dict) -> None:
        for key in path:
            result = result[key]
        for name, value in fields.items():
            result.pop(name, None) if value is ... else result.__setitem__(name, value)

    return apply


SCORED = [
    (change(scores=...), "no scores in it; score it with test_qwen2vl_CVBench.py"),
    (change(scores=[]), "scores: expected an object"),
    (change("scores", Total=...), "scores: missing Total"),
    (change("scores", Total="high"), "scores: Total: expected"),
    (change("scores", Where=0.5), "scores: Where: expected an object"),
    (change("scores", **{"\x1b]0;x\x07": {}}), "scores: name: expected a name"),
    (change("scores", "Total", accuracy="0.5"), "scores: Total: accuracy: expected a number from 0 to 1"),
    (change("scores", "Total", accuracy=float("nan")), "scores: Total: accuracy: expected a number from 0 to 1"),
    (change("scores", "Total", accuracy=1e400), "scores: Total: accuracy: expected a number from 0 to 1"),
    (change("scores", "Total", accuracy=10**400), "scores: Total: accuracy: expected a number from 0 to 1"),
    (change("scores", "Total", accuracy=59.5), "scores: Total: accuracy: expected a number from 0 to 1"),
    (change("scores", "Total", accuracy=True), "scores: Total: accuracy: expected a number from 0 to 1"),
    (change("scores", "Total", chance=...), "scores: Total: missing chance"),
    (change("scores", "Total", interval=...), "scores: Total: missing interval"),
    (change("scores", "Total", interval=[0.5]), "scores: Total: interval: expected two numbers"),
    (change("scores", "Total", interval=[0.7, 0.3]), "scores: Total: interval: expected two numbers"),
    (change("scores", "Total", interval=[-1, 2]), "scores: Total: interval: expected two numbers"),
    (change("scores", "Total", bounds={}), "scores: Total: bounds: expected two numbers"),
    (change("scores", "Total", n=-1), "scores: Total: n: expected a whole number"),
    (change(shares=...), "shares: expected an object"),
    (change("shares", truncated_share="x"), "shares: truncated_share: expected a number"),
    (change("shares", unread_shares={"refused": 3}), "shares: unread_shares: expected shares by name"),
    (change("shares", unread_shares={"\x1b": 0}), "shares: unread_shares: expected shares by name"),
    (change("results", 3, correct=...), "row 3: missing correct"),
    (change("results", 3, correct="yes"), "row 3: correct: expected true or false"),
    (change(prompt="base"), "prompt: expected an object with a name and a style"),
    (change("prompt", name="\x1b[1m"), "prompt: expected an object with a name and a style"),
    (change(benchmark=["SAT-val"]), "benchmark: expected a name"),
    (change(parser=None), "parser: expected a name"),
]


@pytest.mark.parametrize("damage, message", SCORED, ids=[message for _, message in SCORED])
def test_scores_are_checked_whole(tmp_path, damage, message):
    result = make_scored()
    damage(result)
    (tmp_path / "result.json").write_text(json.dumps(result))
    told = refused(read_scored, tmp_path / "result.json")
    assert told.startswith(f"{tmp_path}/result.json: {message}"), told


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


# --- unfinished work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, message",
    [
        (b"[1]", "expected an object"),
        (b"{}", "missing question, options, task, ground_truth, response, id, rotation"),
        (json.dumps({**make_rows()[0], "error": None, "id": [1]}).encode(), "id: expected a text or a whole number"),
        (b'{"id": ', "damaged ("),
        (b"[" * 99_999, "damaged ("),
        (b'{"id": "\xff"}', "damaged ("),
    ],
)
def test_unfinished_work_that_is_damaged(tmp_path, line, message):
    partial = tmp_path / "result.partial0.jsonl"
    settings = {"benchmark": "SAT-val"}
    good = make_rows()[1] | {"error": None, "response": "half"}
    append_rows(partial, [settings, good])
    assert collect(tmp_path / "result.json", settings) == {(0, 1): good}
    with partial.open("ab") as file:
        file.write(line + b"\n" + to_json(good))
    assert refused(collect, tmp_path / "result.json", settings).startswith(f"{partial}: line 3: {message}")


def test_unfinished_work_of_something_else(tmp_path):
    (tmp_path / "result.partial0.jsonl").write_text("[1]\n[2]\n")
    assert "partial0.jsonl: line 1: expected an object" in refused(collect, tmp_path / "result.json", {})
    (tmp_path / "result.partial0.jsonl").write_text('{"benchmark": "VSR"}\n{}\n')
    assert collect(tmp_path / "result.json", {}) == {} and not partial_paths(tmp_path / "result.json")


# --- question sets ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> pa.Table:
    """Four rows of CV-Bench."""
    folder = tmp_path_factory.mktemp("cvbench")
    write_cvbench(folder, 8, 3, LEVELS["easy"])
    return pq.read_table(folder / "test_2d.parquet")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"answer": None}, "row 1: answer: expected text"),
        ({"answer": "(hidden)"}, "row 1: idx 1: answer '(hidden)' is not one of its"),
        ({"choices": None}, "row 1: choices: expected a list of texts"),
        ({"choices": [None]}, "row 1: choices: expected a list of texts"),
        ({"choices": []}, "row 1: idx 1: answer"),
        ({"prompt": None}, "row 1: prompt: expected text"),
        ({"task": None}, "row 1: task: expected a name"),
        ({"task": "\x1b[2J"}, "row 1: task: expected a name"),
        ({"source": "a\tb"}, "row 1: source: expected a name"),
        ({"idx": None}, "row 1: idx: expected a whole number or a name"),
        ({"idx": 0}, "row 1: has the idx 0 of {path}: row 0; two questions need two"),
    ],
    ids=str,
)
def test_a_row_of_cvbench_that_is_something_else(tmp_path, table, changes, message):
    rows = table.to_pylist()
    rows[1] |= changes
    path = tmp_path / "test_2d.parquet"
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)
    told = refused(read, BENCHMARKS["CV-Bench"], str(path))
    assert told.startswith(f"{path}: {message.format(path=path)}"), told


def test_text_that_is_not_utf8_names_its_file(tmp_path, table):
    broken = pa.array([b"\xff"] * len(table)).cast(pa.binary()).view(pa.string())
    pq.write_table(table.set_column(table.column_names.index("prompt"), "prompt", broken), tmp_path / "x.parquet")
    assert f"{tmp_path}/x.parquet: " in refused(read, BENCHMARKS["CV-Bench"], str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"caption": "\xe9"}', "line 2: not JSON ('utf-8' codec"),
        (b"[" * 99_999, "line 2: not JSON (nested too deep)"),
        (b"[1]", "row 1: expected an object"),
        (b'{"caption": "?"}', "no column image, label, relation; is this VSR?"),
        (b'{"caption": "\\ud800", "image": "a", "label": 1, "relation": "on"}', "row 1: caption: expected text"),
        (b'{"caption": "?", "image": "a", "label": 2, "relation": "on"}', "row 1: label: expected 0 or 1"),
        (b'{"caption": "?", "image": 5, "label": 1, "relation": "on"}', "row 1: image: expected an image"),
        (b'{"caption": "?", "image": "a", "label": 1, "relation": null}', "row 1: relation: expected a name"),
        (b'{"caption": "?", "image": {"bytes": [1]}, "label": 1, "relation": "on"}', "row 1: image: expected an image"),
    ],
)
def test_a_line_of_vsr_that_is_something_else(tmp_path, line, message):
    path = tmp_path / "test.jsonl"
    path.write_bytes(b'{"caption": "?", "image": "a", "label": 1, "relation": "on"}\n' + line + b"\n\n")
    assert refused(read, BENCHMARKS["VSR"], str(path)).startswith(f"{path}: {message}")


# --- options that are seen before anything is made --------------------------------------------------------------


@pytest.mark.parametrize(
    "run, arguments, message",
    [
        (world.main, "--output {folder}/w --rows 1 --schema cvbench", "--rows 1: cvbench has 2 files, and each needs"),
        (world.main, "--output {folder}", "--output: {folder} is a folder; name a file"),
        (world.main, "--output x --rows 0", "--rows: expected a number above 0, not '0'"),
        ("scripts/benchmark.py", "stpe", "{{data,eval,step}}"),
        ("scripts/benchmark.py", "data --rounds 0", "--rounds: expected a number above 0, not '0'"),
        ("scripts/benchmark.py", "eval --bs -1", "--bs: expected a number above 0, not '-1'"),
        ("scripts/benchmark.py", "--json {folder}/no/x.json data", "--json: {folder}/no/x.json: no folder {folder}/no"),
    ],
)
def test_a_wrong_option_is_seen_first(tmp_path, monkeypatch, capsys, run, arguments, message):
    monkeypatch.setattr(sys, "argv", ["", *arguments.format(folder=tmp_path).split()])
    with pytest.raises(SystemExit) as left:
        (load_script(REPO_ROOT / run).main if isinstance(run, str) else run)()
    assert left.value.code == 2 and message.format(folder=tmp_path) in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
