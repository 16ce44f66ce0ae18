"""Looks a data set through once: images that do not open, answers that cannot be used, duplicates."""

import hashlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from open_r1.base.errors import Mistake
from open_r1.base.images import BrokenImage, ImageSource, image_bytes, image_name, open_image
from open_r1.running.data import Row

DECODING_SECONDS = 45


@dataclass
class Survey:
    """What was found.

    Attributes:
        rows: how many there are.
        images, decoded: how many images they name, and how many of these were decoded in the time there was.
        broken: what is wrong with an image, and its row.
        unusable: what is wrong with an answer, and its row.
        shown: of each row its question, and a hash of each image's file.
        answers: of each row.
    """

    rows: int = 0
    images: int = 0
    decoded: int = 0
    broken: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)
    shown: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)


def look_at(source: ImageSource, decode: bool) -> str:
    """A hash of the image's file; on the way it is decoded, or not.

    Raises:
        BrokenImage: it cannot be opened.
    """
    if decode:
        open_image(source)
    data = image_bytes(source)
    try:
        with io.BytesIO(data) if data is not None else open(image_name(source), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BrokenImage(error.strerror or "cannot be read", image_name(source)) from error


def survey(examples: Iterable[Row], check: Callable[[Row], None]) -> Survey:
    """Look through a data set; after what is wrong with a row comes the next one.

    Args:
        examples: see `tasks.mixture.iter_mixture`, whose errors pass.
        check: raises ValueError for a row whose answer cannot be trained on.
    """
    found, deadline, threads = Survey(), time.monotonic() + DECODING_SECONDS, os.cpu_count() or 1
    waiting: deque[tuple[int, str, list[Future[str]]]] = deque()

    def settle(row: int, question: str, futures: list[Future[str]]) -> None:
        digests = []
        for future in futures:
            try:
                digests.append(future.result())
            except BrokenImage as error:
                found.broken.append(f"row {row}: {error}")
        found.shown.append((question, tuple(digests)))

    with ThreadPoolExecutor(threads) as pool:
        for row, example in enumerate(examples):
            in_time, sources = time.monotonic() < deadline, example["images"]
            found.rows, found.images = found.rows + 1, found.images + len(sources)
            found.decoded += in_time * len(sources)
            found.answers.append(example["solution"])
            try:
                check(example)
            except Mistake as error:
                found.unusable.append(f"row {row}: {error}")
            futures = [pool.submit(look_at, source, in_time) for source in sources]
            waiting.append((row, example["prompt"][-1]["content"], futures))
            if len(waiting) > 4 * threads:  # rows may carry their images: few are held at a time
                settle(*waiting.popleft())
        while waiting:
            settle(*waiting.popleft())
    return found
