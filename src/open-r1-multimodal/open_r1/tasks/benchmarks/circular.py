"""Benchmarks that ask each question once for every rotation of its options (circular evaluation): SAT."""

from collections.abc import Mapping
from typing import Annotated, Any

from open_r1.base.fields import Expected, Name, Prose, Record
from open_r1.base.prompts import sat_question
from open_r1.tasks.benchmarks.base import Benchmark, Cell, Item, Texts


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


CIRCULAR = {
    "SAT-val": Benchmark("SAT-val", "array/SAT", ("SAT_val.parquet",), SATRow, sat_items),
    "SAT-test": Benchmark("SAT-test", "array/SAT", ("SAT_test.parquet",), SATRow, sat_items),
}
