"""The video model against the official one: frames as a fifth axis, (B, C, F, H, W).

Its sampling runs are in test_golden_sampling.py, its small-gain values in test_golden_image.py.
"""
from functools import cache

import pytest
import torch
from formula import (GRADIENT, LOSS, MODULE, assert_all_close, assert_close, build, given, golden, gradients,
                     model, norm, recorded, recorded_residuals, training_data)
from torch.nn.functional import silu

from nanodisco import temporal
from nanodisco.disco import Conditions
from nanodisco.temporal import fold, unfold

TENSORS = golden("temporal/temporal.safetensors")
DEBUG = golden("temporal/debug.safetensors")
RESULTS = golden("temporal/temporal.json")
FRAMES = RESULTS["nframes"]


# ---- Outputs of modules ----------------------------------------------------------------------------------

def numbered(prefix, residuals):
    """Residuals as clips under their golden names: down_00 … down_11 and mid."""
    *down, mid = [unfold(x, FRAMES) for x in residuals]
    return {f"{prefix}_down_{i:02}": x for i, x in enumerate(down)} | {f"{prefix}_mid": mid}


@torch.no_grad()
def each_controlnet():
    net, seen = model("temporal"), (fold(given("t_latents"))[0], given("timesteps"), given("tokens"))
    return (numbered("controlnet0", net.pose(*seen, fold(given("t_pose"))[0], FRAMES))
            | numbered("controlnet1", net.background(*seen, given("bg_latents"), FRAMES)))


@torch.no_grad()
def whole_at_two_scales():
    seen, net = {}, model("temporal")
    conditions = Conditions(given("tokens"), given("t_pose"), given("bg_latents"))
    for scales in ((1.0, 1.0), RESULTS["scales"]):
        name = "scale_{}_{}".format(*scales)
        with recorded_residuals(net) as residuals:
            seen[f"unet_{name}"] = net(given("t_latents"), given("timesteps"), conditions, *scales)
        seen |= numbered(f"merged_{name}", residuals)
    return seen


@torch.no_grad()
def unet(frames=FRAMES, batch=2):
    z, _ = fold(given("t_latents")[:batch, :, :frames])
    out = model("temporal").unet(z, given("timesteps")[:batch], given("tokens")[:batch], frames=frames)
    return {"unet_no_residuals" if frames > 1 else "unet_single_frame": unfold(out, frames)}


OURS = {"each controlnet": cache(each_controlnet), "whole at two scales": cache(whole_at_two_scales),
        "unet": cache(unet), "unet of a single frame": cache(lambda: unet(frames=1))}


@pytest.mark.parametrize("part", OURS)
def test_modules_give_the_official_numbers(part):
    stored = {name: x for name, x in OURS[part]().items() if name in TENSORS}    # of the residuals only some are
    assert_all_close(stored, TENSORS, MODULE)


def test_every_golden_module_output_is_compared():
    ours = {name for part in OURS.values() for name in part()}
    assert {name for name in TENSORS if not name.startswith("sample_")} <= ours


def test_residuals_have_the_official_shapes():
    shapes = [list(x.shape) for name, x in OURS["each controlnet"]().items() if name.startswith("controlnet0_down")]
    assert shapes == RESULTS["down_residual_shapes"] and len(shapes) == RESULTS["n_down_residuals"]


# ---- Inner modules ---------------------------------------------------------------------------------------

PATHS = {                              # official module -> where ours gives the same
    "resnets.0": "res.0", "resnets.0.norm1": "res.0.norm1", "resnets.0.tem_conv": "res.0.temporal",
    "attentions.0": "attn.0", "attentions.0.norm": "attn.0.norm",
    "attentions.0.transformer_blocks.0": "attn.0.block",
    "attentions.0.transformer_blocks.0.attn1": "attn.0.block.self_attn",
    "attentions.0.transformer_blocks.0.attn2": "attn.0.block.cross_attn",
    "attentions.0.transformer_blocks.0.tem_attn": "attn.0.block.temporal"}

UNET_PATHS = {f"unet.down_blocks.0.{theirs}": f"encoder.down.0.{ours}" for theirs, ours in PATHS.items()} | {
    "unet.down_blocks.0": "encoder.down.0.down", "unet.mid_block": "encoder.mid", "unet.up_blocks.0": "up.0.up"}


@pytest.fixture(scope="module")
def inner():
    """Official name -> our tensor, as we have it; of the first clip alone."""
    norms = []
    with pytest.MonkeyPatch.context() as patch, recorded(model("temporal").unet, UNET_PATHS) as seen:
        # the norm before the first temporal convolution is no call of a module
        true = temporal.group_norm_silu
        patch.setattr(temporal, "group_norm_silu", lambda *args: norms.append(true(*args)) or norms[-1])
        unet(batch=1)
    return seen | {"unet.down_blocks.0.resnets.0.tem_norm": norms[0]}


def as_ours(name, theirs):
    """A recorded official tensor in the layout that we have, frames folded into the batch."""
    if name.endswith("tem_attn"):                                        # (H*W, F, D)
        return theirs.transpose(0, 1)
    if name.endswith("tem_conv"):                                        # (H*W, C, F)
        return theirs.permute(2, 1, 0).unflatten(2, (8, 8))
    theirs = fold(theirs)[0] if theirs.ndim == 5 else theirs
    return silu(theirs) if name.endswith(("norm1", "tem_norm")) else theirs      # ours are one with the SiLU


@pytest.mark.parametrize("name", DEBUG)
def test_inner_module_gives_the_official_numbers(inner, name):
    assert_close(inner[name], as_ours(name, DEBUG[name]), MODULE)


def test_every_golden_inner_module_is_compared(inner):
    assert inner.keys() == DEBUG.keys()


def test_norm2_serves_twice_in_a_block_and_the_temporal_norm_never():
    block, calls = model("temporal").unet.encoder.down[0].attn[0].block, []
    hooks = [module.register_forward_hook(lambda *_, name=name: calls.append(name))
             for name, module in (("norm2", block.norm2), ("tem_norm", block.unused_norm))]
    unet()
    for hook in hooks:
        hook.remove()
    assert calls == RESULTS["norm_calls_in_one_block"]


# ---- Training ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained():
    """-> loss, and official name -> gradient, or None where there is none"""
    net = build("temporal")
    net.requires_grad_(True)           # the unused norms too, as in the official program
    net.vae.requires_grad_(False)
    net.clip.vision.requires_grad_(False)
    loss = net.loss(*training_data("t_"))
    loss.backward()
    return loss.item(), gradients(net)


def test_loss_is_the_official_one(trained):
    assert trained[0] == pytest.approx(RESULTS["loss_all"], rel=LOSS)


def test_parameters_without_gradient_are_the_unused_norms(trained):
    without = [key for key, gradient in trained[1].items() if gradient is None]
    assert len(without) == RESULTS["params_without_grad_count"] == 60
    assert all(".transformer_blocks.0.tem_norm." in key for key in without)
    assert sorted({key.split("transformer_blocks.0.")[1] for key in without}) == RESULTS["params_without_grad"]


@pytest.mark.parametrize("key", RESULTS["grad_norms_selected"])
def test_gradient_norm_is_the_official_one(trained, key):
    assert norm([trained[1][key]]) == pytest.approx(RESULTS["grad_norms_selected"][key], rel=GRADIENT)


def test_norm_of_all_gradients_is_the_official_one(trained):
    all_ = [gradient for gradient in trained[1].values() if gradient is not None]
    assert norm(all_) == pytest.approx(RESULTS["global_grad_norm"], rel=GRADIENT)


@torch.no_grad()
def test_dropped_reference_gives_the_official_loss():
    loss = model("temporal", uncond="clip-zero").loss(*training_data("t_", drop_reference=True))
    assert loss.item() == pytest.approx(RESULTS["loss_reference_dropped"], rel=LOSS)


@torch.no_grad()
def test_dropped_poses_give_the_official_loss():
    loss = model("temporal").loss(*training_data("t_", drop_pose=True))
    assert loss.item() == pytest.approx(RESULTS["loss_all_poses_dropped"], rel=LOSS)
