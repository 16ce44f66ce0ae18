"""Asks SAT's and CV-Bench's questions about a scene, with true answers; a question in doubt is `Unclear`."""

import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from open_r1.world.scene import Level, Seen, Solid, Unclear, in_frame, is_clear, mark_box, overlap, place, see

TRIES = 2000  # scenes to draw for one question before giving up; a few are enough
DISTANCE_RATIO = 1.25  # a distance is larger when it is so by this factor
SIDE_MARGIN = 0.12  # of the image's width or height between two objects that are beside or above one another
DOMINANCE = 2.0  # a direction is the answer only where the offset along it is this many times the other offset


@dataclass(frozen=True)
class Asked:
    """A question with its true answer, and what to draw for it: one list of objects an image."""

    question: str
    options: tuple[str, ...]
    answer: str
    scenes: tuple[list[Seen], ...]
    question_type: str = "other"
    mark: tuple[float, float] | None = None  # x and z of an X on the floor
    boxes: tuple[tuple[str, Seen], ...] = ()  # colour of the annotation, object
    targets: tuple[str, ...] = ()  # what is asked about


QuestionMaker = Callable[[random.Random, Level], Asked]  # raises Unclear


def ask(question: QuestionMaker, rng: random.Random, level: Level) -> Asked:
    """Draw scenes until the question has one clear answer."""
    for _ in range(TRIES):
        with suppress(Unclear):
            return question(rng, level)
    raise RuntimeError(f"{question.__name__}: no clear scene in {TRIES} tries at level {level.name}")


def require(is_clear_enough: bool) -> None:
    """Raises Unclear where a condition for a clear answer does not hold."""
    if not is_clear_enough:
        raise Unclear


def is_left(level: Level, a: Seen, b: Seen) -> bool:
    """Whether a is to the left of b; unclear when it is close, or when the image and the floor plan disagree."""
    du, dx = a.centre[0] - b.centre[0], a.solid.x - b.solid.x
    require(abs(du) >= SIDE_MARGIN * level.width and abs(dx) >= a.solid.radius)
    require((du < 0) == (dx < 0))
    return du < 0


def closer(a: tuple[Seen, float], b: tuple[Seen, float]) -> Seen:
    """The object of the smaller distance of two (object, distance); unclear when they are about equal."""
    (near, small), (_, large) = sorted([a, b], key=lambda pair: pair[1])
    require(large > DISTANCE_RATIO * small)
    return near


def number_options(rng: random.Random, number: int, count: int) -> tuple[str, ...]:
    """`count` consecutive numbers with the right one among them, at any place but for 0 as the least."""
    first = number - rng.randrange(min(count, number + 1))
    return tuple(str(first + i) for i in range(count))


def count_scene(rng: random.Random, level: Level) -> tuple[str, int, list[Seen]]:
    """A kind, how many of it there are (uniform from 1), and the scene."""
    kind, number = rng.choice(level.kinds), rng.randint(1, level.most)
    others = [other for other in level.kinds if other != kind]
    kinds = [kind] * number + rng.choices(others, k=rng.randint(0, min(2, level.most - number)))
    rng.shuffle(kinds)
    return kind, number, place(rng, level, kinds)


def any_objects(rng: random.Random, level: Level, fewest: int) -> list[Seen]:
    """A scene of `fewest` objects or more."""
    return place(rng, level, rng.choices(level.kinds, k=rng.randint(fewest, level.most)))


def ask_count(rng: random.Random, level: Level) -> Asked:
    kind, number, scene = count_scene(rng, level)
    options = number_options(rng, number, 3)
    return Asked(f"How many {kind}s are visible in the scene?", options, str(number), (scene,))


def two_of(rng: random.Random, level: Level) -> tuple[list[Seen], Seen, Seen]:
    """A scene, and two objects in it to compare."""
    scene = any_objects(rng, level, 2)
    return scene, *rng.sample(scene, 2)


def ask_closer(rng: random.Random, level: Level) -> Asked:
    scene, a, b = two_of(rng, level)
    near = closer((a, a.distance), (b, b.distance))
    question = f"Which object is closer to the camera taking this photo, the {a.solid.name} or the {b.solid.name}?"
    return Asked(question, (a.solid.name, b.solid.name), near.solid.name, (scene,))


def ask_where(rng: random.Random, level: Level) -> Asked:
    scene, a, b = two_of(rng, level)
    dx, dz = a.solid.x - b.solid.x, a.solid.z - b.solid.z
    if abs(dx) > DOMINANCE * abs(dz):
        answer = "left" if is_left(level, a, b) else "right"
    else:
        require(abs(dz) > DOMINANCE * abs(dx))
        closer((a, a.distance), (b, b.distance))
        answer = "in front" if dz < 0 else "behind"
    question = f"Considering the relative positions, where is the {a.solid.name} with respect to the {b.solid.name}?"
    return Asked(question, ("left", "right", "in front", "behind"), answer, (scene,))


def ask_left(rng: random.Random, level: Level) -> Asked:
    scene, a, b = two_of(rng, level)
    answer = "yes" if is_left(level, a, b) else "no"
    question = f"Is the {a.solid.name} to the left of the {b.solid.name}?"
    return Asked(question, ("yes", "no"), answer, (scene,))


def side_of(facing: str, dz: float) -> str:
    """On which hand of someone facing left or right in the image is a thing that is `dz` farther away?

    Seen from above, with z up the page, the left hand of someone who faces left (-x) points down the page.
    """
    return "left" if (dz < 0) == (facing == "left") else "right"


def ask_perspective(rng: random.Random, level: Level) -> Asked:
    scene = any_objects(rng, level, 1)
    target = rng.choice(scene)
    z = rng.uniform(*level.depth)
    x = rng.uniform(-0.4, 0.4) * level.width / level.focal * z
    dx, dz = target.solid.x - x, target.solid.z - z
    mark = mark_box(level, x, z)
    require(abs(dz) >= 2 * target.solid.radius and abs(dx) <= DOMINANCE * abs(dz))
    require(in_frame(level, mark))
    require(not any(overlap(mark, seen.box) for seen in scene))
    facing = rng.choice(["left", "right"])
    question = (
        f"For someone at the 'X' marked point in the image and facing 90 degrees to the {facing}, "
        f"will the {target.solid.name} be to their left or right?"
    )
    return Asked(question, ("left", "right"), side_of(facing, dz), (scene,), mark=(x, z))


def ask_rotation(rng: random.Random, level: Level) -> Asked:
    """Two images: before and after the camera turned about its vertical axis by 10 to 25 degrees."""
    scene = any_objects(rng, level, 2)
    to_right = rng.random() < 0.5
    angle = math.radians(rng.uniform(10, 25)) * (1 if to_right else -1)
    after = [see(level, turned(seen.solid, angle)) for seen in scene]
    require(is_clear(level, after))
    question = (
        "The first image is from the beginning of the video and the second image is from the end. "
        "How did the camera likely rotate when shooting the video?"
    )
    options = ("rotated left", "rotated right")
    return Asked(question, options, options[to_right], (scene, after), "action_sequence")


def turned(solid: Solid, angle: float) -> Solid:
    """The solid in the coordinates of a camera that has turned to the right by `angle` radians."""
    sin, cos = math.sin(angle), math.cos(angle)
    x, z = solid.x * cos - solid.z * sin, solid.x * sin + solid.z * cos
    return Solid(solid.kind, solid.colour, x, z, solid.radius, solid.yaw + angle)


QUESTIONS: dict[str, QuestionMaker] = {
    "count": ask_count,
    "closer": ask_closer,
    "where": ask_where,
    "left": ask_left,
    "perspective": ask_perspective,
    "rotation": ask_rotation,
}
STATIC = tuple(name for name in QUESTIONS if name != "rotation")


def shuffled(rng: random.Random, options: Sequence[str]) -> tuple[str, ...]:
    return tuple(rng.sample(list(options), len(options)))


def ask_cv_count(rng: random.Random, level: Level) -> Asked:
    kind, number, scene = count_scene(rng, level)
    options = shuffled(rng, number_options(rng, number, 4))
    return Asked(f"How many {kind}s are in the image?", options, str(number), (scene,), targets=(kind,))


def ask_cv_relation(rng: random.Random, level: Level) -> Asked:
    """Left or right, above or below: of the two objects' boxes in the image, as the benchmark means it."""
    scene, a, b = two_of(rng, level)
    axis = rng.randrange(2)
    gap = max(a.box[axis], b.box[axis]) - min(a.box[axis + 2], b.box[axis + 2])
    offset = a.centre[axis] - b.centre[axis]
    require(gap >= 0 and abs(offset) >= SIDE_MARGIN * (level.width, level.height)[axis])
    names = (("left", "right"), ("above", "below"))[axis]
    boxes, targets = (("red", a), ("blue", b)), (a.solid.name, b.solid.name)
    first, second = (f"the {seen.solid.name} (annotated by the {colour} box)" for colour, seen in boxes)
    question = (
        f"Considering the relative positions of {first} and {second} in the image provided, "
        f"where is {first} located with respect to {second}?"
    )
    return Asked(question, shuffled(rng, names), names[offset > 0], (scene,), boxes=boxes, targets=targets)


def ask_cv_depth(rng: random.Random, level: Level) -> Asked:
    scene, a, b = two_of(rng, level)
    near = closer((a, a.distance), (b, b.distance))
    boxes, names = (("red", a), ("blue", b)), (a.solid.name, b.solid.name)
    question = (
        f"Which object is closer to the camera taking this photo, the {names[0]} (highlighted by a red box) "
        f"or the {names[1]} (highlighted by a blue box)?"
    )
    return Asked(question, shuffled(rng, names), near.solid.name, (scene,), boxes=boxes, targets=names)


def ask_cv_distance(rng: random.Random, level: Level) -> Asked:
    scene = any_objects(rng, level, 3)
    anchor, a, b = rng.sample(scene, 3)
    near = closer((a, floor_distance(anchor, a)), (b, floor_distance(anchor, b)))
    names = (anchor.solid.name, a.solid.name, b.solid.name)
    question = (
        "Estimate the real-world distances between objects in this image. Which object is closer to the "
        f"{names[0]} (highlighted by a red box), the {names[1]} (highlighted by a blue box) "
        f"or the {names[2]} (highlighted by a green box)?"
    )
    boxes = (("red", anchor), ("blue", a), ("green", b))
    return Asked(question, shuffled(rng, names[1:]), near.solid.name, (scene,), boxes=boxes, targets=names)


def floor_distance(a: Seen, b: Seen) -> float:
    """Metres between the centres of two objects on the floor."""
    return math.hypot(a.solid.x - b.solid.x, a.solid.z - b.solid.z)


CV_QUESTIONS = {"Count": ask_cv_count, "Relation": ask_cv_relation, "Depth": ask_cv_depth, "Distance": ask_cv_distance}
