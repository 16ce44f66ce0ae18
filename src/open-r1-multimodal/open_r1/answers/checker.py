r"""Decides whether a response answers its question correctly; rewards and evaluation both call it.

An answer is read in one of two ways:

- strictly, for rewards: the answer *is* an option, up to case, white space, quotes, brackets, markup, LaTeX that
  only dresses it, characters that nobody sees, a final full stop and the spelling of numbers (3 = 3.0 = three, in
  any script). What only contains an option is wrong, so neither a hedge ("left or right") nor a list of letters can
  win;
- leniently, for evaluating models that were never taught the tag: the rules of `EVIDENCE` look for the place
  where the response commits itself, and there it must name exactly one option, by its letter ("(B)", "B.",
  "The answer is B") or by its text. Naming two, or hedging about one, is no answer; `Unread` says what it is.

Model output is untrusted text: every step is linear in its length or works on a bounded length.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

from open_r1.answers.options import Answer, Choice, Outcome, Question, Unread, is_answer, make_question
from open_r1.answers.passages import Response, announced, chosen, denies, is_list, praised, said
from open_r1.answers.values import tidy

MAX_ANSWER_CHARS = 1_000  # an answer is an option or a number; anything longer is not an answer


@dataclass(frozen=True)
class Verdict:
    """What a response was understood to answer, and whether that is right.

    `answer` is the option chosen: its letter, as in `"(B)"`, when the options are lettered, otherwise its
    text; for a question without options, the answer as it stands. None means that no answer could be read.
    `reading` is the rule of `EVIDENCE` that decided or, without an answer, the value of an `Unread`.
    """

    answer: str | None
    correct: bool
    reading: str = field(default="", compare=False)  # how the verdict came about is not what it says


def extract_answer(text: str) -> str | None:
    """The content of the last closed `<answer>...</answer>` block, stripped; None when there is none.

    Of nested blocks the innermost counts; one that is never closed does not: the model did not finish.
    """
    opening, closing = "<answer>", "</answer>"
    start = text.rfind(opening, 0, max(text.rfind(closing), 0))
    if start < 0:
        return None
    return text[start + len(opening) : text.find(closing, start)].strip()


def bare_gold(solution: str, options: Sequence[str] | None) -> str:
    """The gold answer without `<answer>` tags around it, unless they are an option's own."""
    return solution if options and solution in options else extract_answer(solution) or solution


def is_letter(solution: str, options: Sequence[str]) -> bool:
    """Whether a gold answer names its option by the letter, and is no option's text."""
    gold, texts = bare_gold(solution, options), tuple(options)
    return Choice(texts, lettered=False).equal(gold) is None and Choice(texts, lettered=True).equal(gold) is not None


def is_correct(
    answer: str | None, gold: str, options: Sequence[str] | None = None, *, lettered: bool | None = None
) -> bool:
    """Whether an extracted answer, read strictly, is the gold answer.

    Args:
        answer: what `extract_answer` returned; None and blank are wrong.
        gold: the right option's text or, when the options are lettered, its letter in any form ("C", "(C)").
        options: the options in the order shown; None or empty for a question without options.
        lettered: whether the model was shown letters. None: yes if `gold` is a letter and no option's text.

    Raises:
        Mistake: there are options, and the gold answer is none of them.
    """
    question = make_question(gold, options, lettered)
    return _verdict(question, read_strictly(answer, question), "tag").correct


def judge(
    response: str,
    gold: str,
    options: Sequence[str] | None = None,
    *,
    lettered: bool | None = None,
    lenient: bool = False,
) -> Verdict:
    """Read the answer out of a whole response and compare it with the gold answer.

    Not lenient, the answer must stand in an `<answer>` block and is read strictly. Lenient, the first rule of
    `EVIDENCE` that finds something decides. The other arguments are those of `is_correct`.

    >>> judge("<think>The lamp is on that side.</think><answer>Left.</answer>", "left", ["left", "right"])
    Verdict(answer='left', correct=True, reading='tag')
    >>> judge("So the answer is B, the right one.", "(A)", ["left", "right"], lenient=True)
    Verdict(answer='(B)', correct=False, reading='declaration')

    Raises:
        Mistake: there are options, and the gold answer is none of them.
    """
    question = make_question(gold, options, lettered)
    if lenient:
        return _verdict(question, *_read(response, question))
    answer = extract_answer(response)
    outcome = _unread(Response(response)) if answer is None else read_strictly(answer, question)
    return _verdict(question, outcome, "tag")


# --- the order of evidence ----------------------------------------------------------------------------------


def _tag(response: Response, question: Question) -> Outcome:
    content = extract_answer(response.text)
    if content is None:
        return None
    answer = question.exact(content)
    return _read(content, question)[0] if answer is None else answer


def _box(response: Response, question: Question) -> Outcome:
    for box in response.boxes:
        if is_answer(outcome := question.stated(tidy(box))) or (outcome := question.exact(box)) is not None:
            return outcome
    return None


def _declaration(response: Response, question: Question) -> Outcome:
    """The last "the answer is B", which corrects the earlier ones; else the last of weaker words."""
    declarations = []
    for declaration in said(response):
        if (outcome := _declared(declaration.clause, question)) is not None:
            declarations.append((declaration, outcome))
    for (before, first), (after, second) in pairwise(declarations):
        again = after.sentence == before.sentence + 1 and after.lead == before.lead
        if again and second != first and is_answer(first):
            # The same words without a thought between correct nothing. Line after line of them, the model runs on,
            # to questions that nobody asked.
            return first if after.line > before.line else Unread.SEVERAL
    if declarations:
        return declarations[-1][1]
    if question.ends_with_answer:  # weaker words introduce its steps, too
        return None
    alone = (question.stated(line) for line in reversed(list(announced(response))))
    weaker = (question.named([clause]) for clause in reversed([*praised(response), *chosen(response)]))
    return _first_answer(chain(alone, weaker))


def _declared(clause: str, question: Question) -> Outcome:
    if denies(clause) and question.stated(clause) is None:
        return Unread.REFUSED
    return question.declared(clause)


def _first_line(response: Response, question: Question) -> Outcome:
    if not response.lines or is_list(response.lines[:2]):
        return None
    return _first_answer(question.stated(line) for line in (response.lines[0], response.sentences[0].text))


def _last_line(response: Response, question: Question) -> Outcome:
    if len(response.lines) < 2 or is_list(response.lines[-2:]):
        return None
    return _first_answer([question.stated(response.lines[-1])])


def _refusal(response: Response, question: Question) -> Outcome:
    if response.refuses:
        return Unread.REFUSED
    return Unread.UNREADABLE if response.boxes else None  # it commits itself, to something that is no option


def _opening(response: Response, question: Question) -> Outcome:
    return None if question.ends_with_answer else _named_alone(response.opening, question)


def _whole_text(response: Response, question: Question) -> Outcome:
    if response.conclusion is not None:  # what led to a conclusion that names no option is none either
        return None
    return question.named([sentence.text for sentence in response.sentences])


def _named_alone(passage: str | None, question: Question) -> Outcome:
    return None if passage is None else _first_answer([question.named([passage])])


def _first_answer(outcomes: Iterable[Outcome]) -> Outcome:
    """The first answer; what cannot be read is left to later rules."""
    return next(filter(is_answer, outcomes), None)


# The first rule that finds something decides, even if what it finds cannot be read.
EVIDENCE: dict[str, Callable[[Response, Question], Outcome]] = {
    "tag": _tag,  # <answer>B</answer>, the last one that is closed
    "box": _box,  # \boxed{B}, the last one
    "declaration": _declaration,  # the answer is B | I would choose B | B is the correct one
    "first line": _first_line,  # (B) left. Because ...
    "last line": _last_line,  # ... In short: \n (B) left
    "refusal": _refusal,  # It is not possible to tell.
    "conclusion": lambda response, question: _named_alone(response.conclusion, question),  # Therefore, it is at B.
    "opening": _opening,  # B fits well. A, on the other hand, ...
    "closing": lambda response, question: _named_alone(response.closing, question),  # ... A does not. B has a lamp.
    "whole text": _whole_text,  # names B and no other option
}


def _read(text: str, question: Question) -> tuple[Answer | Unread, str]:
    """What a whole response answers, and by which rule; first without the questions that the model asked itself."""
    response = Response(text)
    reason = _unread(response)
    for part in filter(None, (response.before_next_question(), response)):
        for rule, find in EVIDENCE.items():
            outcome = find(part, question)
            if is_answer(outcome):
                return outcome, rule
            if outcome is not None:
                reason = outcome
                break
    return reason, ""


def read_strictly(answer: str | None, question: Question) -> Answer | Unread:
    """The answer if the text is one, and nothing else."""
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return Unread.UNREADABLE
    exact = question.exact(answer)
    if exact is not None:
        return exact
    named = question.named([answer])  # only to say why
    return named if isinstance(named, Unread) else Unread.UNREADABLE


def _unread(response: Response) -> Unread:
    return Unread.CUT_OFF if response.is_cut_off else Unread.UNREADABLE


def _verdict(question: Question, outcome: Answer | Unread, rule: str) -> Verdict:
    if isinstance(outcome, Unread):
        return Verdict(None, False, outcome.value)
    return Verdict(question.label(outcome), question.is_right(outcome), rule)
