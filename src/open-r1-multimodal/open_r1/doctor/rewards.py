"""Checks the rewards: what they give right answers in many forms, wrong ones, and texts that are no answers."""

import asyncio
import inspect
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState

from open_r1.answers.checker import extract_answer, is_correct
from open_r1.base.errors import Mistake, first_line
from open_r1.doctor.finding import Checks, Finding, failed, passed, warned
from open_r1.doctor.subject import Patient
from open_r1.rewards import Reward, accuracy_reward
from open_r1.running.data import ROTATION_OF, Row, opens_think

ROWS = 200  # among which are looked for
ASKED = 4  # examples with different answers
SLOW = 0.05  # seconds a completion
LONGEST = 32_768  # words of a sample, whatever the recipe allows: a limit without end would fill the memory
THOUGHT = "The picture shows it. Wait, let me look again.</think>\n"
# Ways to write the right answer into `<answer>`, none of which changes it.
DRESSES = (
    *("{0}", " {0} ", "\n{0}\n", "\t{0}\r\n", "{0}.", '"{0}"', "'{0}'", "“{0}”", "`{0}`", "({0})", "[{0}]", "*{0}*"),
    *("**{0}**", "**{0}.**", "_{0}_", "${0}$", "\\boxed{{{0}}}", "$\\boxed{{{0}}}$", "\\text{{{0}}}", "{0}\u00a0"),
)
# What follows a thought, holds the right answer and gives none.
NO_ANSWERS = {
    "not closed": "<answer>{0}",
    "not opened": "{0}</answer>",
    "without tags": "{0}",
    "nothing in the tags": "{0} <answer> </answer>",
}
HEDGES = ("{0} or {1}", "{1} or {0}", "{0}, {1}", "either {0} or {1}, hard to say")
BARE = DRESSES[0]


@dataclass(frozen=True)
class Sample:
    """A completion for an example.

    Attributes:
        kind: what it is a case of: a dress, or a name.
        right: whether it answers the question.
    """

    row: Row
    kind: str
    text: str
    right: bool


def make_samples(rows: Iterable[Row], opens_think: bool, longest: int) -> list[Sample]:
    """Right, wrong and hedged answers, and none, to a few questions that have different answers.

    Args:
        rows: examples, the first of each answer are taken.
        opens_think: whether the prompt ends with `<think>`, so that completions start inside.
        longest: the limit of a completion, in tokens.
    """
    thought = THOUGHT if opens_think else f"<think>{THOUGHT}"
    asked: dict[str, Row] = {}
    for row in rows:
        gold = row["solution"] or "yes"  # without answers rewards look at something else
        asked.setdefault(extract_answer(gold) or gold, row)
    result = []
    for gold, row in list(asked.items())[:ASKED]:
        answers = [(dress, dress.format(gold), True) for dress in DRESSES]
        options = row["options"] if row["solution"] else []
        others = (other for other in options or asked if not is_correct(other, gold, options))
        if other := next(others, None):
            answers.append(("wrong", other, False))
            answers += [("hedged", hedge.format(gold, other), False) for hedge in HEDGES]
        result += [Sample(row, kind, f"{thought}<answer>{text}</answer>", right) for kind, text, right in answers]
        result += [Sample(row, kind, thought + text.format(gold), False) for kind, text in NO_ANSWERS.items()]
        result += [Sample(row, "empty", "", False), Sample(row, "thought alone", f"It is {gold}. {thought}", False)]
        if row.get(ROTATION_OF) is not None:
            other_order = {**row, "options": [*row["options"][1:], *row["options"][:1]]}
            result.append(Sample(other_order, "in another order", f"{thought}<answer>{gold}</answer>", True))
        endless = f"{gold} " * min(longest, LONGEST)
        result += [Sample(row, "answer alone", gold, False), Sample(row, "endless", endless, False)]
    return result


def call(reward: Reward, samples: Sequence[Sample], tokenizer: Any) -> list[Any]:
    """What a reward gives these completions, called as TRL calls it."""
    rows = [sample.row for sample in samples]
    given = reward(
        prompts=[row["prompt"] for row in rows],
        completions=[[{"role": "assistant", "content": sample.text}] for sample in samples],
        completion_ids=[tokenizer(sample.text)["input_ids"] for sample in samples],
        trainer_state=TrainerState(),
        log_extra=lambda *_: None,
        log_metric=lambda *_: None,
        **{name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")},
    )
    return list(asyncio.run(given) if inspect.iscoroutine(given) else given)


def examine(reward: Reward, samples: Sequence[Sample], tokenizer: Any) -> Finding:
    """What there is to say of a reward."""
    name, start = reward.__name__, time.perf_counter()
    try:
        given = call(reward, samples, tokenizer)
        values = [math.nan if value is None else float(value) for value in given]
    except (Exception, SystemExit) as error:  # a user's function raises what it likes
        what = (
            str(error) if isinstance(error, Mistake) else f"{name} raises {type(error).__name__}: {first_line(error)}"
        )
        return failed(what, "mend it, or leave it out")
    seconds = (time.perf_counter() - start) / len(samples)
    if len(values) != len(samples):
        return failed(f"{name} gives {len(values)} rewards for {len(samples)} completions", "one for each is expected")
    for sample, value in zip(samples, given, strict=True):
        if value is not None and not math.isfinite(value):
            return failed(f"{name} gives {value} for {sample.text!r}", "give a number, or None for no opinion")
    known = sorted({value for value in values if not math.isnan(value)})
    if len(known) < 2:
        what = f"{name} gives {known[0] if known else None} for each of {len(samples)} different completions"
        return failed(what, "no group has anything to learn from it; mend it, or leave it out")
    if reward is accuracy_reward:
        for sample, value in zip(samples, values, strict=True):
            if value != sample.right:
                what = f"{name} gives {value:g} for {sample.text!r} ({sample.row['solution']!r} is right)"
                is_plain = not sample.right or sample.kind == BARE
                return (failed if is_plain else warned)(what, "look at the answers and options of these data")
    if seconds > SLOW:
        return warned(f"{name} takes {seconds * 1000:.0f} ms a completion", "every step waits for it: make it faster")
    extent = f"{known[0]:g} to {known[-1]:g} over {len(samples)} completions"
    if reward is accuracy_reward:
        extent = f"1 for {len(DRESSES)} forms of a right answer, 0 for wrong, hedged and none"
    return passed(f"{name}: {extent}, {seconds * 1000:.1f} ms each")


def lint(patient: Patient) -> Iterator[Finding]:
    """Each reward on the same completions."""
    if not patient.is_grpo:
        return
    prepared = patient.prepared_data
    rows = prepared["train_dataset"].select(range(min(ROWS, len(prepared["train_dataset"]))))
    processor = prepared["processing_class"]
    longest = patient.settings[1].max_completion_length
    samples = make_samples(rows, opens_think(processor, **patient.template_kwargs), longest)
    for reward in prepared["reward_funcs"]:
        yield examine(reward, samples, processor.tokenizer)


CHECKS: Checks = {"lint": lint}
