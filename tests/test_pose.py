"""Poses: the official drawing to the byte, every JSON format in and out, alignment."""
import hashlib
import json
import math

import numpy as np
import pytest
from formula import golden

from nanodisco import pose
from nanodisco.errors import InputError
from nanodisco.pose import Frame

CASES = golden("pose/cases.json")


def person(seed=0, size=(200, 300), missing=()):
    """(17, 3), whole pixels"""
    rng = np.random.default_rng(seed)
    joints = np.concatenate([np.trunc(rng.uniform(20, 180, (17, 2))), np.full((17, 1), 0.5)], axis=1)
    joints[list(missing)] = -1
    return joints


# ---- Drawing ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", CASES)
def test_drawing_is_the_official_one_to_the_byte(name):
    case = CASES[name]
    people = [np.array(one["keypoints"], float) for one in case["people"]]
    drawn = pose.draw(people, (case["width"], case["height"]))
    assert hashlib.sha256(drawn.tobytes()).hexdigest() == case["rgb_sha256"]


def with_opencv(cv2, joints, size):
    """The same drawing by OpenCV, which the official program calls."""
    canvas, points = np.zeros((size[1], size[0], 3), np.uint8), pose.to_openpose(joints)[:, :2]
    for (x, y), colour in zip(points, pose.COLOURS):
        if x >= 0 and y >= 0:
            cv2.circle(canvas, (int(x), int(y)), 4, colour, thickness=-1)
    for (i, j), colour in zip(pose.LIMBS, pose.COLOURS):
        (x0, y0), (x1, y1) = points[i], points[j]
        if min(x0, y0, x1, y1) >= 0:
            middle, length = (int((x0 + x1) / 2), int((y0 + y1) / 2)), math.hypot(x0 - x1, y0 - y1)
            angle = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
            over = canvas.copy()
            cv2.fillConvexPoly(over, cv2.ellipse2Poly(middle, (int(length / 2), 4), angle, 0, 360, 1), colour)
            canvas = cv2.addWeighted(canvas, 0.4, over, 0.6, 0)
    return canvas


@pytest.mark.parametrize("whole", [True, False])
def test_drawing_is_opencv_s_on_random_people_some_of_them_outside(whole):
    cv2, rng = pytest.importorskip("cv2"), np.random.default_rng(int(whole))
    for _ in range(60):
        size = rng.integers(20, 500, 2).tolist()
        joints = np.concatenate([rng.uniform(-0.1, 1.2, (17, 2)) * size, np.ones((17, 1))], axis=1)
        joints = np.trunc(joints) if whole else joints
        assert np.array_equal(pose.draw([joints], size), with_opencv(cv2, joints, size))


def test_only_the_first_person_is_drawn():
    assert np.array_equal(pose.draw([person(0), person(1)], (200, 300)), pose.draw([person(0)], (200, 300)))


def test_a_limb_on_black_is_drawn_at_sixty_per_cent():
    joints = np.full((17, 3), -1.0)
    joints[[5, 7]] = (20, 50, 1), (180, 50, 1)                           # left shoulder and elbow
    drawn = pose.draw([joints], (200, 100))
    assert drawn[50, 100].tolist() == [round(0.6 * c) for c in pose.COLOURS[pose.LIMBS.index((5, 6))]]


# ---- Skeletons and JSON -----------------------------------------------------------------------------------------

def test_blazepose_joints_unseen_or_outside_are_missing():
    points = np.tile([50.0, 50.0, 0.9], (33, 1))
    points[0, 2], points[2, 0], points[5, 1] = 0.49, 101, -1
    found = pose.from_blazepose(points, (100, 100))
    assert (found[:3] == -1).all() and (found[3:] == (50, 50, 0.9)).all()


@pytest.mark.parametrize("form", ["disco", "openpose", "coco"])
def test_written_poses_are_read_back(tmp_path, form):
    frames = [Frame((person(1, missing=[3, 9]), person(2)), (200, 300), "a"), Frame((), (200, 300), "b")]
    frames = frames[:1] if form == "disco" else frames
    (tmp_path / "pose.json").write_text(json.dumps(pose.to_json(frames, form)))
    back = pose.read(tmp_path / "pose.json")
    assert len(back) == len(frames)
    for one, other in zip(back, frames):
        assert one.size == (None if form == "disco" else other.size) and len(one.people) == len(other.people)
        for a, b in zip(one.people, other.people):
            assert np.array_equal(a, b)


def read(tmp_path, content):
    (tmp_path / "pose.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return pose.read(tmp_path / "pose.json")


def test_body_25_has_its_hips_elsewhere(tmp_path):
    points = np.arange(1.0, 76).reshape(25, 3)
    found = read(tmp_path, {"people": [{"pose_keypoints_2d": points.ravel().tolist()}]})[0].people[0]
    assert np.array_equal(found[[0, 11, 12, 15]], points[[0, 12, 9, 14]])    # nose, hips, left ankle


def test_shares_of_a_canvas_become_pixels(tmp_path):
    numbers = np.tile([0.5, 0.25, 1.0], 18).tolist()
    frame, = read(tmp_path, [{"people": [{"pose_keypoints_2d": numbers}], "canvas_width": 200, "canvas_height": 100}])
    assert frame.size == (200, 100) and (frame.people[0] == (100, 25, 1)).all()


def test_coco_results_are_frames_in_order_with_the_surest_person_first(tmp_path):
    results = [{"image_id": i, "keypoints": person(seed).ravel().tolist(), "score": score}
               for i, seed, score in ((2, 0, 0.9), (1, 1, 0.3), (1, 2, 0.8))]
    frames = read(tmp_path, results)
    assert [frame.name for frame in frames] == ["1", "2"] and np.array_equal(frames[0].people[0], person(2))


@pytest.mark.parametrize("names", [["frame10", "frame2", "²"], ["10.png", "9.png"]], ids=str)
def test_frames_of_coco_are_in_natural_order(tmp_path, names):
    images = [{"id": i, "file_name": name, "width": 9, "height": 9} for i, name in enumerate(names)]
    results = [{"image_id": name, "keypoints": person(0).ravel().tolist()} for name in names]
    wanted = sorted(names, key=lambda name: int("".join(filter(str.isdecimal, name)) or 99))
    assert [frame.name for frame in read(tmp_path, {"images": images, "annotations": []})] == wanted
    assert [frame.name for frame in read(tmp_path, results)] == wanted


@pytest.mark.parametrize("content, words", [
    ("[{", "not whole JSON"), ("[" * 100_000, "not whole JSON"),
    ("7", "holds no poses"), ({"persons": []}, "holds no poses"),
    ([{"keypoints": [[1, 2, 3]] * 16}], "48 numbers"), ([{"keypoints": [[1, 2, "x"]] * 17}], "holds no poses"),
    ([{"keypoints": [[1e6, 2, 1]] * 17}], "a joint at 1000000 pixels"),
    ({"people": [], "canvas_width": 0, "canvas_height": 9}, "a frame of 0 x 9"),
    ({"people": [], "canvas_width": None, "canvas_height": 9}, "holds no poses"),
    ([{"keypoints": [[1, 2, float("nan")]] * 17}], "finite"), ({"people": [{}]}, "holds no poses")], ids=str)
def test_json_without_poses_is_refused(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, content)


# ---- Alignment --------------------------------------------------------------------------------------------------

def test_alignment_finds_the_scale_and_the_shift_of_a_moved_person():
    first, reference = person(3), person(3)
    reference[:, :2] = 2 * first[:, :2] + (10, 30)
    moved, = pose.align([Frame((first,))], reference)
    assert np.abs(moved.people[0][:, :2] - reference[:, :2]).max() <= 1      # cut to whole pixels
    assert np.array_equal(moved.people[0][:, 2], first[:, 2])


def test_alignment_is_the_least_squares_similarity_without_its_rotation():
    first, reference = person(4), person(5)
    a, b = (pose._steady(joints) for joints in (first, reference))
    rows = [row for x, y in a for row in ((x, -y, 1, 0), (y, x, 0, 1))]      # c, s, tx, ty
    c, s, tx, ty = np.linalg.lstsq(np.array(rows), b.ravel(), rcond=None)[0]
    moved, = pose.align([Frame((first,))], reference)
    assert np.array_equal(moved.people[0][:, :2], np.trunc(first[:, :2] * math.hypot(c, s) + (tx, ty)))


def test_alignment_leaves_missing_joints_missing_and_needs_five_common_ones():
    moved, = pose.align([Frame((person(3, missing=[9]),))], person(3) * (2, 2, 1))
    assert (moved.people[0][9] == -1).all()
    with pytest.raises(InputError, match="share 4 joints"):
        pose.align([Frame((person(3),))], person(3, missing=range(4, 17)))


def test_alignment_needs_joints_in_more_than_one_place():
    one_place = person(3)
    one_place[:, :2] = 0.1
    for first, reference in ((person(3), one_place), (one_place, person(3))):
        with pytest.raises(InputError, match="in one place"):
            pose.align([Frame((first,))], reference)
