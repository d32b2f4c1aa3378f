"""The image encoder is CLIP's by transformers, in each of the three ways to take tokens from it."""
from functools import cache

import pytest
import torch
from reference import SAME, copy_weights, normal, randomised
from torch.testing import assert_close

from nanodisco.clip import ImageEncoder
from nanodisco.config import ClipConfig

SIZES = {
    "quick_gelu": ClipConfig(image_size=24, patch=8, width=32, layers=2, heads=4, mlp=96, projection=20),
    "gelu": ClipConfig(image_size=28, patch=4, width=48, layers=3, heads=3, mlp=64, projection=24, activation="gelu")}

CONTEXT = 20


@cache
def theirs(name):
    transformers, c = pytest.importorskip("transformers"), SIZES[name]
    return randomised(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
        image_size=c.image_size, patch_size=c.patch, hidden_size=c.width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, intermediate_size=c.mlp, projection_dim=c.projection, hidden_act=c.activation,
        attn_implementation="sdpa")))                                    # their "eager" has its softmax in float32


def ours(name, mode, context=CONTEXT):
    net = randomised(ImageEncoder(SIZES[name], context, mode))
    copy_weights(theirs(name), net.vision, "clip.vision.")
    return net


def photo(name):
    return normal(2, 3, SIZES[name].image_size, SIZES[name].image_size)


def their_tokens(name):
    """Every token behind the last LayerNorm, which theirs applies to the first one only.   (B, M, width)"""
    net = theirs(name)
    return net.vision_model.post_layernorm(net(photo(name)).last_hidden_state)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_local_tokens_are_all_of_clips_through_the_trained_projection(name):
    net = ours(name, "local")
    got = net(photo(name))
    assert got.shape == (2, SIZES[name].tokens, CONTEXT)
    assert_close(got, their_tokens(name) @ net.proj.weight.T, **SAME)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_local_clip_tokens_are_all_of_clips_through_its_own_projection(name):
    net = ours(name, "local-clip")
    assert net.proj is None
    assert_close(net(photo(name)), theirs(name).visual_projection(their_tokens(name)), **SAME)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_the_global_token_is_clips_embedding_of_the_picture(name):
    assert_close(ours(name, "global")(photo(name)), theirs(name)(photo(name)).image_embeds[:, None], **SAME)


@torch.no_grad()
def test_the_two_activations_are_not_the_same():
    quick, exact = (randomised(ImageEncoder(ClipConfig(24, 8, 32, 2, 4, 96, 20, activation), CONTEXT, "local"))
                    for activation in ("quick_gelu", "gelu"))
    difference = (quick(photo("quick_gelu")) - exact(photo("quick_gelu"))).abs().max()
    assert 1e-4 < difference < 0.1
