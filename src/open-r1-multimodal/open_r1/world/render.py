"""Draws a scene: flat figures at the easy level, shaded solids at the full one."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from open_r1.world.questions import Asked
from open_r1.world.scene import COLOURS, LEVELS, Level, Seen, Solid, mark_box

BOX_COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}  # of CV-Bench's annotations
SKY, FLOOR, INK = (225, 232, 240), (178, 172, 165), (0, 0, 0)
LIGHT = np.array([-0.45, 0.8, -0.4], np.float32)  # towards the light; of about unit length


def render(level: Level, scene: Sequence[Seen]) -> Image.Image:
    """The picture of a scene, without marks and boxes."""
    return draw_flat(level, scene) if level.name == "easy" else ray_cast(level, scene)


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
