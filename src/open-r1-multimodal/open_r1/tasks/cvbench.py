"""CV-Bench (`nyu-visionx/CV-Bench`): its schema, how a parquet row becomes a question, its official score.

Source: the dataset card. Split `test`, in two files: `test_2d.parquet` (1438 rows), `test_3d.parquet` (1200).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from open_r1.base.errors import Mistake

HUB_ID = "nyu-visionx/CV-Bench"
COLUMNS = (
    "idx",
    "type",
    "task",
    "image",
    "question",
    "choices",
    "answer",
    "prompt",
    "filename",
    "source",
    "source_dataset",
    "source_filename",
    "target_class",
    "target_size",
    "bbox",
)
TASKS = {"2D": ("Count", "Relation"), "3D": ("Depth", "Distance")}  # type -> its tasks
SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}  # type -> where its images are from
FILES = {"2D": "test_2d.parquet", "3D": "test_3d.parquet"}
LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Question:
    """One question: `answer` is the right choice's letter without parentheses.

    `image` is the file's cell: encoded bytes, a path when the bytes are kept elsewhere, or None.
    """

    idx: int
    type: str
    task: str
    source: str
    question: str
    choices: tuple[str, ...]
    answer: str
    prompt: str
    image: bytes | str | None


def render_prompt(question: str, choices: tuple[str, ...]) -> str:
    """The `prompt` column, verbatim: the question, then one lettered line a choice."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([f"{question} Select from the following choices.", *lines])


def convert_row(row: Mapping[str, Any]) -> Question:
    """A row of the parquet files -> a question.

    Raises:
        ValueError: the answer is not the letter of a choice; the message names the row's `idx`.
    """
    choices = tuple(row["choices"])
    answer = row["answer"].strip("()")
    if answer not in tuple(LETTERS[: len(choices)]):
        raise Mistake(f"idx {row['idx']}: answer {row['answer']!r} is not one of its {len(choices)} choices")
    image = row["image"]
    return Question(
        idx=row["idx"],
        type=row["type"],
        task=row["task"],
        source=row["source"],
        question=row["question"],
        choices=choices,
        answer=answer,
        prompt=row["prompt"],
        image=(image.get("bytes") or image.get("path")) if isinstance(image, Mapping) else image,
    )


def official_score(accuracy: Mapping[str, Any]) -> Any:
    """1/2 * ((ADE20K + COCO) / 2 + Omni3D), the authors' combination of the accuracies by source.

    Works on numbers and on arrays of them. The paper reports the micro average over all questions instead.

    Raises:
        KeyError: a source is missing.
    """
    return ((accuracy["ADE20K"] + accuracy["COCO"]) / 2 + accuracy["Omni3D"]) / 2
