"""GroupNorm and SiLU in Triton; formulas and names are those of group_norm_silu.py.

A picture is a matrix of P pixels and C channels. A group of 10 channels is only 20 bytes of a pixel, so kernels
that stream know nothing of groups: they cut the matrix into tiles of 64 whole channels, and a tiny one between
them folds what they found, channel by channel, into groups.

    statistics     of a tile: mean and centred sum of squares of each channel, each in a slot of its own
    fold           of a group of a clip: Chan's formula over its channels, tiles and frames -> centre, rstd
    apply          y = silu((x - centre) rstd weight + bias)

`centre` is mean_g - shift, so no kernel adds the shift. It and `rstd` are kept for each picture and channel. Small
pictures are done by one kernel, a few groups to a program, which reads its pixels once. No atomics: results repeat bit
for bit. The letters are those of picture_tiles_triton.py.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.group_norm_silu_backward_triton import backward
from kernels.picture_tiles_triton import (channels_last, dense, divided, of_channels, sigmoid, statistics_for, tile_at,
                                          tile_of, tile_of_group, tile_of_program, vectors_of)
from kernels.tiles_triton import options

SMALL = 2**12                          # numbers of some groups of a picture, up to which one launch beats three;
FEW = 2**20                            # twice as many where x has no more than so many


# ---- For both ways ----------------------------------------------------------------------------------------

@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _pixel(x, pixel, channels, ours, P, C, LAST: tl.constexpr, TYPE: tl.constexpr):
    """(BC,)"""
    return tl.load(x + (pixel * C + channels if LAST else channels * P + pixel), mask=ours, other=0.0).to(TYPE)


@triton.jit
def _moments(pivot, total, squares, count):
    """Mean of `count` pixels, and sum of squares around it, from differences from one of them and their squares.

    A large mean costs no digits so. And since the square of that one pixel is part of the result, rounding is at most
    `count` units of it, wherever the others are.   (BC,), 2 x (ROWS, BC) -> 2 x (BC,)
    """
    total, squares = tl.reduce((total, squares), 0, _add_pairs)
    return pivot + total / count, squares - total * total / count


@triton.jit
def _normalised(tile, centre, rstd, weight, bias, SILU: tl.constexpr):
    """silu((x - centre) rstd weight + bias)"""
    z = (tile.to(rstd.dtype) - centre[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    if SILU:
        z *= sigmoid(z)
    return z


# ---- A picture by tiles ------------------------------------------------------------------------------------

@triton.jit
def _statistics(x,                     # (N, P, C), or (N, C, P) if not LAST
                slots,                 # (2, N, K, C): mean, centred sum of squares
                P, C, LAST: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr):
    TYPE: tl.constexpr = slots.dtype.element_ty
    k, n, K = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    channels = tl.program_id(0) * BC + tl.arange(0, BC)
    ours, first, x = channels < C, k * CHUNK, x + n.to(tl.int64) * P * C
    pivot = _pixel(x, first, channels, ours, P, C, LAST, TYPE)
    total, squares = tl.zeros([ROWS, BC], TYPE), tl.zeros([ROWS, BC], TYPE)
    for start in tl.static_range(0, CHUNK, ROWS):                        # unrolled: all are read before one is needed
        places, inside = tile_at(first + start + tl.arange(0, ROWS), channels, ours, P, C, LAST)
        d = tl.where(inside, tl.load(x + places, mask=inside, other=0.0).to(TYPE) - pivot[None, :], 0.0)
        total += d
        squares += d * d
    mean, squares = _moments(pivot, total, squares, tl.minimum(CHUNK, P - first))
    slot = slots + (n * K + k) * C + channels
    tl.store(slot, mean, mask=ours)
    tl.store(slot + tl.num_programs(2) * K * C, squares, mask=ours)


@triton.jit
def _slots_of_group(slots, shift, start, channels, ours, F, K, P, C, EACH,
                    CHUNK: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr):
    """Some slots of a group of a clip: where, which there are, of how many pixels, and their means with the shift."""
    clip, rows = tl.program_id(1), start + tl.arange(0, ROWS)
    inside = (rows < F * K)[:, None] & ours[None, :]
    where = (clip * F * K + rows)[:, None] * C + channels[None, :]
    count = tl.where(inside, tl.minimum(CHUNK, P - rows % K * CHUNK)[:, None], 0)
    mean = tl.load(slots + where, mask=inside, other=0.0)
    if SHIFT:
        row = (clip * F + rows // K) // EACH
        mean += tl.load(shift + row[:, None] * C + channels[None, :], mask=inside, other=0.0).to(mean.dtype)
    return where, inside, count, mean


@triton.jit
def _fold(slots,                       # (2, N, K, C) of _statistics
          shift,                       # (R, C), each row for EACH pictures
          stats,                       # (2, N, C): centre, rstd
          N, F, K, P, C, EACH, eps,
          CG: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, SHIFT: tl.constexpr):
    TYPE: tl.constexpr = stats.dtype.element_ty
    clip, lanes = tl.program_id(1), tl.arange(0, LANES)
    channels, ours = tl.program_id(0) * CG + lanes, lanes < CG
    origin = tl.load(slots + clip * F * K * C + tl.program_id(0) * CG)   # sums of differences stay small and exact
    total, squares = tl.zeros([ROWS, LANES], TYPE), tl.zeros([ROWS, LANES], TYPE)
    for start in range(0, F * K, ROWS):
        _, _, count, mean = _slots_of_group(slots, shift, start, channels, ours, F, K, P, C, EACH, CHUNK, ROWS, SHIFT)
        total += count * (mean - origin)
    mean_g = origin + tl.sum(total) / (CG * F * P)
    for start in range(0, F * K, ROWS):
        where, inside, count, mean = _slots_of_group(slots, shift, start, channels, ours, F, K, P, C, EACH,
                                                     CHUNK, ROWS, SHIFT)
        squares += tl.load(slots + N * K * C + where, mask=inside, other=0.0)
        squares += count * (mean - mean_g) * (mean - mean_g)
    rstd = tl.rsqrt(tl.sum(squares) / (CG * F * P) + eps)
    for n in range(clip * F, clip * F + F):
        centre = tl.zeros([LANES], TYPE) + mean_g
        if SHIFT:
            centre -= of_channels(shift + n // EACH * C, channels, ours, TYPE)
        tl.store(stats + n * C + channels, centre, mask=ours)
        tl.store(stats + (N + n) * C + channels, tl.zeros([LANES], TYPE) + rstd, mask=ours)


@triton.jit
def _apply(x, y,                       # (N, P, C), or (N, C, P) if not LAST
           weight, bias,               # (C,)
           stats,                      # (2, N, C) of _fold
           P, C, SILU: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr):
    N = tl.num_programs(2)
    n = N - 1 - tl.program_id(2)                                         # those read last are still in the L2 cache
    channels, ours, picture, places, inside = tile_of_program(n, P, C, LAST, CHUNK, BC)
    tile = tl.load(x + picture + places, mask=inside, other=0.0)
    centre, rstd, w, b = vectors_of(stats, weight, bias, n, N, channels, ours, C)
    z = _normalised(tile, centre, rstd, w, b, SILU)
    tl.store(y + picture + places, z.to(y.dtype.element_ty), mask=inside)


def launch_tiles(x, y, weight, bias, shift, stats, groups, eps, frames, silu) -> None:
    N, C, H, W = x.shape
    P, LAST = H * W, channels_last(x)
    CHUNK, BC = tile_of(N, P, C, most=128)
    K = triton.cdiv(P, CHUNK)
    LANES, ROWS = tile_of_group(C // groups, frames * K)
    slots = statistics_for(x, 2, N, K, C)
    _statistics[triton.cdiv(C, BC), K, N](
        x, slots, P, C, LAST=LAST, CHUNK=CHUNK, ROWS=min(32, CHUNK), BC=BC, **options(2))
    _fold[groups, N // frames](
        slots, shift, stats, N, frames, K, P, C, 1 if shift is None else N // len(shift), eps, CG=C // groups,
        LANES=LANES, ROWS=ROWS, CHUNK=CHUNK, SHIFT=shift is not None, **options())
    CHUNK, BC = tile_of(N, P, C, most=64)
    _apply[triton.cdiv(C, BC), triton.cdiv(P, CHUNK), N](
        x, y, weight, bias, stats, P, C, SILU=silu, LAST=LAST, CHUNK=CHUNK, BC=BC,
        **options(max(1, CHUNK * BC // 1024)))


# ---- A small picture at once -------------------------------------------------------------------------------

def width_of_groups(CG: int) -> int:
    """Channels of so many whole groups that they start at 16 bytes and are 64 bytes of a pixel, in half precision."""
    width = math.lcm(CG, 8)
    return width * triton.cdiv(32, width)


def tile_of_small(P: int, CG: int) -> tuple[int, int]:
    """Pixels and channels of a whole picture's tile."""
    return triton.next_power_of_2(P), triton.next_power_of_2(width_of_groups(CG))


@triton.jit
def _over_group(values, lanes, CG: tl.constexpr, GROUPS: tl.constexpr):
    """Each channel's value replaced by the sum of its group's.   (BC,) -> (BC,)"""
    same = (lanes // CG)[:, None] == tl.arange(0, GROUPS)[None, :]
    sums = tl.sum(tl.where(same, values[:, None], 0.0), 0)
    return tl.sum(tl.where(same, sums[None, :], 0.0), 1)


@triton.jit
def _small(x, y,                       # (N, P, C), or (N, C, P) if not LAST
           weight, bias,               # (C,)
           shift,                      # (R, C), each row for EACH pictures
           stats,                      # (2, N, C): centre, rstd
           P, C, EACH, eps,
           CG: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, SHIFT: tl.constexpr, SILU: tl.constexpr,
           LAST: tl.constexpr, PIXELS: tl.constexpr, BC: tl.constexpr):
    """All three for the WIDTH channels of a few groups of a picture, whose pixels stay in registers."""
    TYPE: tl.constexpr = stats.dtype.element_ty
    n, N, lanes = tl.program_id(1), tl.num_programs(1), tl.arange(0, BC)
    pixels, channels = tl.arange(0, PIXELS), tl.program_id(0) * WIDTH + lanes
    ours, picture = (lanes < WIDTH) & (channels < C), n.to(tl.int64) * P * C
    places, inside = tile_at(pixels, channels, ours, P, C, LAST)
    tile = tl.load(x + picture + places, mask=inside, other=0.0)
    w, b = of_channels(weight, channels, ours, TYPE), of_channels(bias, channels, ours, TYPE)
    pivot = _pixel(x + picture, 0, channels, ours, P, C, LAST, TYPE)
    d = tl.where(inside, tile.to(TYPE) - pivot[None, :], 0.0)
    mean, squares = _moments(pivot, d, d * d, P)
    if SHIFT:
        added = of_channels(shift + n // EACH * C, channels, ours, TYPE)
    else:
        added = tl.zeros([BC], TYPE)
    mean += added
    origin = tl.sum(tl.where(lanes == 0, mean, 0.0))                     # sums of differences stay small and exact
    mean_g = origin + divided(_over_group(tl.where(ours, mean - origin, 0.0), lanes, CG, GROUPS), CG)
    squares += tl.where(ours, P * (mean - mean_g) * (mean - mean_g), 0.0)    # Chan's formula
    rstd = tl.rsqrt(_over_group(squares, lanes, CG, GROUPS) / (CG * P) + eps)
    centre = mean_g - added
    tl.store(stats + n * C + channels, centre, mask=ours)
    tl.store(stats + (N + n) * C + channels, rstd, mask=ours)
    z = _normalised(tile, centre, rstd, w, b, SILU)
    tl.store(y + picture + places, z.to(y.dtype.element_ty), mask=inside)


def launch_small(x, y, weight, bias, shift, stats, groups, eps, frames, silu) -> None:
    N, C, H, W = x.shape
    P, CG = H * W, C // groups
    width = width_of_groups(CG)
    PIXELS, BC = tile_of_small(P, CG)
    _small[triton.cdiv(C, width), N](
        x, y, weight, bias, shift, stats, P, C, 1 if shift is None else N // len(shift), eps, CG=CG, WIDTH=width,
        GROUPS=triton.next_power_of_2(width // CG), SHIFT=shift is not None, SILU=silu, LAST=channels_last(x),
        PIXELS=PIXELS, BC=BC, **options(min(16, max(1, PIXELS * BC // 2048))))


# ---- Operation of PyTorch ----------------------------------------------------------------------------------

def group_norm_silu_triton(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                           frames: int = 1, silu: bool = True, shift: Tensor | None = None) -> Tensor:
    """group_norm_silu of group_norm_silu.py.

    Under autocast the result is float32, as PyTorch's group_norm has it there on a GPU; x is read as it is.
    """
    N, C = x.shape[:2]
    rows = 1 if shift is None else len(shift)
    assert C % groups == 0, f"{C} channels in {groups} groups"
    assert N % frames == 0 and N % rows == 0, f"{N} pictures in clips of {frames} frames, {rows} rows of shift"
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.float32
    shift = None if shift is None else shift.contiguous()
    return forward(x, weight.contiguous(), bias.contiguous(), shift, groups, eps, frames, silu, dtype)[0]


@torch.library.custom_op("nanodisco::group_norm_silu", mutates_args=())
def forward(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, frames: int,
            silu: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """y in `dtype`; centre and rstd, (2, N, C)."""
    x = dense(x)
    y, stats = torch.empty_like(x, dtype=dtype), statistics_for(x, 2, *x.shape[:2])
    PIXELS, BC = tile_of_small(x.shape[2] * x.shape[3], x.shape[1] // groups)
    small = frames == 1 and BC <= 128 and PIXELS * BC <= (SMALL if x.numel() > FEW else 2 * SMALL)
    with torch.cuda.device_of(x):
        (launch_small if small else launch_tiles)(x, y, weight, bias, shift, stats, groups, eps, frames, silu)
    return y, stats


@forward.register_fake
def _(x, weight, bias, shift, groups, eps, frames, silu, dtype):
    return torch.empty_like(dense(x), dtype=dtype), statistics_for(x, 2, *x.shape[:2])


def keep(ctx, inputs, output) -> None:
    x, weight, bias, shift, ctx.groups, _, ctx.frames, ctx.silu, _ = inputs
    ctx.save_for_backward(x, weight, bias, shift, output[1])
    ctx.mark_non_differentiable(output[1])


def gradients(ctx, dy: Tensor, _) -> tuple:
    x, weight, bias, shift, stats = ctx.saved_tensors
    shifted = shift is not None and ctx.needs_input_grad[3]
    dx, sums, dshift = backward(dy, x, weight, bias, stats, ctx.groups, ctx.frames, ctx.silu, shifted)
    dweight = sums[1].sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
    dbias = sums[0].sum(0).to(bias.dtype) if ctx.needs_input_grad[2] else None
    dshift = dshift.unflatten(0, (len(shift), -1)).sum(1).to(shift.dtype) if shifted else None
    return dx, dweight, dbias, dshift, None, None, None, None, None


forward.register_autograd(gradients, setup_context=keep)
