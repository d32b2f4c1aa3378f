"""Dancers: a seeded world of people, rooms and dances, in which everything is known about every picture.

    frame = sample(identity=3, background=7, dance=11, frame=0, size=64)
    frame.picture, frame.keypoints, frame.mask, frame.labels, frame.background

A dancer is a skeleton in 3-D: angles that swing to a beat, turned about the vertical, projected, and
dressed with shapes, the far limbs first. Who, where and what are three independent seeds, so the true
picture of any person in any room and any pose can be asked for. Seeds below HELD_OUT are for training.
Every dance repeats after 24 frames.
"""
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from nanodisco import pose
from nanodisco.rooms import hsv, room
from nanodisco.shapes import Canvas, Shape, capsule, ellipse, polygon

HELD_OUT = 10**9                       # seeds from here on, of people, rooms and dances alike, are for tests (and
                                       # config/nano/human_specific.yaml trains on one of these people)
LOOP = 24                              # frames after which a dance repeats
DRAWN = 256                            # pixels that pose pictures are drawn at before they are made small
REGIONS = ("nothing", "skin", "hair", "shirt", "legs", "shoes")          # of the labels
SKIN, HAIR, SHIRT, LEGS, SHOES = range(1, 6)

NOSE, EYES, EARS, SHOULDERS, ELBOWS, WRISTS, HIPS, KNEES, ANKLES = 0, (1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (
    11, 12), (13, 14), (15, 16)        # COCO: left, right


@dataclass(frozen=True)
class Sample:
    """One frame and all that is known about it. S is the size asked for."""
    picture: np.ndarray                # uint8 (S, S, 3)
    keypoints: np.ndarray              # (17, 3) x, y in pixels and 1; -1 where out of the picture or turned away
    mask: np.ndarray                   # uint8 (S, S), 255 is the person
    labels: np.ndarray                 # uint8 (S, S), index into REGIONS
    background: np.ndarray             # uint8 (S, S, 3), the room without the person


def sample(identity: int, background: int, dance: int, frame: int, size: int) -> Sample:
    """One frame of one person in one room doing one dance; the same for the same arguments, always."""
    person, moves, empty = Person.of(identity), Dance.of(dance), room(background, size)
    joints, facing = moves.joints(person, frame)
    canvas = Canvas(empty.astype(np.float32) / 255)
    _draw(canvas, person, joints, facing, moves.zoom)
    return Sample(np.rint(canvas.pixels * 255).astype(np.uint8), _keypoints(joints, size),
                  np.rint(canvas.covered * 255).astype(np.uint8), canvas.labels, empty)


def pose_picture(keypoints: np.ndarray, size: int) -> np.ndarray:
    """The official drawing, made at DRAWN pixels or more and averaged down.   -> uint8 (S, S, 3)"""
    times = -(-DRAWN // size)
    scaled = np.where(keypoints >= 0, keypoints * (times, times, 1), keypoints)
    large = pose.draw([scaled], (size * times, size * times))
    return np.asarray(Image.fromarray(large).reduce(times))


# ---- Who -------------------------------------------------------------------------------------------------------

PATTERNS = ("plain", "stripes", "pinstripes", "checks", "dots", "diagonal", "halves", "band", "sun")
HAIRSTYLES = ("short", "long", "bun", "curls", "tail")
GARMENTS = ("trousers", "shorts", "skirt", "dress")


@dataclass(frozen=True)
class Person:
    skin: np.ndarray
    hair: np.ndarray
    shirt: tuple[np.ndarray, np.ndarray]                                 # two colours
    legs: np.ndarray
    shoes: np.ndarray
    pattern: str
    hairstyle: str
    garment: str
    sleeves: bool                                                        # long
    height: float                                                        # 1 is usual
    width: float

    @staticmethod
    @lru_cache(maxsize=256)
    def of(seed: int) -> "Person":
        rng = np.random.default_rng([seed, 0])
        tone = rng.random()
        skin = np.array([0.98, 0.83, 0.70], np.float32) * (1 - tone) + np.array([0.40, 0.26, 0.18], np.float32) * tone
        dyed = rng.random() < 0.2
        hair = hsv(rng.random(), 0.7, 0.8) if dyed else hsv(rng.uniform(0.02, 0.14), rng.uniform(0.3, 0.8),
                                                            rng.uniform(0.1, 0.9))
        hue = rng.random()
        shirt = hsv(hue, rng.uniform(0.45, 1.0), rng.uniform(0.55, 1.0))
        other = hsv(hue + rng.uniform(0.25, 0.75), rng.uniform(0.0, 0.9), rng.uniform(0.2, 1.0))
        if abs((other - shirt) @ (0.3, 0.6, 0.1)) < 0.25:                # a pattern that nobody can see is none
            other = np.ones(3, np.float32) if shirt @ (0.3, 0.6, 0.1) < 0.55 else np.full(3, 0.15, np.float32)
        garment = GARMENTS[rng.choice(4, p=(0.45, 0.2, 0.2, 0.15))]
        legs = shirt if garment == "dress" else hsv(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.2, 0.9))
        return Person(skin, hair, (shirt, other), legs, hsv(rng.random(), rng.uniform(0, 0.9), rng.uniform(0.1, 1.0)),
                      PATTERNS[rng.integers(len(PATTERNS))], HAIRSTYLES[rng.integers(len(HAIRSTYLES))], garment,
                      bool(rng.random() < 0.4), rng.uniform(0.93, 1.05), rng.uniform(0.9, 1.12))


# ---- What they do ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Swing:
    """An angle or a length that swings about its middle, in waves of whole turns a loop."""
    middle: float
    waves: tuple[tuple[int, float, float], ...]                          # turns a loop, size, phase

    def __call__(self, frame: int, phase: float = 0.0) -> float:
        turn = 2 * np.pi * frame / LOOP
        return self.middle + sum(size * np.sin(n * turn + start + phase) for n, size, start in self.waves)


@dataclass(frozen=True)
class Dance:
    """Angles in radians, lengths in heights of the picture. Arms and legs are one movement, the other side's
    comes `mirrored` (0: together, pi: in turn)."""
    x: Swing
    lean: Swing
    turn: Swing                        # about the vertical; 0 faces us
    spins: int                         # whole turns a loop
    lift: Swing                        # of the upper arm, sideways; 0 hangs, pi is straight up
    swing: Swing                       # of the upper arm, forwards
    bend: Swing                        # of the elbow
    stride: Swing                      # of the thigh, sideways
    step: Swing                        # of the thigh, forwards
    arms_mirrored: float
    zoom: float                        # 1: the whole person; more: cut off at the hips
    bounce: float

    @staticmethod
    @lru_cache(maxsize=256)
    def of(seed: int) -> "Dance":
        rng = np.random.default_rng([seed, 2])
        beat = int(rng.integers(1, 3))

        def swing(middle: tuple[float, float], size: tuple[float, float]) -> Swing:
            waves = ((beat, rng.uniform(*size), rng.uniform(0, 2 * np.pi)),
                     (2 * beat, 0.3 * rng.uniform(*size), rng.uniform(0, 2 * np.pi)))
            return Swing(rng.uniform(*middle), waves)
        leaves = rng.random() < 0.12                                     # the picture, now and then
        return Dance(x=swing((0.42, 0.58), (0.3, 0.4) if leaves else (0.01, 0.07)),
                     lean=swing((-0.05, 0.05), (0.02, 0.15)), turn=swing((-0.5, 0.5), (0.05, 0.5)),
                     spins=int(rng.random() < 0.15) * int(rng.choice([-1, 1])),
                     lift=swing((0.3, 2.3), (0.15, 0.8)), swing=swing((-0.2, 0.6), (0.1, 0.6)),
                     bend=swing((0.3, 1.7), (0.1, 0.6)), stride=swing((0.08, 0.25), (0.0, 0.12)),
                     step=swing((0.1, 0.3), (0.1, 0.6)), arms_mirrored=float(rng.choice([0.0, np.pi, np.pi / 2])),
                     zoom=rng.uniform(1.55, 1.8) if rng.random() < 0.25 else rng.uniform(0.92, 1.05),
                     bounce=rng.uniform(0.0, 0.02))

    def joints(self, person: Person, frame: int) -> tuple[np.ndarray, float]:
        """COCO's joints in the picture, and the turn.   -> (17, 3) x, y, nearness in heights of the picture; radians"""
        frame %= LOOP
        unit = 0.82 * person.height                                      # height of a whole person, zoom 1
        facing = self.turn(frame) + 2 * np.pi * self.spins * frame / LOOP
        lean, out = self.lean(frame), np.zeros((17, 3))
        up = np.array([np.sin(lean), np.cos(lean), 0.0])                 # x to our right, y up, z towards us
        across = np.array([np.cos(lean), -np.sin(lean), 0.0])
        neck = 0.27 * unit * up
        head = neck + 0.15 * unit * up
        out[[*EYES, *EARS]] = head
        out[NOSE] = head + (0, -0.01 * unit, 0.07 * unit)
        for side, (eye, ear) in zip((1, -1), zip(EYES, EARS)):
            out[eye] += (side * 0.04 * unit, 0.02 * unit, 0.06 * unit)
            out[ear] += (side * 0.085 * unit, 0.0, 0.0)
        for which in (0, 1):
            self._limbs(out, which, frame, unit, person.width, neck, across)
        turned = out.copy()
        turned[:, 0] = out[:, 0] * np.cos(facing) + out[:, 2] * np.sin(facing)
        turned[:, 2] = out[:, 2] * np.cos(facing) - out[:, 0] * np.sin(facing)
        sole = turned[list(ANKLES), 1].min() - 0.05 * unit               # the lower foot stands on the floor
        hop = self.bounce * abs(np.sin(2 * np.pi * frame / LOOP * 2))
        turned[:, 1] = 0.95 - hop - (turned[:, 1] - sole)                # y downwards from here on
        turned[:, 0] += self.x(frame)
        if self.zoom > 1.2:                                              # the camera goes up to the head and near
            turned[:, :2] = (turned[:, :2] - (0.5, 0.08)) * self.zoom + (0.5, 0.08)
        return turned, facing

    def _limbs(self, out, which: int, frame: int, unit: float, width: float, neck, across) -> None:
        """Arm and leg of one side, 0 left and 1 right, before the turn."""
        side, arm, leg = 1 - 2 * which, self.arms_mirrored * which, np.pi * which
        shoulder = neck + side * 0.115 * unit * width * across - (0, 0.025 * unit, 0)
        lift, forwards, bend = self.lift(frame, arm), self.swing(frame, arm), np.clip(self.bend(frame, arm), 0, 2.4)
        out_of, ahead = side * np.sin(lift) * np.cos(forwards), np.sin(forwards) * (0.3 + np.sin(lift))
        upper = _direction(out_of, -np.cos(lift), ahead)
        aside = np.array([-side * 0.6, 0.9, 0.7])                        # where elbows bend to: up, inwards, forwards
        fore = np.cos(bend) * upper + np.sin(bend) * _direction(*(aside - upper * (aside @ upper)))
        elbow = shoulder + 0.155 * unit * upper
        out[SHOULDERS[which]], out[ELBOWS[which]], out[WRISTS[which]] = shoulder, elbow, elbow + 0.145 * unit * fore
        hip = side * 0.065 * unit * width * across
        stride, step = max(self.stride(frame), 0.03), max(self.step(frame, leg), -0.2)
        knee = hip + 0.21 * unit * _direction(side * np.sin(stride), -np.cos(step) * np.cos(stride), np.sin(step))
        back = max(1.7 * step, 0.05) - step                              # a lifted leg bends at the knee
        ankle = knee + 0.21 * unit * _direction(side * np.sin(stride) * 0.6, -np.cos(back), -np.sin(back))
        out[HIPS[which]], out[KNEES[which]], out[ANKLES[which]] = hip, knee, ankle


def _direction(*vector: float) -> np.ndarray:
    return np.array(vector) / np.linalg.norm(vector)


def _keypoints(joints: np.ndarray, size: int) -> np.ndarray:
    """What an estimator would see: nothing outside of the picture, no face on the back of a head."""
    seen = ((joints[:, :2] >= 0) & (joints[:, :2] < 1)).all(1)
    middle = joints[list(EARS), 2].mean()
    seen[[NOSE, *EYES]] &= joints[[NOSE, *EYES], 2] > middle + 0.005
    seen[list(EARS)] &= joints[list(EARS), 2] > middle - 0.03
    return np.where(seen[:, None], np.column_stack([joints[:, :2] * size, np.ones(17)]), -1.0)


# ---- How they look -------------------------------------------------------------------------------------------------

def _draw(canvas: Canvas, person: Person, joints: np.ndarray, facing: float, zoom: float) -> None:
    """The far limbs, the body, the near limbs, the head."""
    unit = 0.82 * person.height * (zoom if zoom > 1.2 else 1.0)
    line, wide = 0.011 * unit, person.width
    at, depth = joints[:, :2], joints[:, 2]
    body_depth = depth[[*SHOULDERS, *HIPS]].mean()
    front = np.cos(facing)
    face = Face(at[list(EARS)].mean(0), 0.105 * unit, facing, _upwards(at))

    def limb(points, radii, colours, labels, far):
        for (a, b), (ra, rb), colour, label in zip(zip(points, points[1:]), zip(radii, radii[1:]), colours, labels):
            canvas.paint(capsule(a, b, ra * unit, rb * unit), colour * (0.86 if far else 1.0), label, line)

    def arm(i: int, far: bool) -> None:
        sleeve = person.shirt[0]
        hand = at[WRISTS[i]] + (at[WRISTS[i]] - at[ELBOWS[i]]) * 0.12
        limb([at[SHOULDERS[i]], at[ELBOWS[i]], hand], (0.042, 0.036, 0.030),
             (sleeve, sleeve if person.sleeves else person.skin), (SHIRT, SHIRT if person.sleeves else SKIN), far)
        canvas.paint(ellipse(hand, 0.032 * unit, 0.032 * unit), person.skin * (0.86 if far else 1.0), SKIN, line)

    def leg(i: int, far: bool) -> None:
        cloth = {"trousers": 2, "shorts": 1}.get(person.garment, 0)
        colours = [person.legs] * cloth + [person.skin] * (2 - cloth)
        points = [at[HIPS[i]], at[KNEES[i]], at[ANKLES[i]]]
        limb(points, (0.06 * wide, 0.05, 0.038), colours, [LEGS] * cloth + [SKIN] * (2 - cloth), far)
        toe = at[ANKLES[i]] + (0.065 * unit * np.sin(facing), 0.022 * unit)
        canvas.paint(capsule(at[ANKLES[i]] + (0, 0.016 * unit), toe, 0.038 * unit, 0.034 * unit),
                     person.shoes * (0.86 if far else 1.0), SHOES, line)

    face.hair_behind(canvas, person, line)
    near = [i for i in (0, 1) if depth[[ELBOWS[i], WRISTS[i]]].mean() > body_depth - 0.02]
    for i in {0, 1}.difference(near):
        arm(i, far=True)
    for i in sorted((0, 1), key=lambda i: depth[KNEES[i]] + depth[ANKLES[i]]):
        leg(i, far=bool(depth[ANKLES[i]] < depth[ANKLES[1 - i]] - 0.04))
    _torso(canvas, person, at, unit, line)
    canvas.paint(capsule((at[5] + at[6]) / 2, face.centre, 0.035 * unit, 0.035 * unit), person.skin * 0.9, SKIN, line)
    if front >= 0:
        face.draw(canvas, person, line)
    for i in near:
        arm(i, far=False)
    if front < 0:                                                        # hair hangs over the back
        face.draw(canvas, person, line)


def _upwards(at: np.ndarray) -> np.ndarray:
    """From the hips to the neck, of length 1."""
    spine = at[list(SHOULDERS)].mean(0) - at[list(HIPS)].mean(0)
    return spine / np.hypot(*spine)


def _torso(canvas: Canvas, person: Person, at: np.ndarray, unit: float, line: float) -> None:
    up = _upwards(at)
    side = np.array([-up[1], up[0]])                                     # to our right if up is up
    neck, hip = at[list(SHOULDERS)].mean(0), at[list(HIPS)].mean(0)
    deep = 0.06 * unit                                                   # a body seen from the side is not flat
    chest = max(abs((at[5] - at[6]) @ side) / 2, deep) + 0.015 * unit
    waist = max(abs((at[11] - at[12]) @ side) / 2, deep) + 0.03 * unit
    top, bottom = neck + up * 0.02 * unit, hip - up * 0.03 * unit

    def cloth(x, y):
        dx, dy = x - neck[0], y - neck[1]
        u, v = (dx * side[0] + dy * side[1]) / chest, -(dx * up[0] + dy * up[1]) / (0.27 * unit)
        amount = _pattern(person.pattern, u, v)
        return person.shirt[0] + (person.shirt[1] - person.shirt[0]) * amount[..., None]
    if person.garment in ("skirt", "dress"):
        knees = at[list(KNEES)]
        hem = knees.mean(0) * 0.8 + hip * 0.2
        spread = max(abs((knees[0] - knees[1]) @ side) / 2 + 0.06 * unit, 0.13 * unit)
        shape = polygon(hip + up * 0.05 * unit - side * waist * 0.9, hip + up * 0.05 * unit + side * waist * 0.9,
                        hem + side * spread, hem - side * spread)
        dress = person.garment == "dress"
        canvas.paint(shape, cloth if dress else person.legs, SHIRT if dress else LEGS, line)
    else:
        canvas.paint(capsule(hip - side * waist * 0.45, hip + side * waist * 0.45, waist * 0.55, waist * 0.55),
                     person.legs, LEGS, line)
    shape = polygon(top - side * chest * 0.75, top + side * chest * 0.75, neck + side * chest - up * 0.04 * unit,
                    bottom + side * waist, bottom - side * waist, neck - side * chest - up * 0.04 * unit)
    canvas.paint(shape.grown(0.012 * unit), cloth, SHIRT, line)


def _pattern(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of the second colour.   u -1..1 from side to side, v 0..1 from neck to hips -> like both, 0..1"""
    wave = {"plain": lambda: -1 + 0 * (u + v),
            "stripes": lambda: np.sin(2 * np.pi * 3 * v) + 0 * u,
            "pinstripes": lambda: np.sin(2 * np.pi * 1.5 * u) + 0 * v,
            "checks": lambda: np.sin(2 * np.pi * 1.2 * u) * np.sin(2 * np.pi * 2 * v),
            "dots": lambda: np.cos(2 * np.pi * 1.25 * u) * np.cos(2 * np.pi * 1.8 * v) - 0.35,
            "diagonal": lambda: np.sin(2 * np.pi * (u + 2 * v)),
            "halves": lambda: 4 * (v - 0.5) + 0 * u,
            "band": lambda: 1 - np.abs(v - 0.4) * 8 + 0 * u,
            "sun": lambda: 1 - (u * u * 3.5 + (v - 0.42) ** 2 * 14)}[name]()
    return np.clip(0.5 + 1.5 * wave, 0, 1)


@dataclass(frozen=True)
class Face:
    """A head and what is on it."""
    centre: np.ndarray
    radius: float
    facing: float
    up: np.ndarray

    def at(self, right: float, down: float) -> np.ndarray:
        """A place on the head, in radii."""
        side = np.array([-self.up[1], self.up[0]])
        return self.centre + self.radius * (right * side - down * self.up)

    def hair_behind(self, canvas: Canvas, person: Person, line: float) -> None:
        r, back = self.radius, -np.sin(self.facing)
        if person.hairstyle == "long" and np.cos(self.facing) > -0.2:
            canvas.paint(capsule(self.at(0.3 * back, 0.0), self.at(0.35 * back, 1.5), r * 1.08, r * 0.8),
                         person.hair * 0.85, HAIR, line)
        elif person.hairstyle == "curls":
            canvas.paint(ellipse(self.at(0.2 * back, -0.2), r * 1.45, r * 1.4), person.hair, HAIR, line)
        elif person.hairstyle == "tail":
            canvas.paint(capsule(self.at(0.9 * back, -0.3), self.at(1.35 * back + 0.1, 1.2), r * 0.35, r * 0.2),
                         person.hair * 0.9, HAIR, line)
        elif person.hairstyle == "bun":
            canvas.paint(ellipse(self.at(0.45 * back, -1.15), r * 0.48, r * 0.45), person.hair, HAIR, line)

    def draw(self, canvas: Canvas, person: Person, line: float) -> None:
        r, sine, front = self.radius, np.sin(self.facing), np.cos(self.facing)
        head = ellipse(self.centre, r * 0.92, r)
        canvas.paint(head, person.skin, SKIN, line)
        if front > -0.35:
            for azimuth in (self.facing - 0.42, self.facing + 0.42):
                if np.cos(azimuth) > 0.1:
                    eye = ellipse(self.at(0.85 * np.sin(azimuth), 0.12), r * (0.06 + 0.05 * np.cos(azimuth)), r * 0.16)
                    canvas.paint(eye, np.array([0.08, 0.07, 0.1], np.float32), SKIN)
            if front > 0.1:
                smile = self._smile(0.75 * sine, 0.34 * front + 0.04)
                canvas.paint(smile, np.array([0.62, 0.12, 0.16], np.float32), SKIN)
        canvas.paint(self._hair(head.grown(0.05 * r), sine, front), person.hair, HAIR, line)
        if person.hairstyle == "long" and front <= -0.2:
            canvas.paint(capsule(self.at(0, 0.0), self.at(0, 1.5), r * 1.0, r * 0.85), person.hair, HAIR, line)

    def _smile(self, right: float, half: float) -> Shape:
        """The lower half of an ellipse."""
        middle = self.at(right, 0.42)
        whole = ellipse(middle, half * self.radius, 0.27 * self.radius)

        def distance(x, y):
            above = (x - middle[0]) * self.up[0] + (y - middle[1]) * self.up[1]
            return np.maximum(whole.distance(x, y), above)
        return Shape(whole.box, distance)

    def _hair(self, head: Shape, sine: float, front: float) -> Shape:
        """What of the head is not face: above the brow, behind the ears; all of it from behind."""
        brow = -0.35 + 1.5 * np.clip(-2.2 * front, 0, 1)
        side = np.array([-self.up[1], self.up[0]])

        def distance(x, y):
            dx, dy = (x - self.centre[0]) / self.radius, (y - self.centre[1]) / self.radius
            right, down = dx * side[0] + dy * side[1], -(dx * self.up[0] + dy * self.up[1])
            not_face = np.minimum(down - brow, right * sine + 0.45 + 0.4 * max(front, 0) + 0.15 * down)
            return np.maximum(head.distance(x, y), not_face * self.radius)
        return Shape(head.box, distance)
