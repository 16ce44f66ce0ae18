"""Reads a data set once and notes broken images, unusable answers, and which images and questions each row has."""

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from open_r1.base.edits import Edit, split_edit
from open_r1.base.errors import Mistake
from open_r1.base.files import file_digest
from open_r1.base.images import BrokenImage, ImageSource, image_bytes, image_name, open_image
from open_r1.running.data import Row

DECODING_SECONDS = 45
Shown = tuple[str, Edit | None]  # an image: a hash of its file, and what is done to it when it is opened


@dataclass
class Survey:
    """What was found.

    Attributes:
        rows: how many there are.
        images, decoded: how many images they name, and how many of these were decoded in the time
        there was.
        broken: what is wrong with an image, and its row.
        unusable: what is wrong with an answer, and its row.
        shown: of each row its question, and of each image a hash of its file and what is done to it.
        answers: of each row.
    """

    rows: int = 0
    images: int = 0
    decoded: int = 0
    broken: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    shown: list[tuple[str, tuple[Shown, ...]]] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)


def look_at(source: ImageSource, decode: bool) -> Shown:
    """A hash of the image's file, and its edit; on the way it is decoded, or not.

    Raises:
        BrokenImage: it cannot be opened.
    """
    if decode:
        open_image(source)
    data = image_bytes(source)
    path, edit = split_edit(image_name(source) or "")
    try:
        return hashlib.sha256(data).hexdigest() if data is not None else file_digest(path), edit
    except OSError as error:
        raise BrokenImage(error.strerror or "cannot be read", image_name(source)) from error


def survey(examples: Iterable[Row], check: Callable[[Row], None]) -> Survey:
    """Look through a data set; after what is wrong with a row comes the next one.

    Args:
        examples: see `tasks.mixture.iter_mixture`, whose errors pass.
        check: raises Mistake for a row whose answer cannot be trained on.
    """
    result, deadline, threads = Survey(), time.monotonic() + DECODING_SECONDS, os.cpu_count() or 1
    examples = iter(examples)
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(examples, 8 * threads)):  # rows may carry their images: few are held at a time
            decode = time.monotonic() < deadline
            futures = [[pool.submit(look_at, source, decode) for source in row["images"]] for row in chunk]
            for row, images in zip(chunk, futures, strict=True):
                digests = []
                for image in images:
                    try:
                        digests.append(image.result())
                    except BrokenImage as error:
                        result.broken.append(f"row {result.rows}: {error}")
                try:
                    check(row)
                except Mistake as error:
                    result.unusable.append(f"row {result.rows}: {error}")
                result.shown.append((row["prompt"][-1]["content"], tuple(digests)))
                result.answers.append(row["solution"])
                result.rows, result.images = result.rows + 1, result.images + len(images)
                result.decoded += decode * len(images)
    return result
