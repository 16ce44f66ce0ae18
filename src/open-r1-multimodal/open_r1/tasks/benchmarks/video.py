"""Benchmarks of videos, whose frames are a question's images: VSI-Bench, with its numbers, and SITE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from open_r1.base.fields import Expected, Name, Prose, Record
from open_r1.base.videos import FORMATS
from open_r1.tasks.benchmarks.base import Benchmark, Id, Item, Letter, Texts, behind_letters, lettered

FRAMES = "These are frames of a video."


class VSIRow(Record):
    """The columns of VSI-Bench that are read."""

    id: Id
    dataset: Name
    scene_name: Name
    question_type: Name
    question: Prose
    options: Texts | None
    ground_truth: Prose


def vsi_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """VSI-Bench asks for a letter, or without options for a number, which earns its mean relative accuracy.

    A room of 20 square metres that is said to have 23 is off by 0.15: good for the thresholds 0.5 to 0.85, 0.8 of 1.
    Source: `vision-x-nyu/thinking-in-space`, e6a72f3, `lmms_eval/tasks/vsibench`; both of its parquet files are the
    whole set.
    """
    options = row["options"] or []
    form = "Answer with the option's letter from the given choices directly."
    asked = ["Options:", *options, form] if options else ["Please answer the question using a single word or phrase."]
    return [
        Item(
            id=row["id"],
            task=row["question_type"],
            type="Multiple-Choice Answer" if options else "Numerical Answer",
            question=row["question"],
            options=lettered("\n".join(options)),
            answer=f"({row['ground_truth']})" if options else row["ground_truth"],
            prompt="\n".join([FRAMES, row["question"], *asked]),
            images=(f"{row['dataset']}/{row['scene_name']}.mp4",),
        )
    ]


# The authors' average is over eight tasks, of which the relative direction is the mean of its three levels.
DIRECTION = tuple(f"object_rel_direction_{level}" for level in ("easy", "medium", "hard"))
VSI_TASKS = (
    *("object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation"),
    *("object_rel_distance", DIRECTION, "route_planning", "obj_appearance_order"),
)


class SITERow(Record):
    """The columns of SITE that are read."""

    visual: Annotated[list[str], Field(min_length=1), Expected("a list of paths")]
    category: Name
    dataset: Name
    question: Prose
    options: Annotated[list[str], Field(min_length=2, max_length=26), Expected("a list of 2 to 26 texts")]
    answer: Letter


VIDEO_PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter of the correct option."
)


def site_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """SITE asks about images or about a video; its images stand in front here, not where `<image>` marks them.

    One of 4 options right and one of 2 wrong are an accuracy of 1/2 at a chance of 3/8, (1/2 - 3/8) / (1 - 3/8) = 0.2
    after it. Source: `wenqi-wang20/SITE-Bench`, 36295bb, `eval_scripts/sitebench`.
    """
    asked = [f"Question: {row['question'].strip()}", "Options:", *behind_letters(row["options"], ":")]
    is_video = Path(row["visual"][0]).suffix.lower() in FORMATS
    prompt = "\n".join([VIDEO_PROMPT] * is_video + asked + ["Give me the answer letter directly. The best answer is:"])
    return [
        Item(
            id=number,
            task=row["category"],
            source=row["dataset"],
            question=row["question"],
            options=tuple(row["options"]),
            answer=f"({row['answer']})",
            prompt=prompt.replace("<image>", ""),
            images=tuple(row["visual"]),
        )
    ]


VSI_FILES, SITE_FILES = ("test_pruned.parquet", "test_debiased.parquet"), ("*image_test*", "*video_test*")
VIDEO = {
    "VSI-Bench": Benchmark(
        *("VSI-Bench", "nyu-visionx/VSI-Bench", VSI_FILES, VSIRow, vsi_items),
        combinations={"object_rel_direction": DIRECTION, "VSI-Bench": VSI_TASKS},
        images="unpack arkitscenes.zip, scannet.zip and scannetpp.zip of the data set there",
        lmms=("vsibench", "vsibench_overall"),
    ),
    "SITE": Benchmark(
        *("SITE", "franky-veteran/SITE-Bench", SITE_FILES, SITERow, site_items),
        adjusted=True,
        images="unpack data_chunked_*.zip of the data set there",
        lmms=("site_bench", "accuracy"),
    ),
}
