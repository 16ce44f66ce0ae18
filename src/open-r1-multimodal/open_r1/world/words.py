"""Puts a scene into words: what is in it and where, and the step from there to a question's answer."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from open_r1.world import questions
from open_r1.world.render import paint
from open_r1.world.scene import LEVELS, Seen

LEVEL = LEVELS["easy"]
GRID = 10  # columns of the image and steps of depth that a description tells apart
QUESTIONS = {**{name: questions.QUESTIONS[name] for name in questions.STATIC}, **questions.CV_QUESTIONS}
LIST_ALL = "List the things from left to right."  # `list_places(from_left(...))` answers it
TURNS = (*QUESTIONS, "count", "perspective", "Count", "Distance")  # what is hard to learn comes twice


def column(u: float) -> int:
    """The tenth of the image's width that a horizontal position in pixels is in."""
    return min(GRID - 1, max(0, int(u * GRID / LEVEL.width)))


def rank(z: float) -> int:
    """How far along the way from the nearest to the farthest place, 0 to 9; logarithmic, as perspective is."""
    nearest, farthest = LEVEL.depth
    return min(GRID - 1, max(0, round((GRID - 1) * math.log(z / nearest) / math.log(farthest / nearest))))


@dataclass(frozen=True)
class Thing:
    """Something to see: an object, or the X on the floor. u and v in pixels, depth in metres."""

    name: str
    u: float
    v: float
    depth: float

    @property
    def place(self) -> str:
        """`"3 7"`: its column and how deep it is."""
        return f"{column(self.u)} {rank(self.depth)}"


def things_in(asked: questions.Asked) -> list[Thing]:
    """The objects of a question's one scene, and the X if it has one, in no order."""
    [scene] = asked.scenes
    things = [Thing(seen.solid.name, *seen.centre, seen.solid.z) for seen in scene]
    if asked.mark is not None:
        x, z = asked.mark
        things.append(Thing("X", *LEVEL.project(x, 0, z)[:2], z))
    return things


def list_places(things: Sequence[Thing]) -> str:
    """`" red circle at 3 7, X at 8 2."`, in the order given."""
    return " " + ", ".join(f"{thing.name} at {thing.place}" for thing in things) + "."


def from_left(things: Sequence[Thing]) -> list[Thing]:
    """The things from left to right."""
    return sorted(things, key=lambda thing: thing.u)


def list_kind(things: Sequence[Thing], kind: str) -> str:
    """`" circles: red at 3 7, blue at 8 2."`, from left to right."""
    of_kind = [f"{thing.name.split()[0]} at {thing.place}" for thing in from_left(things) if kind in thing.name]
    return f" {kind}s: {', '.join(of_kind) or 'none'}."


def compare(a: int, b: int, axis: str) -> str:
    """`"3 < 8 across."`"""
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b} {axis}."


def tell_gap(anchor: Seen, other: Seen) -> tuple[str, int]:
    """`"red circle 3 4 makes 5"`: how far it is from the anchor across, in depth and in all, in half metres."""
    across, deep = abs(anchor.solid.x - other.solid.x), abs(anchor.solid.z - other.solid.z)
    whole = round(2 * questions.floor_distance(anchor, other))
    return f"{other.solid.name} {round(2 * across)} {round(2 * deep)} makes {whole}", whole


def observe(asked: questions.Asked) -> tuple[str, str]:
    """What a question is about, with its places, and the step from there to the answer."""
    things = things_in(asked)
    named = sorted(
        (thing for thing in things if thing.name in asked.question), key=lambda thing: asked.question.index(thing.name)
    )
    if not named:
        kind = next(kind for kind in LEVEL.kinds if kind in asked.question)
        return list_kind(things, kind), f"That makes {asked.answer}."
    if len(named) == 3:
        [scene] = asked.scenes
        anchor, *others = (next(seen for seen in scene if seen.solid.name == thing.name) for thing in named)
        gaps = [tell_gap(anchor, other) for other in others]
        [(_, near), (_, far)] = gaps
        return list_places(named), f"{', '.join(text for text, _ in gaps)}. {compare(near, far, 'apart')}"
    if asked.mark is not None:
        named.sort(key=lambda thing: thing.name == "X")
        facing = "left" if "facing 90 degrees to the left" in asked.question else "right"
        depths = compare(*(rank(thing.depth) for thing in named), "deep")
        return list_places(named), f"{depths} Facing {facing}."
    if "closer" in asked.question or asked.answer in ("in front", "behind", "above", "below"):
        return list_places(named), compare(*(rank(thing.depth) for thing in named), "deep")
    return list_places(named), compare(*(column(thing.u) for thing in named), "across")


def draw(rng: random.Random, row: int) -> tuple[questions.Asked, Image.Image]:
    """Question `row` with its image; the kinds take turns."""
    asked = questions.ask(QUESTIONS[TURNS[row % len(TURNS)]], rng, LEVEL)
    return asked, paint(LEVEL, asked, asked.scenes[0])
