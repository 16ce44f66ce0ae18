"""Writes every completion of a run to trajectories/{train,eval,blind}.jsonl.

The rows of the newest rollout in training, and those of the evaluation under way, stay here for whoever shows them or
takes figures of them.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from open_r1.answers.checker import bare_gold
from open_r1.answers.judgement import judgement_of
from open_r1.answers.reflection import analyse
from open_r1.base.files import append_rows
from open_r1.base.trajectories import CompletionRecord
from open_r1.rewards import COMPARING, bare_accuracy_reward, completion_text
from open_r1.trainer.rows import render_with_images, row_images
from open_r1.trainer.sampling import ROW


@dataclass
class Rollout:
    """One generation step of this process, from rows to advantages: B completions, F reward functions.

    Attributes:
        rows: as the dataset has them, one a completion.
        refill: which pass it is of those that make one generation step (`open_r1.trainer.sampling`).
        is_broken: which rows have an image that could not be opened.
        completions, ids: what was sampled, as reward functions get it.
        rewards: of each row F numbers; NaN for none.
        advantages: one of each row.
    """

    rows: list[dict[str, Any]]
    refill: int = 0
    is_broken: list[bool] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)


class Rows(list):
    """The rows of a generation step with its record, on their way through TRL to the reward functions."""

    def __init__(self, rows: Iterable[dict[str, Any]], rollout: Rollout):
        super().__init__(rows)
        self.rollout = rollout
        self.given = [dict(row) for row in self]

    def as_given(self) -> list[dict[str, Any]]:
        """The rows as the dataset has them, with what was added to these on the way."""
        return [
            {**row, **{name: now[name] for name in now if name not in given or now[name] is not given[name]}}
            for row, given, now in zip(self.rollout.rows, self.given, self, strict=True)
        ]


class Recorder:
    """Writes completions down, and keeps the rows of the rollout or evaluation under way.

    Attributes:
        newest: rows of all processes, of the newest rollout in training.
        held_out: rows of the evaluation under way, each question's once.

    Args:
        trainer: a GRPO trainer whose other attributes are all set.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir) / "trajectories"
        self.judges = any(reward in COMPARING for reward in trainer.reward_funcs)
        self.needs_tag = bare_accuracy_reward not in trainer.reward_funcs
        self.newest: list[dict[str, Any]] = []
        self.begin_evaluation(math.inf)

    def begin_evaluation(self, completions: float) -> None:
        """Forget the rows of the evaluation before; of the one that begins, only the first `completions` rows count.

        The rows behind them are repeated questions, which some processes get so that each has as many.
        """
        self.held_out: list[dict[str, Any]] = []
        self.held_out_left = completions

    def describe(self, rollout: Rollout, step: int, dataset: str | None = None) -> list[dict[str, Any]]:
        """The rows of a rollout, those of all processes in order.

        Args:
            rollout: of this process, with rewards and advantages.
            step: under way.
            dataset: the name of the evaluation set, where there are several.
        """
        trainer, prompts = self.trainer, []
        for (prompt, images), repeats in groupby(rollout.rows, key=lambda row: (row["prompt"], row_images(row))):
            rendered = render_with_images(trainer.processing_class, prompt, images, **trainer.chat_template_kwargs)
            prompts += [rendered] * len(list(repeats))
        columns = (rollout.rows, prompts, rollout.completions, rollout.ids, rollout.rewards, rollout.advantages)
        records = []
        for row, (prompt, images), completion, ids, rewards, advantage in zip(*columns, strict=True):
            text, options, solution = completion_text(completion), row.get("options"), row.get("solution")
            has_options = isinstance(options, list) and all(isinstance(option, str) for option in options)
            options = options if has_options and options else None
            if not (solution is None or isinstance(solution, str)):
                solution = json.dumps(solution, ensure_ascii=False, default=str)
            ended, judgement = ids[-1] in trainer.eos_token_ids, None
            if self.judges:
                gold = bare_gold(solution, options)
                judgement = judgement_of(text, gold, options, ended=ended, needs_tag=self.needs_tag).value
            reflection = analyse(text, options)
            # a reward function that has nothing to say about a completion returns None, TRL's NaN
            rewards = [None if math.isnan(reward) else reward for reward in rewards]
            record = CompletionRecord(
                step=step,
                prompt=prompt,
                images=images,
                solution=solution,
                options=options,
                question_type=str(row.get("question_type") or "") or None,
                completion=text,
                rewards=dict(zip(trainer.reward_func_names, rewards, strict=True)),
                advantage=advantage,
                judgement=judgement,
                length=len(ids),
                ended=ended,
                reflections=[list(span) for span in reflection.spans],
                considered=reflection.considered,
                self_corrected=reflection.self_corrected,
                row=row.get(ROW),
                refill=rollout.refill,
                dataset=dataset,
            )
            records.append(record.to_row())
        return gather_object(records)

    def add_training(self, rows: list[dict[str, Any]], refill: int, group_size: int) -> None:
        """Write down a pass of a rollout in training; the passes of one rollout count their groups on."""
        earlier = self.newest if refill else []
        self._write("train", rows, len(earlier), group_size)
        self.newest = earlier + rows

    def add_held_out(self, rows: list[dict[str, Any]], group_size: int, is_blind: bool) -> int:
        """Write down a batch of an evaluation; returns how many of its rows are of its questions."""
        rows = rows[: int(min(self.held_out_left, len(rows)))]
        self._write("blind" if is_blind else "eval", rows, len(self.held_out), group_size)
        self.held_out_left -= len(rows)
        self.held_out += rows
        return len(rows)

    def _write(self, name: str, rows: list[dict[str, Any]], start: int, group_size: int) -> None:
        for index, row in enumerate(rows, start=start):
            row["group"] = index // group_size
        if self.trainer.accelerator.is_main_process:
            append_rows(self.folder / f"{name}.jsonl", rows)
