"""Rooms: where the dancers dance. A wall, a floor, and things along the wall, all from a seed.

    picture = room(seed=7, size=64)                # uint8 (64, 64, 3)
"""
from functools import lru_cache

import numpy as np

from nanodisco.shapes import Canvas, Shape, box, capsule, ellipse, polygon


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """-> RGB (3,) float32 in [0, 1]"""
    ramp = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation * (1 - ramp))).astype(np.float32)


@lru_cache(maxsize=8)                 # the frames of a clip are drawn one after the other
def room(seed: int, size: int) -> np.ndarray:
    """uint8 (size, size, 3); read-only"""
    rng = np.random.default_rng([seed, 1])
    canvas = Canvas(np.zeros((size, size, 3), np.float32))
    wall = hsv(rng.random(), rng.uniform(0.08, 0.4), rng.uniform(0.6, 0.95))
    floor_line = rng.uniform(0.70, 0.80)
    _wall(canvas, rng, wall, floor_line)
    _floor(canvas, rng, floor_line)
    for place in rng.permutation([0.16, 0.5, 0.84])[:rng.integers(1, 4)]:
        THINGS[rng.integers(len(THINGS))](canvas, rng, place + rng.uniform(-0.04, 0.04), floor_line)
    picture = np.rint(canvas.pixels * 255).astype(np.uint8)
    picture.flags.writeable = False                                      # it is shared by all frames in this room
    return picture


def _wall(canvas: Canvas, rng, wall: np.ndarray, floor_line: float) -> None:
    kind, count = rng.integers(5), int(rng.integers(5, 9))
    other = np.clip(wall * rng.uniform(0.82, 0.92), 0, 1)

    def paper(x, y):
        if kind == 0:                                                    # plain, lighter towards the floor
            amount = y / floor_line + 0 * x
        elif kind == 1:                                                  # stripes
            amount = _soft(np.sin(2 * np.pi * count * x) + 0 * y)
        elif kind == 2:                                                  # diamonds
            amount = _soft(np.cos(np.pi * count * (x + y)) * np.cos(np.pi * count * (x - y)))
        elif kind == 3:                                                  # bricks
            row = np.floor(y * count * 2)
            amount = _soft(np.maximum(np.cos(2 * np.pi * count * 2 * y),
                                      np.cos(2 * np.pi * (count * x + row % 2 / 2))) - 0.85)
        else:                                                            # panelling below, plain above
            amount = _soft(20 * (y - 0.55 * floor_line - 0.12)) * (0.6 + 0.4 * _soft(np.sin(4 * np.pi * count * x)))
        return wall + (other - wall) * amount[..., None]
    canvas.paint(box(0, 0, 1, floor_line + 0.02), paper)


def _floor(canvas: Canvas, rng, floor_line: float) -> None:
    colour = hsv(rng.uniform(0.05, 0.12) if rng.random() < 0.6 else rng.random(), rng.uniform(0.15, 0.5),
                 rng.uniform(0.4, 0.75))
    other, tiles, count = colour * 0.86, rng.random() < 0.4, int(rng.integers(5, 9))

    def boards(x, y):
        depth = 1 / np.maximum(y - floor_line + 0.25, 0.05)              # boards run towards a point far away
        across = np.sin(2 * np.pi * count * (x - 0.5) * depth * 0.4)
        along = np.sin(2 * np.pi * depth * 2)
        return colour + (other - colour) * _soft(across * along if tiles else across + 0 * y)[..., None]
    canvas.paint(box(0, floor_line, 1, 1), boards)
    skirting = hsv(0.1, rng.uniform(0.0, 0.2), rng.uniform(0.75, 1.0))
    canvas.paint(box(0, floor_line - 0.015, 1, floor_line + 0.01), skirting)


def _soft(wave: np.ndarray) -> np.ndarray:
    """A wave around 0 -> 0 or 1, with soft edges."""
    return np.clip(0.5 + 2 * wave, 0, 1)


# ---- Things along the wall: each at a place x, standing or hanging ------------------------------------------------

def _window(canvas: Canvas, rng, x: float, floor_line: float) -> None:
    width, top, bottom = rng.uniform(0.1, 0.15), rng.uniform(0.1, 0.16), rng.uniform(0.42, 0.52)
    sky = hsv(rng.uniform(0.5, 0.62), rng.uniform(0.2, 0.55), rng.uniform(0.8, 1.0))
    pane = box(x - width, top, x + width, bottom)
    canvas.paint(pane, lambda x, y: sky + (1 - sky) * ((y - top) / 0.6 + 0 * x)[..., None])
    frame = hsv(0.1, 0.1, rng.uniform(0.8, 1.0))
    canvas.paint(_rim(pane, 0.02), frame)
    canvas.paint(box(x - 0.008, top, x + 0.008, bottom), frame)
    canvas.paint(box(x - width, (top + bottom) / 2 - 0.008, x + width, (top + bottom) / 2 + 0.008), frame)


def _picture(canvas: Canvas, rng, x: float, floor_line: float) -> None:
    y, half = rng.uniform(0.2, 0.34), rng.uniform(0.06, 0.11)
    shape = box(x - half, y - half * 0.8, x + half, y + half * 0.8)
    canvas.paint(shape, hsv(rng.random(), 0.5, 0.9))
    canvas.paint(ellipse((x + rng.uniform(-0.3, 0.3) * half, y), half * 0.5, half * 0.4), hsv(rng.random(), 0.7, 0.8))
    canvas.paint(_rim(shape.grown(0.012), 0.018), hsv(0.1, 0.6, rng.uniform(0.25, 0.6)))


def _plant(canvas: Canvas, rng, x: float, floor_line: float) -> None:
    ground, height = floor_line + 0.03, rng.uniform(0.2, 0.32)
    leaf = hsv(rng.uniform(0.25, 0.4), rng.uniform(0.5, 0.8), rng.uniform(0.35, 0.65))
    for turn in np.linspace(-1.0, 1.0, int(rng.integers(5, 8))):
        tip = (x + 0.13 * turn, ground - 0.1 - height * (1 - 0.45 * turn * turn))
        canvas.paint(capsule((x, ground - 0.1), tip, 0.008, 0.03), leaf * (1 - 0.15 * abs(turn)), line=0.006)
    pot = hsv(rng.random(), 0.55, 0.75)
    canvas.paint(polygon((x - 0.055, ground - 0.11), (x + 0.055, ground - 0.11), (x + 0.04, ground),
                         (x - 0.04, ground)), pot, line=0.006)


def _lamp(canvas: Canvas, rng, x: float, floor_line: float) -> None:
    ground, top = floor_line + 0.02, rng.uniform(0.3, 0.4)
    light = np.array([1.0, 0.95, 0.75], np.float32)
    canvas.paint(ellipse((x, top + 0.03), 0.16, 0.16), light, opacity=0.3)
    canvas.paint(capsule((x, top), (x, ground), 0.008, 0.008), np.full(3, 0.25, np.float32))
    canvas.paint(ellipse((x, ground), 0.05, 0.012), np.full(3, 0.25, np.float32))
    shade = polygon((x - 0.035, top - 0.04), (x + 0.035, top - 0.04), (x + 0.07, top + 0.05), (x - 0.07, top + 0.05))
    canvas.paint(shade, light * hsv(rng.random(), 0.25, 1.0), line=0.006)


def _shelf(canvas: Canvas, rng, x: float, floor_line: float) -> None:
    wood, width, top = hsv(0.08, rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.7)), 0.12, rng.uniform(0.3, 0.42)
    canvas.paint(box(x - width, top, x + width, floor_line + 0.02), wood, line=0.012)
    for low in np.arange(top + 0.13, floor_line + 0.01, 0.13):
        canvas.paint(box(x - width + 0.015, low, x + width - 0.015, low + 0.01), wood * 0.55)
        left = x - width + 0.02
        while left < x + width - 0.045:
            wide, high = rng.uniform(0.02, 0.035), rng.uniform(0.06, 0.105)
            canvas.paint(box(left, low - high, left + wide, low), hsv(rng.random(), rng.uniform(0.3, 0.8), 0.75))
            left += wide + 0.003


def _sofa(canvas: Canvas, rng, x: float, floor_line: float) -> None:
    cloth, ground = hsv(rng.random(), rng.uniform(0.3, 0.7), rng.uniform(0.4, 0.8)), floor_line + 0.05
    canvas.paint(box(x - 0.19, ground - 0.2, x + 0.19, ground - 0.02).grown(0.02), cloth * 0.9, line=0.008)
    canvas.paint(box(x - 0.15, ground - 0.09, x + 0.15, ground - 0.02).grown(0.015), cloth, line=0.008)
    for side in (-0.19, 0.19):
        arm = box(x + side - 0.02, ground - 0.13, x + side + 0.02, ground - 0.01)
        canvas.paint(arm.grown(0.012), cloth, line=0.008)


def _rim(shape: Shape, width: float) -> Shape:
    """What is within `width` of the edge, inside."""
    return Shape(shape.box, lambda x, y: np.abs(shape.distance(x, y) + width / 2) - width / 2)


THINGS = (_window, _picture, _plant, _lamp, _shelf, _sofa, _window, _picture)
