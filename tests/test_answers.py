"""The answer checker against a table judged by hand, and against text that wants to break it."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from open_r1 import answers
from open_r1.answers import Verdict, extract_answer, is_correct, judge, normalize

TABLE = json.loads((Path(__file__).parent / "data" / "responses.json").read_text(encoding="utf-8"))
COUNT = {"gold": "(B)", "options": ["3", "2", "1", "0"]}
MEGABYTE = 1_000_000


@pytest.mark.parametrize(("question", "mode", "response", "answer", "correct"), TABLE["responses"])
def test_response_is_judged_as_by_a_human(question, mode, response, answer, correct):
    verdict = judge(response, **TABLE["questions"][question], lenient=mode == "lenient")
    assert verdict == Verdict(answer, correct)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>left</answer>", "left"),
        ("<answer>\nleft\nfront\n</answer>", "left\nfront"),
        ("<answer>left</answer> no: <answer>right</answer>", "right"),
        ("<answer><answer>left</answer></answer>", "left"),
        ("<answer>left</answer> <answer>right", "left"),
        ("<answer></answer>", ""),
        ("<answer>left", None),
        ("left</answer>", None),
        ("</answer>left<answer>", None),
        ("", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("three", "3"),
        ("3.0", "3"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("1,000", "1000"),
        ("-3.0", "-3"),
        ("nineteen", "19"),
        ("Twenty-One Chairs", "21 chairs"),
        ("ninety nine", "99"),
        ("someone", "someone"),
        ("3rd", "3rd"),
        ("10:30", "10:30"),
        (' "The chair." ', "chair"),
        ("a", "a"),
        ("a b", "a b"),
        ("half-left", "half-left"),
        ("?", "?"),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected
    assert normalize(expected) == expected


@pytest.mark.parametrize("gold", ["C", "(C)", "c.", "1", "one"])
def test_gold_is_a_letter_or_a_text(gold):
    assert is_correct("C", gold, COUNT["options"], lettered=True)
    assert is_correct("1.0", gold, COUNT["options"], lettered=True)
    assert not is_correct("B", gold, COUNT["options"], lettered=True)


def test_letters_count_only_where_they_were_shown():
    assert is_correct("A", "(A)", ["left", "right"])
    assert not is_correct("A", "left", ["left", "right"])
    assert is_correct("A", "left", ["left", "right"], lettered=True)


def test_the_same_option_twice_is_the_same_answer():
    assert is_correct("(A)", "(C)", ["left", "right", "Left"])
    assert is_correct("left", "Left", ["left", "right", "Left"])


@pytest.mark.parametrize("gold", ["(F)", "behind", ""])
def test_gold_outside_the_options_is_an_error_in_the_data(gold):
    with pytest.raises(ValueError, match="none of the options"):
        is_correct("left", gold, ["left", "right"])


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("1/2", "0.5", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\sqrt{4}", "2", True),
        ("6", "2*3", True),
        ("6", "2 × 3", True),  # noqa: RUF001
        ("x+1", "1+x", True),
        ("10^{3}", "1000", True),
        ("1/2", "1/3", False),
        ("2", "1 or 2", False),
        ("2", "1, 2", False),
        ("12", "1 2", False),
        ("2", "{1, 2}", False),
        ("1/2", "1/0", False),
        ("1/2", "", False),
        ("1/2", None, False),
    ],
)
def test_symbolic_equality_is_the_last_resort(gold, answer, equal):
    assert is_correct(answer, gold) is equal


@pytest.mark.parametrize(
    "answer",
    [
        "9^9^9^9",
        "9**9**9",
        "{9^{99}}^{99}",
        "(9^9)^9",
        "99999999999",
        "9!",
        r"\binom{99999}{9999}",
        "(" * 20 + "1",
        "x" * 65,
    ],
)
def test_runaway_expressions_never_reach_math_verify(answer, monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # importing it now raises ImportError
    assert not is_correct(answer, "1/2")


def test_symbolic_equality_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(is_correct("0.5", "1/2")))
    thread.start()
    thread.join()
    assert results == [True]


ENGLISH = ["(B) ", "A ", "3 or ", "one of ", "answer is ", "answer is A because ", "1", "1,000,", "\n x", "..x"]
MARKUP = ["<answer>", "</answer>", "<answer>A</answer>", "<a", "*_", r"\boxed{", "&amp;", "答案是", "\ufdfa"]


@pytest.mark.parametrize("piece", ENGLISH + MARKUP)
def test_a_megabyte_of_anything_is_no_problem(piece):
    """No clock: anything quadratic would take this test from a fraction of a second to many minutes."""
    text = piece * (MEGABYTE // len(piece))
    for response in (text, f"<answer>{text}</answer>", f"<answer>{text}x", f"<answer>x{text}"):
        for lenient in (False, True):
            judge(response, **COUNT, lenient=lenient)
            judge(response, "1/2", lenient=lenient)


def test_overlong_answers():
    assert judge("So many organs! " * 10_000 + "The answer is B.", **COUNT, lenient=True).correct
    assert judge(f"<answer>2{' x' * answers.MAX_ANSWER_CHARS}</answer>", **COUNT) == Verdict(None, False)


def test_plain_answers_need_neither_torch_nor_math_verify():
    code = """if True:
        import sys
        from open_r1 import rewards
        assert rewards.accuracy_reward(["<answer>three</answer>"], ["3.0"], options=[["3", "4"]]) == [1.0]
        assert rewards.accuracy_reward(["<answer>4</answer>"], ["3"], options=[["3", "4"]]) == [0.0]
        assert not {"torch", "math_verify", "sympy"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
