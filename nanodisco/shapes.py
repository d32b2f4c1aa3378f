"""Shapes: filled outlines with smooth edges at any size, painted one over the other.

A shape is a box that it fits into and its signed distance (negative inside). A pixel is covered as far
as the edge has passed its middle, clip(1/2 - distance in pixels, 0, 1), which is the area of a straight
edge through it, nearly. Coordinates are shares of the picture, (0, 0) to (1, 1), y downwards.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

Point = tuple[float, float] | np.ndarray
Colour = np.ndarray | Callable[[np.ndarray, np.ndarray], np.ndarray]     # (3,) in [0, 1], or of places x, y (…, 3)


@dataclass(frozen=True)
class Shape:
    box: tuple[float, float, float, float]                               # left, top, right, bottom
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def grown(self, by: float) -> "Shape":
        left, top, right, bottom = self.box
        return Shape((left - by, top - by, right + by, bottom + by), lambda x, y: self.distance(x, y) - by)


def capsule(a: Point, b: Point, a_radius: float, b_radius: float) -> Shape:
    """A line with round ends, as thick at each as its radius."""
    ax, ay, dx, dy = float(a[0]), float(a[1]), float(b[0] - a[0]), float(b[1] - a[1])
    length = max(dx * dx + dy * dy, 1e-12)

    def distance(x, y):
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / length, 0, 1)
        return np.hypot(x - ax - along * dx, y - ay - along * dy) - (a_radius + along * (b_radius - a_radius))
    r = max(a_radius, b_radius)
    return Shape((min(ax, ax + dx) - r, min(ay, ay + dy) - r, max(ax, ax + dx) + r, max(ay, ay + dy) + r), distance)


def ellipse(centre: Point, rx: float, ry: float) -> Shape:
    cx, cy, small = float(centre[0]), float(centre[1]), min(rx, ry)
    return Shape((cx - rx, cy - ry, cx + rx, cy + ry),
                 lambda x, y: (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * small)


def box(left: float, top: float, right: float, bottom: float) -> Shape:
    return Shape((left, top, right, bottom),
                 lambda x, y: np.maximum(np.maximum(left - x, x - right), np.maximum(top - y, y - bottom)))


def polygon(*points: Point) -> Shape:
    corners = np.array(points, np.float32)

    def distance(x, y):
        nearest, inside = np.float32(np.inf), np.zeros(np.broadcast_shapes(x.shape, y.shape), bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
            dx, dy = bx - ax, by - ay
            along = np.clip(((x - ax) * dx + (y - ay) * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
            nearest = np.minimum(nearest, np.hypot(x - ax - along * dx, y - ay - along * dy))
            if dy:                                                       # does a line to the right cross this edge?
                inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / dy * dx)
        return np.where(inside, -nearest, nearest)
    return Shape((*corners.min(0), *corners.max(0)), distance)


@dataclass
class Canvas:
    """A picture that remembers where something was painted, and what."""
    pixels: np.ndarray                                                   # (S, S, 3) float32 in [0, 1]
    covered: np.ndarray = field(init=False)                              # (S, S) float32, by labelled shapes
    labels: np.ndarray = field(init=False)                               # (S, S) uint8, 0: none

    def __post_init__(self):
        self.pixels = self.pixels.copy()
        self.covered = np.zeros(self.pixels.shape[:2], np.float32)
        self.labels = np.zeros(self.pixels.shape[:2], np.uint8)

    def paint(self, shape: Shape, colour: Colour, label: int = 0, line: float = 0.0, opacity: float = 1.0) -> None:
        """line: width of an outline, inside of the shape, half as bright as the colour."""
        size = len(self.pixels)
        left, top, right, bottom = (int(np.floor(edge * size)) for edge in shape.box)
        rows, columns = slice(max(top - 1, 0), max(bottom + 2, 0)), slice(max(left - 1, 0), max(right + 2, 0))
        middles = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size
        x, y = middles[columns][None], middles[rows][:, None]
        if not x.size or not y.size:
            return
        distance = shape.distance(x, y)
        cover = np.clip(0.5 - distance * size, 0, 1).astype(np.float32) * opacity
        fill = colour(x, y) if callable(colour) else colour
        if line:
            inner = np.clip(0.5 - (distance + line) * size, 0, 1)[..., None]
            edge = fill * 0.45
            fill = edge + (fill - edge) * inner
        part = self.pixels[rows, columns]
        part += (fill - part) * cover[..., None]
        if label:
            self.labels[rows, columns][cover > 0.5] = label
            np.maximum(self.covered[rows, columns], cover, out=self.covered[rows, columns])
