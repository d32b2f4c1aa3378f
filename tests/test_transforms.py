"""Pictures for the networks: the official loader's own tensors, and the rules on synthetic pictures."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nanodisco import transforms
from nanodisco.data import TsvDataset

PHOTOS = Path(__file__).parents[2] / "shared" / "golden" / "data"        # pictures of people: not in this repository
needs_photos = pytest.mark.skipif(not PHOTOS.exists(), reason="../shared/golden/data (pictures of people) is not here")


def probes(tensor, recorded):
    got = tensor.flatten()[torch.tensor(recorded["probe_index_flat"])]
    return (got - torch.tensor(recorded["probe"])).abs().max()


@needs_photos
@pytest.mark.parametrize("i", range(4))
def test_evaluation_tensors_are_the_official_ones(i):
    row, recorded = TsvDataset(PHOTOS / "samples" / "tsv" / "val.yaml")[i], json.loads(
        (PHOTOS / "samples" / "samples.json").read_text())[f"sample{i}"]
    got = {"label_imgs": transforms.target(row.target, (256, 256)), "cond_imgs": transforms.pose(row.pose, (256, 256)),
           "reference_img": transforms.reference(row.reference, row.mask, 224),
           "reference_img_controlnet": transforms.background(row.reference, row.mask, (256, 256))}
    stored = np.load(PHOTOS / "samples" / f"sample{i}_tensors.npz")
    for name, tensor in got.items():
        assert probes(tensor, recorded[name]) <= 1e-5, name
        if name in stored:
            assert np.abs(tensor.numpy() - stored[name].astype(np.float32)).max() <= 2e-3, name
        else:
            picture = np.asarray(Image.open(PHOTOS / "samples" / f"sample{i}_{name}.png")).transpose(2, 0, 1) / 255
            assert np.abs((tensor.numpy() / 2 + 0.5 if name == "label_imgs" else tensor.numpy()) - picture).max() < 1e-6


@needs_photos
@pytest.mark.parametrize("name", ["masked0", "masked1"])
def test_demo_inputs_are_the_official_ones(name):
    recorded = json.loads((PHOTOS / "demo_input" / "demo_input.json").read_text())[name]
    person, scene, pose = (Image.open(PHOTOS / recorded[which]) for which in ("foreground", "background", "pose"))
    hole = ImageOps.invert(transforms.not_black(scene))
    assert probes(transforms.pose(pose, (256, 256)), recorded["cond_imgs"]) <= 1e-5
    reference = transforms.reference(person, transforms.not_black(person), 224, True)
    assert probes(reference, recorded["reference_img"]) <= 1e-5
    assert probes(transforms.background(scene, hole, (256, 256), True), recorded["reference_img_controlnet"]) <= 1e-5


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size, wanted, box", [
    ((604, 1080), (256, 256), (0, 238, 604, 842)),       # the official centre square of a portrait frame
    ((1080, 604), (256, 256), (238, 0, 842, 604)), ((100, 100), (64, 128), (25, 0, 75, 100)),
    ((100, 200), (64, 128), (0, 0, 100, 200)), ((101, 50), (8, 8), (25, 0, 75, 50))])
def test_centre_box_has_the_wanted_aspect_and_touches_two_borders(size, wanted, box):
    assert transforms.centre(size, wanted) == box


def test_what_the_mask_removes_is_zero_after_normalising():
    mask = Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 20, 40))                                      # the person is the left half
    photo = picture(40, 40)
    reference, background = transforms.reference(photo, mask, 40), transforms.background(photo, mask, (40, 40))
    assert (reference[:, :, 20:] == 0).all() and (reference[:, :, :20] != 0).all()
    assert (background[:, :, :20] == 0).all() and (background[:, :, 20:] != 0).all()


def test_picture_of_the_wanted_size_is_only_normalised():
    photo = picture(32, 24)
    assert torch.equal(transforms.target(photo, (32, 24)), transforms.to_tensor(photo) * 2 - 1)
    clip = transforms.reference(picture(28, 28), Image.new("L", (28, 28), 255), 28)
    mean, std = (torch.tensor(x)[:, None, None] for x in (transforms.CLIP_MEAN, transforms.CLIP_STD))
    torch.testing.assert_close(clip * std + mean, transforms.to_tensor(picture(28, 28)))


def test_reference_is_resampled_without_antialiasing_as_torchvision_does_it():
    resize = pytest.importorskip("torchvision.transforms.functional").resize
    photo, mask = picture(90, 90), Image.new("L", (90, 90), 255)
    wanted = resize(transforms.to_tensor(photo), [28, 28], interpolation=3, antialias=False)
    mean, std = (torch.tensor(x)[:, None, None] for x in (transforms.CLIP_MEAN, transforms.CLIP_STD))
    torch.testing.assert_close(transforms.reference(photo, mask, 28) * std + mean, wanted)


def test_binary_mask_keeps_every_trace_of_the_person():
    mask = Image.fromarray(np.array([[0, 1, 128, 255]], np.uint8).repeat(4, 0))
    got = transforms.mask_tensor(mask, (4, 4), (4, 4), Image.Resampling.BICUBIC, binary=True)
    assert got[0, 0].tolist() == [0, 1, 1, 1]


def test_frames_are_rounded_and_clamped():
    pictures = torch.tensor([-0.1, 0.498, 0.499, 2.0]).reshape(1, 1, 1, 4)
    assert transforms.to_frames(pictures)[0, 0, :, 0].tolist() == [0, 127, 127, 255]


def test_a_cropped_reference_is_the_square_around_the_person():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 80, 3), dtype=np.uint8))
    mask = Image.new("L", (80, 100))
    mask.paste(255, (30, 40, 50, 64))                                    # 24 high: the square is 28 wide
    picture, cut = transforms.around(photo, mask)
    assert picture.size == cut.size == (28, 28)
    assert np.array_equal(np.asarray(picture), np.asarray(photo)[38:66, 26:54])
    assert np.asarray(cut).astype(bool).sum() == 20 * 24


def test_a_person_at_the_edge_is_cropped_with_nothing_beyond_it():
    photo, mask = Image.new("RGB", (40, 40), (255, 255, 255)), Image.new("L", (40, 40))
    mask.paste(255, (0, 0, 12, 36))
    picture, cut = transforms.around(photo, mask)
    assert picture.size == (42, 42) and not np.asarray(cut)[:, :15].any()
    assert not transforms.reference(photo, mask, 32, crop=True)[:, :, :11].any()

