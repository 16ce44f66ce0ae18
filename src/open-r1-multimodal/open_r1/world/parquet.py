"""Writes rendered questions as parquet files in SAT's and CV-Bench's schemas; a row follows from seed and index."""

import io
import random
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from open_r1.base.files import MADE_BY, replacing
from open_r1.tasks.benchmarks.choice import CVBENCH_FILES
from open_r1.world.questions import CV_QUESTIONS, QUESTIONS, STATIC, Asked, ask
from open_r1.world.render import paint
from open_r1.world.scene import Level, Seen

BATCH_ROWS = 200  # written at a time
CVBENCH_TASKS = {"2D": ("Count", "Relation"), "3D": ("Depth", "Distance")}  # type -> its tasks
CVBENCH_SOURCES = {"2D": ("ADE20K", "COCO"), "3D": ("Omni3D",)}  # type -> where its images are from
LETTERS = "ABCDEF"
SAT_SCHEMA = pa.schema(
    [
        ("image_bytes", pa.list_(pa.binary())),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("question_type", pa.string()),
        ("correct_answer", pa.string()),
    ]
)
CVBENCH_SCHEMA = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("filename", pa.string()),
        ("source", pa.string()),
        ("source_dataset", pa.string()),
        ("source_filename", pa.string()),
        ("target_class", pa.string()),
        ("target_size", pa.list_(pa.int64())),
        ("bbox", pa.list_(pa.list_(pa.float64()))),
    ]
)


def picture(level: Level, asked: Asked, scene: Sequence[Seen]) -> bytes:
    """One image of a question, encoded."""
    buffer = io.BytesIO()
    paint(level, asked, scene).save(buffer, level.format, compress_level=1, quality=90)  # of PNG and of JPEG
    return buffer.getvalue()


def row_rng(seed: int, row: int) -> random.Random:
    return random.Random(f"{seed}:{row}")


def sat_row(row: int, seed: int, level: Level, questions: Sequence[str] = STATIC) -> dict[str, Any]:
    """Row `row` in SAT's schema; the kinds of question take turns."""
    asked = ask(QUESTIONS[questions[row % len(questions)]], row_rng(seed, row), level)
    return {
        "image_bytes": [picture(level, asked, scene) for scene in asked.scenes],
        "question": asked.question,
        "answers": list(asked.options),
        "question_type": asked.question_type,
        "correct_answer": asked.answer,
    }


def cvbench_prompt(question: str, choices: tuple[str, ...]) -> str:
    """CV-Bench's `prompt` column, verbatim: the question, then one lettered line for each choice."""
    lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([f"{question} Select from the following choices.", *lines])


def cvbench_row(row: int, seed: int, level: Level, kind: str) -> dict[str, Any]:
    """Row `row` in CV-Bench's schema, of type `kind` (2D or 3D); tasks and sources take turns.

    A source is only a label here, which the benchmark's own score averages over.
    """
    tasks, sources = CVBENCH_TASKS[kind], CVBENCH_SOURCES[kind]
    task, source = tasks[row % len(tasks)], sources[row // len(tasks) % len(sources)]
    asked = ask(CV_QUESTIONS[task], row_rng(seed, row), level)
    [scene] = asked.scenes
    filename = f"img/{kind}/{task.lower()}/{source.lower()}_{row}.{level.format.lower()}"
    return {
        "idx": row,
        "type": kind,
        "task": task,
        "image": {"bytes": picture(level, asked, scene), "path": Path(filename).name},
        "question": asked.question,
        "choices": list(asked.options),
        "answer": f"({LETTERS[asked.options.index(asked.answer)]})",
        "prompt": cvbench_prompt(asked.question, asked.options),
        "filename": filename,
        "source": source,
        "source_dataset": "open_r1.world",
        "source_filename": Path(filename).name,
        "target_class": ", ".join(asked.targets),
        "target_size": [level.width, level.height],
        "bbox": [[float(side) for side in seen.box] for _, seen in asked.boxes],
    }


def write_rows(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]], total: int) -> None:
    """Write a parquet file as its rows come, under a temporary name until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema.with_metadata({"open_r1": MADE_BY})) as writer,
        tqdm(total=total, unit=" rows", desc=path.name) as bar,
    ):
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            bar.update(len(batch))


def write_sat(path: Path, rows: int, seed: int, level: Level, questions: Sequence[str] = STATIC) -> None:
    """Write `rows` rows in SAT's schema."""
    write_rows(path, SAT_SCHEMA, (sat_row(i, seed, level, questions) for i in range(rows)), rows)


def write_cvbench(folder: Path, rows: int, seed: int, level: Level) -> None:
    """Write the benchmark's two files, with `rows` rows together; `idx` runs through both."""
    half = (rows + 1) // 2
    for kind, span in (("2D", range(half)), ("3D", range(half, rows))):
        made = (cvbench_row(i, seed, level, kind) for i in span)
        write_rows(folder / CVBENCH_FILES[kind], CVBENCH_SCHEMA, made, len(span))
