"""Data: sets of frames with pose, mask and reference, as the official YAML files describe them.

    img, poses, masks, vid2line: TSV files beside the YAML file; row i of each belongs to frame i.
    vid2line row i: [first - i, last - i], the rows of frame i's video, counted from i. The first frame of a
    video is the reference of all its frames.
"""
import ast
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nanodisco.config import read_yaml
from nanodisco.errors import InputError
from nanodisco.tsv import Table


@dataclass
class Sample:
    """One frame to make: its key, itself, its pose, and the reference with its mask."""
    key: str
    target: Image.Image
    pose: Image.Image
    reference: Image.Image
    mask: Image.Image


class Validation:
    """A set for evaluation, one Sample a row."""

    def __init__(self, path: str | Path):
        path, values = Path(path), read_yaml(path)
        if values.get("composite"):
            raise InputError(f"{path} is a composite set; give the sets it is made of one by one")
        for field in ("img", "poses", "masks", "vid2line"):
            if not isinstance(values.get(field), str):
                raise InputError(f"{path}: no `{field}`; expected the name of a TSV file")
        self.path = path
        self.images, self.poses, self.masks, self.videos = (
            Table(path.parent / values[field]) for field in ("img", "poses", "masks", "vid2line"))
        lengths = {table.path.name: len(table) for table in (self.images, self.poses, self.masks, self.videos)}
        if len(set(lengths.values())) > 1:
            raise InputError(f"{path}: files of different length: {lengths}")

    def __len__(self) -> int:
        return len(self.images)

    def reference_row(self, i: int) -> int:
        """The row of the first frame of i's video."""
        try:
            first = int(ast.literal_eval(self.videos[i][1])[0])
        except (ValueError, SyntaxError, IndexError, TypeError):
            raise InputError(f"{self.videos.path}, row {i}: {self.videos[i][1:]}; expected [first, last]") from None
        return i + first

    def __getitem__(self, i: int) -> Sample:
        reference = self.reference_row(i)
        return Sample(self.images[i][0], self.images.picture(i), self.poses.picture(i, 1),
                      self.images.picture(reference), self.masks.picture(reference, 1))
