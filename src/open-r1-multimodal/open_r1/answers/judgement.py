"""Says in a few words how a completion fared under the accuracy reward: right, or why it earned nothing."""

from collections.abc import Sequence
from enum import StrEnum

from open_r1.answers.checker import extract_answer, judge, read_strictly
from open_r1.answers.options import Unread, is_answer, make_question


class Judgement(StrEnum):
    """How a completion was read; all but the first earn no accuracy reward."""

    RIGHT = "right"
    WRONG = "wrong answer"
    WRONG_FORM = "right answer, wrong form"  # where a lenient reader finds it, not as the reward wants it
    NO_TAG = "no answer tag"
    HEDGED = "hedged"  # names several options, or says that it cannot tell
    NO_OPTION = "none of the options"
    CUT_OFF = "cut off"  # at the limit of its length, before an answer


_HEDGES = {Unread.SEVERAL.value, Unread.CONFLICT.value, Unread.REFUSED.value}


def judgement_of(
    completion: str, gold: str, options: Sequence[str] | None, *, ended: bool = True, needs_tag: bool = True
) -> Judgement:
    """How one completion was read.

    Args:
        completion: the model's text.
        gold, options: see `open_r1.answers.checker.is_correct`.
        ended: whether the model came to an end by itself, not at the limit of its length.
        needs_tag: whether the answer has to stand in `<answer>` tags; else it is the whole completion.

    >>> judgement_of("<answer>left or right</answer>", "left", ["left", "right"]).value
    'hedged'
    >>> judgement_of("I think it is left.", "left", ["left", "right"]).value
    'right answer, wrong form'

    Raises:
        Mistake: there are options, and the gold answer is none of them.
    """
    question = make_question(gold, options, lettered=None)
    answer = extract_answer(completion) if needs_tag else completion.strip()
    outcome = read_strictly(answer, question)
    if is_answer(outcome):
        return Judgement.RIGHT if question.is_right(outcome) else Judgement.WRONG
    if not ended and (answer is None or not needs_tag):
        return Judgement.CUT_OFF
    lenient = judge(completion, gold, options, lenient=True)
    if lenient.correct:
        return Judgement.WRONG_FORM
    if answer is None:
        return Judgement.NO_TAG
    return Judgement.HEDGED if {outcome.value, lenient.reading} & _HEDGES else Judgement.NO_OPTION
