"""Tiles of a head: some rows of its (rows, K) matrix, in two parts whose widths are powers of two.

Triton's tiles have powers of two as sides and the heads of a diffusion UNet are 40, 80 and 160 wide.
Padded, they would be multiplied as 64, 128 and 256. So a tile is a tuple of a main part and a tail,

    40 = 32 + 8 (of 16)      80 = 64 + 16      160 = 128 + 32

or of one part where padding costs no more. Products over the width sum both parts; products that have
the width as a result make each part by itself.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
NARROWEST = 16                         # side of the smallest matrix product


def options(warps: int = 4, stages: int = 3) -> dict:
    """How a kernel is compiled: a x + b in one instruction, which some versions leave to be asked for.

    stages: blocks in memory at a time, of the loop over matrix products.
    """
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def parts(K: int) -> tuple[int, int]:
    """Width of a head -> of its main part and its tail (0: none)."""
    padded = max(NARROWEST, triton.next_power_of_2(K))
    if K == padded or padded == NARROWEST:
        return padded, 0
    main = padded // 2
    tail = max(NARROWEST, triton.next_power_of_2(K - main))
    return (main, tail) if main + tail < padded else (padded, 0)


def heads_adjacent(x: Tensor) -> Tensor:
    """x (..., N, K) with the numbers of a row's heads side by side, as of every linear layer; else a copy. The other
    axes may have any strides."""
    N, K = x.shape[-2:]
    return x if x.stride(-1) == 1 and (x.stride(-2) == K or N == 1) else x.contiguous()


def strides(x: Tensor) -> tuple[int, ...]:
    """Of all axes but the two of the heads."""
    return x.stride()[:-2]


@triton.jit
def place(blocks, N: tl.constexpr):
    """Which block of rows, head and picture this program has: neighbours share a head, and so its keys in the cache."""
    program = tl.program_id(0)
    return program % blocks, program // blocks % N, (program // blocks // N).to(tl.int64)


@triton.jit
def load(pointer, offsets, inside, EVEN: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    """The rows that start at `offsets`, zeros where not `inside`; EVEN: all are.   -> (R, MAIN), (R, TAIL)"""
    main = _load_part(pointer, offsets, inside, EVEN, K, 0, MAIN)
    if TAIL == 0:
        return (main,)
    else:
        return main, _load_part(pointer, offsets, inside, EVEN, K, MAIN, TAIL)


@triton.jit
def _load_part(pointer, offsets, inside, EVEN: tl.constexpr, K: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr):
    columns = FROM + tl.arange(0, WIDTH)
    pointers = pointer + offsets[:, None] + columns[None, :]
    if EVEN and FROM + WIDTH <= K:
        return tl.load(pointers)
    elif EVEN:
        return tl.load(pointers, mask=(columns < K)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=inside[:, None] & (columns < K)[None, :], other=0.0)


@triton.jit
def store(pointer, offsets, inside, x, K: tl.constexpr, factor=1.0):
    """x times a factor, the other way; in the dtype of the pointer."""
    _store_part(pointer, offsets, inside, x[0] * factor, K, 0)
    if len(x) > 1:
        _store_part(pointer, offsets, inside, x[1] * factor, K, x[0].shape[1])


@triton.jit
def _store_part(pointer, offsets, inside, x, K: tl.constexpr, FROM: tl.constexpr):
    columns = FROM + tl.arange(0, x.shape[1])
    mask = inside[:, None] & (columns < K)[None, :]
    tl.store(pointer + offsets[:, None] + columns[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr):
    if TAIL == 0:
        return (tl.zeros((ROWS, MAIN), tl.float32),)
    else:
        return tl.zeros((ROWS, MAIN), tl.float32), tl.zeros((ROWS, TAIL), tl.float32)


@triton.jit
def mm(a, b, total=None):
    """total + a b, in float32. The interpreter multiplies the bits of bfloat16 as if they were integers: not there."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def inner(a, b):
    """a b^T: every row of a with every row of b.   (R, K), (S, K) -> (R, S)"""
    x = mm(a[0], tl.trans(b[0]))
    if len(a) > 1:
        x = mm(a[1], tl.trans(b[1]), x)
    return x


@triton.jit
def add(total, p, b):
    """total + p b: rows of b, weighted.   (R, K), (R, S), (S, K) -> (R, K)"""
    p = p.to(b[0].dtype)
    if len(b) > 1:
        return mm(p, b[0], total[0]), mm(p, b[1], total[1])
    else:
        return (mm(p, b[0], total[0]),)


@triton.jit
def scaled(x, factor):
    """Each row times its factor.   (R, K), (R,) -> (R, K)"""
    if len(x) > 1:
        return x[0] * factor[:, None], x[1] * factor[:, None]
    else:
        return (x[0] * factor[:, None],)


@triton.jit
def inner_rows(a, b):
    """Each row of a with its row of b, or with b's only one.   (R, K), (R or 1, K) -> (R,)"""
    x = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) > 1:
        x += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return x


@triton.jit
def outer(factor, b):
    """b's only row, times each factor.   (R,), (1, K) -> (R, K)"""
    if len(b) > 1:
        return factor[:, None] * b[0].to(tl.float32), factor[:, None] * b[1].to(tl.float32)
    else:
        return (factor[:, None] * b[0].to(tl.float32),)


# ---- Whether any of this runs -------------------------------------------------------------------------------

@triton.jit
def _one(pointer):
    tl.store(pointer, 1.0)


def launch_one(device: str) -> None:
    """The smallest of kernels; an exception where Triton cannot compile or launch it."""
    x = torch.zeros(1, device=device)
    _one[(1,)](x)
    assert x.item() == 1, "it wrote something else"
