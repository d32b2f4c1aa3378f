"""A picture of what bench_kernels.py measured: how near each kernel is to what the machine can do.

    python tests/bench_kernels.py --json bench.json && python tests/roofline.py bench.json docs/roofline.png

A roofline (Williams and others, 2009): a kernel that does i operations a byte can do min(peak, i x bandwidth) a second,
whatever its author. Peak and bandwidth are those that the benchmark measured first. Exponentials are a roof of their
own, lower for attention of narrow heads, and not drawn; the benchmark's "limit" column counts them. Kernels that
only move bytes (GroupNorm) do no matrix operations and have no place here.
"""
import argparse
import json
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDE, HIGH, LEFT, BELOW, FINE = 960, 600, 80, 60, 3                      # pixels; drawn FINE times as large and reduced
COLOURS = ("#1f4e8c", "#b3541e", "#2e7d32", "#7b1fa2", "#00838f", "#ad1457")


def points(found: dict) -> list[tuple[str, str, float, float]]:
    """-> [(table, kernel, operations a byte, operations a second)]"""
    return [(title, row["name"], row["TFLOP/s"] * 1e3 / row["GB/s"], row["TFLOP/s"] * 1e12)
            for title, rows in found["tables"].items() for row in rows if row.get("TFLOP/s")]


def roof(intensity: float, ceilings: dict) -> float:
    """Operations a second that this machine can do at so many operations a byte."""
    return min(ceilings["flops"], intensity * ceilings["bytes"])


class Axes:
    """Two logarithmic axes that hold the points and the roof's edge."""

    def __init__(self, shown: list, ceilings: dict):
        edge = ceilings["flops"] / ceilings["bytes"]
        across, up = [edge, *(point[2] for point in shown)], [ceilings["flops"], *(point[3] for point in shown)]
        self.left, self.right = min(across) / 2, max(across) * 2
        self.bottom, self.top = min(up) / 2, max(up) * 1.5

    def at(self, intensity: float, rate: float) -> tuple[float, float]:
        """-> x, y in pixels of the large picture"""
        x = math.log(intensity / self.left) / math.log(self.right / self.left)
        y = math.log(self.top / rate) / math.log(self.top / self.bottom)
        return (LEFT + x * (WIDE - LEFT - 20)) * FINE, (20 + y * (HIGH - BELOW - 20)) * FINE


def powers(low: float, high: float) -> list[float]:
    return [10.0 ** n for n in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)]


def draw(found: dict) -> Image.Image:
    ceilings, shown = found["ceilings"], points(found)
    axes, paper = Axes(shown, ceilings), Image.new("RGB", (WIDE * FINE, HIGH * FINE), "white")
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(size=13 * FINE)
    for rate in powers(axes.bottom, axes.top):
        pen.line([axes.at(axes.left, rate), axes.at(axes.right, rate)], "#e4e4e4", FINE)
        x, y = axes.at(axes.left, rate)
        pen.text((x - 8 * FINE, y), f"{rate / 1e12:g}", "#444444", font, anchor="rm")
    for intensity in powers(axes.left, axes.right):
        pen.line([axes.at(intensity, axes.bottom), axes.at(intensity, axes.top)], "#e4e4e4", FINE)
        pen.text((axes.at(intensity, axes.bottom)[0], (HIGH - BELOW + 8) * FINE), f"{intensity:g}", "#444444", font,
                 anchor="mt")
    edge = ceilings["flops"] / ceilings["bytes"]
    pen.line([axes.at(i, roof(i, ceilings)) for i in (axes.left, edge, axes.right)], "black", 2 * FINE)
    titles = list(dict.fromkeys(point[0] for point in shown))
    for title, _, intensity, rate in shown:
        x, y = axes.at(intensity, rate)
        colour = COLOURS[titles.index(title) % len(COLOURS)]
        pen.ellipse((x - 5 * FINE, y - 5 * FINE, x + 5 * FINE, y + 5 * FINE), colour)
    for i, title in enumerate(titles):
        pen.text((WIDE * FINE - 30 * FINE, (HIGH - BELOW - 20 - 18 * i) * FINE), title, COLOURS[i % len(COLOURS)], font,
                 anchor="rs")
    pen.text((WIDE // 2 * FINE, (HIGH - 10) * FINE), "operations a byte", "#444444", font, anchor="mb")
    machine = found.get("machine", {}).get("gpu", "")
    pen.text((LEFT * FINE, 2 * FINE), f"TFLOP/s, bf16{', ' + machine if machine else ''}", "#444444", font, anchor="lt")
    return paper.reduce(FINE)


def main(arguments: list[str] | None = None) -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("json", type=Path, help="of bench_kernels.py --json, on a GPU")
    top.add_argument("picture", type=Path)
    given = top.parse_args(arguments)
    found = json.loads(given.json.read_text())
    if "ceilings" not in found or not points(found):
        sys.exit(f"{given.json} holds no times of a GPU; expected what bench_kernels.py --json writes there")
    draw(found).save(given.picture)


if __name__ == "__main__":
    main()
