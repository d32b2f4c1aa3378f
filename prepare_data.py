"""Data sets, ready for training and evaluation.

    python prepare_data.py dancers --out data/dancers --clips 1000 --frames 8 --size 64
    python prepare_data.py dancers --out data/held-out --clips 96 --split held-out --format tsv
"""
import argparse
from pathlib import Path

from nanodisco.errors import InputError, run
from nanodisco.files import refuse_existing

SPLITS = ("train", "held-out")
FORMATS = ("folder", "tsv", "example")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="prepare_data.py", description="Data sets for training and evaluation.")
    kinds = top.add_subparsers(dest="kind", required=True)
    dancers = kinds.add_parser("dancers", help="synthetic dancers, drawn: no download, everything known")
    dancers.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    dancers.add_argument("--clips", type=int, help="each another person, room and dance (default 100; 3 with "
                         "--format example)")
    dancers.add_argument("--frames", type=int, default=8, help="of each clip (default 8)")
    dancers.add_argument("--size", type=int, default=64, help="pixels, square (default 64)")
    dancers.add_argument("--seed", type=int, default=0, help="other seeds give other clips (default 0)")
    dancers.add_argument("--split", choices=SPLITS, default="train", help="nothing is in both (default train)")
    dancers.add_argument("--format", choices=FORMATS, default="folder", help="the official program's folder of clips, "
                         "or its TSV files; example: of 3 clips a photo, a room and a dance (default folder)")
    return top


def main(argv: list[str] | None = None) -> None:
    given = parser().parse_args(argv)
    if given.clips is None:
        given.clips = 3 if given.format == "example" else 100
    for flag, low, high in (("clips", 1, 10**6), ("frames", 1, 10**4), ("size", 8, 4096), ("seed", 0, 899)):
        value = getattr(given, flag)
        if not low <= value <= high:
            raise InputError(f"--{flag} {value}; expected {low} to {high}")
    if given.format == "example" and given.clips != 3:
        raise InputError(f"--clips {given.clips}; expected 3 with --format example")
    refuse_existing(given.out)
    from tqdm import tqdm

    from nanodisco import dancers, datasets
    first = (dancers.HELD_OUT if given.split == "held-out" else 0) + given.seed * 10**6
    clips = tqdm(range(first, first + given.clips), unit="clip", disable=None)
    write = dict(zip(FORMATS, (datasets.write_folder, datasets.write_tsv, datasets.write_example)))[given.format]
    write(Path(given.out), clips, given.frames, given.size, given.split)
    print(f"{given.clips} clips of {given.frames} frames, {given.size}x{given.size}: {given.out}")


if __name__ == "__main__":
    run(main)
