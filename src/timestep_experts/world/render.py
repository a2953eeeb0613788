"""Pixels of the embedded world: scenes become pictures in one of two visual domains.

Shapes are signed distance functions, so edges are anti-aliased at any resolution. All lengths are in units of the
picture's side, y points down.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from timestep_experts.errors import UserError
from timestep_experts.world.scenes import Scene, SceneObject

Array = NDArray[np.floating]

DOMAINS = ("flat", "neon")
_OFFSET = 0.242  # of an object's centre from the middle of the picture
_RGB = {
    "red": (0.86, 0.16, 0.16),
    "orange": (0.97, 0.55, 0.10),
    "yellow": (0.98, 0.86, 0.16),
    "green": (0.18, 0.65, 0.28),
    "blue": (0.16, 0.40, 0.88),
    "purple": (0.56, 0.24, 0.72),
}
_FLAT_BACKGROUND = np.array([0.96, 0.96, 0.94], np.float32)
_NEON_BACKGROUND = np.array([0.05, 0.06, 0.13], np.float32)


def render(scenes: Sequence[Scene], domain: str, *, seed: int, resolution: int = 64) -> NDArray[np.uint8]:
    """Draw pictures of scenes.

    Args:
        scenes: what to draw, N of them.
        domain: ``flat`` (filled shapes on paper) or ``neon`` (glowing, slightly turned outlines on a dark ground).
        seed: places, sizes and turns are drawn from it; picture i depends on the seed and i alone.
        resolution: side in pixels.

    Returns:
        ``(N, resolution, resolution, 3)`` uint8, RGB.

    Raises:
        UserError: an unknown domain.
    """
    if domain not in DOMAINS:
        raise UserError(f"unknown domain {domain!r}: allowed are {', '.join(DOMAINS)}")
    pictures = [
        _render_one(scene, domain, np.random.default_rng((seed, index)), resolution)
        for index, scene in enumerate(scenes)
    ]
    return np.stack(pictures) if pictures else np.zeros((0, resolution, resolution, 3), np.uint8)


def _render_one(scene: Scene, domain: str, rng: np.random.Generator, resolution: int) -> NDArray[np.uint8]:
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    grid_x, grid_y = np.meshgrid(axis, axis)
    picture = np.empty((resolution, resolution, 3), np.float32)
    picture[:] = _FLAT_BACKGROUND if domain == "flat" else _NEON_BACKGROUND
    paint = _paint_flat if domain == "flat" else _paint_neon
    for side, item in zip((-1, 1), scene.in_reading_order(), strict=True):
        along, across = 0.5 + side * _OFFSET + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.08, 0.08)
        centre_x, centre_y = (along, across) if scene.is_horizontal else (across, along)
        radius = rng.uniform(0.195, 0.220)
        angle = 0.0 if domain == "flat" else rng.uniform(-0.2, 0.2)
        turn_x, turn_y = np.cos(angle), np.sin(angle)
        x = ((grid_x - centre_x) * turn_x + (grid_y - centre_y) * turn_y) / radius
        y = ((grid_y - centre_y) * turn_x - (grid_x - centre_x) * turn_y) / radius
        pixel = 1 / (radius * resolution)
        picture = paint(picture, item, x.astype(np.float32), y.astype(np.float32), pixel)
    pixels: NDArray[np.uint8] = (picture.clip(0, 1) * 255).round().astype(np.uint8)
    return pixels


def _paint_flat(picture: Array, item: SceneObject, x: Array, y: Array, pixel: float) -> Array:
    colour = np.array(_RGB[item.colour], np.float32)
    marks = texture_coverage(item.texture, x, y, pixel)[..., None]
    fill = colour * (1 - marks) + (0.25 * colour + 0.75) * marks
    inside = _coverage(shape_distance(item.shape, x, y), pixel)[..., None]
    return picture * (1 - inside) + fill * inside


def _paint_neon(picture: Array, item: SceneObject, x: Array, y: Array, pixel: float) -> Array:
    colour = np.array(_RGB[item.colour], np.float32) * 0.8 + 0.2
    distance = shape_distance(item.shape, x, y)
    marks = texture_coverage(item.texture, x, y, pixel)[..., None]
    inside = _coverage(distance, pixel)[..., None]
    outline = _coverage(np.abs(distance) - 0.07, pixel)[..., None]
    glow = (0.35 * np.exp(-np.maximum(distance, 0) / 0.22))[..., None] * (1 - inside)
    fill = colour * (0.28 + 0.62 * marks)
    lit = picture * (1 - inside) + fill * inside + colour * glow
    return lit * (1 - outline) + colour * outline


def _coverage(distance: Array, pixel: float) -> Array:
    """How much of a pixel lies inside, from the signed distance of its centre (one-pixel ramp)."""
    covered: Array = np.clip(0.5 - distance / pixel, 0, 1)
    return covered


def texture_coverage(texture: str, x: Array, y: Array, pixel: float) -> Array:
    """How much of each point is covered by the texture's marks, in [0, 1]; ``plain`` has none.

    Args:
        texture: ``plain``, ``striped``, ``dotted`` or ``checkered``.
        x: horizontal object coordinates, in units of the object's radius.
        y: vertical ones.
        pixel: one pixel in the same units.
    """
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "striped":
        return _coverage(np.abs((y / 0.70 + 0.5) % 1 - 0.5) * 0.70 - 0.175, pixel)
    if texture == "dotted":
        cell_x, cell_y = ((v / 0.66 + 0.5) % 1 - 0.5 for v in (x, y))
        return _coverage(np.hypot(cell_x, cell_y) * 0.66 - 0.18, pixel)
    wave_x, wave_y = (np.abs((v / 0.90) % 1 - 0.5) * 0.90 - 0.225 for v in (x, y))
    one, other = _coverage(wave_x, pixel), _coverage(wave_y, pixel)
    return one * (1 - other) + other * (1 - one)


def shape_distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to the outline of a shape of about unit radius, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 0.92
    if shape == "square":
        return _box_distance(x, y, 0.82, 0.82)
    if shape == "diamond":
        distance: Array = (np.abs(x) + np.abs(y) - 1.12) / np.float32(np.sqrt(2))
        return distance
    if shape == "cross":
        return np.minimum(_box_distance(x, y, 0.98, 0.34), _box_distance(x, y, 0.34, 0.98))
    points = {"triangle": 3, "star": 5}[shape]
    return _polygon_distance(x, y, _radial_polygon(points, star=shape == "star"))


def _box_distance(x: Array, y: Array, half_width: float, half_height: float) -> Array:
    dx, dy = np.abs(x) - half_width, np.abs(y) - half_height
    return np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)


def _radial_polygon(points: int, *, star: bool) -> Array:
    count = 2 * points if star else points
    angle = np.arange(count) * 2 * np.pi / count - np.pi / 2
    radius = np.where(np.arange(count) % 2 == 0, 1.12, 0.46) if star else np.full(count, 1.16)
    drop = 0.0 if star else 0.22  # a triangle's centroid stands low; its box should be centred
    return np.stack([radius * np.cos(angle), radius * np.sin(angle) + drop], -1).astype(np.float32)


def _polygon_distance(x: Array, y: Array, vertices: Array) -> Array:
    point = np.stack([x, y], -1)
    nearest = np.full(x.shape, np.inf, np.float32)
    crossings = np.zeros(x.shape, np.int32)
    for start, end in zip(vertices, np.roll(vertices, -1, 0), strict=True):
        edge, offset = end - start, point - start
        share = np.clip(offset @ edge / (edge @ edge), 0, 1)
        nearest = np.minimum(nearest, np.hypot(*np.moveaxis(offset - share[..., None] * edge, -1, 0)))
        straddles = (start[1] <= y) != (end[1] <= y)
        if edge[1] != 0:
            crossings += straddles & (x < start[0] + (y - start[1]) * edge[0] / edge[1])
    return np.where(crossings % 2 == 1, -nearest, nearest).astype(np.float32)
