"""GEGLU in Triton; formulas and names are those of geglu.py.

x is a matrix of R rows and 2 D columns, values and then gates. A tile is ROWS of its rows by BD of the D columns of
values, and the gates that belong to them. Tiles side by side come one behind the other, so memory is read in long
stretches; none needs another.

Arithmetic is in float32, or in float64 where x is float64 (which only tests are).
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles_triton import options

TILE = 2048                            # values of a tile: two of 16 bytes to a thread, and as many gates
SQRT_HALF = tl.constexpr(0.5 ** 0.5)
BELL = tl.constexpr((2 * torch.pi) ** -0.5)                              # phi(0)


# ---- Tiles ------------------------------------------------------------------------------------------------

def tile_of(D: int) -> tuple[int, int]:
    """Rows and columns of a tile: 256 columns, 512 bytes in half precision, divide the widths of the models."""
    columns = min(256, max(16, triton.next_power_of_2(D)))
    return TILE // columns, columns


@triton.jit
def _place(R, D, ROWS: tl.constexpr, BD: tl.constexpr):
    """The tile of this program: its first row, how far down its rows are, its columns, what of it there is."""
    across = tl.cdiv(D, BD)
    first = tl.program_id(0) // across * ROWS
    down, columns = tl.arange(0, ROWS)[:, None], tl.program_id(0) % across * BD + tl.arange(0, BD)[None, :]
    return first.to(tl.int64), down, columns, (first + down < R) & (columns < D)


@triton.jit
def _share(gate):
    """Phi(gate)."""
    return 0.5 + 0.5 * tl.erf(gate * SQRT_HALF)


# ---- Kernels ----------------------------------------------------------------------------------------------

@triton.jit
def _geglu(x,                          # (R, 2 D), rows `stride` apart
           y,                          # (R, D)
           R, D, stride, TYPE: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    first, down, columns, inside = _place(R, D, ROWS, BD)
    values = x + first * stride + down * stride + columns
    value = tl.load(values, mask=inside, other=0.0).to(TYPE)
    gate = tl.load(values + D, mask=inside, other=0.0).to(TYPE)
    result = value * (gate * _share(gate))
    tl.store(y + first * D + down * D + columns, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_of_x(x,                  # (R, 2 D), rows `stride` apart
                   dy,                 # (R, D), rows `stride_dy` apart
                   dx,                 # (R, 2 D)
                   R, D, stride, stride_dy, TYPE: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    first, down, columns, inside = _place(R, D, ROWS, BD)
    values = x + first * stride + down * stride + columns
    value = tl.load(values, mask=inside, other=0.0).to(TYPE)
    gate = tl.load(values + D, mask=inside, other=0.0).to(TYPE)
    g = tl.load(dy + first * stride_dy + down * stride_dy + columns, mask=inside, other=0.0).to(TYPE)
    share = _share(gate)
    slope = share + gate * (BELL * tl.exp(-0.5 * gate * gate))
    results = dx + first * 2 * D + down * 2 * D + columns
    tl.store(results, (g * (gate * share)).to(dx.dtype.element_ty), mask=inside)
    tl.store(results + D, (g * value * slope).to(dx.dtype.element_ty), mask=inside)


# ---- Operations of PyTorch --------------------------------------------------------------------------------

def as_rows(x: Tensor) -> Tensor:
    """A matrix of the last axis, side by side in memory, rows at any one distance; a copy where x is not that."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def arithmetic(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def geglu_triton(x: Tensor) -> Tensor:
    """geglu of geglu.py. Under autocast the result has the type of x, as PyTorch has it there."""
    assert x.shape[-1] % 2 == 0, f"{x.shape[-1]} channels cannot be halved into values and gates"
    return forward(x)


@torch.library.custom_op("nanodisco::geglu", mutates_args=())
def forward(x: Tensor) -> Tensor:
    x, y = as_rows(x), x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    (R, D), (ROWS, BD) = (len(x), y.shape[-1]), tile_of(y.shape[-1])
    with torch.cuda.device_of(x):
        if y.numel():
            _geglu[(triton.cdiv(R, ROWS) * triton.cdiv(D, BD),)](
                x, y, R, D, x.stride(0), TYPE=arithmetic(x), ROWS=ROWS, BD=BD, **options())
    return y


@forward.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("nanodisco::geglu_backward", mutates_args=())
def backward(dy: Tensor, x: Tensor) -> Tensor:
    dx, x, dy = x.new_empty(x.shape), as_rows(x), as_rows(dy)
    (R, D), (ROWS, BD) = dy.shape, tile_of(dy.shape[1])
    with torch.cuda.device_of(x):
        if dy.numel():
            _gradient_of_x[(triton.cdiv(R, ROWS) * triton.cdiv(D, BD),)](
                x, dy, dx, R, D, x.stride(0), dy.stride(0), TYPE=arithmetic(x), ROWS=ROWS, BD=BD, **options())
    return dx


@backward.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def gradients(ctx, dy: Tensor) -> Tensor:
    return backward(dy, *ctx.saved_tensors)


forward.register_autograd(gradients, setup_context=keep)
