"""The tiles of softmax attention within many short sequences: along frames, or of 64 pixels and fewer.

A matrix product wants 64 rows, and a clip has 16 frames: so one tile holds as many whole sequences as fit,
and the scores of different sequences are masked. All of a sequence is there at once: no running maximum,
nothing kept from forward to backward but Q, K, V, and one program makes dQ, dK and dV together.

Shapes: clips B, tokens T of a sequence, places S of a clip, heads N, width K. The layout is (B, T, S, N, K),
where the sequences of a video lie already: frames are T, pixels are S. Of one picture, pixels are T and S = 1.
Q, K and V lie packed, (B, T, S, 3, N, K), with one set of strides; so do dQ, dK and dV, contiguous.
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tiles_triton import add, heads_adjacent, inner, load, options, parts, scaled, store, strides, zeros


def longest(q: Tensor) -> int:
    """The longest sequence for this kernel, 0 if none: the rows of a tile.

    64 are what Hopper's matrix product wants, which has no float32. And in float32 backward of a head wider than
    192 does not fit into the registers.
    """
    return (16 if q.shape[-1] <= 192 else 0) if q.dtype == torch.float32 else 64


@triton.jit
def whole_sequences(count, S, T: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows and head. -> each row's sequence within the tile, clip, place, token, is it one; head

    Neighbours share rows: a row of all heads is read from memory once.
    """
    row = tl.arange(0, ROWS)
    own = row // T
    sequence = tl.program_id(0) // N * (ROWS // T) + own
    inside = (own < ROWS // T) & (sequence < count)
    return own, (sequence // S).to(tl.int64), sequence % S, row % T, inside, tl.program_id(0) % N


@triton.jit
def weights(q, k, own, scale, T: tl.constexpr):
    """exp of each row's scores less their largest, zero where the key is of another sequence; and their sum."""
    x = inner(q, k) * scale
    if T < x.shape[0]:
        x = tl.where(own[:, None] == own[None, :], x, float("-inf"))
    p = tl.exp2(x - tl.max(x, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def forward(q_ptr, k_ptr, v_ptr, o_ptr,                                  # (B, T, S, N, K)
            clip_stride, token_stride, place_stride, count, S, scale,
            T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
            EVEN: tl.constexpr, ROWS: tl.constexpr):
    own, clip, place, token, inside, n = whole_sequences(count, S, T, N, ROWS)
    at = clip * clip_stride + token * token_stride + place * place_stride + n * K
    q = load(q_ptr, at, inside, EVEN, K, MAIN, TAIL)
    k = load(k_ptr, at, inside, EVEN, K, MAIN, TAIL)
    v = load(v_ptr, at, inside, EVEN, K, MAIN, TAIL)
    p, total = weights(q, k, own, scale, T)
    o = scaled(add(zeros(ROWS, MAIN, TAIL), p, v), 1 / total)
    store(o_ptr, (((clip * T + token) * S + place) * N + n) * K, inside, o, K)


@triton.jit
def backward(q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr,        # (B, T, S, N, K)
             clip_stride, token_stride, place_stride, do_clip, do_token, do_place, count, S, scale, root,
             T: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
             EVEN: tl.constexpr, ROWS: tl.constexpr):
    own, clip, place, token, inside, n = whole_sequences(count, S, T, N, ROWS)
    at = clip * clip_stride + token * token_stride + place * place_stride + n * K
    do_at = clip * do_clip + token * do_token + place * do_place + n * K
    into = (((clip * T + token) * S + place) * 3 * N + n) * K            # dQ, dK and dV lie packed
    q = load(q_ptr, at, inside, EVEN, K, MAIN, TAIL)
    k = load(k_ptr, at, inside, EVEN, K, MAIN, TAIL)
    v = load(v_ptr, at, inside, EVEN, K, MAIN, TAIL)
    do = load(do_ptr, do_at, inside, EVEN, K, MAIN, TAIL)
    p, total = weights(q, k, own, scale, T)
    p = p / total[:, None]
    nothing = zeros(ROWS, MAIN, TAIL)
    store(dv_ptr, into, inside, add(nothing, tl.trans(p), do), K)
    dp = inner(do, v)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None])
    store(dq_ptr, into, inside, add(nothing, ds, k), K, root)
    store(dk_ptr, into, inside, add(nothing, tl.trans(ds), q), K, root)


# ---- Operation -----------------------------------------------------------------------------------

@torch.library.custom_op("nanodisco::short_attention", mutates_args=())
def attend(qkv: Tensor) -> Tensor:
    """Each of the B*S sequences attends to itself.   (B, T, S, 3, N, K) -> (B, T, S, N, K)"""
    q, k, v = heads_adjacent(qkv).unbind(3)
    grid, sizes, constants = cut(q)
    o = q.new_empty(q.shape)
    with torch.cuda.device_of(q):
        forward[grid](q, k, v, o, *strides(q), *sizes, **constants)
    return o


@attend.register_fake
def _(qkv):
    B, T, S, _, N, K = qkv.shape
    return qkv.new_empty(B, T, S, N, K)


@torch.library.custom_op("nanodisco::short_attention_backward", mutates_args=())
def attend_backward(qkv: Tensor, do: Tensor) -> Tensor:
    """-> dQ, dK and dV, packed as Q, K and V are"""
    (q, k, v), do = heads_adjacent(qkv).unbind(3), heads_adjacent(do)
    grid, sizes, constants = cut(q)
    gradient = qkv.new_empty(qkv.shape)
    with torch.cuda.device_of(q):
        backward[grid](q, k, v, do, *gradient.unbind(3), *strides(q), *strides(do), *sizes, q.shape[-1] ** -0.5,
                       **constants)
    return gradient


@attend_backward.register_fake
def _(qkv, do):
    return qkv.new_empty(qkv.shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, do):
    return attend_backward(*ctx.saved_tensors, do)


attend.register_autograd(_backward, setup_context=_keep)


def cut(q: Tensor) -> tuple[tuple, tuple, dict]:
    """-> grid, sizes, constants and launch of the kernels"""
    B, T, S, N, K = q.shape
    count, rows = B * S, longest(q)
    each = rows // T                                                     # sequences of a tile
    MAIN, TAIL = parts(K)
    wide = K > (96 if q.dtype == torch.float32 else 160)
    return ((-(-count // each) * N,), (count, S, K ** -0.5 * math.log2(math.e)),
            {"T": T, "N": N, "K": K, "MAIN": MAIN, "TAIL": TAIL, "ROWS": rows,
             "EVEN": rows % T == 0 and count % each == 0, **options(warps=8 if wide else 4, stages=1)})
