"""The record of one completion, a line of trajectories/*.jsonl: the trainer writes it, the report reads it.

A new number of a completion is a field here, which the report has as a column at once, and a curve in
`report/curves.py`. No torch.
"""

from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, get_type_hints

from open_r1.base.fields import FLAG, TEXT, Check, Fields, are, is_count, is_number, is_text, maybe

CHOOSING = ("row", "refill")


def _are_rewards(value: Any) -> bool:
    return isinstance(value, dict) and all(reward is None or is_number(reward) for reward in value.values())


def _is_span(value: Any) -> bool:
    return are(is_count)(value) and len(value) == 2


@dataclass(kw_only=True)
class Completion:
    """One completion of a rollout. Fields with a default may be absent from a file: older runs have not all of them."""

    step: Annotated[int, Check(is_count, "a number of steps")]
    prompt: Annotated[str, TEXT]
    images: Annotated[list[str], Check(are(is_text), "a list of paths")]
    solution: Annotated[str | None, maybe(TEXT)] = None
    options: Annotated[list[str] | None, maybe(Check(are(is_text), "a list of texts"))] = None
    completion: Annotated[str, TEXT]
    rewards: Annotated[dict[str, float | None], Check(_are_rewards, "numbers or null by name")]  # null: none given
    advantage: Annotated[float, Check(is_number, "a number")]
    length: Annotated[int, Check(is_count, "a number of tokens")]
    ended: Annotated[bool, FLAG]
    reflections: Annotated[list[list[int]] | None, Check(are(_is_span), "pairs of offsets")] = None
    considered: Annotated[str | None, maybe(TEXT)] = None
    self_corrected: Annotated[bool, FLAG] = False
    group: Annotated[int, Check(is_count, "a number")] = 0  # of one prompt's completions; counts anew in every rollout
    row: Annotated[int | None, maybe(Check(is_count, "a number"))] = None  # of the prompt in the training set
    refill: Annotated[int, Check(is_count, "a number")] = (
        0  # which pass of a rollout sampled it, see open_r1.trainer.sampling
    )
    dataset: Annotated[str | None, maybe(TEXT)] = None  # the name of its evaluation set, where there are several

    def to_row(self) -> dict[str, Any]:
        """As a line of a file holds it; the last fields are those of runs that choose prompts, or name their sets."""
        absent = (CHOOSING if self.row is None else ()) + (("dataset",) if self.dataset is None else ())
        return {name: value for name, value in vars(self).items() if name not in absent}


_HINTS = get_type_hints(Completion, include_extras=True)
_CHECKS: Fields = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}
OPTIONAL: Fields = {each.name: _CHECKS[each.name] for each in fields(Completion) if each.default is not MISSING}
REQUIRED: Fields = {name: check for name, check in _CHECKS.items() if name not in OPTIONAL}
# The numbers among the fields -> their types; but for `group`, which means nothing without its rollout.
NUMBERS = {name: hint.__origin__ for name, hint in _HINTS.items() if hint.__origin__ in (int, float, bool)}
del NUMBERS["group"]
