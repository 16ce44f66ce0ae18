"""Question sets, scores and their intervals, re-scoring and comparing: all that needs no model."""

import json
import math
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_r1.answers import statistics
from open_r1.base.errors import REPO_ROOT, Mistake
from open_r1.tasks.benchmarks import BENCHMARKS, Item, digest, read, stratified
from open_r1.tasks.benchmarks.choice import CVBENCH_FILES, CVBENCH_SCORE
from open_r1.world.parquet import SAT_SCHEMA, sat_row, write_cvbench, write_sat
from open_r1.world.scene import LEVELS
from support import load_script

SCRIPT = REPO_ROOT / "src/eval/test_qwen2vl_CVBench.py"
COMPARE = REPO_ROOT / "scripts/compare.py"
CV_BENCH = BENCHMARKS["CV-Bench"]
EASY = LEVELS["easy"]
NAMES = ["Total", "Count", "Relation", "Depth", "Distance", "2D", "3D", "ADE20K", "COCO", "Omni3D", "CV-Bench"]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A folder with CV-Bench's two files."""
    folder = tmp_path_factory.mktemp("cvbench")
    write_cvbench(folder, 400, 3, EASY)
    return folder


@pytest.fixture(scope="module")
def items(rendered) -> list[Item]:
    return read(CV_BENCH, str(rendered))


def respond(items: list[Item], *responses: str) -> list[dict]:
    """Rows of a result, not yet judged; the responses take turns."""
    turns = [responses[i % len(responses)] for i in range(len(items))]
    return [{**item.to_row(), "response": turn, "truncated": False} for item, turn in zip(items, turns, strict=True)]


def judged(rows: list[dict]) -> list[dict]:
    return [statistics.judge_row(row, "lenient") for row in rows]


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[str, str]]:
    """Runs a script in this process; returns what it printed and what it warned of."""

    def run(script: Path, *args: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        load_script(script).main()
        return capsys.readouterr()

    return run


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dress", ["{}", "It is near, so <answer> {} </answer>", "The answer is {}."])
def test_oracle_scores_one(items, dress):
    rows = [row | {"response": dress.format(row["ground_truth"])} for row in respond(items, "")]
    scores = statistics.score(judged(rows), CV_BENCH.combinations)
    assert list(scores) == NAMES
    assert all(value["accuracy"] == 1 and value["interval"][1] == 1 for value in scores.values())
    assert json.loads(json.dumps(scores)) == scores  # plain numbers


def test_official_score_weighs_sources_and_total_weighs_questions():
    rows = []
    for source, right, n in (("ADE20K", 1, 4), ("COCO", 1, 2), ("Omni3D", 3, 4)):
        for i in range(n):
            rows.append({"id": len(rows), "task": "Count", "source": source, "options": ["1", "2"], "question": "?"})
            rows[-1] |= {"ground_truth": "(A)", "response": "(A)" if i < right else "(B)"}
    scores = statistics.score(judged(rows), CV_BENCH.combinations)
    assert scores["Total"]["accuracy"] == 5 / 10
    assert scores["CV-Bench"]["accuracy"] == ((1 / 4 + 1 / 2) / 2 + 3 / 4) / 2
    assert scores["CV-Bench"]["chance"] == 1 / 2 and scores["CV-Bench"]["n"] == 10
    low, high = scores["CV-Bench"]["interval"]
    assert low < scores["CV-Bench"]["accuracy"] < high
    assert "CV-Bench" not in statistics.score(judged(rows[:6]), CV_BENCH.combinations)  # without Omni3D


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson(successes, n, low, high):
    assert statistics.wilson(successes, n) == pytest.approx((low, high), abs=1e-6)


def test_bootstrap_is_seeded_and_as_wide_as_theory():
    right = {"ADE20K": (300, 600), "COCO": (400, 838), "Omni3D": (700, 1200)}
    earned = {name: [1] * k + [0] * (n - k) for name, (k, n) in right.items()}
    low, high = statistics.bootstrap(earned, CVBENCH_SCORE)
    assert (low, high) == statistics.bootstrap(earned, CVBENCH_SCORE)
    weights = {"ADE20K": 1 / 4, "COCO": 1 / 4, "Omni3D": 1 / 2}
    variance = sum(weights[name] ** 2 * k / n * (1 - k / n) / n for name, (k, n) in right.items())
    centre = statistics.mean_of(CVBENCH_SCORE, {name: k / n for name, (k, n) in right.items()})
    assert (low + high) / 2 == pytest.approx(centre, abs=1e-3)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(variance), rel=0.05)


@pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1), (5, 0, 0.0625), (10, 2, 2 * 79 / 4096), (3, 3, 1)])
def test_mcnemar(b, c, p):
    assert statistics.mcnemar(b, c) == statistics.mcnemar(c, b) == pytest.approx(p)
    assert 0 < statistics.mcnemar(1500, 1000) < 1e-20


def test_baselines_by_hand():
    row = {"question": "?", "options": ["1", "2", "3", "4"], "response": ""}
    golds = {"Count": ["(C)", "(B)", "(B)", "(C)", "(A)"], "Depth": ["(A)", "(A)"]}
    rows = [row | {"task": task, "ground_truth": gold} for task, of_task in golds.items() for gold in of_task]
    scores = statistics.score(judged(rows))
    assert [scores[name]["majority"] for name in ("Total", "Count", "Depth")] == [4 / 7, 2 / 5, 1]
    assert scores["Total"]["chance"] == 1 / 4 and scores["Total"]["n"] == 7
    # of positions that are as frequent the first
    assert statistics.majority_answers(rows) == {"Count": 1, "Depth": 0}


def test_the_article_is_no_answer_and_neither_are_two_options(items):
    asked = [item for item in items if item.task == "Depth" and item.answer == "(A)"][:1]
    for response in ("There is a chair in the image.", "a", "(A) or (B)", "A and B", ""):
        row = statistics.judge_row(respond(asked, response)[0], "lenient")
        assert row["model_answer"] is None or response == "a", response  # alone, "a" is a letter and no article
        assert response == "a" or not row["correct"]


UNREAD = {
    "I'm sorry, I cannot see the image.": "refused",
    "It is (A) or (B).": "several named",
    "The answer is (A) table.": "letter and text disagree",
    "<think>The picture shows": "cut off",
    "Something else.": "unreadable",
}


def test_what_could_not_be_read_is_told_apart_and_bounds_the_score():
    row = {"question": "?", "task": "Depth", "options": ["chair", "table"], "ground_truth": "(B)"}
    responses = [*UNREAD, "(B)", "(B) table", "(A)", "Therefore, the table is closer.", ""]
    rows = judged([{**row, "response": response} for response in responses])
    assert [row["reading"] for row in rows[:5]] == list(UNREAD.values())
    assert [row["reading"] for row in rows[5:9]] == ["first line", "first line", "first line", "conclusion"]
    counts = statistics.response_shares(rows)
    assert counts["unread_shares"] == {reason: 1 / 10 + (reason == "unreadable") / 10 for reason in UNREAD.values()}
    assert sum(counts["unread_shares"].values()) == pytest.approx(counts["unparsable_share"]) == 6 / 10
    total = statistics.score(rows)["Total"]
    assert total["bounds"] == [3 / 10, 9 / 10] and total["accuracy"] == 3 / 10
    assert "30.0 -  90.0" in statistics.table({"Total": total})
    assert "60.0% of the responses could not be read (refused 10.0%" in statistics.unread_warning(counts)
    assert statistics.unread_warning(counts | {"unparsable_share": 0.05}) is None


def test_a_response_without_an_answer_that_was_cut_off_says_so():
    row = {"question": "?", "task": "Depth", "options": ["chair", "table"], "ground_truth": "(B)", "truncated": True}
    rows = judged([row | {"response": text} for text in ("I see", "(A) or (B)", "(B)")])
    assert [row["reading"] for row in rows] == ["cut off", "several named", "first line"]
    counts = statistics.response_shares(rows)
    assert (counts["unparsable"], counts["truncated"], counts["image_errors"]) == (2, 3, 0)


def test_bounds_of_rotations_and_of_the_combination():
    row = {"task": "Count", "question": "?", "options": ["1", "2"], "ground_truth": "(A)"}
    responses = {"ADE20K": ["(A)", "?"], "COCO": ["(A)", "(B)"], "Omni3D": ["?", "?"]}
    rows = [
        {**row, "id": source, "rotation": rotation, "source": source, "response": response}
        for source, answers in responses.items()
        for rotation, response in enumerate(answers)
    ]
    scores = statistics.score(judged(rows), CV_BENCH.combinations)
    assert scores["Total"]["n"] == scores["CV-Bench"]["n"] == 3  # questions, not responses
    assert scores["Total"]["bounds"] == pytest.approx([2 / 6, 5 / 6])
    assert scores[statistics.ALL_ROTATIONS]["bounds"] == pytest.approx([0, 2 / 3])
    assert scores["CV-Bench"]["bounds"] == pytest.approx([((1 / 2 + 1 / 2) / 2 + 0) / 2, ((1 + 1 / 2) / 2 + 1) / 2])


ROTATED = {  # question -> its options, and the responses to their rotations
    "one": (["x", "y"], ["x", "x"]),
    "two": (["x", "y", "z"], ["x", "y", "x"]),
    "three": (["x", "y"], ["y", "what?"]),
    "four": (["x", "y", "z"], ["what?", "x", "x"]),
}


def test_of_a_rotated_question_every_order_counts():
    rows = [
        {"id": name, "rotation": turn, "question": name, "task": "Where", "ground_truth": "x", "response": response}
        | {"options": options[turn:] + options[:turn]}
        for name, (options, responses) in ROTATED.items()
        for turn, response in enumerate(responses)
    ]
    rows = judged(rows)
    scores = statistics.score(rows)
    total, everywhere = scores["Total"], scores[statistics.ALL_ROTATIONS]
    right = 1 + 2 / 3 + 0 + 2 / 3
    assert total["n"] == everywhere["n"] == 4
    assert total["accuracy"] == pytest.approx(right / 4) and everywhere["accuracy"] == 1 / 4
    assert total["interval"] == pytest.approx(statistics.wilson(right, 4))
    assert everywhere["interval"] == pytest.approx(statistics.wilson(1, 4))
    assert total["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert everywhere["chance"] == pytest.approx((1 / 2**2 + 1 / 3**3) / 2)  # a guess for every order
    assert total["bounds"] == pytest.approx([right / 4, (right + 1 / 2 + 1 / 3) / 4])
    assert everywhere["bounds"] == [1 / 4, 2 / 4]
    # "x" stands at the first place in four rows, one a question; nowhere more often.
    assert total["majority"] == pytest.approx((1 / 2 + 1 / 3) / 2) and everywhere["majority"] == 0
    shares = {"one": 1, "two": 2 / 3, "three": 0, "four": 2 / 3}
    assert statistics.outcomes(rows) == {(name, name): pytest.approx(share) for name, share in shares.items()}


def test_what_was_not_asked_for_want_of_its_image_is_wrong_in_both_bounds():
    row = {"task": "Count", "question": "?", "options": ["1", "2"], "ground_truth": "(A)", "response": ""}
    rows = judged([{**row, "error": "corrupt image"}, {**row, "response": "(A)"}, row, {**row, "error": None}])
    assert statistics.score(rows)["Total"]["bounds"] == [1 / 4, 3 / 4]


# --- question sets --------------------------------------------------------------------------------


def test_cvbench_asks_its_prompt_column(rendered, items):
    rows = [row for name in CVBENCH_FILES.values() for row in pq.read_table(rendered / name).to_pylist()]
    assert [item.prompt for item in items] == [row["prompt"] for row in rows]
    assert [item.answer for item in items] == [row["answer"] for row in rows]
    assert [item.images for item in items] == [(row["image"]["bytes"],) for row in rows]
    assert {(item.type, item.source) for item in items} == {("2D", "ADE20K"), ("2D", "COCO"), ("3D", "Omni3D")}


def test_sat_is_evaluated_in_every_rotation(tmp_path):
    write_sat(tmp_path / "SAT_val.parquet", 12, 0, EASY, ["count", "left"])
    asked = read(BENCHMARKS["SAT-val"], str(tmp_path))
    for number in range(12):
        rotations = [item for item in asked if item.id == number]
        options = rotations[0].options
        assert [item.options[0] for item in rotations] == list(options)
        assert all(sorted(item.options) == sorted(options) and item.answer in options for item in rotations)
        assert all(f"options: {item.options[0]}" in item.prompt for item in rotations)
    # Always the first option: right in exactly one rotation of each question.
    scores = statistics.score(judged([row | {"response": row["options"][0]} for row in respond(asked, "")]))
    assert scores["Total"]["n"] == 12 < len(asked)
    assert scores["Total"]["accuracy"] == pytest.approx(scores["Total"]["chance"])
    assert scores[statistics.ALL_ROTATIONS]["accuracy"] == 0


def test_sat_rows_without_a_right_option_are_left_out_and_reported(tmp_path, capsys):
    rows = [sat_row(i, 0, EASY) for i in range(3)]
    rows[1]["correct_answer"] = "none of these"
    pq.write_table(pa.Table.from_pylist(rows, SAT_SCHEMA), tmp_path / "SAT_test.parquet")
    assert {item.id for item in read(BENCHMARKS["SAT-test"], str(tmp_path))} == {0, 2}
    assert "left out 1 of 3 rows" in capsys.readouterr().err


def test_limit_keeps_the_shares_of_the_tasks():
    tasks = ["Count"] * 788 + ["Relation"] * 650 + ["Depth"] * 600 + ["Distance"] * 600
    chosen = stratified(tasks, 100)
    assert chosen == sorted(set(chosen)) == stratified(tasks, 100)
    assert [sum(tasks[i] == task for i in chosen) for task in dict.fromkeys(tasks)] == [30, 24, 23, 23]
    assert stratified(tasks, 10_000) == list(range(2638))
    assert len(stratified(tasks, 1)) == 1


def test_digest_depends_on_what_is_asked(items, rendered):
    assert digest(items) == digest(read(CV_BENCH, str(rendered)))
    assert digest(items) != digest(items[:-1])
    assert digest(items) != digest(read(CV_BENCH, str(rendered / "test_2d.parquet")))


# --- re-scoring -----------------------------------------------------------------------------------


def write_rows(path: Path, rows: list[dict], **about: object) -> Path:
    path.write_text(json.dumps({**about, "results": rows}))
    return path


def test_rescoring_a_whole_run_is_quick_and_complete_and_needs_no_torch(tmp_path, items):
    responses = ["(A)", "The answer is B.", "<answer>C</answer>", "hm " * 200, "1/2", "twenty-one"]
    rows = [row | {"id": number} for number, row in enumerate(respond((items * 7)[:2638], *responses))]
    rows[-1]["response"] = rows[-1]["ground_truth"]
    saved = write_rows(tmp_path / "saved.json", rows)
    code = f"""if True:
        import runpy, sys
        sys.argv = ["", "--precomputed_json", {str(saved)!r}, "--output_dir", {str(tmp_path / "out")!r}]
        try:
            runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
        finally:
            assert "torch" not in sys.modules
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of the CPU
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out/saved.json").read_text())
    assert len(result["results"]) == result["scores"]["Total"]["n"] == 2638
    assert result["results"][-1]["correct"]
    assert seconds < 10, "3 seconds is the aim; a slow machine gets more"


def test_rescoring_reproduces_a_result_bit_for_bit(tmp_path, items, run):
    saved = write_rows(tmp_path / "run.json", respond(items, "(A)", "2", "?"), args={"bs": 4}, benchmark="CV-Bench")
    for folder, source in (("a", saved), ("b", tmp_path / "a/run.json"), ("a", tmp_path / "a/run.json")):
        run(SCRIPT, "--precomputed_json", source, "--output_dir", tmp_path / folder)
    assert (tmp_path / "a/run.json").read_bytes() == (tmp_path / "b/run.json").read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["run.json"]
    result = json.loads((tmp_path / "a/run.json").read_text())
    assert result["parser"] == "lenient" and result["args"] == {"bs": 4}
    assert list(result["accuracy"]) == [name for name in NAMES if name not in ("ADE20K", "COCO", "Omni3D")]

    run(SCRIPT, "--precomputed_json", saved, "--output_dir", tmp_path / "a", "--parser", "strict")
    assert json.loads((tmp_path / "a/run.json").read_text())["accuracy"]["Total"] == 0
    assert len(list((tmp_path / "a").glob("*.old"))) == 1  # the lenient one


# --- comparing ------------------------------------------------------------------------------------


def test_compare(tmp_path, items, run):
    rng = random.Random(0)
    paths = []
    for name, skill in (("base", 0.3), ("grpo", 0.8)):
        rows = respond(items, "?")
        for row in rows:
            if rng.random() < skill:
                row["response"] = row["ground_truth"]
        about = {"benchmark": "CV-Bench", "prompt": {"name": name, "style": "reasoning"}}
        saved = write_rows(tmp_path / f"CVBench_result_{name}_reasoning.json", rows, **about)
        run(SCRIPT, "--precomputed_json", saved, "--output_dir", tmp_path / "scored")
        paths.append(tmp_path / "scored" / saved.name)
    out, err = run(COMPARE, *paths, "--chart", tmp_path / "chart.svg")
    assert "| | base | grpo |" in out and "<svg" in (tmp_path / "chart.svg").read_text()
    assert "| | Count | Relation | Depth | Distance | Total |" in out
    totals = [100 * json.loads(path.read_text())["accuracy"]["Total"] for path in paths]
    for line, total in zip(out.splitlines()[2:4], totals, strict=True):
        assert line.count("(") == 5 and line.rpartition(" | ")[2].startswith(f"{total:.2f} (")
    assert "the prompts differ" in err and "parsers" not in err
    unread = json.loads(paths[0].read_text())["shares"]["unparsable_share"]
    assert f"warning: base: {unread:.1%} of the responses could not be read (unreadable {unread:.1%})" in err
    assert f"| unread: unreadable | {100 * unread:.2f} |" in out and "| unread: refused | 0.00 | 0.00 |" in out
    assert f"[{totals[0]:.1f} - 100.0]" in out
    first, second = (json.loads(path.read_text())["results"] for path in paths)
    only_second = sum(b["correct"] and not a["correct"] for a, b in zip(first, second, strict=True))
    only_first = sum(a["correct"] and not b["correct"] for a, b in zip(first, second, strict=True))
    points = 100 * (only_second - only_first) / 400
    assert f"| grpo | {points:+.2f} (" in out and f"| {only_second} | {only_first} | 400 |" in out

    (tmp_path / "strict.json").write_text(json.dumps(json.loads(paths[0].read_text()) | {"parser": "strict"}))
    _, err = run(COMPARE, paths[0], tmp_path / "strict.json")
    assert "the parsers differ" in err and "prompts" not in err
    out, _ = run(COMPARE, *paths, "--names", "Base", "+GRPO")
    assert "| | Base | +GRPO |" in out and (tmp_path / "scored/comparison.png").stat().st_size > 10_000
    with pytest.raises(Mistake, match="--names: 1 names for 2 results"):
        run(COMPARE, *paths, "--names", "Base")
