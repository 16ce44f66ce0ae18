"""A rendered spatial world: seeded scenes of known geometry that ask what SAT and CV-Bench ask.

    python -m open_r1.world --output SAT_train.parquet --rows 2000 --level easy
    python -m open_r1.world --output cvbench/ --rows 400 --level full --schema cvbench

Coloured solids stand on a floor and a pinhole camera looks at them. Every answer follows from the geometry,
and a scene in which it would be a matter of taste (two distances about equal, an object half hidden, a side
that image and floor plan disagree about) is thrown away and drawn again. Row i depends on the seed and on i
alone. No torch.

World coordinates, in metres: x to the right, y up, z ahead; the camera is at (0, elevation, 0) and looks down
by its pitch. Image coordinates, in pixels: u to the right, v down.
"""

import argparse
import io
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from tqdm import tqdm

from open_r1.files import replacing
from open_r1.tasks import cvbench

Pixels = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 210, 40),
    "purple": (145, 55, 185),
    "orange": (240, 130, 25),
    "cyan": (60, 200, 215),
}
BOX_COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}  # of CV-Bench's annotations
SKY, FLOOR, INK = (225, 232, 240), (178, 172, 165), (0, 0, 0)
LIGHT = np.array([-0.45, 0.8, -0.4], np.float32)  # towards the light; of about unit length

BATCH_ROWS = 200  # written at a time
TRIES = 2000  # scenes to draw for one question before giving up; a few are enough
DISTANCE_RATIO = 1.25  # a distance is larger when it is so by this factor
SIDE_MARGIN = 0.12  # of the image's width or height between two objects that are beside or above one another
DOMINANCE = 2.0  # a direction is the one to name when its offset is this many times the other's


@dataclass(frozen=True)
class Level:
    """What a scene looks like; lengths in metres, focal length and image size in pixels."""

    name: str
    width: int
    height: int
    focal: float
    elevation: float
    pitch: float  # radians
    kinds: tuple[str, ...]
    depth: tuple[float, float]  # nearest and farthest z of an object
    radius: tuple[float, float]
    most: int  # objects in a scene
    hidden: float  # of an object's box that nearer ones may cover
    format: str
    save_options: tuple[tuple[str, Any], ...]

    def project(self, x: float, y: float, z: float) -> tuple[float, float, float]:
        """A point of the world -> its u and v, and its depth along the optical axis in metres."""
        sin, cos = math.sin(self.pitch), math.cos(self.pitch)
        depth = z * cos - (y - self.elevation) * sin
        down = -(y - self.elevation) * cos - z * sin
        return self.width / 2 + self.focal * x / depth, self.height / 2 + self.focal * down / depth, depth

    @property
    def horizon(self) -> int:
        return max(0, round(self.height / 2 - self.focal * math.tan(self.pitch)))


LEVELS = {
    # Flat figures that never overlap: a tiny vision transformer with 28-pixel cells can read it.
    "easy": Level(
        name="easy",
        width=112,
        height=112,
        focal=88.0,
        elevation=3.5,
        pitch=math.radians(23),
        kinds=("circle", "square", "triangle"),
        depth=(2.6, 7.5),
        radius=(0.7, 0.7),
        most=4,
        hidden=0.0,
        format="PNG",
        save_options=(("compress_level", 1),),
    ),
    "full": Level(
        name="full",
        width=640,
        height=480,
        focal=550.0,
        elevation=1.8,
        pitch=math.radians(18),
        kinds=("sphere", "cube", "cylinder"),
        depth=(2.8, 8.5),
        radius=(0.25, 0.42),
        most=7,
        hidden=0.35,
        format="JPEG",
        save_options=(("quality", 90),),
    ),
}


@dataclass(frozen=True)
class Solid:
    """An object on the floor at (x, z); `radius` is half its width, and its height is twice that."""

    kind: str
    colour: str
    x: float
    z: float
    radius: float
    yaw: float  # radians, of a cube about its vertical axis

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"


@dataclass(frozen=True)
class Seen:
    """A solid and what the camera sees of it: its box in the image and its centre's distance in metres."""

    solid: Solid
    box: Box
    distance: float

    @property
    def centre(self) -> Pixels:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


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


# --- geometry ---------------------------------------------------------------------------------------


def see(level: Level, solid: Solid) -> Seen:
    """Where a solid is in the image. A flat figure faces the camera; a solid is bounded by its outline."""
    distance = math.hypot(solid.x, solid.radius - level.elevation, solid.z)
    if level.name == "easy":
        u, v, depth = level.project(solid.x, solid.radius, solid.z)
        half = level.focal * solid.radius / depth
        return Seen(solid, (u - half, v - half, u + half, v + half), distance)
    u, v, _ = level.project(*outline(solid))
    return Seen(solid, (float(u.min()), float(v.min()), float(u.max()), float(v.max())), distance)


def outline(solid: Solid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """World coordinates x, y, z, each (points,), of points whose images bound that of the solid."""
    height = 2 * solid.radius
    if solid.kind == "sphere":
        polar, around = np.meshgrid(np.linspace(0, np.pi, 17), np.linspace(0, 2 * np.pi, 33))
        ring = solid.radius * np.sin(polar).ravel()
        around, y = around.ravel(), solid.radius * (1 + np.cos(polar).ravel())
    else:
        corners = 4 if solid.kind == "cube" else 32
        ring = solid.radius * (math.sqrt(2) if solid.kind == "cube" else 1.0)
        angles = np.arange(corners) * (2 * np.pi / corners) + np.pi / 4 + solid.yaw
        around, y = np.tile(angles, 2), np.repeat([0.0, height], corners)
    return solid.x + ring * np.cos(around), y, solid.z + ring * np.sin(around)


def overlap(a: Box, b: Box) -> float:
    """Shared area of two boxes in square pixels."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def in_frame(level: Level, box: Box) -> bool:
    return box[0] >= 2 and box[1] >= 2 and box[2] <= level.width - 2 and box[3] <= level.height - 2


def is_clear(level: Level, scene: Sequence[Seen]) -> bool:
    """Whether every object is inside the image and hidden by nearer ones by no more than the level allows."""
    for seen in scene:
        nearer = (other.box for other in scene if other.distance < seen.distance)
        if not in_frame(level, seen.box):
            return False
        if sum(overlap(seen.box, box) for box in nearer) > level.hidden * area(seen.box):
            return False
    return True


def place(rng: random.Random, level: Level, kinds: Sequence[str]) -> list[Seen] | None:
    """Objects of these kinds, each of another colour, standing apart and in clear view; None if it fails."""
    scene: list[Seen] = []
    for kind, colour in zip(kinds, rng.sample(list(COLOURS), len(kinds)), strict=True):
        for _ in range(20):
            z = rng.uniform(*level.depth)
            x = rng.uniform(-0.5, 0.5) * level.width / level.focal * z
            solid = Solid(kind, colour, x, z, rng.uniform(*level.radius), rng.uniform(0, math.pi / 2))
            reach = 1.5 * solid.radius  # a little more than a cube's corner
            apart = all(math.hypot(s.solid.x - x, s.solid.z - z) > reach + 1.5 * s.solid.radius for s in scene)
            if apart and is_clear(level, candidate := [*scene, see(level, solid)]):
                scene = candidate
                break
        else:
            return None
    return scene


def any_kinds(rng: random.Random, level: Level, fewest: int) -> list[str]:
    return rng.choices(level.kinds, k=rng.randint(fewest, level.most))


def is_left(level: Level, a: Seen, b: Seen) -> bool | None:
    """Whether a is to the left of b; None when it is close, or when the image and the floor plan disagree."""
    du, dx = a.centre[0] - b.centre[0], a.solid.x - b.solid.x
    if abs(du) < SIDE_MARGIN * level.width or abs(dx) < a.solid.radius or (du < 0) != (dx < 0):
        return None
    return du < 0


def closer(a: tuple[Seen, float], b: tuple[Seen, float]) -> Seen | None:
    """The object of the smaller distance of two (object, distance); None when they are about equal."""
    (near, small), (_, large) = sorted([a, b], key=lambda pair: pair[1])
    return near if large > DISTANCE_RATIO * small else None


# --- SAT's static questions; each returns None when the scene leaves room for doubt ------------------


def number_options(rng: random.Random, number: int, count: int) -> tuple[str, ...]:
    """`count` consecutive numbers with the right one among them, at any place but for 0 as the least."""
    first = number - rng.randrange(min(count, number + 1))
    return tuple(str(first + i) for i in range(count))


def count_scene(rng: random.Random, level: Level) -> tuple[str, int, list[Seen]] | None:
    """A kind, how many of it there are (uniform from 1), and the scene."""
    kind, number = rng.choice(level.kinds), rng.randint(1, level.most)
    others = [other for other in level.kinds if other != kind]
    kinds = [kind] * number + rng.choices(others, k=rng.randint(0, min(2, level.most - number)))
    rng.shuffle(kinds)
    scene = place(rng, level, kinds)
    return None if scene is None else (kind, number, scene)


def ask_count(rng: random.Random, level: Level) -> Asked | None:
    if (counted := count_scene(rng, level)) is None:
        return None
    kind, number, scene = counted
    options = number_options(rng, number, 3)
    return Asked(f"How many {kind}s are visible in the scene?", options, str(number), (scene,))


def ask_closer(rng: random.Random, level: Level) -> Asked | None:
    if (scene := place(rng, level, any_kinds(rng, level, 2))) is None:
        return None
    a, b = rng.sample(scene, 2)
    if (near := closer((a, a.distance), (b, b.distance))) is None:
        return None
    question = f"Which object is closer to the camera taking this photo, the {a.solid.name} or the {b.solid.name}?"
    return Asked(question, (a.solid.name, b.solid.name), near.solid.name, (scene,))


def ask_where(rng: random.Random, level: Level) -> Asked | None:
    if (scene := place(rng, level, any_kinds(rng, level, 2))) is None:
        return None
    a, b = rng.sample(scene, 2)
    dx, dz = a.solid.x - b.solid.x, a.solid.z - b.solid.z
    if abs(dx) > DOMINANCE * abs(dz):
        if (left := is_left(level, a, b)) is None:
            return None
        answer = "left" if left else "right"
    elif abs(dz) > DOMINANCE * abs(dx) and closer((a, a.distance), (b, b.distance)) is not None:
        answer = "in front" if dz < 0 else "behind"
    else:
        return None
    question = f"Considering the relative positions, where is the {a.solid.name} with respect to the {b.solid.name}?"
    return Asked(question, ("left", "right", "in front", "behind"), answer, (scene,))


def ask_left(rng: random.Random, level: Level) -> Asked | None:
    if (scene := place(rng, level, any_kinds(rng, level, 2))) is None:
        return None
    a, b = rng.sample(scene, 2)
    if (left := is_left(level, a, b)) is None:
        return None
    question = f"Is the {a.solid.name} to the left of the {b.solid.name}?"
    return Asked(question, ("yes", "no"), "yes" if left else "no", (scene,))


def side_of(facing: str, dz: float) -> str:
    """On which hand of someone facing left or right in the image is a thing that is `dz` farther away?

    Seen from above, with z up the page, the left hand of someone who faces left (-x) points down the page.
    """
    return "left" if (dz < 0) == (facing == "left") else "right"


def ask_perspective(rng: random.Random, level: Level) -> Asked | None:
    if (scene := place(rng, level, any_kinds(rng, level, 1))) is None:
        return None
    target = rng.choice(scene)
    z = rng.uniform(*level.depth)
    x = rng.uniform(-0.4, 0.4) * level.width / level.focal * z
    dx, dz = target.solid.x - x, target.solid.z - z
    mark = mark_box(level, x, z)
    if abs(dz) < 2 * target.solid.radius or abs(dx) > DOMINANCE * abs(dz) or not in_frame(level, mark):
        return None
    if any(overlap(mark, seen.box) for seen in scene):
        return None
    facing = rng.choice(["left", "right"])
    question = (
        f"For someone at the 'X' marked point in the image and facing 90 degrees to the {facing}, "
        f"will the {target.solid.name} be to their left or right?"
    )
    return Asked(question, ("left", "right"), side_of(facing, dz), (scene,), mark=(x, z))


def ask_rotation(rng: random.Random, level: Level) -> Asked | None:
    """Two images: before and after the camera turned about its vertical axis by 10 to 25 degrees."""
    if (scene := place(rng, level, any_kinds(rng, level, 2))) is None:
        return None
    to_right = rng.random() < 0.5
    angle = math.radians(rng.uniform(10, 25)) * (1 if to_right else -1)
    after = [see(level, turned(seen.solid, angle)) for seen in scene]
    if not is_clear(level, after):
        return None
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


QUESTIONS: dict[str, Callable[[random.Random, Level], Asked | None]] = {
    "count": ask_count,
    "closer": ask_closer,
    "where": ask_where,
    "left": ask_left,
    "perspective": ask_perspective,
    "rotation": ask_rotation,
}
STATIC = tuple(name for name in QUESTIONS if name != "rotation")


# --- CV-Bench's questions ---------------------------------------------------------------------------


def shuffled(rng: random.Random, options: Sequence[str]) -> tuple[str, ...]:
    return tuple(rng.sample(list(options), len(options)))


def ask_cv_count(rng: random.Random, level: Level) -> Asked | None:
    if (counted := count_scene(rng, level)) is None:
        return None
    kind, number, scene = counted
    options = shuffled(rng, number_options(rng, number, 4))
    return Asked(f"How many {kind}s are in the image?", options, str(number), (scene,), targets=(kind,))


def ask_cv_relation(rng: random.Random, level: Level) -> Asked | None:
    """Left or right, above or below: of the two objects' boxes in the image, as the benchmark means it."""
    if (scene := place(rng, level, any_kinds(rng, level, 2))) is None:
        return None
    a, b = rng.sample(scene, 2)
    axis = rng.randrange(2)
    gap = max(a.box[axis], b.box[axis]) - min(a.box[axis + 2], b.box[axis + 2])
    offset = a.centre[axis] - b.centre[axis]
    if gap < 0 or abs(offset) < SIDE_MARGIN * (level.width, level.height)[axis]:
        return None
    names = (("left", "right"), ("above", "below"))[axis]
    first, second = (
        f"the {seen.solid.name} (annotated by the {colour} box)" for seen, colour in ((a, "red"), (b, "blue"))
    )
    question = (
        f"Considering the relative positions of {first} and {second} in the image provided, "
        f"where is {first} located with respect to {second}?"
    )
    boxes = (("red", a), ("blue", b))
    return Asked(
        question,
        shuffled(rng, names),
        names[offset > 0],
        (scene,),
        boxes=boxes,
        targets=(a.solid.name, b.solid.name),
    )


def ask_cv_depth(rng: random.Random, level: Level) -> Asked | None:
    if (scene := place(rng, level, any_kinds(rng, level, 2))) is None:
        return None
    a, b = rng.sample(scene, 2)
    if (near := closer((a, a.distance), (b, b.distance))) is None:
        return None
    names = (a.solid.name, b.solid.name)
    question = (
        f"Which object is closer to the camera taking this photo, the {names[0]} (highlighted by a red box) "
        f"or the {names[1]} (highlighted by a blue box)?"
    )
    boxes = (("red", a), ("blue", b))
    return Asked(question, shuffled(rng, names), near.solid.name, (scene,), boxes=boxes, targets=names)


def ask_cv_distance(rng: random.Random, level: Level) -> Asked | None:
    if (scene := place(rng, level, any_kinds(rng, level, 3))) is None:
        return None
    anchor, a, b = rng.sample(scene, 3)
    near = closer((a, floor_distance(anchor, a)), (b, floor_distance(anchor, b)))
    if near is None:
        return None
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


CV_QUESTIONS = {
    "Count": ask_cv_count,
    "Relation": ask_cv_relation,
    "Depth": ask_cv_depth,
    "Distance": ask_cv_distance,
}


def ask(question: Callable[[random.Random, Level], Asked | None], rng: random.Random, level: Level) -> Asked:
    """Draw scenes until the question has one clear answer."""
    for _ in range(TRIES):
        if (asked := question(rng, level)) is not None:
            return asked
    raise RuntimeError(f"{question.__name__}: no clear scene in {TRIES} tries at level {level.name}")


# --- rendering --------------------------------------------------------------------------------------


def render(level: Level, scene: Sequence[Seen]) -> Image.Image:
    """The picture of a scene, without marks and boxes."""
    draw = draw_flat if level.name == "easy" else ray_cast
    return draw(level, scene)


def draw_flat(level: Level, scene: Sequence[Seen]) -> Image.Image:
    """Flat figures of one colour, the farthest first."""
    image = Image.fromarray(background(level))
    draw = ImageDraw.Draw(image)
    for seen in sorted(scene, key=lambda seen: -seen.distance):
        left, top, right, bottom = seen.box
        colour = COLOURS[seen.solid.colour]
        if seen.solid.kind == "circle":
            draw.ellipse(seen.box, fill=colour)
        elif seen.solid.kind == "square":
            draw.rectangle(seen.box, fill=colour)
        else:
            draw.polygon([(left, bottom), ((left + right) / 2, top), (right, bottom)], fill=colour)
    return image


def ray_cast(level: Level, scene: Sequence[Seen]) -> Image.Image:
    """Shaded solids: each ray shows the nearest surface that it meets, so occlusion is exact."""
    picture = background(level).copy()
    nearest = np.full(picture.shape[:2], np.inf, np.float32)
    for seen in scene:
        left, top, right, bottom = seen.box
        window = slice(max(0, int(top) - 1), int(bottom) + 2), slice(max(0, int(left) - 1), int(right) + 2)
        distance, normal = SURFACES[seen.solid.kind](level, seen.solid, rays(level)[window])
        front = distance < nearest[window]
        nearest[window][front] = distance[front]
        shade = 0.4 + 0.6 * np.clip(normal[front] @ LIGHT, 0, 1)  # (pixels,)
        picture[window][front] = shade[:, None] * np.array(COLOURS[seen.solid.colour], np.float32)
    return Image.fromarray(picture)


@lru_cache(maxsize=len(LEVELS))
def rays(level: Level) -> np.ndarray:
    """Unit direction of every pixel's ray in world coordinates, (height, width, 3)."""
    u = (np.arange(level.width) + 0.5 - level.width / 2) / level.focal
    v = (np.arange(level.height) + 0.5 - level.height / 2) / level.focal
    right, down = np.meshgrid(u, v)
    sin, cos = math.sin(level.pitch), math.cos(level.pitch)
    direction = np.stack([right, -down * cos - sin, cos - down * sin], -1)
    return (direction / np.linalg.norm(direction, axis=-1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=len(LEVELS))
def background(level: Level) -> np.ndarray:
    """Sky over floor, (height, width, 3) bytes; the full level's has the grain of a photograph."""
    picture = np.empty((level.height, level.width, 3), np.float32)
    picture[: level.horizon], picture[level.horizon :] = SKY, FLOOR
    if level.name == "full":
        picture += np.random.default_rng(0).normal(0, 5, (level.height, level.width, 1))
    return picture.clip(0, 255).astype(np.uint8)


# Each meets the rays (h, w, 3) with one solid: distance along the ray (h, w), inf where it passes by, and the
# surface's unit normal there (h, w, 3).


def meet_sphere(level: Level, solid: Solid, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    offset = np.array([-solid.x, level.elevation - solid.radius, -solid.z], np.float32)  # centre -> camera
    along = rays @ offset
    root = along**2 - (offset @ offset - solid.radius**2)
    distance = np.where(root > 0, -along - np.sqrt(np.maximum(root, 0)), np.inf)
    return distance, (offset + finite(distance)[..., None] * rays) / solid.radius


def meet_cube(level: Level, solid: Solid, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    sin, cos = math.sin(solid.yaw), math.cos(solid.yaw)
    axes = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)  # rows: the cube's own axes
    offset = axes @ np.array([-solid.x, level.elevation - solid.radius, -solid.z], np.float32)
    local = rays @ axes.T
    local = np.where(np.abs(local) < 1e-9, np.float32(1e-9), local)
    enter = (-np.sign(local) * solid.radius - offset) / local  # (h, w, 3): into each pair of planes
    leave = (np.sign(local) * solid.radius - offset) / local
    distance = enter.max(-1)
    face = np.eye(3, dtype=np.float32)[enter.argmax(-1)] * -np.sign(local)
    return np.where(distance < leave.min(-1), distance, np.inf), face @ axes


def meet_cylinder(level: Level, solid: Solid, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its side and its top; the camera is above the top, so the bottom is never seen."""
    height = 2 * solid.radius
    dx, dy, dz = np.moveaxis(rays, -1, 0)
    flat = np.maximum(dx**2 + dz**2, 1e-12)
    along = -(dx * solid.x + dz * solid.z) / flat
    root = along**2 - (solid.x**2 + solid.z**2 - solid.radius**2) / flat
    side = np.where(root > 0, -along - np.sqrt(np.maximum(root, 0)), np.inf)
    y = level.elevation + finite(side) * dy
    side = np.where((y >= 0) & (y <= height), side, np.inf)
    with np.errstate(divide="ignore"):
        top = np.where(dy < 0, (height - level.elevation) / dy, np.inf)
    reach = np.hypot(finite(top) * dx - solid.x, finite(top) * dz - solid.z)
    top = np.where(reach <= solid.radius, top, np.inf)
    outward = np.stack([finite(side) * dx - solid.x, np.zeros_like(dx), finite(side) * dz - solid.z], -1)
    up = np.array([0, 1, 0], np.float32)
    return np.minimum(side, top), np.where((top < side)[..., None], up, outward / np.float32(solid.radius))


def finite(distance: np.ndarray) -> np.ndarray:
    """Zero where a ray passes by, so that arithmetic on it stays quiet."""
    return np.where(np.isfinite(distance), distance, 0).astype(np.float32)


SURFACES = {"sphere": meet_sphere, "cube": meet_cube, "cylinder": meet_cylinder}


def mark_box(level: Level, x: float, z: float) -> Box:
    """Where the X at (x, z) on the floor is in the image."""
    u, v, _ = level.project(x, 0, z)
    half = level.width / 28
    return u - half, v - half, u + half, v + half


def paint(level: Level, asked: Asked, scene: Sequence[Seen]) -> Image.Image:
    """One image of a question, with its mark and its boxes."""
    image = render(level, scene)
    draw = ImageDraw.Draw(image)
    width = max(2, level.width // 200)
    if asked.mark is not None:
        left, top, right, bottom = mark_box(level, *asked.mark)
        draw.line((left, top, right, bottom), fill=INK, width=width)
        draw.line((left, bottom, right, top), fill=INK, width=width)
    for colour, seen in asked.boxes:
        left, top, right, bottom = seen.box
        around = (left - width - 1, top - width - 1, right + width + 1, bottom + width + 1)
        draw.rectangle(around, outline=BOX_COLOURS[colour], width=width)
    return image


def picture(level: Level, asked: Asked, scene: Sequence[Seen]) -> bytes:
    """`paint`'s image, encoded."""
    buffer = io.BytesIO()
    paint(level, asked, scene).save(buffer, level.format, **dict(level.save_options))
    return buffer.getvalue()


# --- rows -------------------------------------------------------------------------------------------

SAT_SCHEMA = pa.schema(
    [
        ("image_bytes", pa.list_(pa.binary())),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("question_type", pa.string()),
        ("correct_answer", pa.string()),
    ]
)
CVBENCH_SCHEMA = pa.schema(
    [
        ("idx", pa.int64()),
        ("type", pa.string()),
        ("task", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("question", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("answer", pa.string()),
        ("prompt", pa.string()),
        ("filename", pa.string()),
        ("source", pa.string()),
        ("source_dataset", pa.string()),
        ("source_filename", pa.string()),
        ("target_class", pa.string()),
        ("target_size", pa.list_(pa.int64())),
        ("bbox", pa.list_(pa.list_(pa.float64()))),
    ]
)


def row_rng(seed: int, row: int) -> random.Random:
    return random.Random(f"{seed}:{row}")


def sat_row(row: int, seed: int, level: Level, questions: Sequence[str] = STATIC) -> dict[str, Any]:
    """Row `row` in SAT's schema; the kinds of question take turns."""
    asked = ask(QUESTIONS[questions[row % len(questions)]], row_rng(seed, row), level)
    return {
        "image_bytes": [picture(level, asked, scene) for scene in asked.scenes],
        "question": asked.question,
        "answers": list(asked.options),
        "question_type": asked.question_type,
        "correct_answer": asked.answer,
    }


def cvbench_row(row: int, seed: int, level: Level, kind: str) -> dict[str, Any]:
    """Row `row` in CV-Bench's schema, of type `kind` (2D or 3D); tasks and sources take turns.

    A source is only a label here, which the benchmark's own score averages over.
    """
    tasks, sources = cvbench.TASKS[kind], cvbench.SOURCES[kind]
    task, source = tasks[row % len(tasks)], sources[row // len(tasks) % len(sources)]
    asked = ask(CV_QUESTIONS[task], row_rng(seed, row), level)
    [scene] = asked.scenes
    filename = f"img/{kind}/{task.lower()}/{source.lower()}_{row}.{level.format.lower()}"
    return {
        "idx": row,
        "type": kind,
        "task": task,
        "image": {"bytes": picture(level, asked, scene), "path": Path(filename).name},
        "question": asked.question,
        "choices": list(asked.options),
        "answer": f"({cvbench.LETTERS[asked.options.index(asked.answer)]})",
        "prompt": cvbench.render_prompt(asked.question, asked.options),
        "filename": filename,
        "source": source,
        "source_dataset": "open_r1.world",
        "source_filename": Path(filename).name,
        "target_class": ", ".join(asked.targets),
        "target_size": [level.width, level.height],
        "bbox": [[float(side) for side in seen.box] for _, seen in asked.boxes],
    }


def write_rows(path: Path, schema: pa.Schema, rows: Iterator[dict[str, Any]], total: int) -> None:
    """Write a parquet file as its rows come, under a temporary name until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema) as writer,
        tqdm(total=total, unit=" rows", desc=path.name) as bar,
    ):
        while batch := list(islice(rows, BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema))
            bar.update(len(batch))


def write_sat(path: Path, rows: int, seed: int, level: Level, questions: Sequence[str] = STATIC) -> None:
    """Write `rows` rows in SAT's schema."""
    write_rows(path, SAT_SCHEMA, (sat_row(i, seed, level, questions) for i in range(rows)), rows)


def write_cvbench(folder: Path, rows: int, seed: int, level: Level) -> None:
    """Write the benchmark's two files, with `rows` rows together; `idx` runs through both."""
    half = (rows + 1) // 2
    for kind, span in (("2D", range(half)), ("3D", range(half, rows))):
        made = (cvbench_row(i, seed, level, kind) for i in span)
        write_rows(folder / cvbench.FILES[kind], CVBENCH_SCHEMA, made, len(span))


# --- the command ------------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return int(text)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m open_r1.world",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, help="sat: the file; cvbench: the folder of its two files")
    add("--rows", type=positive, default=1000, help="questions, of both files together (default: %(default)s)")
    add("--level", choices=LEVELS, default="full", help="easy: 112x112, flat; full: 640x480 (default: full)")
    add("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")
    add("--schema", choices=("sat", "cvbench"), default="sat", help="(default: sat)")
    add(
        "--questions",
        nargs="+",
        choices=QUESTIONS,
        default=STATIC,
        help="sat: the kinds that take turns; rotation has two images (default: all but rotation)",
    )
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    level = LEVELS[args.level]
    try:
        if args.schema == "sat":
            write_sat(args.output, args.rows, args.seed, level, args.questions)
        else:
            write_cvbench(args.output, args.rows, args.seed, level)
    except OSError as error:
        print(f"world: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nworld: interrupted; the unfinished file is gone", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
