"""The UNet is diffusers' UNet, whatever its sizes; and what a clip's frames share."""
from dataclasses import replace
from functools import cache

import pytest
import torch
from reference import SAME, copy_weights, encoder_arguments, normal, randomised
from torch.testing import assert_close

from nanodisco.config import UNetConfig
from nanodisco.unet import UNet

TINY = UNetConfig(4, (8, 16), attention=(True, False), layers=1, heads=2, context=12, groups=4)
VIDEO = replace(TINY, temporal=True)

SIZES = {                              # config, (h, w) of the latent
    "2 levels, odd latent": (TINY, (9, 7)),
    "2 levels, attention only in the middle": (UNetConfig(8, (8, 8), (False, False), 2, 1, 20, 8), (6, 10)),
    "3 levels, 3 heads": (UNetConfig(16, (12, 24, 36), (False, True, True), 2, 3, 24, 3), (8, 14)),
    "4 levels, odd at each": (UNetConfig(4, (16, 32, 48, 48), (True, False, True, False), 2, 4, 24, 16), (25, 13)),
    "4 levels, narrowing": (UNetConfig(5, (24, 16, 16, 8), (True, True, True, True), 1, 8, 9, 8), (8, 8)),
    "1 level": (UNetConfig(4, (12,), (True,), 3, 4, 10, 6), (5, 3))}


@cache
def twins(name):
    """diffusers' UNet and ours, with the same weights"""
    diffusers, (config, _) = pytest.importorskip("diffusers"), SIZES[name]
    ups = ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(config.attention)]
    theirs = randomised(diffusers.UNet2DConditionModel(
        out_channels=config.channels, up_block_types=ups, mid_block_type="UNetMidBlock2DCrossAttn",
        **encoder_arguments(config)))
    return theirs, copy_weights(theirs, UNet(config), "unet.")


def inputs(config, size=(6, 5), batch=2, frames=1):
    """z (B*F, C, h, w), t (B,), tokens (B, 7, context)"""
    return normal(batch * frames, config.channels, *size), torch.tensor([17, 801, 400])[:batch], normal(
        batch, 7, config.context, seed=1)


def with_untrained_temporal_layers(net, config):
    """The same picture weights in a video UNet"""
    video = UNet(replace(config, temporal=True)).double()
    missing, unexpected = video.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected and all(".temporal." in key or ".unused_norm." in key for key in missing)
    return video


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_unet_is_that_of_diffusers(name):
    theirs, ours = twins(name)
    z, t, tokens = inputs(*SIZES[name])
    assert_close(ours(z, t, tokens), theirs(z, t, tokens).sample, **SAME)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_unet_adds_residuals_as_that_of_diffusers(name):
    theirs, ours = twins(name)
    z, t, tokens = inputs(*SIZES[name])
    skips, middle, _ = ours.encoder(z, t, tokens)
    *down, mid = residuals = [normal(*x.shape, seed=2 + i) for i, x in enumerate([*skips, middle])]
    wanted = theirs(z, t, tokens, down_block_additional_residuals=tuple(down), mid_block_additional_residual=mid)
    assert_close(ours(z, t, tokens, residuals), wanted.sample, **SAME)


@torch.no_grad()
def test_a_missing_residual_is_noticed():
    net, (z, t, tokens) = randomised(UNet(TINY)), inputs(TINY)
    skips, middle, _ = net.encoder(z, t, tokens)
    with pytest.raises(AssertionError, match=f"{len(skips) - 1} residuals for {len(skips)} skips"):
        net(z, t, tokens, [*skips[1:], middle])


@torch.no_grad()
def test_untrained_temporal_layers_leave_a_clip_of_one_frame_unchanged():
    net, (z, t, tokens) = randomised(UNet(TINY)), inputs(TINY)
    video = with_untrained_temporal_layers(net, TINY)
    assert_close(video(z, t, tokens, frames=1), net(z, t, tokens), **SAME)


@torch.no_grad()
def test_untrained_temporal_layers_leave_a_clip_of_equal_frames_unchanged():
    net, (z, t, tokens) = randomised(UNet(TINY)), inputs(TINY)
    video = with_untrained_temporal_layers(net, TINY)
    got = video(z.repeat_interleave(3, 0), t, tokens, frames=3)
    assert_close(got, net(z, t, tokens).repeat_interleave(3, 0), **SAME)


@torch.no_grad()
def test_frames_see_each_other_through_pooled_norms_even_before_temporal_layers_are_trained():
    # official: the norms of the ResBlocks run over the whole clip
    video, (z, t, tokens) = with_untrained_temporal_layers(randomised(UNet(TINY)), TINY), inputs(TINY, frames=3)
    clip, alone = video(z, t, tokens, frames=3), video(z, t.repeat_interleave(3), tokens.repeat_interleave(3, 0))
    assert (clip - alone).abs().max() > 0.1


@torch.no_grad()
def test_samples_of_a_batch_do_not_see_each_other():
    net, (z, t, tokens) = randomised(UNet(TINY)), inputs(TINY, batch=3)
    singles = [net(z[i:i + 1], t[i:i + 1], tokens[i:i + 1]) for i in range(3)]
    assert_close(net(z, t, tokens), torch.cat(singles), **SAME)


@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other():
    net, (z, t, tokens) = randomised(UNet(VIDEO)), inputs(TINY, frames=4)
    singles = [net(z[4 * i:4 * i + 4], t[i:i + 1], tokens[i:i + 1], frames=4) for i in range(2)]
    assert_close(net(z, t, tokens, frames=4), torch.cat(singles), **SAME)


@torch.no_grad()
def test_clip_played_backwards_comes_out_backwards_but_for_the_convolution_along_frames():
    # attention along frames knows no order, and norms none either: only the three-frame convolution does
    net, (z, t, tokens) = randomised(UNet(VIDEO)), inputs(TINY, batch=1, frames=4)
    forward, backward = net(z, t, tokens, frames=4), net(z.flip(0), t, tokens, frames=4).flip(0)
    assert (forward - backward).abs().max() > 0.1
    for name, p in net.named_parameters():
        if name.endswith("temporal.conv.weight"):
            p.copy_((p + p.flip(2)) / 2)
    assert_close(net(z.flip(0), t, tokens, frames=4).flip(0), net(z, t, tokens, frames=4), **SAME)


@pytest.mark.parametrize("config, frames", [(TINY, 1), (VIDEO, 3)], ids=["pictures", "clips"])
@torch.no_grad()
def test_bfloat16_is_near_float32(config, frames):
    net, (z, t, tokens) = randomised(UNet(config)), inputs(config, frames=frames)
    exact = net.float()(z.float(), t, tokens.float(), frames=frames)
    rounded = net.bfloat16()(z.bfloat16(), t, tokens.bfloat16(), frames=frames)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
