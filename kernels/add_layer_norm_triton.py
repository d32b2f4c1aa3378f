"""A residual and the LayerNorm behind it in Triton; formulas and names are those of add_layer_norm.py.

A matrix of R rows and D columns. A program holds ROWS whole rows in registers, each padded to BD, a power of two,
so it reads them once and takes the variance around the mean that it has already found. A row is the work of one
warp up to a width of 1024, backward 512, so its sums need no other warp.

Backward, a program goes over every so many rows and adds up its part of dweight and dbias in a slot of its own; what
the slots hold PyTorch adds up. No atomics: results repeat bit for bit.

Arithmetic is in the type of the statistics: float32, or float64 where x is float64 (which only tests are).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.geglu_triton import as_rows
from kernels.picture_tiles_triton import divided, statistics_for
from kernels.tiles_triton import options

WARPS = 16 * 132                       # keep an H200 busy: sixteen for each multiprocessor
LEAST = 8                              # rows of a program that has slots to write


# ---- Tiles ------------------------------------------------------------------------------------------------

def tile_of(D: int, each: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps: one, with up to `each` numbers to a thread, or more for a wide row."""
    columns = max(8, triton.next_power_of_2(D))
    return max(1, 32 * each // columns), columns, min(8, max(1, columns // (32 * each)))


@triton.jit
def _load(x, row, stride, down, columns, inside, TYPE: tl.constexpr):
    """Some rows from `row` on."""
    place = x + tl.cast(row, tl.int64) * stride + down * stride + columns
    return tl.load(place, mask=inside, other=0.0).to(TYPE)


@triton.jit
def _store(x, row, D, down, columns, inside, values):
    tl.store(x + tl.cast(row, tl.int64) * D + down * D + columns, values.to(x.dtype.element_ty), mask=inside)


# ---- Kernels ----------------------------------------------------------------------------------------------

@triton.jit
def _add_normalise(x, more,            # (R, D) and (R - FILLED, D), rows stride and stride_more apart
                   weight, bias,       # (D,)
                   fill,               # (D,): what the first FILLED rows get
                   sums, normed,       # (R, D)
                   stats,              # (2, R): mean, rstd
                   R, D, FILLED, stride, stride_more, eps,
                   MORE: tl.constexpr, FILL: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    TYPE: tl.constexpr = stats.dtype.element_ty
    row, down, columns = tl.program_id(0) * ROWS, tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
    inside = (row + down < R) & (columns < D)
    h = _load(x, row, stride, down, columns, inside, TYPE)
    if MORE:
        if FILL:                                                         # a tile may have rows of both kinds
            first = row + down < FILLED
            added = _load(more, row - FILLED, stride_more, down, columns, inside & ~first, TYPE)
            added = tl.where(first, tl.load(fill + columns, mask=columns < D, other=0.0).to(TYPE), added)
        else:
            added = _load(more, row, stride_more, down, columns, inside, TYPE)
        h = (h + added).to(sums.dtype.element_ty)
        _store(sums, row, D, down, columns, inside, h)
        h = h.to(TYPE)                                                   # rounded, as the next residual sees it
    mean = divided(tl.sum(h, 1), D)[:, None]
    centred = tl.where(inside, h - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / D + eps)
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(TYPE)
    b = tl.load(bias + columns, mask=columns < D, other=0.0).to(TYPE)
    _store(normed, row, D, down, columns, inside, centred * rstd * w + b)
    tl.store(stats + row + down, mean, mask=row + down < R)
    tl.store(stats + R + row + down, rstd, mask=row + down < R)


@triton.jit
def _gradient_of_sum(sums, dsums, dnormed,         # (R, D), rows stride, stride_dsums and stride_dnormed apart
                     weight,                       # (D,)
                     stats,                        # (2, R)
                     dx,                           # (R, D)
                     slots,                        # (programs, 2, D): of dweight, of dbias
                     R, D, stride, stride_dsums, stride_dnormed,
                     DSUMS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    TYPE: tl.constexpr = stats.dtype.element_ty
    down, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
    w = tl.load(weight + columns, mask=columns < D, other=0.0).to(TYPE)
    dweight, dbias = tl.zeros([ROWS, BD], TYPE), tl.zeros([ROWS, BD], TYPE)
    for row in range(tl.program_id(0) * ROWS, R, tl.num_programs(0) * ROWS):
        inside = (row + down < R) & (columns < D)
        if DSUMS:                                                        # early: sums over a row wait for its loads
            before = _load(dsums, row, stride_dsums, down, columns, inside, TYPE)
        else:
            before = tl.zeros([ROWS, BD], TYPE)
        mean = tl.load(stats + row + down, mask=row + down < R, other=0.0)
        rstd = tl.load(stats + R + row + down, mask=row + down < R, other=0.0)
        xhat = (_load(sums, row, stride, down, columns, inside, TYPE) - mean) * rstd
        g = _load(dnormed, row, stride_dnormed, down, columns, inside, TYPE)     # 0 outside, so xhat counts nowhere
        dweight += g * xhat
        dbias += g
        g *= w
        result = g - tl.sum(g, 1)[:, None] / D - xhat * (tl.sum(g * xhat, 1)[:, None] / D)
        _store(dx, row, D, down, columns, inside, before + rstd * result)
    slot, lanes = slots + tl.program_id(0) * 2 * D, tl.arange(0, BD)
    tl.store(slot + lanes, tl.sum(dweight, 0), mask=lanes < D)
    tl.store(slot + D + lanes, tl.sum(dbias, 0), mask=lanes < D)


# ---- Operations of PyTorch --------------------------------------------------------------------------------

def empty_sum(x: Tensor, more: Tensor | None) -> Tensor:
    """Room for x + more, in the type that PyTorch would give it; for nothing where nothing is added."""
    return x.new_empty(0) if more is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, more.dtype))


def add_layer_norm_triton(x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5,
                          fill: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """add_layer_norm of add_layer_norm.py; with `fill` it has no gradients.

    Under autocast `normed` is float32, as PyTorch's layer_norm has it there on a GPU; x and more are read as they are.
    """
    if fill is None:
        assert more is None or more.shape == x.shape, f"x is {tuple(x.shape)}, what is added {tuple(more.shape)}"
    else:
        assert more.shape[1:] == x.shape[1:] and len(more) <= len(x), \
            f"x is {tuple(x.shape)}, what is added to the last of it {tuple(more.shape)}"
        assert fill.shape == x.shape[-1:], f"rows of {x.shape[-1]}, what is added to the others {tuple(fill.shape)}"
        fill = fill.to(more.dtype).contiguous()
    assert weight.shape == bias.shape == x.shape[-1:], f"rows of {x.shape[-1]}, a weight {tuple(weight.shape)}"
    dtype = x.dtype if more is None else torch.promote_types(x.dtype, more.dtype)
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.float32
    sums, normed, _ = forward(x, more, weight.contiguous(), bias.contiguous(), eps, dtype, fill)
    return x if more is None else sums, normed


@torch.library.custom_op("nanodisco::add_layer_norm", mutates_args=())
def forward(x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
            fill: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The sum; normed in `dtype`; mean and rstd, (2, R)."""
    sums, normed = empty_sum(x, more), x.new_empty(x.shape, dtype=dtype)
    x, more = as_rows(x), None if more is None else as_rows(more)
    (R, D), (ROWS, BD, warps) = x.shape, tile_of(x.shape[1], each=32)
    stats = statistics_for(sums, 2, R)
    with torch.cuda.device_of(x):
        if R:
            _add_normalise[(triton.cdiv(R, ROWS),)](
                x, more, weight, bias, fill, sums, normed, stats, R, D, 0 if more is None else R - len(more),
                x.stride(0), 0 if more is None else more.stride(0), eps, MORE=more is not None,
                FILL=fill is not None, ROWS=ROWS, BD=BD, **options(warps))
    return sums, normed, stats


@forward.register_fake
def _(x, more, weight, bias, eps, dtype, fill=None):
    sums, R = empty_sum(x, more), x.numel() // x.shape[-1]
    return sums, x.new_empty(x.shape, dtype=dtype), statistics_for(sums, 2, R)


@torch.library.custom_op("nanodisco::add_layer_norm_backward", mutates_args=())
def backward(dsums: Tensor | None, dnormed: Tensor, sums: Tensor, weight: Tensor,
             stats: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the sum; those of weight and bias, (2, D)."""
    dx = sums.new_empty(sums.shape)
    sums, dsums, dnormed = as_rows(sums), None if dsums is None else as_rows(dsums), as_rows(dnormed)
    (R, D), (ROWS, BD, warps) = sums.shape, tile_of(sums.shape[1], each=16)
    programs = max(1, min(WARPS // warps, triton.cdiv(R, max(ROWS, LEAST))))
    slots = stats.new_empty(programs, 2, D)
    with torch.cuda.device_of(sums):
        _gradient_of_sum[(programs,)](
            sums, dsums, dnormed, weight, stats, dx, slots, R, D, sums.stride(0),
            0 if dsums is None else dsums.stride(0), dnormed.stride(0), DSUMS=dsums is not None, ROWS=ROWS, BD=BD,
            **options(warps))
    return dx, slots.sum(0)


@backward.register_fake
def _(dsums, dnormed, sums, weight, stats):
    return sums.new_empty(sums.shape), stats.new_empty(2, sums.shape[-1])


def keep(ctx, inputs, output) -> None:
    x, more, weight, bias, _, _, fill = inputs
    assert fill is None, "gradients are of the form without `fill`: see add_layer_norm.py"
    sums, _, stats = output
    ctx.more, ctx.bias = None if more is None else more.dtype, bias.dtype
    ctx.save_for_backward(x if more is None else sums, weight, stats)
    ctx.mark_non_differentiable(*([sums, stats] if more is None else [stats]))
    ctx.set_materialize_grads(False)                                     # None, not zeros, where a result is not used


def gradients(ctx, dsums: Tensor | None, dnormed: Tensor | None, _) -> tuple:
    sums, weight, stats = ctx.saved_tensors
    if dnormed is None:
        dx, vectors = dsums, stats.new_zeros(2, len(weight))
    else:
        dx, vectors = backward(dsums, dnormed, sums, weight, stats)
    dmore = None if ctx.more is None else dx.to(ctx.more)
    return dx, dmore, vectors[0].to(weight.dtype), vectors[1].to(ctx.bias), None, None, None


forward.register_autograd(gradients, setup_context=keep)
