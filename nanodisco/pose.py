"""Pose: a person's joints, from and to JSON, and as the picture that the pose net sees.

Inside there is one skeleton: COCO's 17 joints as an array (17, 3) of x, y, confidence in pixels of the
frame; a joint that was not found is (-1, -1, -1). The drawing is OpenPose's (arXiv:1812.08008): 18
coloured dots, 17 coloured sticks at 60 %, as DisCo was trained on, equal to it to the last byte.

    official   [{"keypoints": 17 x [x, y, c]}]: the people of one frame; the first counts
    OpenPose   {"people": [{"pose_keypoints_2d": 18 or 25 x (x, y, c)}]}; DWPose: the same, or a list of them
    COCO       {"images": …, "annotations": …}, or a list of {"image_id", "keypoints"}
"""
import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from nanodisco.errors import InputError
from nanodisco.files import natural

JOINTS = ("nose", "left eye", "right eye", "left ear", "right ear", "left shoulder", "right shoulder", "left elbow",
          "right elbow", "left wrist", "right wrist", "left hip", "right hip", "left knee", "right knee",
          "left ankle", "right ankle")                   # COCO-17
# For each joint of COCO its number in another skeleton.
FROM_OPENPOSE = (0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10)
FROM_BODY25 = (0, 16, 15, 18, 17, 5, 2, 6, 3, 7, 4, 12, 9, 13, 10, 14, 11)
FROM_BLAZEPOSE = (0, 2, 5, 7, 8, 11, 12, 13, 14, 15, 16, 23, 24, 25, 26, 27, 28)
TO_OPENPOSE = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)       # None: the neck
VISIBLE = 0.5                          # BlazePose reports every joint; below this one counts as not found

LIMBS = ((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
         (1, 0), (0, 14), (14, 16), (0, 15), (15, 17))   # of OpenPose-18, in the order of drawing
COLOURS = ((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
           (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
           (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85))                # of dot i and of limb i
FARTHEST = 2**14                       # pixels from the corner; no picture is larger
KEPT = 48                              # half the length of limbs whose shape is remembered, in pixels
RADIUS = WIDTH = 4                     # of a dot; half of a limb's width: in pixels of the frame, whatever its size


@dataclass(frozen=True)
class Frame:
    """The people of one frame, each (17, 3), and what the file says of the picture."""
    people: tuple[np.ndarray, ...]
    size: tuple[int, int] | None = None                  # (width, height) that the coordinates refer to
    name: str = ""


# ---- Skeletons ------------------------------------------------------------------------------------------

def from_openpose(points: np.ndarray) -> np.ndarray:
    """OpenPose's 18 or 25 joints, with zeros where nothing was found.   (18 or 25, 3) -> (17, 3)"""
    joints = points[list(FROM_OPENPOSE if len(points) == 18 else FROM_BODY25)]
    return np.where((joints[:, 2:] <= 0) | (joints[:, :2] < 0).any(1, keepdims=True), -1.0, joints)


def from_blazepose(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """MediaPipe's 33 landmarks, x y visibility in pixels.   (33, 3), (width, height) -> (17, 3)"""
    joints = points[list(FROM_BLAZEPOSE)]
    inside = (joints[:, :2] >= 0).all(1) & (joints[:, :2] < size).all(1)
    return np.where((inside & (joints[:, 2] >= VISIBLE))[:, None], joints, -1.0)


def to_openpose(joints: np.ndarray) -> np.ndarray:
    """(17, 3) -> OpenPose's 18 joints (18, 3)

    official: the neck is the mean of both shoulders even where one of them was not found.
    """
    neck = (joints[5] + joints[6]) / 2
    return np.stack([neck if i is None else joints[i] for i in TO_OPENPOSE])


# ---- Drawing ----------------------------------------------------------------------------------------------

def draw(people, size: tuple[int, int]) -> np.ndarray:
    """The first of `people`, each (17, 3), on black.   size (width, height) -> uint8 (H, W, 3)"""
    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    if len(people) == 0:
        return canvas
    joints = to_openpose(np.asarray(people[0], np.float64))[:, :2]
    found = (joints >= 0).all(axis=1)
    for (x, y), there, colour in zip(joints, found, COLOURS):
        if there:
            _paint(canvas, int(x) - RADIUS, int(y) - RADIUS, _disc(), colour, opacity=1.0)
    for (a, b), colour in zip(LIMBS, COLOURS):
        if found[a] and found[b]:
            _paint(canvas, *_stick(joints[a], joints[b], size), colour, opacity=0.6)
    return canvas


def _paint(canvas: np.ndarray, left: int, top: int, mask: np.ndarray, colour, opacity: float) -> None:
    """Mix the colour in where the mask, placed at (left, top), lies within the canvas."""
    height, width = canvas.shape[:2]
    rows = slice(max(top, 0), max(min(top + mask.shape[0], height), 0))
    columns = slice(max(left, 0), max(min(left + mask.shape[1], width), 0))
    inside = mask[rows.start - top:max(rows.stop - top, 0), columns.start - left:max(columns.stop - left, 0)]
    place = canvas[rows, columns]
    place[inside] = np.rint(place[inside] * (1 - opacity) + np.array(colour) * opacity)


@cache
def _disc() -> np.ndarray:
    """bool (9, 9)"""
    y, x = np.ogrid[-RADIUS:RADIUS + 1, -RADIUS:RADIUS + 1]
    return x * x + y * y <= RADIUS * RADIUS


def _stick(a: np.ndarray, b: np.ndarray, size: tuple[int, int]) -> tuple[int, int, np.ndarray]:
    """The ellipse around the limb from a to b on a canvas of that size.   -> left, top, mask"""
    centre = [int((a[0] + b[0]) / 2), int((a[1] + b[1]) / 2)]
    length = math.hypot(a[1] - b[1], a[0] - b[0])
    angle, half = int(math.degrees(math.atan2(a[1] - b[1], a[0] - b[0]))), int(length / 2)
    reach = max(half, WIDTH) + 1
    if half > KEPT or not all(reach <= at < end - reach for at, end in zip(centre, size)):
        return _filled(_ellipse(centre, (half, WIDTH), angle), size)
    home = [KEPT * 2 + at % 2 for at in centre]                          # halves are rounded to even numbers
    left, top, mask = _kept(half, angle, *home)
    return left + centre[0] - home[0], top + centre[1] - home[1], mask


@lru_cache(maxsize=1 << 17)                            # all there are: 360 angles, KEPT lengths, 4 halves; 1 kB each
def _kept(half: int, angle: int, x: int, y: int) -> tuple[int, int, np.ndarray]:
    """An ellipse that no border cuts looks the same wherever it is."""
    return _filled(_ellipse([x, y], (half, WIDTH), angle), (4 * KEPT, 4 * KEPT))


@cache
def _sine() -> np.ndarray:
    """OpenCV's table: of whole degrees, to seven decimals, in single precision.   (451,)"""
    return np.sin(np.radians(np.arange(451))).round(7).astype(np.float32).astype(np.float64)


def _ellipse(centre, axes: tuple[int, int], angle: int) -> np.ndarray:
    """A polygon of one corner a degree, in whole pixels without repeats.   int (P, 2)"""
    sine, i = _sine(), np.arange(361)
    x, y = axes[0] * sine[450 - i], axes[1] * sine[i]
    cos, sin = sine[450 - angle % 360], sine[angle % 360]
    corners = np.stack([centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos], axis=1)
    corners = np.rint(corners).astype(np.int64)
    return corners[np.append(True, (corners[1:] != corners[:-1]).any(axis=1))]


def _filled(corners: np.ndarray, size: tuple[int, int]) -> tuple[int, int, np.ndarray]:
    """A convex polygon: its edges as lines of pixels, and each row from the left edge to the right.

    OpenCV follows each edge in steps of 1/65536 pixel and rounds half up. int (P, 2) -> left, top, mask
    """
    left, top = corners.min(axis=0).tolist()
    width, height = (corners.max(axis=0) - (left, top) + 1).tolist()
    points, mask = corners.tolist(), np.zeros((height, width), bool)
    within = ((corners >= 0) & (corners < size)).all(axis=1)
    mask[corners[within, 1] - top, corners[within, 0] - left] = True
    short = (abs(corners - np.roll(corners, 1, axis=0)) <= 1).all(axis=1) & within & np.roll(within, 1)
    for i in np.flatnonzero(~short).tolist():                            # those from corner to next corner are drawn
        if line := _clipped(points[i - 1], points[i], size):
            xs, ys = _line(*line)
            mask[ys - top, xs - left] = True
    first = min(range(len(points)), key=lambda i: points[i][1])
    sides = [_side([points[(first + step * i) % len(points)] for i in range(len(points) + 1)], height)
             for step in (1, -1)]
    for y, (a, b) in enumerate(zip(*sides)):
        mask[y, ((min(a, b) + 0x8000) >> 16) - left:((max(a, b) + 0x8000) >> 16) - left + 1] = True
    return left, top, mask


def _clipped(start: list, end: list, size: tuple[int, int]) -> tuple[list, list] | None:
    """The part of a line within the canvas. OpenCV cuts first and draws then, which moves single pixels."""
    ends = [list(start), list(end)]
    for axis in (1, 0):                                                  # first at top and bottom, then at the sides
        last = size[axis] - 1
        if all(point[axis] < 0 for point in ends) or all(point[axis] > last for point in ends):
            return None
        for point, other in (ends, ends[::-1]):
            if not 0 <= point[axis] <= last:
                border = 0 if point[axis] < 0 else last
                way = (border - point[axis]) * (other[1 - axis] - point[1 - axis])
                point[1 - axis] += int(way / (other[axis] - point[axis]))
                point[axis] = border
    return ends[0], ends[1]


def _side(chain: list, height: int) -> list[int]:
    """x in 1/65536 pixel of a chain of corners at each row, from the top one down to the bottom."""
    xs: list[int] = []
    for (x0, y0), (x1, y1) in zip(chain, chain[1:]):
        if y1 > y0 and len(xs) < height:
            rows, rise = y1 - y0, 2 * ((x1 - x0) << 16) + (y1 - y0)
            slope = abs(rise) // (2 * rows) * (1 if rise >= 0 else -1)           # towards zero
            xs += [(x0 << 16) + slope * i for i in range(rows)]
            bottom = (x0 << 16) + slope * rows
    return (xs + [bottom if xs else chain[0][0] << 16])[:height]


def _line(start: list, end: list) -> tuple[np.ndarray, np.ndarray]:
    """Bresenham's line, always from the left to the right.   -> xs, ys"""
    (x0, y0), (x1, y1) = sorted((start, end)) if start[0] != end[0] else (start, end)
    dx, dy = x1 - x0, abs(y1 - y0)
    steps, short = max(dx, dy), min(dx, dy)
    i = np.arange(steps + 1)
    side = (2 * short * i + steps - 1) // (2 * steps) if steps else i     # half a pixel does not step aside yet
    down = 1 if y1 >= y0 else -1
    return (x0 + i, y0 + down * side) if dx > dy else (x0 + side, y0 + down * i)


# ---- JSON ---------------------------------------------------------------------------------------------------

def read(path: str | Path) -> list[Frame]:
    """All frames of a JSON file, whichever of the formats above it is in. InputError if in none."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there; expected a JSON file of poses") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):                                 # of JSON, or of its text encoding
        raise InputError(f"{path} is not whole JSON; expected poses of OpenPose, DWPose, COCO or DisCo") from None
    try:
        return _frames(content, path.name)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"{path} holds no poses that can be read ({type(error).__name__}: {error}); "
                         "expected OpenPose, DWPose, COCO or DisCo JSON") from None


def _frames(content, name: str) -> list[Frame]:
    if isinstance(content, dict) and "annotations" in content:
        return _coco_frames(content)
    if isinstance(content, dict):
        return [_openpose_frame(content, name)]
    if not isinstance(content, list):
        raise ValueError(f"a {type(content).__name__}")
    if content and all("image_id" in item for item in content):
        return _coco_results(content)
    if content and all("people" in item for item in content):
        return [_openpose_frame(item, f"{i:06}") for i, item in enumerate(content)]
    return [Frame(tuple(_points(person["keypoints"], (17,)) for person in content), None, name)]


def _openpose_frame(content: dict, name: str) -> Frame:
    size = _size(content["canvas_width"], content["canvas_height"]) if "canvas_width" in content else None
    people = []
    for person in content["people"]:
        points = _points(person["pose_keypoints_2d"], (18, 25))
        if size and points[:, :2].max() <= 1:                            # DWPose may write shares of the canvas
            points = points * (*size, 1)
        people.append(from_openpose(points))
    return Frame(tuple(people), size, name)


def _coco_frames(content: dict) -> list[Frame]:
    people: dict = {image["id"]: [] for image in content["images"]}
    for item in content["annotations"]:
        people[item["image_id"]].append(_coco_person(item["keypoints"]))
    images = sorted(content["images"], key=lambda image: natural(image["file_name"]))
    return [Frame(tuple(people[image["id"]]), _size(image["width"], image["height"]), image["file_name"])
            for image in images]


def _coco_results(content: list) -> list[Frame]:
    people: dict = {}
    for item in sorted(content, key=lambda item: -item.get("score", 0)):
        people.setdefault(item["image_id"], []).append(_coco_person(item["keypoints"]))
    return [Frame(tuple(people[key]), None, str(key))
            for key in sorted(people, key=lambda key: natural(str(key)))]


def _coco_person(numbers: list) -> np.ndarray:
    points = _points(numbers, (17,))
    return np.where(points[:, 2:] == 0, -1.0, points)                    # COCO's v: 0 is "not labelled"


def _size(width, height) -> tuple[int, int]:
    """Of a frame, in pixels."""
    if not (1 <= width <= FARTHEST and 1 <= height <= FARTHEST):
        raise ValueError(f"a frame of {width} x {height}")
    return int(width), int(height)


def _points(numbers: list, counts: tuple[int, ...]) -> np.ndarray:
    """Flat or nested numbers, with null for a joint that is missing.   -> (one of counts, 3)"""
    if any(item is None for item in numbers):
        numbers = [(0, 0, 0) if item is None else item for item in numbers]
    points = np.asarray(numbers, np.float64).reshape(-1, 3)
    if len(points) not in counts or not np.isfinite(points).all():
        raise ValueError(f"{points.size} numbers; expected {' or '.join(str(3 * n) for n in counts)} finite ones")
    if np.abs(points[:, :2]).max() > FARTHEST:
        raise ValueError(f"a joint at {np.abs(points[:, :2]).max():.0f} pixels")
    return points


def to_json(frames: list[Frame], form: str):
    """Frames as the content of a JSON file; `read` takes it back. form: disco (one frame) | openpose | coco"""
    if form == "disco":
        return [{"keypoints": person.tolist()} for person in frames[0].people]
    if form == "openpose":
        return [_openpose_json(frame) for frame in frames]
    if form == "coco":
        images = [{"id": i, "file_name": frame.name or f"{i:06}", "width": frame.size[0], "height": frame.size[1]}
                  for i, frame in enumerate(frames)]
        people = [(i, np.where(person[:, :1] < 0, 0.0, person)) for i, frame in enumerate(frames)
                  for person in frame.people]
        return {"images": images, "categories": [{"id": 1, "name": "person", "keypoints": JOINTS}],
                "annotations": [{"id": i, "image_id": image, "category_id": 1, "keypoints": person.ravel().tolist()}
                                for i, (image, person) in enumerate(people)]}
    raise ValueError(f"form {form!r}; expected disco, openpose or coco")


def _openpose_json(frame: Frame) -> dict:
    people = [np.where((points := to_openpose(person))[:, :2].min(1, keepdims=True) < 0, 0.0, points)
              for person in frame.people]
    size = {"canvas_width": frame.size[0], "canvas_height": frame.size[1]} if frame.size else {}
    return {"people": [{"pose_keypoints_2d": points.ravel().tolist()} for points in people]} | size


# ---- Alignment ------------------------------------------------------------------------------------------------

STEADY = (0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 14)     # all but wrists and ankles


def align(frames: list[Frame], reference: np.ndarray) -> list[Frame]:
    """Move and scale a whole track so that its first pose stands where the reference (17, 3) stands.

    The similarity between the joints that both have (without wrists and ankles, with neck and pelvis),
    by least squares; its rotation is dropped. official: OpenCV's RANSAC finds it there; the axes scale
    by one number here too, coordinates are cut to whole pixels, missing joints stay missing.
    """
    first = next((frame.people[0] for frame in frames if frame.people), None)
    if first is None:
        raise InputError("no frame of the pose track has a person in it; nothing can be aligned")
    a, b = _steady(first), _steady(reference)
    common = (a >= 0).all(axis=1) & (b >= 0).all(axis=1)
    if common.sum() < 5:
        raise InputError(f"reference and first pose share {common.sum()} joints; aligning needs 5 (leave out --align)")
    a, b = a[common], b[common]
    a_mean, b_mean = a.mean(axis=0), b.mean(axis=0)
    z = ((a - a_mean) @ (1, 1j)).conj() @ ((b - b_mean) @ (1, 1j))       # sum of conj(a) b: a turn and a scale
    if not min(np.ptp(a, axis=0).max(), np.ptp(b, axis=0).max(), abs(z)) > 0:
        raise InputError("the joints of the reference, or those of the first pose, lie in one place; expected a person")
    scale = abs(z) / ((a - a_mean) ** 2).sum()
    turn = z / abs(z) * scale
    shift = b_mean - np.array([[turn.real, -turn.imag], [turn.imag, turn.real]]) @ a_mean

    def moved(person: np.ndarray) -> np.ndarray:
        there = (person[:, :2] >= 0).any(axis=1, keepdims=True)
        return np.concatenate([np.where(there, np.trunc(person[:, :2] * scale + shift), person[:, :2]),
                               person[:, 2:]], axis=1)
    return [Frame(tuple(moved(person) for person in frame.people), frame.size, frame.name) for frame in frames]


def _steady(joints: np.ndarray) -> np.ndarray:
    """The joints to align by.   (17, 3) -> (15, 2), missing ones negative"""
    def middle(i: int, j: int) -> np.ndarray:
        return joints[[i, j], :2].mean(axis=0) if (joints[[i, j], :2] >= 0).all() else np.array([-1.0, -1.0])
    return np.stack([*joints[list(STEADY), :2], middle(5, 6), middle(11, 12)])
