"""Finds answers that have become constant: one option, or the one shown first, whatever is asked.

Rows are those of `answers.statistics`. A constant answer is a fault only where it is more frequent than it is right:
of a data set whose right answers are mostly the same, a good model's are, too.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from open_r1.answers.checker import bare_gold, extract_answer, read_strictly
from open_r1.answers.options import is_answer, make_question
from open_r1.answers.statistics import Row, by_question, labels
from open_r1.base.errors import Mistake

# Of 20 answers drawn at even odds, 18 or more are the same once in 2,500 times, and at odds of 7 : 3 once in 28; of
# ten answers nine or more once in 47 and once in 7.
ENOUGH_QUESTIONS = 20
CONSTANT = 0.9  # of the answers
EXCESS = 0.25  # by which a constant answer is more frequent than it is right
MOST_CHARS = 80  # of options in a line


@dataclass(frozen=True)
class Habit:
    """How often the answers to questions that are alike are the same, and how often that is right.

    Attributes:
        asked: what the questions have in common, in words.
        questions: how many different ones have a readable answer.
        answer: in words.
        share, right: its share of these answers, and of the right ones.
    """

    asked: str
    questions: int
    answer: str
    share: float
    right: float

    @property
    def excess(self) -> float:
        """By how much a constant answer is more frequent than it is right; 0 where it is not constant."""
        is_constant = self.questions >= ENOUGH_QUESTIONS and self.share >= CONSTANT
        return max(self.share - self.right, 0.0) if is_constant else 0.0

    def __str__(self) -> str:
        are = f"{self.share:.0%} of the answers to {self.asked} are {self.answer}"
        return f"{are}, and {self.right:.0%} of the right answers"


Kind = Callable[[str, Sequence[Row]], Habit]  # what questions have in common, and their readable answers (at least one)


def most_frequent(asked: str, rows: Sequence[Row]) -> Habit:
    """Of the most frequent answer: by its text where all questions have the same options, else as given."""
    by_text = len({frozenset(row["options"]) for row in rows}) == 1

    def names(key: str) -> list[str]:
        return [row["options"][labels(row).index(row[key])] if by_text else row[key] for row in rows]

    [(answer, _)] = Counter(names("model_answer")).most_common(1)
    shares = (names(key).count(answer) / len(rows) for key in ("model_answer", "ground_truth"))
    return Habit(asked, len(by_question(rows)), f'"{answer}"', *shares)


def shown_first(asked: str, rows: Sequence[Row]) -> Habit:
    """Of answers that are the option which is shown first."""
    shares = (sum(row[key] == labels(row)[0] for row in rows) / len(rows) for key in ("model_answer", "ground_truth"))
    return Habit(asked, len(by_question(rows)), "the option shown first", *shares)


def habits(rows: Iterable[Row], group: Callable[[Row], str], kind: Kind) -> list[Habit]:
    """The habit of each group of rows that has a readable answer; `group` gives the name of a row's group."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["model_answer"] in labels(row):
            groups[group(row)].append(row)
    return [kind(name, of_group) for name, of_group in groups.items()]


def by_options(row: Row) -> str:
    """A question's options, in whatever order they are shown, as a line has them: `"left", "right"`."""
    text = " ".join(", ".join(f'"{option}"' for option in sorted(row["options"])).split())
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}..."


def most_constant(
    rows: Sequence[Row], asked: str = "all questions", kinds: Sequence[Kind] = (most_frequent, shown_first)
) -> Habit | None:
    """What is most constant beyond what is right: the answers to one set of options, or to all that is asked."""
    groups = by_options, lambda row: asked
    found = (one for kind in kinds for group in groups for one in habits(rows, group, kind))
    return max(found, key=lambda one: one.excess, default=None)


def constant_answers(rows: Sequence[Row]) -> list[str]:
    """A line for each task of an evaluation that has constant answers."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        one = most_constant([row for row in rows if row["task"] == task], "its questions")
        if one is not None and one.excess >= EXCESS:
            lines.append(f"{task}: {one}")
    return lines


def answered(record: Mapping[str, Any]) -> Row | None:
    """A line of trajectories/*.jsonl as a row, its answer read as strictly as rewards read it.

    None for a question without options, as for one that asks for a number, and for one whose right answer is none of
    its options.
    """
    options, completion = record["options"], record["completion"]
    if not options or record["solution"] is None:
        return None
    try:
        question = make_question(bare_gold(record["solution"], options), options, None)
    except Mistake:
        return None
    answer = extract_answer(completion)
    # without a tag, as where a recipe asks for the answer alone
    outcome = read_strictly(completion if answer is None else answer, question)
    return {
        "id": hash((record["prompt"], *record["images"])),
        "options": options,
        "type": record.get("question_type"),
        "ground_truth": question.label(question.gold),
        "model_answer": question.label(outcome) if is_answer(outcome) else None,
    }
