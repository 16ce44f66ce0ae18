"""Why a completion earned no accuracy reward: every reason, on paper, in a trainer's record, and held to the reward."""

import doctest

import pytest

from open_r1.answers import judgement
from open_r1.answers.judgement import Judgement, judgement_of
from open_r1.rewards import accuracy_reward, bare_accuracy_reward

OPTIONS = ["left", "right"]
READ = [
    ("<think>It is there.</think><answer>left</answer>", {}, Judgement.RIGHT),
    ("<answer> Left. </answer>", {}, Judgement.RIGHT),
    ("<answer>right</answer>", {}, Judgement.WRONG),
    ("Wait. <answer>left</answer> No: <answer>right</answer>", {}, Judgement.WRONG),
    ("<answer>The chair is on the left.</answer>", {}, Judgement.WRONG_FORM),
    ("The answer is left.", {}, Judgement.WRONG_FORM),
    ("The answer is right.", {}, Judgement.NO_TAG),
    ("I see a chair.", {}, Judgement.NO_TAG),
    ("<answer>left", {}, Judgement.WRONG_FORM),
    ("<answer>left or right</answer>", {}, Judgement.HEDGED),
    ("<answer>It is not possible to tell.</answer>", {}, Judgement.HEDGED),
    ("<answer>above</answer>", {}, Judgement.NO_OPTION),
    ("<answer></answer>", {}, Judgement.NO_OPTION),
    ("Let me think about where the left", {"ended": False}, Judgement.CUT_OFF),
    ("<answer>left</answer> and so", {"ended": False}, Judgement.RIGHT),
    ("<answer>above</answer> and so", {"ended": False}, Judgement.NO_OPTION),
    ("left", {"needs_tag": False}, Judgement.RIGHT),
    ("right", {"needs_tag": False}, Judgement.WRONG),
    ("It is on the left.", {"needs_tag": False}, Judgement.WRONG_FORM),
    ("the one on the", {"needs_tag": False, "ended": False}, Judgement.CUT_OFF),
]


@pytest.mark.parametrize("completion, how, expected", READ)
def test_how_a_completion_was_read(completion, how, expected):
    assert judgement_of(completion, "left", OPTIONS, **how) is expected
    reward = accuracy_reward if how.get("needs_tag", True) else bare_accuracy_reward
    [earned] = reward([completion], solution=["left"], options=[OPTIONS])
    assert earned == (expected is Judgement.RIGHT), "and the reward says the same"


def test_every_reason_has_its_case_and_the_examples_hold():
    assert {expected for *_, expected in READ} == set(Judgement)
    assert doctest.testmod(judgement) == (0, 2)


def test_letters_and_open_questions():
    assert judgement_of("<answer>(B)</answer>", "A", OPTIONS) is Judgement.WRONG
    assert judgement_of("<answer>4</answer>", "3", None) is Judgement.WRONG
    assert judgement_of("<answer>3.0</answer>", "3", None) is Judgement.RIGHT
