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

    def video(self, i: int) -> range:
        """The rows of the video that row i belongs to; its first frame is the reference of all."""
        try:
            first, last = (i + int(offset) for offset in ast.literal_eval(self.videos[i][1]))
        except (ValueError, SyntaxError, IndexError, TypeError):
            raise InputError(f"{self.videos.path}, row {i}: {self.videos[i][1:]}; expected [first, last]") from None
        if not 0 <= first <= i <= last < len(self):
            raise InputError(f"{self.videos.path}, row {i}: video of rows {first} to {last}; expected rows of the set, "
                             f"{i} among them, given as offsets [first - {i}, last - {i}]")
        return range(first, last + 1)

    def clips(self, frames: int, every: int) -> list[range]:
        """Rows of clips of at most so many frames that begin `every` so many rows, each within one video.

        As in the official evaluation, which has every=1, a clip that would run over its video's end
        begins earlier. official: in a video shorter than a clip it takes one of another video.
        """
        clips, row = [], 0
        while row < len(self):
            video = self.video(row)
            starts = [max(min(start, video.stop - frames), video.start)
                      for start in range(video.start, video.stop, every)]
            clips += [range(start, min(start + frames, video.stop)) for start in dict.fromkeys(starts)]
            row = video.stop
        return clips

    def __getitem__(self, i: int) -> Sample:
        reference = self.video(i).start
        return Sample(self.images[i][0], self.images.picture(i), self.poses.picture(i, 1),
                      self.images.picture(reference), self.masks.picture(reference, 1))
