"""Layers and the operations under them, each against its formula in float64."""
import math

import pytest
import torch
from reference import SAME, normal, randomised
from torch.nn.functional import group_norm, silu
from torch.testing import assert_close

from kernels import attention_cpu, cross_attention, geglu, group_norm_silu, self_attention, temporal_attention
from kernels.attention import attention_reference
from nanodisco.layers import Down, GroupNormSiLU, ResBlock, Up, time_features
from nanodisco.temporal import TemporalAttention, TemporalConv, fold, unfold
from nanodisco.transformer import CrossAttention

ONEDNN = torch.backends.mkldnn.is_available()
IN_BFLOAT16 = pytest.mark.skipif(not (ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
                                 reason="oneDNN multiplies no bfloat16 here")
IN_FLOAT32 = pytest.mark.skipif(not (ONEDNN and attention_cpu.multiplies_float32()), reason="no such operation here")
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
ODD_SIZES = [(1, 1), (2, 3), (7, 9), (16, 5)]


# ---- Operations ----------------------------------------------------------------------------------

def naive_attention(q, k, v):
    """Sum over every query and key, in float64.   (B, L, N, K), 2 x (B, M, N, K) -> (B, L, N, K)"""
    q, k, v = q.double(), k.double(), v.double()
    weights = torch.einsum("blnk, bmnk -> bnlm", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bnlm, bmnk -> blnk", weights, v)


def naive_group_norm_silu(x, weight, bias, groups, eps, frames):
    """Mean and variance spelled out, over (C/groups, F, H, W), in float64."""
    clips = x.double().unflatten(0, (-1, frames)).unflatten(2, (groups, -1))           # (B, F, G, C/G, H, W)
    over = (1, 3, 4, 5)
    centred = clips - clips.mean(over, keepdim=True)
    y = (centred / (centred.square().mean(over, keepdim=True) + eps).sqrt()).reshape(x.shape)
    y = y * weight.double()[:, None, None] + bias.double()[:, None, None]
    return y / (1 + (-y).exp())


@pytest.mark.parametrize("L, M, N, K", [(1, 1, 1, 8), (35, 35, 2, 16), (63, 257, 3, 40), (64, 2, 8, 4)])
def test_attention_is_its_formula(L, M, N, K):
    q, kv = normal(2, L, N, K).float(), normal(2, M, 2, N, K, seed=1).float()
    assert_close(cross_attention(3 * q, kv).double(), naive_attention(3 * q, *kv.unbind(2)), **FLOAT32)


@IN_BFLOAT16
@pytest.mark.parametrize("size", [1, 4], ids=["small scores", "large scores"])
@pytest.mark.parametrize("L, M, N, K", [(1, 1, 1, 8), (35, 35, 2, 16), (64, 257, 3, 40), (130, 5, 2, 80)])
def test_attention_in_bfloat16_on_a_cpu_is_its_formula(L, M, N, K, size, monkeypatch):
    monkeypatch.setattr(attention_cpu, "MANY", 0)
    monkeypatch.setattr(attention_cpu, "scaled_dot_product_attention", None)             # its own products do it
    q, k, v = (normal(2, rows, N, K, seed=i).bfloat16() for i, rows in enumerate((L, M, M)))
    with torch.no_grad():
        got = attention_reference(size * q, k, v).double()
    wanted = naive_attention(size * q, k, v)
    assert (got - wanted).norm() <= 6e-3 * wanted.norm()


@torch.no_grad()
def test_attention_in_bfloat16_is_torchs_own_where_there_is_nothing_to_multiply_or_to_multiply_with(monkeypatch):
    monkeypatch.setattr(attention_cpu, "MANY", 0)
    q, k, v = (normal(2, rows, 3, 8, seed=i).bfloat16() for i, rows in enumerate((5, 9, 9)))
    assert attention_reference(q[:0], k[:0], v[:0]).shape == (0, 5, 3, 8)
    assert torch.equal(attention_reference(q, k[:, :0], v[:, :0]), torch.zeros_like(q))
    monkeypatch.setattr(attention_cpu, "in_bfloat16", None)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert attention_reference(q, k, v).shape == q.shape


@torch.no_grad()
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)], ids=str)
def test_attention_for_inference_on_a_cpu_is_whole_from_parts(dtype, close, monkeypatch):
    q, k, v = (normal(2, rows, 3, 32, seed=i).to(dtype) for i, rows in enumerate((attention_cpu.LONG, 9, 9)))
    monkeypatch.setattr(attention_cpu, "MANY", 0)
    whole = attention_reference(q, k, v)
    monkeypatch.setattr(attention_cpu, "AT_ONCE", 500)
    parts = attention_reference(q, k, v)
    assert (parts - whole).norm() <= close * whole.norm() and parts.is_contiguous()


@IN_FLOAT32
@torch.no_grad()
@pytest.mark.parametrize("size", [1, 10], ids=["small scores", "large scores"])
@pytest.mark.parametrize("L, M, N, K", [(1024, 257, 2, 40), (1024, 1, 1, 32), (1500, 300, 1, 41)])
def test_attention_in_float32_on_a_cpu_is_its_formula(L, M, N, K, size, monkeypatch):
    monkeypatch.setattr(attention_cpu, "scaled_dot_product_attention", None)             # its own products do it
    q, k, v = (normal(1, rows, 3, N, K).float()[:, :, i] for i, rows in enumerate((L, M, M)))
    wanted = naive_attention(size * q, k, v)
    assert (attention_reference(size * q, k, v) - wanted).norm() <= 1e-5 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("size", [100, -100], ids=["overflow", "nothing left"])
def test_attention_in_float32_is_whole_where_scores_are_too_large_for_powers_of_two(size):
    q, k, v = (normal(1, rows, 1, 32, seed=i).float() for i, rows in enumerate((attention_cpu.LONG, 20, 20)))
    q, k, v = size * q.abs(), k.abs(), 1000 * v           # all scores of one sign
    wanted = naive_attention(q, k, v)
    assert (attention_reference(q, k, v) - wanted).norm() <= 1e-4 * wanted.norm()


@torch.no_grad()
def test_attention_in_float32_is_whole_where_only_the_sum_of_values_is_too_large():
    q = torch.full((1, attention_cpu.LONG, 1, 32), (110 * math.log(2) * 32 ** -0.5) ** 0.5)       # 2^X is 2^110
    v = torch.full((1, 20, 1, 32), 2.0**30)
    assert (attention_reference(q, q[:, :20], v) / 2**30 - 1).abs().max() < 1e-5


@torch.no_grad()
def test_attention_in_bfloat16_is_whole_where_one_key_outshines_those_that_were_looked_at(monkeypatch):
    monkeypatch.setattr(attention_cpu, "MANY", 0)
    q, k, v = (normal(1, rows, 1, 8, seed=i).bfloat16() for i, rows in enumerate((5, 20, 20)))
    k[:, 3] = 500 * q[:, 0]                               # 2^X is infinite for query 0: keys 0, 8, 16 do not know of it
    got = attention_reference(q, k, v)
    assert torch.equal(got[:, 0], v[:, 3]) and got.isfinite().all()


def test_attention_reads_packed_inputs():
    qkv = normal(2, 15, 3, 4, 8)
    got = self_attention(qkv)
    assert_close(got, naive_attention(*qkv.unbind(2)), **SAME)
    assert got.is_contiguous()


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_temporal_attention_is_the_formula_at_each_place_of_packed_inputs(frames):
    qkv = normal(2 * frames, 6, 3, 4, 8)                                  # (B*F, S, 3, N, K)
    got = temporal_attention(qkv, frames)
    for clip in range(2):
        for place in range(6):
            here = (slice(clip * frames, (clip + 1) * frames), place)
            assert_close(got[here], naive_attention(*qkv[here][None].unbind(2))[0], **SAME)


def test_geglu_gates_the_first_half_by_the_second():
    value, gate = normal(2, 5, 8), normal(2, 5, 8, seed=1)
    phi = (1 + torch.erf(gate / math.sqrt(2))) / 2
    assert_close(geglu(torch.cat([value, gate], -1)), value * gate * phi, **SAME)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("C, groups, H, W", [(8, 4, 1, 1), (12, 3, 7, 5), (16, 16, 4, 4), (6, 1, 3, 9)])
def test_group_norm_silu_is_its_formula(C, groups, H, W, frames):
    x, weight, bias = 2 * normal(2 * frames, C, H, W) + 1, normal(C, seed=1), normal(C, seed=2)
    assert_close(group_norm_silu(x, weight, bias, groups, 1e-5, frames),
                 naive_group_norm_silu(x, weight, bias, groups, 1e-5, frames), **SAME)


def test_frames_share_the_statistics_of_a_clip_as_in_torchs_group_norm_of_five_axes():
    clip, weight, bias = normal(2, 8, 3, 5, 4), normal(8, seed=1), normal(8, seed=2)                 # (B, C, F, H, W)
    got = group_norm_silu(fold(clip)[0], weight, bias, 4, 1e-5, frames=3)
    assert_close(unfold(got, 3), silu(group_norm(clip, 4, weight, bias, 1e-5)), **SAME)


def test_group_norm_silu_can_leave_out_the_silu():
    x, weight, bias = normal(2, 8, 5, 4), normal(8, seed=1), normal(8, seed=2)
    assert_close(group_norm_silu(x, weight, bias, 4, 1e-5, silu=False), group_norm(x, 4, weight, bias, 1e-5), **SAME)


@pytest.mark.parametrize("frames", [1, 2])
def test_shift_is_added_before_the_norm(frames):
    x, weight, bias, shift = normal(4, 8, 5, 4), normal(8, seed=1), normal(8, seed=2), normal(4, 8, seed=3)
    assert_close(group_norm_silu(x, weight, bias, 4, 1e-5, frames, shift=shift),
                 naive_group_norm_silu(x + shift[:, :, None, None], weight, bias, 4, 1e-5, frames), **SAME)


@pytest.mark.parametrize("frames", [1, 2])
def test_large_means_do_not_cost_precision(frames):
    x = (normal(2, 8, 32, 32) + 1000).float()                            # E[x^2] - E[x]^2 would lose all of it
    weight, bias = normal(8, seed=1).float(), normal(8, seed=2).float()
    assert_close(group_norm_silu(x, weight, bias, 4, 1e-5, frames).double(),
                 naive_group_norm_silu(x, weight, bias, 4, 1e-5, frames), rtol=0, atol=1e-3)


# ---- Layers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("width", [8, 32, 320])
def test_time_features_are_the_cosines_then_the_sines_of_falling_frequencies(width):
    t = torch.tensor([0, 1, 17, 801, 999])
    angles = t.double()[:, None] * 10000 ** (-torch.arange(width // 2).double() / (width // 2))
    wanted = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert_close(time_features(t, width).double(), wanted, rtol=0, atol=1e-4)        # 999 in float32 is off by 5e-5
    assert_close(time_features(t, width)[0], torch.tensor([1.0, 0.0]).repeat_interleave(width // 2))


@pytest.mark.parametrize("H, W", ODD_SIZES)
def test_down_rounds_up(H, W):
    assert Down(4)(torch.zeros(1, 4, H, W)).shape == (1, 4, (H + 1) // 2, (W + 1) // 2)


@pytest.mark.parametrize("H, W", [(2, 3), (7, 9), (16, 5)])
def test_one_sided_down_rounds_down(H, W):
    assert Down(4, one_sided=True)(torch.zeros(1, 4, H, W)).shape == (1, 4, H // 2, W // 2)


@pytest.mark.parametrize("H, W", ODD_SIZES)
def test_up_undoes_the_size_of_down(H, W):
    x = torch.zeros(1, 4, H, W)
    assert Up(4)(Down(4)(x), x.shape[2:]).shape == x.shape
    assert Up(4)(x).shape == (1, 4, 2 * H, 2 * W)


def test_resblock_without_time_and_temporal_layers_is_two_convolutions_around_a_skip():
    block, x = randomised(ResBlock(8, 12, groups=4, eps=1e-5)), normal(2, 8, 5, 7)

    def normed(norm: GroupNormSiLU, h):
        return naive_group_norm_silu(h, norm.weight, norm.bias, 4, 1e-5, frames=1)
    wanted = block.skip(x) + block.conv2(normed(block.norm2, block.conv1(normed(block.norm1, x))))
    assert_close(block(x), wanted, **SAME)


def test_fold_and_unfold_undo_each_other():
    clip = normal(2, 3, 5, 4, 6)
    folded, frames = fold(clip)
    assert folded.shape == (10, 3, 4, 6) and frames == 5
    assert torch.equal(folded[7], clip[1, :, 2])                         # frames of a clip are adjacent
    assert torch.equal(unfold(folded, frames), clip)


def test_fold_leaves_a_picture_alone():
    picture = normal(2, 3, 4, 6)
    assert fold(picture) == (picture, 1)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_temporal_conv_is_a_convolution_along_the_frames_of_each_pixel(frames):
    layer, clip = randomised(TemporalConv(8, 4, 1e-5)), normal(2, 8, frames, 3, 4)
    normed = silu(group_norm(clip, 4, layer.norm.weight, layer.norm.bias, 1e-5))
    pixels = normed.permute(0, 3, 4, 1, 2).flatten(0, 2)                 # (B*H*W, C, F)
    wanted = layer.conv(pixels).unflatten(0, (2, 3, 4)).permute(0, 3, 4, 1, 2)
    assert_close(unfold(layer(fold(clip)[0], frames), frames), wanted, **SAME)


@pytest.mark.parametrize("layer, shape", [(TemporalConv(8, 4, 1e-5), (6, 8, 3, 4)),
                                          (TemporalAttention(8, 2), (6, 5, 8))], ids=["convolution", "attention"])
def test_temporal_layers_start_as_zero(layer, shape):
    assert layer(torch.randn(shape), frames=3).eq(0).all()


def test_cross_attention_of_a_clip_is_that_of_each_frame_to_the_same_tokens():
    layer, x, tokens = randomised(CrossAttention(12, 3, 10)), normal(6, 5, 12), normal(2, 7, 10, seed=1)
    assert_close(layer(x, tokens), layer(x, tokens.repeat_interleave(3, 0)), **SAME)
