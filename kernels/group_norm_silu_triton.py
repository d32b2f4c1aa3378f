"""GroupNorm and SiLU in Triton; formulas and names are those of group_norm_silu.py.

A picture is a matrix of P pixels and C channels. A group of 10 channels is only 20 bytes of a pixel, so kernels
that stream know nothing of groups: they cut the matrix into tiles of 64 whole channels, and a tiny one between
them folds what they found, channel by channel, into groups.

    statistics     of a tile: mean and centred sum of squares of each channel, each in a slot of its own
    fold           of a group of a clip: Chan's formula over its channels, tiles and frames -> centre, rstd
    apply          y = silu((x - centre) rstd weight + bias)

`centre` is mean_g - shift, so no kernel adds the shift. It and `rstd` are kept for each picture and channel, and
backward is of the same three: sums of g and g xhat; c1 and c2; dx. Small pictures are done by one kernel, a few
groups to a program, which reads its pixels once. No atomics: results repeat bit for bit.

Arithmetic is in the type of the statistics: float32, or float64 where x is float64 (which only tests are).
N pictures, K chunks of CHUNK pixels, BC channels of a tile, CG of a group. LAST: channels last in memory, else NCHW.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL = 2**12                          # numbers of some groups of a picture, up to which one launch beats three;
FEW = 2**20                            # twice as many where x has no more than so many
PROGRAMS = 2 * 132                     # keep an H200 busy: two for each multiprocessor
FOUR_WARPS = {"num_warps": 4, "enable_fp_fusion": True}                  # a x + b in one: the default is changing


# ---- Tiles ------------------------------------------------------------------------------------------------

def tile_of(N: int, P: int, C: int, most: int) -> tuple[int, int]:
    """Pixels (at most `most`) and channels of a tile: fewer pixels where pictures make few tiles."""
    channels = min(64, max(16, triton.next_power_of_2(C)))
    pixels = min(most, max(16, triton.next_power_of_2(P)))
    while pixels > 32 and N * triton.cdiv(P, pixels) * triton.cdiv(C, channels) < PROGRAMS:
        pixels //= 2
    return pixels, channels


def width_of_groups(CG: int) -> int:
    """Channels of so many whole groups that they start at 16 bytes and are 64 bytes of a pixel, in half precision."""
    width = math.lcm(CG, 8)
    return width * triton.cdiv(32, width)


def tile_of_small(P: int, CG: int) -> tuple[int, int]:
    """Pixels and channels of a whole picture's tile."""
    return triton.next_power_of_2(P), triton.next_power_of_2(width_of_groups(CG))


def tile_of_group(CG: int, rows: int) -> tuple[int, int]:
    """Lanes for the channels of a group and, of what there are in `rows`, rows at a time."""
    lanes = triton.next_power_of_2(CG)
    return lanes, min(max(1, 1024 // lanes), triton.next_power_of_2(rows))


@triton.jit
def _places(pixels, channels, ours, P, C, LAST: tl.constexpr):
    """Where a tile lies in its picture, and what of it there is.   (CHUNK,), (BC,), (BC,) -> 2 x (CHUNK, BC)"""
    inside = (pixels < P)[:, None] & ours[None, :]
    if LAST:
        return pixels[:, None] * C + channels[None, :], inside
    else:
        return channels[None, :] * P + pixels[:, None], inside


@triton.jit
def divided(total, count):
    """total / count, rounded once. On a GPU `/` is quick: 63000 / 63 may be 1000.00006 there, and a mean not exact."""
    if total.dtype == tl.float64:
        return total / count
    else:
        return tl.div_rn(total, tl.cast(count, tl.float32))


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)). A root and a square are 2 instructions where a division is 8."""
    root = tl.rsqrt(1 + tl.exp(-z))
    return root * root


# ---- Forward ----------------------------------------------------------------------------------------------

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
        z *= _sigmoid(z)
    return z


@triton.jit
def _of_channels(vector, channels, ours, TYPE: tl.constexpr):
    return tl.load(vector + channels, mask=ours, other=0.0).to(TYPE)


@triton.jit
def _vectors(stats, weight, bias, n, N, channels, ours, C):
    """centre, rstd, weight and bias of some channels of picture n.   -> 4 x (BC,)"""
    TYPE: tl.constexpr = stats.dtype.element_ty
    centre = _of_channels(stats + n * C, channels, ours, TYPE)
    rstd = _of_channels(stats + (N + n) * C, channels, ours, TYPE)
    return centre, rstd, _of_channels(weight, channels, ours, TYPE), _of_channels(bias, channels, ours, TYPE)


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
        places, inside = _places(first + start + tl.arange(0, ROWS), channels, ours, P, C, LAST)
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
            centre -= _of_channels(shift + n // EACH * C, channels, ours, TYPE)
        tl.store(stats + n * C + channels, centre, mask=ours)
        tl.store(stats + (N + n) * C + channels, tl.zeros([LANES], TYPE) + rstd, mask=ours)


@triton.jit
def _apply(x, y,                       # (N, P, C), or (N, C, P) if not LAST
           weight, bias,               # (C,)
           stats,                      # (2, N, C) of _fold
           P, C, SILU: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr):
    N = tl.num_programs(2)
    n = N - 1 - tl.program_id(2)                                         # those read last are still in the L2 cache
    pixels, channels = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK), tl.program_id(0) * BC + tl.arange(0, BC)
    ours, picture = channels < C, n.to(tl.int64) * P * C
    places, inside = _places(pixels, channels, ours, P, C, LAST)
    tile = tl.load(x + picture + places, mask=inside, other=0.0)
    centre, rstd, w, b = _vectors(stats, weight, bias, n, N, channels, ours, C)
    z = _normalised(tile, centre, rstd, w, b, SILU)
    tl.store(y + picture + places, z.to(y.dtype.element_ty), mask=inside)


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
    places, inside = _places(pixels, channels, ours, P, C, LAST)
    tile = tl.load(x + picture + places, mask=inside, other=0.0)
    w, b = _of_channels(weight, channels, ours, TYPE), _of_channels(bias, channels, ours, TYPE)
    pivot = _pixel(x + picture, 0, channels, ours, P, C, LAST, TYPE)
    d = tl.where(inside, tile.to(TYPE) - pivot[None, :], 0.0)
    mean, squares = _moments(pivot, d, d * d, P)
    if SHIFT:
        added = _of_channels(shift + n // EACH * C, channels, ours, TYPE)
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


# ---- Backward ---------------------------------------------------------------------------------------------

@triton.jit
def _gradient_of_z(x, dy, places, inside, centre, rstd, weight, bias, SILU: tl.constexpr):
    """xhat and g of a tile.   -> 2 x (CHUNK, BC)"""
    xhat = (tl.load(x + places, mask=inside, other=0.0).to(rstd.dtype) - centre[None, :]) * rstd[None, :]
    xhat = tl.where(inside, xhat, 0.0)
    g = tl.load(dy + places, mask=inside, other=0.0).to(rstd.dtype)
    if SILU:
        z = xhat * weight[None, :] + bias[None, :]
        sigmoid = _sigmoid(z)
        g *= sigmoid * (1 + z * (1 - sigmoid))
    return xhat, g


@triton.jit
def _sums(x, dy,                       # (N, P, C), or (N, C, P) if not LAST
          weight, bias,                # (C,)
          stats,                       # (2, N, C)
          slots,                       # (2 or 3, N, K, C): sums of g, g xhat and, for the gradient of the shift, xhat
          P, C, SHIFT: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr):
    k, n, K, N = tl.program_id(1), tl.program_id(2), tl.num_programs(1), tl.num_programs(2)
    pixels, channels = k * CHUNK + tl.arange(0, CHUNK), tl.program_id(0) * BC + tl.arange(0, BC)
    ours, picture = channels < C, n.to(tl.int64) * P * C
    places, inside = _places(pixels, channels, ours, P, C, LAST)
    centre, rstd, w, b = _vectors(stats, weight, bias, n, N, channels, ours, C)
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
    w = _of_channels(weight, channels, ours, TYPE)[None, :]
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
    pixels, channels = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK), tl.program_id(0) * BC + tl.arange(0, BC)
    ours, picture = channels < C, n.to(tl.int64) * P * C
    places, inside = _places(pixels, channels, ours, P, C, LAST)
    centre, rstd, w, b = _vectors(stats, weight, bias, n, N, channels, ours, C)
    xhat, g = _gradient_of_z(x + picture, dy + picture, places, inside, centre, rstd, w, b, SILU)
    c1 = _of_channels(folded + n * C, channels, ours, rstd.dtype)        # both times rstd
    c2 = _of_channels(folded + (N + n) * C, channels, ours, rstd.dtype)
    result = g * (rstd * w)[None, :] - c1[None, :] - xhat * c2[None, :]
    tl.store(dx + picture + places, result.to(dx.dtype.element_ty), mask=inside)


# ---- Launches ---------------------------------------------------------------------------------------------

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


def launch_small(x, y, weight, bias, shift, stats, groups, eps, frames, silu) -> None:
    N, C, H, W = x.shape
    P, CG = H * W, C // groups
    width = width_of_groups(CG)
    PIXELS, BC = tile_of_small(P, CG)
    _small[triton.cdiv(C, width), N](
        x, y, weight, bias, shift, stats, P, C, 1 if shift is None else N // len(shift), eps, CG=CG, WIDTH=width,
        GROUPS=triton.next_power_of_2(width // CG), SHIFT=shift is not None, SILU=silu, LAST=channels_last(x),
        PIXELS=PIXELS, BC=BC, **FOUR_WARPS | {"num_warps": min(16, max(1, PIXELS * BC // 2048))})


def launch_tiles(x, y, weight, bias, shift, stats, groups, eps, frames, silu) -> None:
    N, C, H, W = x.shape
    P, LAST = H * W, channels_last(x)
    CHUNK, BC = tile_of(N, P, C, most=128)
    K = triton.cdiv(P, CHUNK)
    LANES, ROWS = tile_of_group(C // groups, frames * K)
    slots = statistics_for(x, 2, N, K, C)
    _statistics[triton.cdiv(C, BC), K, N](
        x, slots, P, C, LAST=LAST, CHUNK=CHUNK, ROWS=min(32, CHUNK), BC=BC, **FOUR_WARPS | {"num_warps": 2})
    _fold[groups, N // frames](
        slots, shift, stats, N, frames, K, P, C, 1 if shift is None else N // len(shift), eps, CG=C // groups,
        LANES=LANES, ROWS=ROWS, CHUNK=CHUNK, SHIFT=shift is not None, **FOUR_WARPS)
    CHUNK, BC = tile_of(N, P, C, most=64)
    _apply[triton.cdiv(C, BC), triton.cdiv(P, CHUNK), N](
        x, y, weight, bias, stats, P, C, SILU=silu, LAST=LAST, CHUNK=CHUNK, BC=BC,
        **FOUR_WARPS | {"num_warps": max(1, CHUNK * BC // 1024)})


# ---- Operations of PyTorch --------------------------------------------------------------------------------

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
    tiles = dict(SILU=silu, LAST=LAST, CHUNK=CHUNK, BC=BC, **FOUR_WARPS)
    slots, grid = statistics_for(x, 2 + shifted, N, K, C), (triton.cdiv(C, BC), K, N)
    dx, folded, dshift = torch.empty_like(x), torch.empty_like(stats), statistics_for(x, N if shifted else 0, C)
    with torch.cuda.device_of(x):
        _sums[grid](x, dy, weight, bias, stats, slots, P, C, SHIFT=shifted, **tiles)
        sums = slots.sum(2)
        _fold_sums[groups, N // frames](sums, weight, stats, folded, dshift, N, frames, P, C, CG=C // groups,
                                        LANES=LANES, ROWS=ROWS, SHIFT=shifted, **FOUR_WARPS)
        _gradient_of_x[grid](x, dy, dx, weight, bias, stats, folded, P, C, **tiles)
    return dx, sums, dshift


@backward.register_fake
def _(dy, x, weight, bias, stats, groups, frames, silu, shifted):
    N, C = x.shape[:2]
    return torch.empty_like(dense(x)), statistics_for(x, 2 + shifted, N, C), statistics_for(x, N if shifted else 0, C)


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
