"""Benchmarks of multiple choice that ask each question once: CV-Bench, BLINK, VSR, MMSI-Bench, MindCube and others."""

from collections.abc import Mapping
from string import ascii_uppercase
from typing import Annotated, Any, Literal

from pydantic import Field

from open_r1.base.fields import Expected, Name, Prose, Record
from open_r1.tasks.benchmarks.base import (
    Benchmark,
    Id,
    ImageCell,
    ImageCells,
    Item,
    Letter,
    Texts,
    behind_letters,
    lettered,
)


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


class MMSIRow(Record):
    """The columns of MMSI-Bench that are read."""

    id: Id
    images: ImageCells
    question_type: Name
    question: Prose
    answer: Letter


def mmsi_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """MMSI-Bench's question names its options ("Options: A: left, B: right"); two or more images.

    Each question counts as much: `B` where B is right is 1, and three more that are wrong make it 1/4. Source: the
    prompt in lmms-eval 0.7.2, `tasks/mmsi_bench`.
    """
    options = lettered(row["question"])
    form = "Answer with the option's letter from the given choices directly. Enclose the option's letter within ``."
    if not options:
        return []
    return [
        Item(
            id=row["id"],
            task=row["question_type"],
            type=row["question_type"].partition(" (")[0],
            question=row["question"],
            options=options,
            answer=f"({row['answer']})",
            prompt=f"{row['question'].strip()}\n{form}",
            images=tuple(row["images"]),
        )
    ]


class MindCubeRow(Record):
    """The columns of MindCube that are read, as lmms-eval's copy has them."""

    id: Name
    images: ImageCells
    question: Prose
    input_prompt: Prose
    gt_answer: Letter


def mindcube_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """MindCube asks its `input_prompt` column, whose question names its options ("A. Above B. Under"), of 2 to 4 views.

    The id says how the camera moves between the views: `among_...` objects, `around_...` (or `aroundnew_...`) them, or
    `rotation_...`. Source: `mll-lab-nu/MindCube`, 8f7cbe9, and lmms-eval 0.7.2, `tasks/mindcube`.
    """
    movement, options = row["id"].partition("_")[0], lettered(row["question"])
    if not options:
        return []
    return [
        Item(
            id=row["id"],
            task="around" if movement == "aroundnew" else movement,
            question=row["question"],
            options=options,
            answer=f"({row['gt_answer']})",
            prompt=row["input_prompt"].replace("<image>", "").strip(),
            images=tuple(row["images"]),
        )
    ]


class ViewSpatialRow(Record):
    """The columns of ViewSpatial-Bench that are read, as lmms-eval's copy has them."""

    question_type: Name
    images: ImageCells
    question: Prose
    choices: Prose
    answer: Prose


def viewspatial_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """ViewSpatial-Bench has its choices in one text, and the whole line of the right one as its answer ("D. back").

    Source: `ZJU-REAL/ViewSpatial-Bench`, 0e86b63, `evaluate.py`, and lmms-eval 0.7.2, `tasks/viewspatial`.
    """
    form = "Reply only to the corresponding option.\nAnswer:"
    return [
        Item(
            id=number,
            task=row["question_type"],
            type=row["question_type"].partition(" - ")[0],
            question=row["question"],
            options=lettered(row["choices"]),
            answer=f"({row['answer'][:1]})",
            prompt=f"Question: {row['question']}\nChoices: {row['choices']}\n{form}",
            images=tuple(row["images"]),
        )
    ]


class EmbSpatialRow(Record):
    """The columns of EmbSpatial-Bench that are read."""

    question_id: Id
    data_source: Name
    relation: Name
    question: Prose
    answer_options: Texts
    answer: Annotated[int, Field(ge=0, lt=26), Expected("a whole number from 0 to 25")]
    image: ImageCell


def embspatial_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """EmbSpatial-Bench numbers its options from 0, and asks for them behind letters.

    Source: lmms-eval 0.7.2, `tasks/embspatial`, without the line that asks for a letter and nothing else.
    """
    return [
        Item(
            id=row["question_id"],
            task=row["relation"],
            source=row["data_source"],
            question=row["question"],
            options=tuple(row["answer_options"]),
            answer=f"({ascii_uppercase[row['answer']]})",
            prompt="\n".join([row["question"], *behind_letters(row["answer_options"], ")")]),
            images=(row["image"],),
        )
    ]


# Of BLINK's val split; its authors' Total is the mean over these tasks (`zeyofu/BLINK_Benchmark`, 0cca9a3,
# `eval/evaluate.py`), not adjusted for chance.
BLINK_TASKS = (
    *("Art_Style", "Counting", "Forensic_Detection", "Functional_Correspondence", "IQ_Test", "Jigsaw"),
    *("Multi-view_Reasoning", "Object_Localization", "Relative_Depth", "Relative_Reflectance"),
    *("Semantic_Correspondence", "Spatial_Relation", "Visual_Correspondence", "Visual_Similarity"),
)
BLINK_FILES = tuple(f"{task}/val-*.parquet" for task in ("Relative_Depth", "Spatial_Relation"))
ALL_BLINK_FILES = tuple(f"{task}/val-*.parquet" for task in BLINK_TASKS)
BLINK = "BLINK-Benchmark/BLINK"
# Of CV-Bench's `test` split, by type: 1438 and 1200 rows, by the dataset card.
CVBENCH_FILES = {"2D": "test_2d.parquet", "3D": "test_3d.parquet"}
# The authors' score, of accuracies by source: 1/2 * ((ADE20K + COCO) / 2 + Omni3D). The R1-Zero paper reports the micro
# average over all questions instead.
CVBENCH_SCORE = (("ADE20K", "COCO"), "Omni3D")
CHOICE = {
    "CV-Bench": Benchmark(
        *("CVBench", "nyu-visionx/CV-Bench", tuple(CVBENCH_FILES.values()), CVBenchRow, cvbench_items),
        {"CV-Bench": CVBENCH_SCORE},
        lmms=("cv_bench", "cv_bench_acc"),
    ),
    "BLINK": Benchmark("BLINK", BLINK, BLINK_FILES, BLINKRow, blink_items),  # as the R1-Zero paper
    "BLINK-full": Benchmark(
        *("BLINK-full", BLINK, ALL_BLINK_FILES, BLINKRow, blink_items, {"BLINK": BLINK_TASKS}),
        lmms=("blink", "blink_acc"),
    ),
    # the split that the R1-Zero paper asked, and the one whose objects VSR's own training set does not show
    "VSR": Benchmark("VSR", "cambridgeltl/vsr_random", ("test.jsonl",), VSRRow, vsr_items, images=VSR_IMAGES),
    "VSR-zeroshot": Benchmark(
        "VSR-zeroshot", "cambridgeltl/vsr_zeroshot", ("test.jsonl",), VSRRow, vsr_items, images=VSR_IMAGES
    ),
    "MMSI-Bench": Benchmark(
        *("MMSI-Bench", "RunsenXu/MMSI-Bench", ("MMSI_Bench.parquet",), MMSIRow, mmsi_items),
        lmms=("mmsi_bench", "average"),
    ),
    "MindCube": Benchmark(  # MindCube-Tiny, which is what is compared
        *("MindCube", "oscarqjh/MindCube_lmmseval", ("tiny/*.parquet",), MindCubeRow, mindcube_items),
        lmms=("mindcube_tiny", "overall_accuracy"),
    ),
    "ViewSpatial": Benchmark(
        *("ViewSpatial", "oscarqjh/ViewSpatial_lmmseval", ("**/test-*.parquet",), ViewSpatialRow, viewspatial_items),
        lmms=("viewspatial", "overall_accuracy"),
    ),
    "EmbSpatial": Benchmark(
        *("EmbSpatial", "FlagEval/EmbSpatial-Bench", ("data/test-*.parquet",), EmbSpatialRow, embspatial_items),
        lmms=("embspatial", "embspatial_acc"),
    ),
}
