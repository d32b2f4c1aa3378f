"""The estimator finds what MediaPipe finds; without it, the other ways are named."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nanodisco import estimate, inputs, pose
from nanodisco.errors import InputError

PICTURES = Path(__file__).parents[2] / "shared" / "golden" / "data"
real = pytest.mark.skipif(not PICTURES.exists() or not estimate.installed(),
                          reason="needs MediaPipe, and the official sample pictures, which show real people")


def found_by_mediapipe() -> dict:
    return json.loads((PICTURES / "mediapipe" / "mediapipe_0.10.21.json").read_text())["frames"]


def toy(name: str, part: str = "") -> Image.Image:
    place = PICTURES / "toy_dataset" / name
    return Image.open(next((place.parent / part).glob(place.stem + ".*")))


@real
def test_masks_overlap_the_recorded_ones_as_much_as_recorded():
    for name, row in found_by_mediapipe().items():
        wanted = np.asarray(toy(name, "groundsam").convert("L")) >= 128
        got = np.asarray(estimate.mask(toy(name))) >= 128
        assert abs((wanted & got).sum() / (wanted | got).sum() - row["iou_selfie_general"]) <= 0.01, name


@real
def test_joints_are_where_they_were_recorded():
    for name, row in found_by_mediapipe().items():
        picture = toy(name)
        frame, = estimate.poses([np.asarray(picture.convert("RGB"))])
        wanted = pose.from_blazepose(np.array(row["blazepose33_xy_visibility"]), picture.size)
        assert np.abs(frame.people[0][:, :2] - wanted[:, :2]).max() <= 2, name


class Fake:
    """Of MediaPipe's interface what is used: the mask is the red channel, the joints lie on the diagonal."""

    def __init__(self, min_detection_confidence=None, **_):
        self.sure = min_detection_confidence

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def process(self, frame):
        points = [SimpleNamespace(x=i / 40, y=i / 80, visibility=1.0) for i in range(33)]
        bright = self.sure is not None and frame.mean() / 255 >= self.sure
        return SimpleNamespace(segmentation_mask=frame[..., 0] / np.float32(255),
                               pose_landmarks=SimpleNamespace(landmark=points) if bright else None)


@pytest.fixture
def fake(monkeypatch):
    solutions = SimpleNamespace(selfie_segmentation=SimpleNamespace(SelfieSegmentation=Fake),
                                pose=SimpleNamespace(Pose=Fake))
    monkeypatch.setattr(estimate, "_solutions", lambda: solutions)
    monkeypatch.setattr(estimate, "installed", lambda: True)


def test_a_mask_has_the_size_of_its_picture_and_whole_grey_levels(fake):
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    found = estimate.mask(Image.fromarray(picture))
    assert found.mode == "L" and np.array_equal(np.asarray(found), picture[..., 0])


@pytest.mark.parametrize("brightness, people", [(200, 1), (100, 1), (40, 0)])
def test_a_frame_with_nobody_is_looked_at_again_less_strictly(fake, brightness, people):
    frame, = estimate.poses([np.full((100, 80, 3), brightness, np.uint8)])
    assert len(frame.people) == people and frame.size == (80, 100)
    if people:
        np.testing.assert_allclose(frame.people[0][5], (11 / 40 * 80, 11 / 80 * 100, 1))     # landmark 11: a shoulder


def test_a_photo_without_a_mask_has_its_person_found(fake, tmp_path):
    Image.new("RGB", (20, 30), (255, 0, 0)).save(tmp_path / "me.png")
    said = []
    assert inputs.photo(str(tmp_path / "me.png"), None, said.append)[1].getextrema() == (255, 255)
    assert "MediaPipe" in said[0]


def test_poses_of_a_video_are_found(fake, tmp_path):
    frames = [Image.new("RGB", (80, 100), (shade,) * 3) for shade in (200, 10)]
    frames[0].save(tmp_path / "dance.gif", save_all=True, append_images=frames[1:])
    found = inputs.poses(str(tmp_path / "dance.gif"), (80, 100), None, lambda text: None)
    assert [np.asarray(found[i]).any() for i in range(len(found))] == [True, False]


def test_without_the_estimator_the_three_ways_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "installed", lambda: False)
    Image.new("RGB", (20, 30)).save(tmp_path / "me.png")
    with pytest.raises(InputError, match="(?s)--ref-mask.*transparency.*pip install.*mediapipe"):
        inputs.photo(str(tmp_path / "me.png"), None, print)
    Image.new("RGB", (20, 30)).save(tmp_path / "dance.gif")
    with pytest.raises(InputError, match="OpenPose.*pip install"):
        inputs.poses(str(tmp_path / "dance.gif"), (20, 30), None, print)
