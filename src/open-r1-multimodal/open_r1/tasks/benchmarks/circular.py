"""Benchmarks that ask each question once for every rotation of its options (circular evaluation): SAT, 3DSRBench."""

from collections.abc import Mapping
from typing import Annotated, Any

from open_r1.base.fields import Expected, Name, Prose, Record
from open_r1.base.prompts import sat_question
from open_r1.tasks.benchmarks.base import Benchmark, Cell, ImageCell, Item, Letter, Texts


class SATRow(Record):
    """The columns of SAT that are read."""

    question: Prose
    question_type: Name
    correct_answer: Prose | None
    answers: Texts | None
    image_bytes: Annotated[list[Cell] | None, Expected("a list of images or null")]


def sat_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """Circular evaluation, as SAT's card asks for: a question once for each rotation of its options."""
    options = tuple(dict.fromkeys(row["answers"] or ()))
    if row["correct_answer"] not in options:
        return []
    rotations = [options[shift:] + options[:shift] for shift in range(len(options))]
    return [
        Item(
            id=number,
            rotation=shift,
            task=row["question_type"],
            question=row["question"],
            options=rotated,
            answer=row["correct_answer"],
            prompt=sat_question(row["question"], rotated),
            images=tuple(row["image_bytes"] or ()) or (None,),
        )
        for shift, rotated in enumerate(rotations)
    ]


class ThreeDSRRow(Record):
    """The columns of 3DSRBench's circular version that are read, as lmms-eval's copy has them."""

    qid: Name
    category: Name
    question: Prose
    A: Prose
    B: Prose
    C: Prose | None
    D: Prose | None
    answer: Letter
    image: ImageCell


# The authors' four groups of their twelve categories.
THREE_DSR_TYPES = ("height", "location", "orientation", "multi_object")


def three_dsr_items(row: Mapping[str, Any], number: int) -> list[Item]:
    """3DSRBench's rows are the rotations already: `VIN6MS3J`, `VIN6MS3J-1`; and `VIN6MS3J-flip`, `VIN6MS3J-flip-1`.

    The last two ask about the mirrored image, which is another question. Of a question in two rotations, one of them
    right earns 1/2 of the Total and nothing of what the authors publish: there every rotation has to be right.

    Source: lmms-eval 0.7.2, `tasks/3dsrbench` (`3dsrbench_circular`, which is also EASI's, 0c1a41e); an option that a
    question does not have is null or "nan".
    """
    question, _, turn = row["qid"].rpartition("-")
    if not turn.isdecimal():
        question, turn = row["qid"], "0"
    options = {letter: row[letter] for letter in "ABCD" if row[letter] not in (None, "", "nan")}
    lines = [f"{letter}. {option}" for letter, option in options.items()]
    asked = "Please select the correct answer from the options above. \n"
    return [
        Item(
            id=question,
            rotation=int(turn),
            task=row["category"],
            type=next((name for name in THREE_DSR_TYPES if row["category"].startswith(name)), "other"),
            question=row["question"],
            options=tuple(options.values()),
            answer=f"({row['answer']})",
            prompt="\n".join([f"Question: {row['question']}", "Options:", *lines, asked]),
            images=(row["image"],),
        )
    ]


CIRCULAR = {
    "SAT-val": Benchmark("SAT-val", "array/SAT", ("SAT_val.parquet",), SATRow, sat_items),
    "SAT-test": Benchmark("SAT-test", "array/SAT", ("SAT_test.parquet",), SATRow, sat_items),
    "3DSRBench": Benchmark(
        *("3DSRBench", "oscarqjh/3DSRBench_lmmseval", ("3dsr_circular/*.parquet",), ThreeDSRRow, three_dsr_items),
        circular=True,
        lmms=("3dsrbench_circular", "vanilla_accuracy"),
    ),
}
