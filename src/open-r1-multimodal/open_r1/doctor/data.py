"""Checks the data sets: rows, images, answers, duplicates, leaks, lengths of prompts."""

import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from open_r1.doctor.finding import Checks, Finding, failed, passed, warned
from open_r1.doctor.run import Run
from open_r1.doctor.survey import Survey
from open_r1.running.data import ROTATION_OF, count_prompt_tokens
from open_r1.running.entry import checked_data

SAMPLE = 500  # prompts whose length is measured
FEW = 0.05  # a share of the examples that nobody misses


def sets(run: Run) -> list[tuple[str, Survey]]:
    """The data sets by their names, the one to train on first."""
    surveys = [(run.script_args.dataset_name, run.train_set)]
    if run.held_out_set:
        surveys.append((run.script_args.eval_dataset_name, run.held_out_set))
    return surveys


def first(wrong: list[str]) -> str:
    """The first of several mistakes, and how many there are."""
    return wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")


def rows(run: Run) -> Iterator[Finding]:
    """The rows can be read as questions, and some have images."""
    for name, data in sets(run):
        if data.images:
            yield passed(f"{name}: {data.rows:,} rows, {data.images:,} images")
        else:
            remedy = "name their field with --image_column"
            yield warned(f"{name}: {data.rows:,} rows, none has an image", remedy)


def images(run: Run) -> Iterator[Finding]:
    """Each image is decoded once."""
    for name, data in sets(run):
        if data.broken:
            yield failed(f"{name}: {first(data.broken)}", "repair these images, or leave their rows out")
        elif data.images:
            partly = "" if data.decoded == data.images else f" of {data.images:,}, more would take too long"
            yield passed(f"{Path(name).name}: {data.decoded:,} decoded{partly}, none broken")


def answers(run: Run) -> Iterator[Finding]:
    """The answers are there, and among the options."""
    for name, data in sets(run):
        if data.unusable:
            yield failed(f"{name}: {first(data.unusable)}", "correct these answers, or leave their rows out")
        else:
            known = [answer for answer in data.answers if answer is not None]
            what = f"{len(known):,} of {data.rows:,} rows with an answer, {len(set(known)):,} different"
            yield passed(f"{Path(name).name}: {what}")


def duplicates(run: Run) -> Iterator[Finding]:
    """Rows that ask the same question about the same images, and whether their answers differ."""
    for name, data in sets(run):
        answers_of = defaultdict(set)
        for shown, answer in zip(data.shown, data.answers, strict=True):
            answers_of[shown].add(answer)
        repeated = data.rows - len(answers_of)
        torn = sum(len(different) > 1 for different in answers_of.values())
        if torn:
            what = f"{name}: {torn} of the questions occur again with another answer"
            yield warned(what, "keep one answer of each")
        elif repeated > FEW * data.rows:
            yield warned(f"{name}: {repeated} of {data.rows} rows are repeated", "keep one of each")
        else:
            yield passed(f"{Path(name).name}: {repeated} of {data.rows:,} rows are repeated")


def leaks(run: Run) -> Iterator[Finding]:
    """Held-out rows that show an image file of the training set, or ask one of its questions."""
    if not run.held_out_set:
        return
    asked = set(run.train_set.shown)
    trained = {digest for _, images in asked for digest, _ in images}
    held_out = run.held_out_set.shown
    leaked = [shown for shown in held_out if shown in asked or any(digest in trained for digest, _ in shown[1])]
    if leaked:
        same = sum(shown in asked for shown in leaked)
        what = f"{len(leaked)} of {len(held_out)} held-out questions show an image of the training set"
        yield failed(f"{what}, {same} ask the same of it", "remove these rows from one of the two data sets")
    else:
        yield passed(f"no image of {len(held_out):,} held-out questions is in the training set")


def prompt_lengths(run: Run) -> Iterator[Finding]:
    """Prompts against `max_prompt_length`: how many are left out, and how long the others are."""
    # a question in two orders of its options, one behind the other, counts once
    asked = range(0, len(run.rows), 2 if ROTATION_OF in run.rows.column_names else 1)
    total, count = run.train_set.rows, len(asked)
    sample = random.Random(0).sample(asked, min(SAMPLE, count))
    tokens = [count_prompt_tokens(run.rows[row], run.processor, **run.template_kwargs) for row in sample]
    left_out, bound = total - count, run.script_args.max_prompt_length or "any number"
    what = f"{left_out:,} of {total:,} rows left out ({left_out / total:.1%}); {len(tokens)} others have "
    what += f"{statistics.median(tokens):.0f} tokens in the median, {max(tokens)} at most, {bound} allowed"
    if left_out > FEW * total:
        yield warned(what, "raise max_prompt_length or lower max_pixels; rows with control tokens are left out, too")
    else:
        yield passed(what)


def unchanged(run: Run) -> Iterator[Finding]:
    """A run that goes on by itself trains on the examples that it began with."""
    if run.checkpoint and run.args.resume_from_checkpoint == "auto":
        checked_data(run.args, run.prepared_data, run.checkpoint)
        yield passed(f"as when the run of {run.args.output_dir} began")


CHECKS: Checks = (rows, images, answers, duplicates, leaks, prompt_lengths, unchanged)
