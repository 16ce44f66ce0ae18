"""Benchmarks of multiple choice that ask each question once: CV-Bench, BLINK, VSR."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from open_r1.base.fields import Expected, Name, Prose, Record
from open_r1.tasks import cvbench
from open_r1.tasks.benchmarks.base import Benchmark, Id, ImageCell, Item, Texts


class CVBenchRow(Record):
    """The columns of CV-Bench that are read."""

    idx: Id
    type: Name
    task: Name
    source: Name
    question: Prose
    prompt: Prose
    choices: Texts
    answer: Prose
    image: ImageCell


def cvbench_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """CV-Bench asks its `prompt` column as it is."""
    return [
        Item(
            id=row["idx"],
            task=row["task"],
            type=row["type"],
            source=row["source"],
            question=row["question"],
            options=tuple(row["choices"]),
            answer=f"({row['answer'].strip('()')})",
            prompt=row["prompt"],
            images=(row["image"],),
        )
    ]


class BLINKRow(Record):
    """The columns of BLINK that are read."""

    idx: Id
    sub_task: Name
    question: Prose
    prompt: Prose
    choices: Texts
    answer: Prose
    image_1: ImageCell
    image_2: ImageCell
    image_3: ImageCell
    image_4: ImageCell


def blink_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """BLINK asks its `prompt` column; up to four images. Only the answers of `val` are public."""
    images = tuple(row[name] for name in ("image_1", "image_2", "image_3", "image_4") if row[name] is not None)
    return [
        Item(
            id=row["idx"],
            task=row["sub_task"],
            question=row["question"],
            options=tuple(row["choices"]),
            answer=row["answer"],
            prompt=row["prompt"],
            images=images or (None,),
        )
    ]


class VSRRow(Record):
    """The columns of VSR that are read."""

    caption: Prose
    image: ImageCell
    label: Annotated[Literal[0, 1, "0", "1"], Expected("0 or 1")]
    relation: Name


# The authors' groups of relations (`rel_meta_category_dict.txt` in their repository); others are `Unallocated`.
VSR_CATEGORIES = {
    "Adjacency": "adjacent to, alongside, at the side of, at the right side of, at the left side of, attached to, "
    "at the back of, ahead of, against, at the edge of",
    "Directional": "off, past, toward, down, deep down, up, away from, along, around, from, into, to, across, "
    "across from, through, down from",
    "Orientation": "facing, facing away from, parallel to, perpendicular to",
    "Projective": "on top of, beneath, beside, behind, left of, right of, under, in front of, below, above, over, "
    "in the middle of",
    "Proximity": "by, close to, near, far from, far away from",
    "Topological": "connected to, detached from, has as a part, part of, contains, within, at, on, in, with, "
    "surrounding, among, consists of, out of, between, inside, outside, touching",
}
VSR_CATEGORY = {relation: name for name, relations in VSR_CATEGORIES.items() for relation in relations.split(", ")}
VSR_IMAGES = "its files name images of COCO 2017 (train and val), which belong beside test.jsonl or in images/ there"


def vsr_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """VSR's captions are true or false; the question is that of the R1-Zero paper's evaluation."""
    statement = f'Does the statement "{row["caption"]}" accurately describes what you see?'
    question = f"Please analyze the provided image. {statement} Choose from (A) True or (B) False."
    return [
        Item(
            id=number,
            task=VSR_CATEGORY.get(row["relation"], "Unallocated"),
            question=question,
            options=("True", "False"),
            answer="(A)" if int(row["label"]) == 1 else "(B)",
            prompt=question,
            images=(row["image"],),
        )
    ]


BLINK_FILES = ("Relative_Depth/val-*.parquet", "Spatial_Relation/val-*.parquet")
CVBENCH_FILES, CVBENCH_SCORE = tuple(cvbench.FILES.values()), ("CV-Bench", cvbench.official_score)
CHOICE = {
    "CV-Bench": Benchmark("CVBench", cvbench.HUB_ID, CVBENCH_FILES, CVBenchRow, cvbench_items, CVBENCH_SCORE),
    "BLINK": Benchmark("BLINK", "BLINK-Benchmark/BLINK", BLINK_FILES, BLINKRow, blink_items),
    # the split that the R1-Zero paper asked, and the one whose objects VSR's own training set does not show
    "VSR": Benchmark("VSR", "cambridgeltl/vsr_random", ("test.jsonl",), VSRRow, vsr_items, images=VSR_IMAGES),
    "VSR-zeroshot": Benchmark(
        "VSR-zeroshot", "cambridgeltl/vsr_zeroshot", ("test.jsonl",), VSRRow, vsr_items, images=VSR_IMAGES
    ),
}
