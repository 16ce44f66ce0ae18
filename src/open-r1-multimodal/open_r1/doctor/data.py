"""Checks the data sets: the form of rows, images, answers, duplicates, leaks, lengths of prompts."""

import random
import statistics
from collections import defaultdict
from collections.abc import Iterator

from open_r1.doctor.finding import Checks, Finding, failed, passed, warned
from open_r1.doctor.subject import Patient
from open_r1.doctor.survey import Survey
from open_r1.running.data import count_prompt_tokens

SAMPLE = 500  # prompts whose length is measured
FEW = 0.05  # a share of the examples that nobody misses


def sets(patient: Patient) -> list[tuple[str, Survey]]:
    """The data sets by their names, the one to train on first."""
    script_args = patient.settings[0]
    surveys = [(script_args.dataset_name, patient.train_set)]
    return surveys + ([(script_args.eval_dataset_name, patient.held_out_set)] if patient.held_out_set else [])


def short(name: str) -> str:
    """A data set's name without its folder."""
    return name.rsplit("/", 1)[-1]


def first(wrong: list[str]) -> str:
    """The first of several mistakes, and how many there are."""
    return wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")


def rows(patient: Patient) -> Iterator[Finding]:
    """They can be read as questions."""
    for name, found in sets(patient):
        if found.images:
            yield passed(f"{name}: {found.rows:,} rows, {found.images:,} images")
        else:
            yield warned(f"{name}: {found.rows:,} rows, none has an image", "name their field with --image_column")


def images(patient: Patient) -> Iterator[Finding]:
    """Each is decoded once."""
    for name, found in sets(patient):
        if found.broken:
            yield failed(f"{name}: {first(found.broken)}", "put these images right, or leave their rows out")
        elif found.images:
            partly = "" if found.decoded == found.images else f" of {found.images:,}, more would take too long"
            yield passed(f"{short(name)}: {found.decoded:,} decoded{partly}, none broken")


def answers(patient: Patient) -> Iterator[Finding]:
    """They are there, and among the options."""
    for name, found in sets(patient):
        if found.unusable:
            yield failed(f"{name}: {first(found.unusable)}", "put these answers right, or leave their rows out")
        else:
            given = [answer for answer in found.answers if answer is not None]
            yield passed(
                f"{short(name)}: {len(given):,} of {found.rows:,} rows with an answer, {len(set(given)):,} different"
            )


def duplicates(patient: Patient) -> Iterator[Finding]:
    """The same question about the same images."""
    for name, found in sets(patient):
        same = defaultdict(list)
        for shown, answer in zip(found.shown, found.answers, strict=True):
            same[shown].append(answer)
        repeated = found.rows - len(same)
        torn = sum(len(set(given)) > 1 for given in same.values())
        if torn:
            yield warned(
                f"{name}: {torn} of the questions are asked again with another answer", "keep one answer of each"
            )
        elif repeated > FEW * found.rows:
            yield warned(f"{name}: {repeated} of {found.rows} rows are repeated", "keep one of each")
        else:
            yield passed(f"{short(name)}: {repeated} of {found.rows:,} rows are repeated")


def leaks(patient: Patient) -> Iterator[Finding]:
    """Images of the training set, file by file, among the held-out ones; without images the questions themselves."""
    if not patient.held_out_set:
        return
    trained = {digest for _, digests in patient.train_set.shown for digest in digests}
    asked = set(patient.train_set.shown)
    held_out = patient.held_out_set.shown
    leaked = [shown for shown in held_out if shown in asked or trained.intersection(shown[1])]
    if leaked:
        same = sum(shown in asked for shown in leaked)
        what = f"{len(leaked)} of {len(held_out)} held-out questions show an image of the training set"
        yield failed(f"{what}, {same} ask the same of it", "take these rows out of one of the two")
    else:
        yield passed(f"no image of {len(held_out):,} held-out questions is in the training set")


def lengths(patient: Patient) -> Iterator[Finding]:
    """Prompts against `max_prompt_length`: how many are left out, and how long the others are."""
    bound = patient.settings[0].max_prompt_length
    kept, total = patient.prepared_data["train_dataset"], patient.train_set.rows
    sample = random.Random(0).sample(range(len(kept)), min(SAMPLE, len(kept)))
    processor = patient.prepared_data["processing_class"]
    tokens = [count_prompt_tokens(kept[row], processor, **patient.template_kwargs) for row in sample]
    left_out = total - len(kept)
    what = f"{left_out:,} of {total:,} rows left out ({left_out / total:.1%}); {len(tokens)} others have "
    what += (
        f"{statistics.median(tokens):.0f} tokens in the median, {max(tokens)} at most, {bound or 'any number'} allowed"
    )
    if left_out > FEW * total:
        yield warned(what, "raise max_prompt_length or lower max_pixels; control tokens in a text leave it out too")
    else:
        yield passed(what)


CHECKS: Checks = {
    "rows": rows,
    "images": images,
    "answers": answers,
    "duplicates": duplicates,
    "leaks": leaks,
    "prompt lengths": lengths,
}
