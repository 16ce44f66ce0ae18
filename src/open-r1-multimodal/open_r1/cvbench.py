"""CV-Bench (`nyu-visionx/CV-Bench`): its schema, and a parquet row -> a question. No torch.

Source: the dataset card. Split `test`, in two files: `test_2d.parquet` (1438 rows), `test_3d.parquet` (1200).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    """One question: `answer` is the right choice's letter without parentheses, `image` an encoded image."""

    idx: int
    task: str
    source: str
    question: str
    choices: tuple[str, ...]
    answer: str
    prompt: str
    image: bytes


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
        raise ValueError(f"idx {row['idx']}: answer {row['answer']!r} is not one of its {len(choices)} choices")
    return Question(
        idx=row["idx"],
        task=row["task"],
        source=row["source"],
        question=row["question"],
        choices=choices,
        answer=answer,
        prompt=row["prompt"],
        image=row["image"]["bytes"],
    )
