"""Checks the rewards for right answers in many forms, for wrong answers, and for none."""

import asyncio
import inspect
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState

from open_r1.answers.checker import bare_gold, extract_answer, is_correct
from open_r1.answers.judgement import judgement_of
from open_r1.base.errors import Mistake
from open_r1.doctor.finding import Checks, Finding, failed, passed, warned
from open_r1.doctor.run import Run
from open_r1.rewards import Reward, accuracy_reward, guarded
from open_r1.running.data import ROTATION_OF, Row

ROWS = 200  # among which are looked for
ASKED = 4  # examples with different answers
SLOW = 0.05  # seconds a completion
LONGEST = 32_768  # words of a probe, whatever the recipe allows
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
class Probe:
    """A completion for an example.

    Attributes:
        kind: what it is a case of: a dress, or a name.
        right: whether it answers the question.
    """

    row: Row
    kind: str
    text: str
    right: bool


def make_probes(rows: Iterable[Row], opens_think: bool, longest: int) -> list[Probe]:
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
    probes = []
    for gold, row in list(asked.items())[:ASKED]:
        options = row["options"] if row["solution"] else []
        right = [(dress, dress.format(gold)) for dress in DRESSES]
        wrong = []
        others = (other for other in options or asked if not is_correct(other, gold, options))
        if other := next(others, None):
            wrong = [("wrong", other), *(("hedged", hedge.format(gold, other)) for hedge in HEDGES)]
        for is_right, answers in ((True, right), (False, wrong)):
            probes += [Probe(row, kind, f"{thought}<answer>{text}</answer>", is_right) for kind, text in answers]
        if row.get(ROTATION_OF) is not None:
            other_order = {**row, "options": [*row["options"][1:], *row["options"][:1]]}
            probes.append(Probe(other_order, "in another order", f"{thought}<answer>{gold}</answer>", True))
        no_answers = {kind: thought + text.format(gold) for kind, text in NO_ANSWERS.items()}
        no_answers |= {"empty": "", "thought alone": f"It is {gold}. {thought}", "answer alone": gold}
        no_answers["endless"] = f"{gold} " * min(longest, LONGEST)
        probes += [Probe(row, kind, text, False) for kind, text in no_answers.items()]
        thoughts = [("meant", gold), ("against its thought", other)][: 1 + bool(other)]
        probes += [
            Probe(row, kind, f"{thought.replace('</think>', f' It is {said}.</think>')}<answer>{gold}</answer>", True)
            for kind, said in thoughts
        ]
    return probes


def call(reward: Reward, probes: Sequence[Probe], tokenizer: Any) -> list[float | None]:
    """What a reward gives these completions, called and checked as in training.

    Raises:
        Mistake: it raises, or does not give each a finite number or None.
    """
    rows = [probe.row for probe in probes]
    rewards = guarded(reward, reward.__name__)(
        prompts=[row["prompt"] for row in rows],
        completions=[[{"role": "assistant", "content": probe.text}] for probe in probes],
        completion_ids=[tokenizer(probe.text)["input_ids"] for probe in probes],
        trainer_state=TrainerState(),
        log_extra=lambda *_: None,
        log_metric=lambda *_: None,
        **{name: [row[name] for row in rows] for name in rows[0] if name not in ("prompt", "completion")},
    )
    return asyncio.run(rewards) if inspect.iscoroutine(rewards) else rewards


def examine_reward(reward: Reward, probes: Sequence[Probe], tokenizer: Any) -> Finding:
    """The finding about one reward: whether it raises, tells completions apart, judges answers rightly, and is fast."""
    name, start = reward.__name__, time.perf_counter()
    try:
        values = call(reward, probes, tokenizer)
    except Mistake as error:
        return failed(str(error), "correct it, or leave it out")
    seconds = (time.perf_counter() - start) / len(probes)
    known = sorted({value for value in values if value is not None})
    if len(known) < 2:
        what = f"{name} gives {known[0] if known else None} for each of {len(probes)} different completions"
        return failed(what, "it teaches nothing in any group; correct it, or leave it out")
    extent = f"{known[0]:g} to {known[-1]:g} over {len(probes)} completions"
    if reward is accuracy_reward:
        for probe, value in zip(probes, values, strict=True):
            if value != probe.right:
                gold, options = probe.row["solution"], probe.row["options"]
                read = judgement_of(probe.text, bare_gold(gold, options), options).value
                what = f"{name} gives {value:g} for {probe.text!r} ({gold!r} is right; it was read as: {read})"
                is_plain = not probe.right or probe.kind == BARE
                return (failed if is_plain else warned)(what, "look at the answers and options of these data")
        extent = f"1 for {len(DRESSES)} forms of a right answer, 0 for wrong, hedged and none"
    if seconds > SLOW:
        return warned(f"{name} takes {seconds * 1000:.0f} ms a completion", "every step waits for it: make it faster")
    return passed(f"{name}: {extent}, {seconds * 1000:.1f} ms each")


def lint(run: Run) -> Iterator[Finding]:
    """Each reward is tried on the same completions."""
    if not run.is_grpo:
        return
    rows = run.rows.select(range(min(ROWS, len(run.rows))))
    probes = make_probes(rows, run.prompt_opening, run.args.max_completion_length)
    for reward in run.reward_funcs:
        yield examine_reward(reward, probes, run.processor.tokenizer)


CHECKS: Checks = (lint,)
