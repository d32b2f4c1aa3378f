"""Tiles of a picture: some pixels of its (pixels, channels) matrix by some channels; and what all norms need.

N pictures, P pixels, C channels. A program has CHUNK pixels, one of the K chunks of a picture, by BC channels; or, of
the CG channels of a group, LANES of which the first CG count, ROWS of the results of such tiles at a time.
LAST: channels last in memory, else NCHW.

Arithmetic is in the type of the statistics: float32, or float64 where x is float64 (which only tests are).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 2 * 132                     # keep an H200 busy: two for each multiprocessor


def tile_of(N: int, P: int, C: int, most: int) -> tuple[int, int]:
    """Pixels (at most `most`) and channels of a tile: fewer pixels where pictures make few tiles."""
    channels = min(64, max(16, triton.next_power_of_2(C)))
    pixels = min(most, max(16, triton.next_power_of_2(P)))
    while pixels > 32 and N * triton.cdiv(P, pixels) * triton.cdiv(C, channels) < PROGRAMS:
        pixels //= 2
    return pixels, channels


def tile_of_group(CG: int, rows: int) -> tuple[int, int]:
    """Lanes for the channels of a group and, of what there are in `rows`, rows at a time."""
    lanes = triton.next_power_of_2(CG)
    return lanes, min(max(1, 1024 // lanes), triton.next_power_of_2(rows))


@triton.jit
def tile_at(pixels, channels, ours, P, C, LAST: tl.constexpr):
    """Where a tile lies in its picture, and what of it there is.   (CHUNK,), (BC,), (BC,) -> 2 x (CHUNK, BC)"""
    inside = (pixels < P)[:, None] & ours[None, :]
    if LAST:
        return pixels[:, None] * C + channels[None, :], inside
    else:
        return channels[None, :] * P + pixels[:, None], inside


@triton.jit
def tile_of_program(n, P, C, LAST: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr):
    """This program's channels and which of them there are, where picture n begins, and the tile as of tile_at."""
    pixels, channels = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK), tl.program_id(0) * BC + tl.arange(0, BC)
    ours = channels < C
    places, inside = tile_at(pixels, channels, ours, P, C, LAST)
    return channels, ours, n.to(tl.int64) * P * C, places, inside


@triton.jit
def of_channels(vector, channels, ours, TYPE: tl.constexpr):
    return tl.load(vector + channels, mask=ours, other=0.0).to(TYPE)


@triton.jit
def vectors_of(stats, weight, bias, n, N, channels, ours, C):
    """centre, rstd, weight and bias of some channels of picture n.   -> 4 x (BC,)"""
    TYPE: tl.constexpr = stats.dtype.element_ty
    centre = of_channels(stats + n * C, channels, ours, TYPE)
    rstd = of_channels(stats + (N + n) * C, channels, ours, TYPE)
    return centre, rstd, of_channels(weight, channels, ours, TYPE), of_channels(bias, channels, ours, TYPE)


@triton.jit
def divided(total, count):
    """total / count, rounded once. On a GPU `/` is quick: 63000 / 63 may be 1000.00006 there, and a mean not exact."""
    if total.dtype == tl.float64:
        return total / count
    else:
        return tl.div_rn(total, tl.cast(count, tl.float32))


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)). A root and a square are 2 instructions where a division is 8."""
    root = tl.rsqrt(1 + tl.exp(-z))
    return root * root


def channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x in one of the two layouts: itself, or a copy in the nearer one."""
    if x.is_contiguous() or channels_last(x):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def statistics_for(x: Tensor, *shape: int) -> Tensor:
    """Room for them, in the type that arithmetic has for x."""
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
