"""Random crops: the boxes and tensors of the official loaders."""
import json

import numpy as np
import pytest
import torch
from formula import golden
from PIL import Image
from test_transforms import PHOTOS, needs_photos, probes

from nanodisco import crops, data, recipe, transforms
from nanodisco.config import ClipConfig
from nanodisco.errors import InputError

BOXES = golden("data/crops.json")
CLIP = ClipConfig(224, 14, 8, 1, 1, 8, 8)


@pytest.mark.parametrize("case", BOXES["random_resized_crop"], ids=lambda case: str(case["seed"]))
def test_a_resized_crop_is_the_official_one_and_draws_as_many_numbers(case):
    generator = torch.Generator().manual_seed(case["seed"])
    box = crops.resized_crop((case["width"], case["height"]), generator, case["scale"])
    left, top = case["left"], case["top"]
    assert box == (left, top, left + case["crop_w"], top + case["crop_h"])
    assert float(torch.rand(1, generator=generator)) == pytest.approx(case["next_torch_rand"], abs=1e-7)


@pytest.mark.parametrize("case", BOXES["random_square_then_random_resized_crop"], ids=lambda case: str(case["seed"]))
def test_a_crop_within_a_sliding_square_is_the_official_one(case):
    generator = torch.Generator().manual_seed(case["seed"])
    box = crops.training_box((case["width"], case["height"]), generator, case["scale"], slide=True)
    left, top = (case[f"square_{side}"] + case[f"crop_{side}_in_square"] for side in ("left", "top"))
    assert box == (left, top, left + case["crop_w"], top + case["crop_h"])


@pytest.mark.parametrize("wanted", [(1, 2), (3, 5), (2, 1)])
def test_crops_of_another_aspect_have_it_and_stay_inside(wanted):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        left, top, right, bottom = crops.resized_crop((90, 160), generator, (0.3, 1.0), wanted)
        assert 0 <= left < right <= 90 and 0 <= top < bottom <= 160
        assert (right - left) / (bottom - top) == pytest.approx(wanted[0] / wanted[1], rel=0.03)


@needs_photos
@pytest.mark.parametrize("name, config", [
    ("default_train_scale0305", {"crop": (0.3, 0.5)}), ("stage2_strongaug_train", {"crop": (0.5, 1.0), "slide": True}),
    ("stage1_strongrand_train", {"crop": (0.5, 1.0), "slide": True, "reference": "same"})])
def test_training_tensors_are_the_official_ones(name, config):
    recorded = json.loads((PHOTOS / "augment" / "augment.json").read_text())[name]
    config = recipe.DataConfig("tsv", str(PHOTOS / "samples" / "tsv" / "val.yaml"), **config)
    scene = data.Rows(config).scene(recorded["row"], np.random.default_rng(0), with_pose="cond_imgs" in recorded)
    scene = data.cropped(scene, config, recorded["seed"])
    got = {"label_imgs": transforms.target(scene.targets[0], (256, 256)),
           "reference_img": transforms.reference(scene.reference, scene.mask, 224),
           "reference_img_controlnet": transforms.background(scene.reference, scene.mask, (256, 256))}
    if scene.poses:
        got["cond_imgs"] = transforms.pose(scene.poses[0], (256, 256))
    for field, tensor in got.items():
        assert probes(tensor, recorded[field]) <= 1e-5, field


def test_pictures_of_one_size_are_cut_at_one_place_and_masks_follow_their_pictures():
    ramp = np.add.outer(np.arange(120), np.arange(80)).astype(np.uint8)
    frame, small = Image.fromarray(ramp), Image.fromarray(ramp[::2, ::2])
    config = recipe.DataConfig("dancers", clips=1, crop=(0.3, 0.4))
    cut = data.cropped(data.Scene([frame], [frame], frame, small, [frame]), config, seed=3)
    assert cut.targets[0].size < frame.size and cut.mask.size == cut.reference.size
    for other in (cut.poses[0], cut.reference, cut.persons[0]):
        assert np.array_equal(np.asarray(cut.targets[0]), np.asarray(other))
    assert np.abs(np.asarray(cut.mask).astype(int) - np.asarray(cut.reference)).max() <= 2


def test_each_sample_and_epoch_is_cut_elsewhere_and_always_there():
    config = recipe.DataConfig("dancers", clips=2, width=32, height=32, reference="same", crop=(0.3, 0.6))
    rows = data.Training(config, CLIP, False, 0)
    assert torch.equal(rows[0, 1]["target"], rows[0, 1]["target"])
    assert not torch.equal(rows[0, 1]["target"], rows[1, 1]["target"])


@pytest.mark.parametrize("wrong", [(0.5,), (0.0, 1.0), (0.9, 0.5), (0.5, 1.5)])
def test_shares_of_an_area_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match="data.crop"):
        recipe.Recipe(recipe.DataConfig("dancers", clips=1, crop=wrong), recipe.TrainConfig(1, 1.0, 1), start=("x",))
