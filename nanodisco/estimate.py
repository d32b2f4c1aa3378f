"""Estimate: where the person in a real picture is, and how they stand, by MediaPipe. Optional; works offline.

Its models come with it. It cannot be an ordinary extra: it pins old versions that it does not need.
"""
import os
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec

import numpy as np
from PIL import Image

from nanodisco import pose
from nanodisco.errors import InputError

INSTALL = ("pip install --no-deps mediapipe==0.10.21 && pip install absl-py attrs flatbuffers 'protobuf<5' "
           "opencv-python-headless matplotlib sounddevice")
CONFIDENCES = (0.5, 0.3)               # to be sure of a person; a second look at pictures that have nobody


def installed() -> bool:
    return find_spec("mediapipe") is not None


@cache
def _solutions():
    os.environ.setdefault("GLOG_minloglevel", "2")                       # it reports each model that it loads
    try:
        from mediapipe import solutions
    except ImportError as error:
        raise InputError(f"MediaPipe is not whole ({error}). To install it: {INSTALL}") from None
    return solutions


def mask(picture: Image.Image) -> Image.Image:
    """Where the person is.   RGB -> L of its size, 0 to 255 (soft edges)"""
    with _solutions().selfie_segmentation.SelfieSegmentation(model_selection=0) as model:
        found = model.process(np.asarray(picture.convert("RGB"))).segmentation_mask          # (H, W) in [0, 1]
    return Image.fromarray(np.rint(found * 255).astype(np.uint8))


def poses(frames: Iterable[np.ndarray]) -> Iterator[pose.Frame]:
    """One person a frame, each frame looked at by itself.   uint8 (H, W, 3)"""
    models = [_solutions().pose.Pose(static_image_mode=True, min_detection_confidence=c) for c in CONFIDENCES]
    for frame in frames:
        height, width = frame.shape[:2]
        found = next(filter(None, (model.process(frame).pose_landmarks for model in models)), None)
        people = ()
        if found:
            points = np.array([[p.x * width, p.y * height, p.visibility] for p in found.landmark])
            people = (pose.from_blazepose(points, (width, height)),)
        yield pose.Frame(people, (width, height))
