"""Gradients of GroupNorm and SiLU in Triton; formulas and names are those of group_norm_silu.py.

Three kernels again, as forward: sums of g and g xhat over the pixels of a tile, channel by channel, each in a slot of
its own; of a group of a clip c1 and c2; and, of a tile, dx. z is made anew from x, so forward keeps nothing of it.
The letters are those of picture_tiles_triton.py.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.picture_tiles_triton import (channels_last, dense, of_channels, sigmoid, statistics_for, tile_of,
                                          tile_of_group, tile_of_program, vectors_of)
from kernels.tiles_triton import options


@triton.jit
def _gradient_of_z(x, dy, places, inside, centre, rstd, weight, bias, SILU: tl.constexpr):
    """xhat and g of a tile.   -> 2 x (CHUNK, BC)"""
    xhat = (tl.load(x + places, mask=inside, other=0.0).to(rstd.dtype) - centre[None, :]) * rstd[None, :]
    xhat = tl.where(inside, xhat, 0.0)
    g = tl.load(dy + places, mask=inside, other=0.0).to(rstd.dtype)
    if SILU:
        z = xhat * weight[None, :] + bias[None, :]
        s = sigmoid(z)
        g *= s * (1 + z * (1 - s))
    return xhat, g


@triton.jit
def _sums(x, dy,                       # (N, P, C), or (N, C, P) if not LAST
          weight, bias,                # (C,)
          stats,                       # (2, N, C)
          slots,                       # (2 or 3, N, K, C): sums of g, g xhat and, for the gradient of the shift, xhat
          P, C, SHIFT: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr):
    k, n, K, N = tl.program_id(1), tl.program_id(2), tl.num_programs(1), tl.num_programs(2)
    channels, ours, picture, places, inside = tile_of_program(n, P, C, LAST, CHUNK, BC)
    centre, rstd, w, b = vectors_of(stats, weight, bias, n, N, channels, ours, C)
    xhat, g = _gradient_of_z(x + picture, dy + picture, places, inside, centre, rstd, w, b, SILU)
    slot = slots + (n * K + k) * C + channels
    tl.store(slot, tl.sum(g, 0), mask=ours)
    tl.store(slot + N * K * C, tl.sum(g * xhat, 0), mask=ours)
    if SHIFT:
        tl.store(slot + 2 * N * K * C, tl.sum(xhat, 0), mask=ours)


@triton.jit
def _fold_sums(sums,                   # (2 or 3, N, C): those of _sums, over all pixels of a picture
               weight,                 # (C,)
               stats,                  # (2, N, C)
               folded,                 # (2, N, C): rstd c1, rstd c2
               dshift,                 # (N, C): as if each picture had a shift of its own
               N, F, P, C,
               CG: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, SHIFT: tl.constexpr):
    TYPE: tl.constexpr = stats.dtype.element_ty
    first, lanes = tl.program_id(1) * F, tl.arange(0, LANES)
    channels, ours = tl.program_id(0) * CG + lanes, lanes < CG
    w = of_channels(weight, channels, ours, TYPE)[None, :]
    c1, c2 = tl.zeros([ROWS, LANES], TYPE), tl.zeros([ROWS, LANES], TYPE)
    for start in range(first, first + F, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < first + F)[:, None] & ours[None, :]
        where = rows[:, None] * C + channels[None, :]
        c1 += w * tl.load(sums + where, mask=inside, other=0.0)
        c2 += w * tl.load(sums + N * C + where, mask=inside, other=0.0)
    c1, c2 = tl.sum(c1) / (CG * F * P), tl.sum(c2) / (CG * F * P)
    for start in range(first, first + F, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < first + F)[:, None] & ours[None, :]
        where = rows[:, None] * C + channels[None, :]
        rstd = tl.load(stats + N * C + where, mask=inside, other=0.0)
        tl.store(folded + where, rstd * c1, mask=inside)
        tl.store(folded + N * C + where, rstd * c2, mask=inside)
        if SHIFT:
            of_g = tl.load(sums + where, mask=inside, other=0.0)
            of_xhat = tl.load(sums + 2 * N * C + where, mask=inside, other=0.0)
            tl.store(dshift + where, rstd * (w * of_g - P * c1 - c2 * of_xhat), mask=inside)


@triton.jit
def _gradient_of_x(x, dy, dx,          # (N, P, C), or (N, C, P) if not LAST
                   weight, bias,       # (C,)
                   stats,              # (2, N, C)
                   folded,             # (2, N, C) of _fold_sums
                   P, C, SILU: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr):
    N = tl.num_programs(2)
    n = N - 1 - tl.program_id(2)                                         # those read last are still in the L2 cache
    channels, ours, picture, places, inside = tile_of_program(n, P, C, LAST, CHUNK, BC)
    centre, rstd, w, b = vectors_of(stats, weight, bias, n, N, channels, ours, C)
    xhat, g = _gradient_of_z(x + picture, dy + picture, places, inside, centre, rstd, w, b, SILU)
    c1 = of_channels(folded + n * C, channels, ours, rstd.dtype)        # both times rstd
    c2 = of_channels(folded + (N + n) * C, channels, ours, rstd.dtype)
    result = g * (rstd * w)[None, :] - c1[None, :] - xhat * c2[None, :]
    tl.store(dx + picture + places, result.to(dx.dtype.element_ty), mask=inside)


# ---- Operation of PyTorch ----------------------------------------------------------------------------------

@torch.library.custom_op("nanodisco::group_norm_silu_backward", mutates_args=())
def backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, stats: Tensor, groups: int, frames: int,
             silu: bool, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx; sums of g and g xhat over the pixels, (2 or 3, N, C); sums of dx, (N, C) or none if not `shifted`."""
    x = dense(x)
    N, C, H, W = x.shape
    P, LAST = H * W, channels_last(x)
    dy = dy.contiguous(memory_format=torch.channels_last if LAST else torch.contiguous_format)
    CHUNK, BC = tile_of(N, P, C, most=64)
    K = triton.cdiv(P, CHUNK)
    LANES, ROWS = tile_of_group(C // groups, frames)
    tiles = dict(SILU=silu, LAST=LAST, CHUNK=CHUNK, BC=BC, **options())
    slots, grid = statistics_for(x, 2 + shifted, N, K, C), (triton.cdiv(C, BC), K, N)
    dx, folded, dshift = torch.empty_like(x), torch.empty_like(stats), statistics_for(x, N if shifted else 0, C)
    with torch.cuda.device_of(x):
        _sums[grid](x, dy, weight, bias, stats, slots, P, C, SHIFT=shifted, **tiles)
        sums = slots.sum(2)
        _fold_sums[groups, N // frames](sums, weight, stats, folded, dshift, N, frames, P, C, CG=C // groups,
                                        LANES=LANES, ROWS=ROWS, SHIFT=shifted, **options())
        _gradient_of_x[grid](x, dy, dx, weight, bias, stats, folded, P, C, **tiles)
    return dx, sums, dshift


@backward.register_fake
def _(dy, x, weight, bias, stats, groups, frames, silu, shifted):
    N, C = x.shape[:2]
    return torch.empty_like(dense(x)), statistics_for(x, 2 + shifted, N, C), statistics_for(x, N if shifted else 0, C)
