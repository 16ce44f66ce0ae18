"""Answers that became constant: told where they are more frequent than they are right, and nowhere else."""

import pytest

from fake_run import row
from open_r1.answers.collapse import answered, constant_answers, most_constant, most_frequent
from open_r1.answers.statistics import judge_row

SIDES = ["left", "right"]


def asked(answers: list[str], golds: list[str], options: list[list[str]], task: str = "Relation") -> list[dict]:
    """Judged rows of an evaluation."""
    rows = zip(answers, golds, options, strict=True)
    return [
        judge_row({"id": n, "task": task, "options": o, "ground_truth": gold, "response": answer}, "lenient")
        for n, (answer, gold, o) in enumerate(rows)
    ]


def sides(answers: list[str], right: int) -> list[dict]:
    """Questions in either order of the options, of which so many have the answer left."""
    golds = ["left"] * right + ["right"] * (len(answers) - right)
    return asked(answers, golds, [SIDES, SIDES[::-1]] * (len(answers) // 2))


def test_a_constant_answer_in_a_line():
    rows = sides(["left"] * 60, right=31)
    line = '100% of the answers to "left", "right" are "left", and 52% of the right answers'
    assert str(most_constant(rows)) == line
    assert constant_answers(rows) == [f"Relation: {line}"]


@pytest.mark.parametrize(
    "rows",
    [
        sides(["left"] * 18, right=9),  # few
        sides(["left"] * 60, right=46),  # right answers are mostly the same
        sides(["left", "right"] * 8 + ["left"] * 44, right=30),  # 87 %
        sides(["Hm."] * 60, right=30),  # nothing to read
        [],
    ],
)
def test_what_is_no_collapse(rows):
    assert constant_answers(rows) == []


def test_questions_count_and_not_their_rotations():
    rows = [{**one, "id": 0} for one in sides(["left"] * 60, right=30)]
    assert most_constant(rows).questions == 1 and constant_answers(rows) == []


def test_letters_are_constant_over_different_options():
    options = [[f"lamp {n}", f"desk {n}"] for n in range(40)]
    rows = asked(["(B)"] * 40, ["(A)", "(B)"] * 20, options, "Depth")
    rows += asked(["(A)", "(B)"] * 20, ["(A)", "(B)"] * 20, options, "Distance")
    line = 'Depth: 100% of the answers to its questions are "(B)", and 50% of the right answers'
    assert constant_answers(rows) == [line]
    in_words = asked([of[0] for of in options], [of[n % 2] for n, of in enumerate(options)], options)
    line = "Relation: 100% of the answers to its questions are the option shown first, and 50% of the right answers"
    assert constant_answers(in_words) == [line]


def test_one_set_of_options_among_others():
    """Letters stand for texts, which are the same whatever their order."""
    options = [SIDES, SIDES[::-1]] * 20
    rows = asked(["(A)", "(B)"] * 20, ["(A)", "(A)"] * 20, options)
    rows += asked(["(A)", "(A)", "(B)", "(B)"] * 10, ["(A)", "(B)"] * 20, [["above", "below"]] * 40)
    assert constant_answers(rows) == [
        'Relation: 100% of the answers to "left", "right" are "left", and 50% of the right answers'
    ]


@pytest.mark.parametrize(
    "changes, gold, answer",
    [
        ({}, "left", "left"),
        ({"completion": "Hm.</think><answer>Right.</answer>"}, "left", "right"),
        ({"completion": "right"}, "left", "right"),  # where no more is asked for
        ({"completion": "It is left, I think."}, "left", None),
        ({"completion": "<answer>(B)</answer>", "solution": "A"}, "(A)", "(B)"),
        ({"solution": "<answer>left</answer>"}, "left", "left"),
    ],
)
def test_completions_are_read_as_rewards_read_them(changes, gold, answer):
    judged = answered(row(**changes))
    assert (judged["ground_truth"], judged["model_answer"]) == (gold, answer)


@pytest.mark.parametrize("changes", [{"options": None}, {"options": []}, {"solution": None}, {"solution": "above"}])
def test_what_has_no_options_says_nothing(changes):
    assert answered(row(**changes)) is None
    assert most_constant([], kinds=[most_frequent]) is None
