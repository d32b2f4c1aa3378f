"""Data: sets of frames with pose, mask and reference: the official YAML files, and the dancers.

    img, poses, masks, vid2line: TSV files beside the YAML file; row i of each belongs to frame i.
    vid2line row i: [first - i, last - i], the rows of frame i's video, counted from i. The first frame of a
    video is the reference of all its frames.
    composite: true: each of these is a list of files, and so is caption, of which only the names are used; row i
    of caption_linelist (source, row, caption) says in which file of each list, and where in it, frame i is.

What a training step sees is a function of (seed, step): the order of an epoch, the frame that is drawn,
the reference. So a run that goes on where it was stopped needs to remember the number of the step only.
"""
import ast
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanodisco import crops, dancers, transforms
from nanodisco.config import ClipConfig, read_yaml
from nanodisco.errors import InputError
from nanodisco.recipe import DataConfig
from nanodisco.tsv import CompositeTable, Table

FIELDS = ("img", "poses", "masks", "vid2line")           # of a set's YAML file


@dataclass
class Sample:
    """One frame to make: its key, itself, its pose, and the reference with its mask."""
    key: str
    target: Image.Image
    pose: Image.Image
    reference: Image.Image
    mask: Image.Image


class TsvDataset:
    """A set in the official format, one Sample a row."""

    def __init__(self, path: str | Path):
        path, values = Path(path), read_yaml(path)
        composite = values.get("composite")
        for field in FIELDS + (("caption",) if composite else ()):
            if not isinstance(values.get(field), list if composite else str):
                raise InputError(f"{path}: no `{field}`; expected " + ("a list of TSV files, as the set is composite"
                                                                       if composite else "the name of a TSV file"))
        if composite and not isinstance(values.get("caption_linelist"), str):
            raise InputError(f"{path}: no `caption_linelist`; expected the name of a TSV file, as the set is composite")
        tables = _composite(path, values) if composite else {field: Table(path.parent / values[field])
                                                             for field in FIELDS}
        self.images, self.poses, self.masks, self.videos = tables.values()
        if len(set(map(len, tables.values()))) > 1 or not len(self):
            rows = ", ".join(f"{field} {len(table)}" for field, table in tables.items())
            raise InputError(f"{path}: files of different length, or of none; rows: {rows}")

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


def _composite(path: Path, values: dict) -> dict[str, CompositeTable]:
    """official: a key begins with the name of its caption file, as the set spells it."""
    lines = Table(path.parent / values["caption_linelist"])
    try:
        order = [(int(source), int(row)) for source, row, *_ in (lines[i] for i in range(len(lines)))]
    except ValueError:
        raise InputError(f"{lines.path}: expected three numbers a row: source, row, caption") from None
    prefixes = [f"{name}_" for name in values["caption"]]
    if len({len(values[field]) for field in (*FIELDS, "caption")}) > 1:
        raise InputError(f"{path}: lists of different length; expected one file of each kind for each source")
    return {field: CompositeTable([Table(path.parent / str(name)) for name in values[field]], order, prefixes,
                                  lines.path) for field in FIELDS}


# ---- Training --------------------------------------------------------------------------------------------------

@dataclass
class Scene:
    """The pictures of one training sample."""
    targets: list[Image.Image]         # F frames
    poses: list[Image.Image]           # of each
    reference: Image.Image
    mask: Image.Image                  # of the person in the reference
    persons: list[Image.Image]         # the same of each target


class Dancers:
    """Clips of the dancers, drawn when they are asked for; clip i is person i, room i, dance i."""

    def __init__(self, config: DataConfig):
        if config.first < dancers.HELD_OUT < config.first + config.clips:
            raise InputError(f"data.first {config.first} and data.clips {config.clips} reach into the held-out dancers "
                             f"from {dancers.HELD_OUT} on; expected fewer")
        self.config = config

    def __len__(self) -> int:
        return self.config.clips

    def fingerprint(self) -> str:
        """Another string where other pictures would be seen."""
        pictures = [dancers.sample(i, i, i, i, 64).picture.tobytes() for i in range(3)]
        return f"{len(self)} clips from {self.config.first} on, drawn as {zlib.crc32(b''.join(pictures)):08x}"

    def scene(self, i: int, rng: np.random.Generator, with_pose: bool) -> Scene:
        size, i = self.config.height, self.config.first + i
        first = int(rng.integers(dancers.LOOP))
        frames = [dancers.sample(i, i, i, first + k * self.config.every, size) for k in range(self.config.frames)]
        shown = {"same": first, "first": 0, "random": int(rng.integers(dancers.LOOP))}[self.config.reference]
        reference = frames[0] if shown == first else dancers.sample(i, i, i, shown, size)
        poses = [Image.fromarray(dancers.pose_picture(frame.keypoints, size)) for frame in frames if with_pose]
        return Scene([Image.fromarray(frame.picture) for frame in frames], poses,
                     Image.fromarray(reference.picture), Image.fromarray(reference.mask),
                     [Image.fromarray(frame.mask) for frame in frames])


class Rows:
    """Rows of a TSV set."""

    def __init__(self, config: DataConfig):
        self.config, self.rows = config, TsvDataset(config.path)

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """Another string where rows have other lengths: of the files' index, not of all their pictures."""
        tables = (self.rows.images, self.rows.poses, self.rows.masks, self.rows.videos)
        return f"{len(self)} rows, {zlib.crc32(repr([(table.offsets, table.size) for table in tables]).encode()):08x}"

    def scene(self, i: int, rng: np.random.Generator, with_pose: bool) -> Scene:
        """A clip that would run over its video's end begins earlier; one longer than that repeats its last frame."""
        video, c = self.rows.video(i), self.config
        start = max(min(i, video.stop - 1 - (c.frames - 1) * c.every), video.start)
        frames = [min(start + k * c.every, video.stop - 1) for k in range(c.frames)]
        shown = {"same": i, "first": video.start, "random": int(rng.integers(video.start, video.stop))}[c.reference]
        return Scene([self.rows.images.picture(k) for k in frames],
                     [self.rows.poses.picture(k, 1) for k in frames if with_pose],
                     self.rows.images.picture(shown), self.rows.masks.picture(shown, 1),
                     [self.rows.masks.picture(k, 1) for k in frames])


def cropped(scene: Scene, config: DataConfig, seed: int) -> Scene:
    """Each picture cut to a random box; those of one size to the same one, masks as what they are masks of."""
    def cut(picture: Image.Image, of: Image.Image) -> Image.Image:
        if picture.size != of.size:
            picture = picture.resize(of.size, Image.Resampling.BICUBIC)
        generator = torch.Generator().manual_seed(seed)
        wanted = (config.width, config.height)
        return picture.crop(crops.training_box(of.size, generator, config.crop, config.slide, wanted))
    return Scene([cut(frame, frame) for frame in scene.targets], [cut(frame, frame) for frame in scene.poses],
                 cut(scene.reference, scene.reference), cut(scene.mask, scene.reference),
                 [cut(mask, frame) for mask, frame in zip(scene.persons, scene.targets)])


class Training(torch.utils.data.Dataset):
    """Samples as tensors. An index is (epoch, i): each epoch draws other frames of the same clips."""

    def __init__(self, config: DataConfig, clip: ClipConfig, with_pose: bool, seed: int):
        self.config, self.clip, self.with_pose, self.seed = config, clip, with_pose, seed
        self.source = Dancers(config) if config.kind == "dancers" else Rows(config)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Tensor]:
        """-> target (3, [F,] H, W), reference (3, S, S), background (3, H, W), pose (3, [F,] H, W) if asked for,
        person (1, [F,] H, W) in [0, 1]: where the target shows them
        """
        epoch, i = place
        scene = self.source.scene(i, np.random.default_rng([self.seed, epoch, i]), self.with_pose)
        if self.config.crop:
            scene = cropped(scene, self.config, zlib.crc32(repr((self.seed, epoch, i)).encode()))
        size = (self.config.width, self.config.height)
        tensors = {"target": self._clip([transforms.target(frame, size) for frame in scene.targets]),
                   "reference": transforms.reference(scene.reference, scene.mask, self.clip.image_size,
                                                     crop=self.clip.crop),
                   "background": transforms.background(scene.reference, scene.mask, size)}
        tensors["person"] = self._clip([transforms.mask_tensor(mask, frame.size, size, Image.Resampling.BILINEAR)[:1]
                                        for mask, frame in zip(scene.persons, scene.targets)])
        if scene.poses:
            tensors["pose"] = self._clip([transforms.pose(frame, size) for frame in scene.poses])
        return tensors

    def _clip(self, frames: list[Tensor]) -> Tensor:
        return frames[0] if self.config.frames == 1 else torch.stack(frames, dim=1)


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def indices(length: int, batch: int, seed: int, step: int) -> list[tuple[int, int]]:
    """The samples of one step, (epoch, i). The last batch of an epoch is smaller if the set does not divide."""
    of_epoch = -(-length // batch)
    epoch, k = divmod(step, of_epoch)
    return [(epoch, int(i)) for i in _order(length, seed, epoch)[k * batch:(k + 1) * batch]]


def shares(count: int, parts: int) -> list[range]:
    """`count` samples dealt to `parts`, as evenly as can be.   A part beyond the last sample is empty."""
    ends = [count * k // parts for k in range(parts + 1)]
    return [range(a, b) for a, b in zip(ends, ends[1:])]


def loader(dataset: Training, batch: int, first: int, steps: int, rank: int, ranks: int,
           workers: int) -> Iterator[dict[str, Tensor]]:
    """The share of one process of each step's batch, stacked. An empty share is the first sample, see train.py."""
    def places() -> Iterator[list[tuple[int, int]]]:
        for step in range(first, steps):
            whole = indices(len(dataset), batch, dataset.seed, step)
            yield [whole[i] for i in shares(len(whole), ranks)[rank]] or whole[:1]
    try:
        yield from torch.utils.data.DataLoader(dataset, batch_sampler=places(), num_workers=workers)
    except InputError as error:                                          # a worker's comes with its whole traceback
        raise InputError(str(error).strip().splitlines()[-1].removeprefix("nanodisco.errors.InputError: ")) from None
