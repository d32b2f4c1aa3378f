"""Attribute pre-training (stage 1) against the official program: one ControlNet, for the background, and no pose.

Its sampling runs are in test_golden_sampling.py.
"""
import pytest
import torch
from formula import (GRADIENT, LOSS, MODULE, assert_all_close, build, given, golden, gradients, model, norm,
                     recorded_residuals, training_data)

from nanodisco.disco import Conditions

TENSORS = golden("stage1/stage1.safetensors")
RESULTS = golden("stage1/stage1.json")


@torch.no_grad()
def test_model_without_a_pose_net_gives_the_official_numbers():
    net = model("stage1")
    with recorded_residuals(net) as residuals:
        out = net(given("latents"), given("timesteps"), Conditions(given("tokens"), background=given("bg_latents")))
    got = {"down_00": residuals[0], "down_last": residuals[-2], "mid": residuals[-1], "unet": out}
    assert_all_close(got, TENSORS, MODULE)
    assert got.keys() == {name for name in TENSORS if not name.startswith("sample_")}


@pytest.fixture(scope="module")
def trained():
    """-> loss, and official name -> gradient of what official training with `transblocks` trains"""
    net = build("stage1")
    net.vae.requires_grad_(False)
    net.clip.vision.requires_grad_(False)
    batch, draws = training_data(pose=None)
    loss = net.loss(batch, draws)
    loss.backward()
    return loss.item(), {key: gradient for key, gradient in gradients(net, stage1=True).items()
                         if not key.startswith("unet.") or ".transformer_blocks." in key}


def test_loss_is_the_official_one(trained):
    assert trained[0] == pytest.approx(RESULTS["loss_transblocks"], rel=LOSS)


def test_as_many_parameters_train_as_in_the_official_program(trained):
    assert len(trained[1]) == RESULTS["n_trainable"]
    assert sum(gradient.numel() for gradient in trained[1].values()) == RESULTS["numel_trainable"]


@pytest.mark.parametrize("key", RESULTS["grad_norms_selected"])
def test_gradient_norm_is_the_official_one(trained, key):
    assert norm([trained[1][key]]) == pytest.approx(RESULTS["grad_norms_selected"][key], rel=GRADIENT)


def test_norm_of_all_gradients_is_the_official_one(trained):
    assert norm(trained[1].values()) == pytest.approx(RESULTS["global_grad_norm"], rel=GRADIENT)
