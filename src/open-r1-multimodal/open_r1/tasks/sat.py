"""SAT (`array/SAT` on the Hub): how a parquet row becomes an example, and an example a ShareGPT record.

Every function here is pure; `open_r1.tasks.examples` reads the records back. Source of the schema: the dataset card of
`array/SAT`. No torch, so that preparing data starts at once.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from open_r1.base.images import CORRUPT, EXTENSIONS, TOO_LARGE, TOO_LONG, BrokenImage, opened
from open_r1.base.prompts import IMAGE_PLACEHOLDER, sat_question

FOLDS = ("train", "static", "val", "test")

# Text that would be read as an image or as a special token, and so break the count of image features.
CONTROL_MARKS = (IMAGE_PLACEHOLDER, "<|")


class Skip(StrEnum):
    """Why a row is not kept; the value is what the user reads."""

    NULL = "null or empty field"
    TYPE = "question type not asked for"
    NO_IMAGE = "no image"
    SEVERAL_IMAGES = "several images"
    FEW_OPTIONS = "fewer than two options"
    ALIKE_OPTIONS = "options differ only in case or space"
    NOT_AN_OPTION = "correct answer not among the options"
    MARK = "control mark in the text"
    CORRUPT = CORRUPT
    TOO_LARGE = TOO_LARGE
    TOO_LONG = TOO_LONG


@dataclass(frozen=True)
class Example:
    """One usable row.

    Attributes:
        question: the question alone, as it is in the file.
        options: each once, in the shuffled order.
        answer: one of the options.
        images: of each image its bytes, untouched, and its true extension without the dot.
    """

    question: str
    options: tuple[str, ...]
    answer: str
    question_type: str
    images: tuple[tuple[bytes, str], ...]


def image_extension(data: bytes) -> str:
    """The true extension of an image (`"jpg"`), found by decoding it whole; raises BrokenImage."""
    with opened(data) as image:
        image.load()
        return EXTENSIONS[image.format]


def shuffled(options: Sequence[str], seed: int, row: int) -> tuple[str, ...]:
    """The options in an order that depends on the seed and the row's index in the file alone."""
    order = list(options)
    random.Random(f"{seed}:{row}").shuffle(order)
    return tuple(order)


def convert_row(
    row: Mapping[str, Any],
    index: int,
    *,
    seed: int,
    keep_multi_image: bool = False,
    question_types: Collection[str] | None = None,
) -> Example | Skip:
    """A row of the parquet file -> an example, or the reason to skip it.

    Options that repeat exactly are merged, because the question stays as clear as it was; a row whose options
    differ only in case or surrounding space is skipped, because no checker could tell right from wrong.

    Args:
        row: the columns of SAT's files.
        index: of the row in the file; with `seed` it decides the order of the options.
        question_types: those to keep; None keeps all.
    """
    question, options, answer = row["question"], row["answers"], row["correct_answer"]
    texts = [question, row["question_type"], answer, *(options or ())]
    if options is None or any(text is None or not text.strip() for text in texts):
        return Skip.NULL
    if question_types is not None and row["question_type"] not in question_types:
        return Skip.TYPE
    # binary, or structs {bytes, path}
    images = [item["bytes"] if isinstance(item, Mapping) else item for item in row["image_bytes"] or ()]
    if not all(images) or not images:
        return Skip.NO_IMAGE
    if len(images) > 1 and not keep_multi_image:
        return Skip.SEVERAL_IMAGES
    options = list(dict.fromkeys(options))
    if len(options) < 2:
        return Skip.FEW_OPTIONS
    if len({option.strip().casefold() for option in options}) < len(options):
        return Skip.ALIKE_OPTIONS
    if answer not in options:
        return Skip.NOT_AN_OPTION
    if any(mark in text for mark in CONTROL_MARKS for text in texts):
        return Skip.MARK
    extensions = []
    for data in images:  # last, because it costs most
        try:
            extensions.append(image_extension(data))
        except BrokenImage as error:
            return Skip(error.reason)
    return Example(
        question=question,
        options=shuffled(options, seed, index),
        answer=answer,
        question_type=row["question_type"],
        images=tuple(zip(images, extensions, strict=True)),
    )


def to_record(example: Example, image_paths: Sequence[str]) -> dict[str, Any]:
    """An example as a ShareGPT record; `image_paths` are relative to the JSON file's folder."""
    marks = IMAGE_PLACEHOLDER * len(image_paths)
    return {
        "messages": [
            {"role": "user", "content": marks + sat_question(example.question, example.options)},
            {"role": "assistant", "content": example.answer},
        ],
        "images": list(image_paths),
        "question_type": example.question_type,
        "options": list(example.options),
    }
