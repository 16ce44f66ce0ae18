"""The record of one completion, a line of trajectories/*.jsonl: the trainer writes it, the report reads it.

A new number of a completion is a field here, which the report has as a column at once, and a curve in
`reporting/curves.py`. No torch.
"""

from typing import Annotated, Any

from pydantic import Field

from open_r1.base.fields import Count, Expected, Flag, Number, Record, Text

CHOOSING = ("row", "refill")  # fields that only a run which chooses its prompts writes (open_r1.trainer.sampling)

Span = Annotated[list[Count], Field(min_length=2, max_length=2)]


class CompletionRecord(Record):
    """One completion of a rollout. Fields with a default may be absent from a file: older runs have not all of them."""

    step: Count
    prompt: Text
    images: Annotated[list[Text], Expected("a list of paths")]
    solution: Text | None = None
    options: Annotated[list[Text] | None, Expected("a list of texts")] = None
    question_type: Text | None = None  # as the data set names it
    completion: Text
    # null where a function gave none
    rewards: Annotated[dict[Text, float | None], Expected("numbers or null by name")]
    advantage: Number
    judgement: Text | None = None  # how its answer was read (open_r1.answers.judgement), under an accuracy reward
    length: Count  # in tokens
    ended: Flag
    reflections: Annotated[list[Span] | None, Expected("pairs of offsets")] = None
    considered: Text | None = None
    self_corrected: Flag = False
    group: Count = 0  # of one prompt's completions; counts anew in every rollout
    row: Count | None = None  # of the prompt in the training set
    refill: Count = 0  # which pass of a rollout sampled it, see open_r1.trainer.sampling
    dataset: Text | None = None  # the name of its evaluation set, where there are several

    def to_row(self) -> dict[str, Any]:
        """As a file holds it: `row` and `refill` only of a run that chooses prompts, `dataset` only of a named set."""
        absent = (CHOOSING if self.row is None else ()) + (("dataset",) if self.dataset is None else ())
        return {name: value for name, value in vars(self).items() if name not in absent}


# The numbers among the fields -> their types; but for `group`, which means nothing without its rollout.
NUMBERS = {
    name: field.annotation
    for name, field in CompletionRecord.model_fields.items()
    if field.annotation in (int, float, bool) and name != "group"
}
