"""SAT (`array/SAT` on the Hub): a parquet row -> an example, an example -> a ShareGPT record, and back.

Every function here is pure, except that `read_examples` reads one JSON file. Source of the schema: the
dataset card of `array/SAT`. No torch, so that preparing data starts at once.
"""

import io
import json
import random
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from PIL import Image

from open_r1.prompts import IMAGE_PLACEHOLDER, sat_question

COLUMNS = ("image_bytes", "question", "answers", "question_type", "correct_answer")
FOLDS = ("train", "static", "val", "test")

# A format's name in Pillow -> the extension of its files. MPO is a JPEG with more pictures behind the first.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
}
# A progressive JPEG takes about 10 bytes a pixel to decode: 160 MiB at this size. Larger is a decompression
# bomb or a poster; the model looks at 0.4 megapixels.
MAX_PIXELS = 2**24
MAX_ASPECT_RATIO = 200  # Qwen2-VL's image processor raises above it

# What Pillow raises on damaged files of the formats above.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

# Text that would be read as an image or as a special token, and so break the count of image features.
CONTROL_MARKS = (IMAGE_PLACEHOLDER, "<|")


class Skip(str, Enum):
    """Why a row is not kept; the value is what the user reads."""

    NULL = "null or empty field"
    BAD_TEXT = "text is not UTF-8"
    TYPE = "question type not asked for"
    NO_IMAGE = "no image"
    SEVERAL_IMAGES = "several images"
    FEW_OPTIONS = "fewer than two options"
    ALIKE_OPTIONS = "options differ only in case or space"
    NOT_AN_OPTION = "correct answer not among the options"
    MARK = "control mark in the text"
    CORRUPT = "corrupt image"
    TOO_LARGE = f"image over {MAX_PIXELS} pixels"
    TOO_LONG = f"image aspect ratio over {MAX_ASPECT_RATIO}"


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


def image_bytes(cell: Sequence[bytes | Mapping[str, Any] | None] | None) -> list[bytes | None]:
    """The bytes of each image of an `image_bytes` cell: a list of binary, or of structs {bytes, path}."""
    return [item.get("bytes") if isinstance(item, Mapping) else item for item in cell or ()]


def sniff_image(data: bytes) -> str | Skip:
    """The true extension of an image (`"jpg"`), found by decoding it whole, or the reason not to use it."""
    try:
        with Image.open(io.BytesIO(data), formats=[name for name in EXTENSIONS if name != "MPO"]) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # known from the header, before any pixel is decoded
                return Skip.TOO_LARGE
            image.load()
            extension = EXTENSIONS[image.format]
    except Image.DecompressionBombError:  # Pillow's own bound, met while it reads the header
        return Skip.TOO_LARGE
    except DECODE_ERRORS:
        return Skip.CORRUPT
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return Skip.TOO_LONG
    return extension


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
        row: the columns of `COLUMNS`.
        index: of the row in the file; with `seed` it decides the order of the options.
        question_types: those to keep; None keeps all.
    """
    question, options, answer = row["question"], row["answers"], row["correct_answer"]
    texts = [question, row["question_type"], answer, *(options or ())]
    if options is None or any(text is None or not text.strip() for text in texts):
        return Skip.NULL
    if question_types is not None and row["question_type"] not in question_types:
        return Skip.TYPE
    images = image_bytes(row["image_bytes"])
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
    extensions = [sniff_image(data) for data in images]  # last, because it costs most
    for extension in extensions:
        if isinstance(extension, Skip):
            return extension
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


def read_examples(json_path: str | Path) -> list[dict[str, Any]]:
    """The records of a prepared JSON file in the form TRL trains on; images are named, not opened.

    A record is in ShareGPT's form, which `to_record` writes, or its user message is a list of parts as
    qwen-vl-utils reads them: `{"type": "image", "image": PATH, file:// URL or base64 data URL}` before
    `{"type": "text", "text": ...}`. `options` and `question_type` may be left out.

    Returns:
        One dict a record: `prompt` (conversational, without the `<image>` marks), `images` (absolute paths, or
        data URLs as they are), `solution`, `options` (maybe none), `question_type` (maybe empty).

    Raises:
        FileNotFoundError: no such file, or no such image beside it.
        ValueError: content of another form; the message names the file and the row.
    """
    path = Path(json_path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make it with src/data/SAT/prepare_dataset.sh")
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path}: expected a list with at least one record")
    examples = []
    for row, record in enumerate(records):
        try:
            examples.append(_from_record(record, path.parent))
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{path}: row {row}: {error}") from error
    return examples


def _from_record(record: Any, folder: Path) -> dict[str, Any]:
    """One ShareGPT record -> one dict of `read_examples`, whose errors it raises without file and row."""
    if not isinstance(record, dict):
        raise ValueError("expected an object")
    if "messages" not in record:
        raise ValueError("missing messages")
    user, assistant = _contents(record["messages"])
    if isinstance(user, list):
        text, references = _from_parts(user)
    else:
        references = _strings(record, "images")
        marks = IMAGE_PLACEHOLDER * len(references)
        text = user.removeprefix(marks)
        if not user.startswith(marks) or IMAGE_PLACEHOLDER in text:
            raise ValueError(
                f"{user.count(IMAGE_PLACEHOLDER)} {IMAGE_PLACEHOLDER} marks for {len(references)} images; "
                "expected one mark an image, all of them in front of the question"
            )
    images = [_locate(reference, folder) for reference in references]
    return {
        "prompt": [{"role": "user", "content": text}],
        "images": images,
        "solution": assistant,
        "options": _strings(record, "options"),
        "question_type": str(record.get("question_type", "")),
    }


def _contents(messages: Any) -> tuple[str | list[Any], str]:
    """The contents of the one user and the one assistant message; ValueError when it is not these two."""
    match messages:
        case [{"role": "user", "content": str() | list() as user}, {"role": "assistant", "content": str(assistant)}]:
            return user, assistant
        case [
            {"role": "user", "content": str() | list() as user},
            {"role": "assistant", "content": [{"type": "text", "text": str(assistant)}]},
        ]:
            return user, assistant
    raise ValueError("messages: expected one user and one assistant message with text")


def _strings(record: dict[str, Any], key: str) -> list[str]:
    """A field that is a list of strings, or none at all."""
    value = record.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{key}: expected a list of strings")
    return value


def _from_parts(parts: list[Any]) -> tuple[str, list[str]]:
    """The text and the image references of a user message's parts, images first."""
    texts, references = [], []
    for part in parts:
        match part:
            case {"type": "image", "image": str(reference)} if not texts:
                references.append(reference)
            case {"type": "text", "text": str(text)} if IMAGE_PLACEHOLDER not in text:
                texts.append(text)
            case _:
                raise ValueError(
                    f"messages: cannot read the part {str(part)[:80]}; expected images "
                    '{"type": "image", "image": ...} and after them texts {"type": "text", "text": ...}'
                )
    return "".join(texts), references


def _locate(reference: str, folder: Path) -> str:
    """An image reference as an absolute path; a base64 data URL stays what it is."""
    if reference.startswith("data:image"):
        return reference
    if reference.startswith(("http://", "https://")):
        raise ValueError(f"image {reference}: download it first and name the file")
    path = folder / reference.removeprefix("file://")
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}")
    return str(path)
