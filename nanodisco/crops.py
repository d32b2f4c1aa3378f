"""Crops: the random part of a picture that one training step is shown, drawn as the official loaders draw it.

    box = training_box((604, 1080), generator, scale=(0.5, 1.0), slide=True)

A box is left, top, right, bottom in pixels; sizes are (width, height). Pictures of one size, cropped with
generators in the same state, get the same box: so a frame, its pose and its mask stay together.
"""
import math

import torch

from nanodisco.transforms import Size, centre

Box = tuple[int, int, int, int]
SQUARE = (1, 1)
TRIES = 10


def training_box(size: Size, generator: torch.Generator, scale: tuple[float, float], slide: bool = False,
                 wanted: Size = SQUARE) -> Box:
    """A box of a random share of the area, from `scale`, of the aspect of `wanted`; slide: in a random square."""
    left, top, right, bottom = sliding_square(size, generator) if slide else (0, 0, *size)
    inner = resized_crop((right - left, bottom - top), generator, scale, wanted)
    return left + inner[0], top + inner[1], left + inner[2], top + inner[3]


def sliding_square(size: Size, generator: torch.Generator) -> Box:
    """The largest square, anywhere along the longer side. official: its last place is never drawn."""
    short, rest = min(size), abs(size[0] - size[1])
    start = int(torch.randint(0, rest, (1,), generator=generator)) if rest else 0
    left, top = (start, 0) if size[0] > size[1] else (0, start)
    return left, top, left + short, top + short


def resized_crop(size: Size, generator: torch.Generator, scale: tuple[float, float], wanted: Size = SQUARE) -> Box:
    """torchvision's RandomResizedCrop for the one aspect of `wanted`.

    It draws an area until the box fits, ten times at most, then takes the largest box in the middle. A square of
    0.9 of a portrait frame's area never fits: so by default the official fine-tuning always sees the middle.
    """
    (width, height), log = size, math.log(wanted[0] / wanted[1])
    for _ in range(TRIES):
        area = width * height * float(torch.empty(1).uniform_(*scale, generator=generator))
        ratio = math.exp(float(torch.empty(1).uniform_(log, log, generator=generator)))       # drawn, though known
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
            left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
            return left, top, left + w, top + h
    return centre(size, wanted)
