"""The convolution of 3 x 3 pixels in Triton; formulas and names are those of conv.py.

A program has BM pixels by BN outputs, and walks over its share of the 9 C_in numbers that are summed: BK channels at
one of the nine taps are one step. A tap moves all pixels by the same distance in memory, so a step is one number added
to addresses that stay; which pixels have that tap inside of the picture is a bit of a word that each pixel keeps.

The nine taps of the same channels come one after the other, and read almost the same numbers: from the cache.

Results repeat bit for bit: parts are summed in the order of their shares.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles_triton import mm, options

SUMMED = 1024                          # numbers of the result that a program of the second pass has
MULTIPROCESSORS = 132                  # of an H100 or H200
FEWEST = 8                             # steps of a share; fewer, and filling the pipeline is most of it
MOST_PARTS = 32                        # all of which a program of the second pass reads at once


# ---- Tiles ------------------------------------------------------------------------------------------------

def tiles(B: int, H: int, W: int, C_in: int, C_out: int) -> tuple[int, ...]:
    """-> BM, BN, BK, S, warps, stages. The fastest of a sweep over the shapes of Stable Diffusion, on an H200."""
    M, per_multiprocessor = B * H * W, 1
    if C_in % 128 == 0 and triton.cdiv(M, 64) * triton.cdiv(C_out, 64) <= MULTIPROCESSORS // 3:
        BM, BN, BK, warps, stages = 64, 64, 128, 4, 4
    elif M <= 1024:
        BM, BN, BK, warps, stages, per_multiprocessor = 64, 64, 64, 4, 5, 2
    else:
        BM, BN, BK, warps, stages = 256, 64, 64, 8, 4
    S = split(per_multiprocessor, triton.cdiv(M, BM) * triton.cdiv(C_out, BN), 9 * triton.cdiv(C_in, BK))
    return BM, BN, BK, S, warps, stages


def split(programs: int, tiles_of_y: int, steps: int) -> int:
    """How many share a tile, for at most so many programs on each multiprocessor."""
    return max(1, min(programs * MULTIPROCESSORS // tiles_of_y, steps // FEWEST, MOST_PARTS))


# ---- Kernels ----------------------------------------------------------------------------------------------

@triton.jit(do_not_specialize=["H", "W", "S"])                           # one kernel for all sizes of pictures
def _products(x,                       # (M, C)
              weight,                  # (N, 9, C)
              bias,                    # (N,) or None
              more,                    # (M, N) or None
              y,                       # (M, N); where SPLIT (S, M, N), in float32
              M, H, W, C, N, S, SPLIT: tl.constexpr, EVEN: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    program, share = tl.program_id(0) % (down * across), tl.program_id(0) // (down * across)
    rows = program % down * BM + tl.arange(0, BM)                        # neighbours share weights, the larger part
    columns = program // down * BN + tl.arange(0, BN)

    i, j = rows // W % H, rows % W
    inside = tl.zeros((BM,), tl.int32)
    for bit in tl.static_range(9):
        u, v = i + (bit // 3 - 1), j + (bit % 3 - 1)
        inside |= ((u >= 0) & (u < H) & (v >= 0) & (v < W) & (rows < M)).to(tl.int32) << bit

    channels, blocks = tl.arange(0, BK), tl.cdiv(C, BK)
    of_x = rows[:, None] * C + channels[None, :]
    of_weight = tl.minimum(columns, N - 1)[None, :] * (9 * C) + channels[:, None]       # the last one again: no mask
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(9 * blocks * share // S, 9 * blocks * (share + 1) // S):
        tap, channel = step % 9, step // 9 * BK
        moved = ((tap // 3 - 1) * W + tap % 3 - 1) * C + channel
        here = ((inside >> tap) & 1)[:, None] != 0
        if EVEN:
            a = tl.load(x + moved + of_x, mask=here, other=0.0)
            b = tl.load(weight + (tap * C + channel) + of_weight)
        else:
            there = channel + channels < C
            a = tl.load(x + moved + of_x, mask=here & there[None, :], other=0.0)
            b = tl.load(weight + (tap * C + channel) + of_weight, mask=there[:, None], other=0.0)
        total = mm(a, b, total)

    of_y = rows[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if SPLIT:
        tl.store(y + share * M * N + of_y, total, mask=mask)
    else:
        if bias is not None:
            total += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if more is not None:
            total += tl.load(more + of_y, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + of_y, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _sum(parts,                        # (S, size)
         bias,                         # (N,) or None
         more,                         # (size,) or None
         y,                            # (size,)
         size, N, S: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for s in tl.static_range(S):                                         # unrolled: all are read before one is needed
        total += tl.load(parts + s * size + at, mask=at < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % N, mask=at < size, other=0.0).to(tl.float32)
    if more is not None:
        total += tl.load(more + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


# ---- Operation of PyTorch ---------------------------------------------------------------------------------

def in_channels_last(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last)


def result_of(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), *x.shape[2:], len(weight)).permute(0, 3, 1, 2)


@torch.library.custom_op("nanodisco::conv3x3", mutates_args=())
def conv3x3_triton(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """conv3x3 of conv.py."""
    (B, C, H, W), N = x.shape, len(weight)
    assert weight.shape == (N, C, 3, 3), f"weights {tuple(weight.shape)}; x has {C} channels, and taps are 3 x 3"
    assert bias is None or bias.shape == (N,), f"bias {tuple(bias.shape)}; there are {N} outputs"
    assert more is None or more.shape == (B, N, H, W), f"added {tuple(more.shape)}; the result is {(B, N, H, W)}"
    y = result_of(x, weight)
    if y.numel():
        bias = None if bias is None else bias.contiguous()
        launch(in_channels_last(x), in_channels_last(weight), bias, in_channels_last(more), y, *tiles(B, H, W, C, N))
    return y


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor | None, y: Tensor,
           BM: int, BN: int, BK: int, S: int, warps: int, stages: int) -> None:
    """All channels last, with tiles as of `tiles`."""
    (B, C, H, W), N = x.shape, len(weight)
    M = B * H * W
    assert max(x.numel(), weight.numel(), S * M * N) < 2**31, f"{S} x {M} x {N} numbers: too many to count in 32 bits"
    products = y if S == 1 else x.new_empty(S, M, N, dtype=torch.float32)
    added = (bias, more) if S == 1 else (None, None)
    with torch.cuda.device_of(x):
        _products[(triton.cdiv(M, BM) * triton.cdiv(N, BN) * S,)](
            x, weight, *added, products, M, H, W, C, N, S, SPLIT=S > 1, EVEN=C % BK == 0, BM=BM, BN=BN, BK=BK,
            **options(warps, stages))
        if S > 1:
            _sum[(triton.cdiv(M * N, SUMMED),)](
                products, bias, more, y, M * N, N, S=S, BLOCK=SUMMED, **options())


@conv3x3_triton.register_fake
def _(x, weight, bias=None, more=None):
    return result_of(x, weight)
