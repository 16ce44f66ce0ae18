"""Places coloured solids on a floor from a seed, and says where a pinhole camera sees them.

World coordinates, in metres: x to the right, y up, z ahead; the camera is at (0, elevation, 0) and looks down
by its pitch. Image coordinates, in pixels: u to the right, v down.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


class Unclear(Exception):
    """A scene in which a question has no answer beyond doubt, or that has no room for its objects."""


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
    hidden: float  # share of an object's box that nearer ones may cover
    format: str

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


def in_frame(level: Level, box: Box) -> bool:
    return box[0] >= 2 and box[1] >= 2 and box[2] <= level.width - 2 and box[3] <= level.height - 2


def is_clear(level: Level, scene: Sequence[Seen]) -> bool:
    """Whether every object is inside the image and hidden by nearer ones by no more than the level allows."""
    for seen in scene:
        left, top, right, bottom = seen.box
        hidden = sum(overlap(seen.box, other.box) for other in scene if other.distance < seen.distance)
        if not in_frame(level, seen.box) or hidden > level.hidden * (right - left) * (bottom - top):
            return False
    return True


def mark_box(level: Level, x: float, z: float) -> Box:
    """Where the X at (x, z) on the floor is in the image."""
    u, v, _ = level.project(x, 0, z)
    half = level.width / 28
    return u - half, v - half, u + half, v + half


def place(rng: random.Random, level: Level, kinds: Sequence[str]) -> list[Seen]:
    """Objects of these kinds, each of another colour, standing apart and in clear view; unclear if there is no room."""
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
            raise Unclear
    return scene
