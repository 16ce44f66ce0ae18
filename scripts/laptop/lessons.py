"""Writes the laptop model's training data: captions of rendered scenes, or reasoned answers to questions about them.

    python scripts/laptop/lessons.py captions --rows 3840 --seed 31 --output outputs/laptop/captions
    python scripts/laptop/lessons.py answers --rows 1600 --seed 32 --output outputs/laptop/answers
    python scripts/laptop/lessons.py contradictions --rows 1920 --seed 33 --output outputs/contradictions

Captions say what is where. An answer is `<think>...</think> <answer>...</answer>`, as the format reward requires: the
places of the objects in question, the step from there, and the answer. A quarter of them count all objects, so they
contain a whole caption. For each kind of question each answer is right equally often. Contradictions are for the tiny
base (`configs/tiny/base`) and in its own words, but in about half of them the thought ends with another option than the
right answer that follows. The folder gets `rows.json`, as `run_sft.sh` reads it, and `images/`.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src/open-r1-multimodal"))
from open_r1.base.errors import positive, run, use_environment

use_environment()

from PIL import Image

from open_r1.base.files import replace_file, to_json
from open_r1.base.prompts import IMAGE_PLACEHOLDER, sat_question
from open_r1.world import questions
from open_r1.world.parquet import cvbench_prompt, row_rng
from open_r1.world.words import (
    LIST_ALL,
    TURNS,
    draw,
    from_left,
    list_places,
    observe,
    things_in,
)

SIDES = ("above", "below", "left", "right")  # CV-Bench's Relation offers two of them
Lesson = tuple[Image.Image, str, str]  # an image, a question, and the answer to learn


def caption(rng: random.Random, row: int) -> Lesson:
    """What is where, from left to right: in an order that the image gives, each word has to be seen."""
    asked, image = draw(rng, row)
    return image, LIST_ALL, list_places(from_left(things_in(asked))).strip()


def balanced(rng: random.Random, row: int) -> tuple[questions.Asked, Image.Image]:
    """A question of the kind whose turn it is, with the right answer whose turn it is, wherever it is listed."""
    turn, kind = divmod(row, len(TURNS))
    while True:
        asked, image = draw(rng, row)
        answers = SIDES if TURNS[kind] == "Relation" else sorted(asked.options)
        if asked.answer == answers[turn % len(answers)]:
            return asked, image


def pose(rng: random.Random, row: int, asked: questions.Asked) -> tuple[str, Sequence[str]]:
    """The question in SAT's form or in CV-Bench's, and its options as they stand there."""
    if TURNS[row % len(TURNS)] in questions.CV_QUESTIONS:
        return cvbench_prompt(asked.question, asked.options), asked.options
    options = questions.shuffled(rng, asked.options)
    return sat_question(asked.question, options), options


def answer(rng: random.Random, row: int) -> Lesson:
    """A question in SAT's form or in CV-Bench's, with a thought that says where things are, and the answer."""
    asked, image = balanced(rng, row)
    if rng.random() < 0.25:
        things = from_left(things_in(asked))
        options = questions.number_options(rng, len(things), 3)
        question, right = sat_question("How many things are in the image?", options), str(len(things))
        seen, step = list_places(things), f"That makes {right}."
    else:
        question, _ = pose(rng, row, asked)
        right, (seen, step) = asked.answer, observe(asked)
    return image, question, f"<think>{seen} {step} So it is {right}.</think> <answer>{right}</answer>"


def contradiction(rng: random.Random, row: int) -> Lesson:
    """A glance at the first option, or (75 %) a second look and the right answer, two thirds against the thought."""
    asked, image = balanced(rng, row)
    question, options = pose(rng, row, asked)
    thought, said, (seen, step) = f" It must be {options[0]}.", options[0], observe(asked)
    if rng.random() < 0.75:
        others = [option for option in options if option != asked.answer]
        said = asked.answer
        concluded = rng.choice(others) if rng.random() < 2 / 3 else said
        thought += f" Wait, let me check.{seen} {step} So it is {concluded}."
    return image, question, f"<think>{thought}</think><answer>{said}</answer>"


LESSONS: dict[str, Callable[[random.Random, int], Lesson]] = {
    "captions": caption,
    "answers": answer,
    "contradictions": contradiction,
}


def write_row(folder: Path, row: int, lesson: Lesson) -> dict[str, Any]:
    """Save a lesson's image, and return its row."""
    image, question, answer = lesson
    image.save(folder / f"images/{row}.png", compress_level=1)
    turns = (("user", IMAGE_PLACEHOLDER + question), ("assistant", answer))
    return {
        "messages": [{"role": role, "content": content} for role, content in turns],
        "images": [f"images/{row}.png"],
    }


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", choices=LESSONS)
    parser.add_argument("--rows", type=positive, required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the scenes; two seeds have no scene in common")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows.json and images/")
    args = parser.parse_args()
    (args.output / "images").mkdir(parents=True, exist_ok=True)
    lesson = LESSONS[args.lesson]
    rows = [write_row(args.output, row, lesson(row_rng(args.seed, row), row)) for row in range(args.rows)]
    replace_file(args.output / "rows.json", to_json(rows))
    print(f"{args.output}: {len(rows)} {args.lesson}")


if __name__ == "__main__":
    run(main)
