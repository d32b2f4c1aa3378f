"""The ControlNet is diffusers' ControlNet, for any hint; a fresh one changes nothing."""
from functools import cache

import pytest
import torch
from reference import SAME, copy_weights, encoder_arguments, normal, randomised
from torch.testing import assert_close

from nanodisco.config import ControlNetConfig, UNetConfig
from nanodisco.controlnet import ControlNet, LatentHint, PixelHint
from nanodisco.unet import Encoder, UNet

TINY = UNetConfig(4, (8, 16), attention=(True, False), layers=1, heads=2, context=12, groups=4)

SIZES = {                              # hint, UNet, (h, w) of the latent
    "pixels, an eighth": (ControlNetConfig("pixels", 3, (4, 6, 10, 12)), TINY, (9, 7)),
    "pixels, a quarter": (ControlNetConfig("pixels", 3, (5, 8, 6)),
                          UNetConfig(8, (12, 24, 24), (True, False, True), 2, 3, 24, 3), (8, 12)),
    "pixels, a half, 6 channels": (ControlNetConfig("pixels", 6, (4, 16)),
                                   UNetConfig(16, (16, 16, 32, 32), (False, True, True, False), 1, 4, 9, 8), (11, 6)),
    "latents": (ControlNetConfig("latents", 4), TINY, (9, 7)),
    "latents, 16 channels": (ControlNetConfig("latents", 16),
                             UNetConfig(16, (8, 16), (True, True), 2, 8, 8, 8), (6, 8))}


@cache
def twins(name):
    """diffusers' ControlNet and ours, with the same weights"""
    diffusers, (hint, unet, _) = pytest.importorskip("diffusers"), SIZES[name]
    theirs = diffusers.ControlNetModel(
        conditioning_channels=hint.channels, conditioning_embedding_out_channels=hint.widths or (1, 1),
        mid_block_type="UNetMidBlock2DCrossAttn", **encoder_arguments(unet))
    if hint.hint == "latents":         # as DisCo does it: theirs knows pixels only
        theirs.controlnet_cond_embedding = LatentHint(hint.channels, unet.widths[0])
    return randomised(theirs), copy_weights(theirs, ControlNet(hint, unet), "pose.")


def inputs(hint, unet, size=(6, 5), batch=2, frames=1):
    """z (B*F, C, h, w), t (B,), tokens (B, 7, context), hint (B*F, channels, H, W)"""
    factor = 2 ** (len(hint.widths) - 1) if hint.hint == "pixels" else 1
    return (normal(batch * frames, unet.channels, *size), torch.tensor([17, 801])[:batch],
            normal(batch, 7, unet.context, seed=1),
            normal(batch * frames, hint.channels, factor * size[0], factor * size[1], seed=2))


@pytest.mark.parametrize("scale", [1.0, 0.7])
@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_controlnet_is_that_of_diffusers(name, scale):
    theirs, ours = twins(name)
    z, t, tokens, hint = inputs(*SIZES[name])
    down, mid = theirs(z, t, tokens, controlnet_cond=hint, conditioning_scale=scale, return_dict=False)
    assert all(x.abs().max() > 0.1 for x in [*down, mid])                # no zero convolution left to hide behind
    assert_close(ours(z, t, tokens, hint, scale=scale), [*down, mid], **SAME)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_a_fresh_controlnet_leaves_the_unet_unchanged(name):
    hint, config, size = SIZES[name]
    net, fresh = randomised(UNet(config)), ControlNet(hint, config).double()
    z, t, tokens, picture = inputs(hint, config, size)
    assert torch.equal(net(z, t, tokens, fresh(z, t, tokens, picture)), net(z, t, tokens))


@torch.no_grad()
def test_a_fresh_pixel_hint_says_nothing_yet():
    assert PixelHint(3, (4, 6, 10), out=8)(torch.rand(1, 3, 16, 24)).eq(0).all()


@torch.no_grad()
def test_a_latent_hint_is_a_wider_conv_in():
    """conv_in(z) + hint(x) is one convolution of z and x side by side."""
    net = randomised(ControlNet(ControlNetConfig("latents", 4), TINY))
    z, t, tokens, hint = inputs(*SIZES["latents"])
    wide = Encoder(UNetConfig(8, (8, 16), attention=(True, False), layers=1, heads=2, context=12, groups=4)).double()
    wide.load_state_dict(net.encoder.state_dict() | {
        "conv_in.weight": torch.cat([net.encoder.conv_in.weight, net.hint.conv_in.weight], dim=1),
        "conv_in.bias": net.encoder.conv_in.bias + net.hint.conv_in.bias})
    skips, middle, _ = wide(torch.cat([z, hint], dim=1), t, tokens)
    wanted = [zero(x) for zero, x in zip([*net.zero_skips, net.zero_mid], [*skips, middle], strict=True)]
    assert_close(net(z, t, tokens, hint), wanted, **SAME)


@pytest.mark.parametrize("name", ["pixels, an eighth", "latents"])
@torch.no_grad()
def test_one_hint_for_a_clip_is_shown_to_every_frame(name):
    net = randomised(ControlNet(*SIZES[name][:2]))
    z, t, tokens, hint = inputs(*SIZES[name], frames=3)
    of_clips = hint[[0, 3]]                                              # (B, channels, H, W)
    assert_close(net(z, t, tokens, of_clips, frames=3),
                 net(z, t, tokens, of_clips[[0, 0, 0, 1, 1, 1]], frames=3), **SAME)


@torch.no_grad()
def test_each_frame_sees_its_own_hint():
    net = randomised(ControlNet(*SIZES["latents"][:2]))
    z, t, tokens, hint = inputs(*SIZES["latents"], frames=3)
    other = hint.clone()
    other[4] += 1                                                        # the middle frame of the second clip
    moved = [(a - b).flatten(1).norm(dim=1) for a, b in
             zip(net(z, t, tokens, hint, frames=3), net(z, t, tokens, other, frames=3))]
    first_skip = moved[0]                                                # before any norm that is pooled over a clip
    assert first_skip[4] > 1 and first_skip[[0, 1, 2, 3, 5]].eq(0).all()
    assert all(x[:3].eq(0).all() and x[4] > 1e-3 for x in moved)         # the other clip never sees it
