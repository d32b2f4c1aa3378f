"""Datasets: the dancers written as files, in the official program's two formats.

    folder   CLIP/000001.png, openpose_json/000001.png.json, groundsam/000001.png.mask.png, background/empty.png
    tsv      SPLIT_images.tsv, _poses, _masks, _vid2line, each with .lineidx, and SPLIT.yaml
    example  reference.png (a photo with alpha), background.png (another room), dance.json (a whole dance, OpenPose)
"""
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from PIL import Image

from nanodisco import dancers, pose, rooms, tsv
from nanodisco.files import appearing

YAML = """img: {0}_images.tsv
poses: {0}_poses.tsv
masks: {0}_masks.tsv
vid2line: {0}_vid2line.tsv
composite: false
"""


def write_folder(out: Path, clips: Iterable[int], frames: int, size: int, split: str) -> None:
    """One folder a clip. The clip's number is the seed of its person, its room and its dance."""
    with appearing(out) as place:
        for clip in clips:
            folder = place / f"{clip:010}"
            for part in ("openpose_json", "groundsam", "background"):
                (folder / part).mkdir(parents=True)
            for i in range(frames):
                made, name = dancers.sample(clip, clip, clip, i, size), f"{i + 1:06}.png"
                Image.fromarray(made.picture).save(folder / name)
                frame = pose.Frame((made.keypoints,), (size, size), name)
                (folder / "openpose_json" / f"{name}.json").write_text(json.dumps(pose.to_json([frame], "disco")))
                Image.fromarray(made.mask).save(folder / "groundsam" / f"{name}.mask.png")
            Image.fromarray(made.background).save(folder / "background" / "empty.png")


def write_example(out: Path, clips: Iterable[int], frames: int, size: int, split: str) -> None:
    """For sample.py, of three clips: the first one's person in its room, the second's room, the third's dance."""
    person, other_room, dance = clips
    with appearing(out) as place:
        place.mkdir()
        photo = dancers.sample(person, person, person, 0, size)
        Image.fromarray(np.dstack([photo.picture, photo.mask])).save(place / "reference.png")
        Image.fromarray(rooms.room(other_room, size)).save(place / "background.png")
        canvas = max(size, dancers.DRAWN)
        track = [pose.Frame((dancers.sample(person, person, dance, i, canvas).keypoints.round(1),), (canvas, canvas))
                 for i in range(frames)]
        (place / "dance.json").write_text(json.dumps(pose.to_json(track, "openpose")))


def write_tsv(out: Path, clips: Iterable[int], frames: int, size: int, split: str) -> None:
    """Rows of one clip are neighbours; vid2line counts them from the row itself, as the official loader reads it."""
    with appearing(out) as place, ExitStack() as open_files:
        place.mkdir()
        images, poses, masks, videos = (open_files.enter_context(tsv.writer(place / f"{split}_{part}.tsv"))
                                        for part in ("images", "poses", "masks", "vid2line"))
        for clip in clips:
            for i in range(frames):
                made, key = dancers.sample(clip, clip, clip, i, size), f"TiktokDance_{clip:010}_{i + 1:04}.png"
                images(key, tsv.encoded(Image.fromarray(made.picture)))
                poses(key, tsv.encoded(Image.fromarray(dancers.pose_picture(made.keypoints, size))))
                masks(key, tsv.encoded(Image.fromarray(made.mask)), True)
                videos(key, [-i, frames - 1 - i])
        (place / f"{split}.yaml").write_text(YAML.format(split))
