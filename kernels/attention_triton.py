"""The tiles of softmax attention over long sequences. See attention.py for the mathematics.

A program has a block of queries and walks over the keys (forward, dQ), or a block of keys and walks over
the queries (dK, dV). No two programs write the same number, so results repeat bit for bit.

    forward      sum l and, in float16 and float32, running maximum m, in the letters of FlashAttention
                 (arXiv:2205.14135, algorithm 1)
    d_queries    dQ, and delta on the way
    d_keys       dK and dV, in the transposed score space; with few keys and many queries several programs
                 share a block of keys: each writes its part, in float32, and a second pass sums the parts

exp(x) is exp2(x log2(e)): the scale and log2(e) are one factor, and LSE is kept in base 2. With 257 keys
(CLIP's) and heads of up to 96 the sums start from key 0, which leaves 256: even blocks, and none for one key.

softmax(X - m) is the same for every m. The maximum keeps exp from leaving the numbers' range, and costs a third
of the arithmetic: to find it, and to shrink what has been summed whenever it grows. bfloat16 reaches as far as
float32, 2^-126 to 2^127, so there m = 0 at first. Where a sum comes near an end of that, which scores beyond 69 do,
the block of queries is done again, with the maximum. (Values may be as large as 1e8 then.)
"""
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import attention_short_triton as short
from kernels.tiles_triton import (add, heads_adjacent, inner, inner_rows, load, options, outer, parts, place, scaled,
                                  store, strides, zeros)

LOG2_E = math.log2(math.e)
ENOUGH = 528                           # programs that fill an H100 or H200: four for each of 132 multiprocessors
LEAST, MOST = tl.constexpr(1e-30), tl.constexpr(1e30)                    # of exponentials: where a sum is in range
AGAIN = tl.constexpr(16)               # keys at a time then: few, or it would be these that need the most registers
NEIGHBOURS = tl.constexpr(8)           # columns that a matrix unit's four threads share; each sums its own
FEW = 2 * 132 * 128                    # B N L up to which the GPU is not full; other tiles are faster then
WIDTHS = (48, 64, 80, 96, 128, 160, 192, 256)                            # heads up to each of these share a size
SIZES = {                              # BLOCK_L, BLOCK_M, warps, stages; 16 bits wide, float32
    "forward": {
        False: [(128, 32, 4, 3), (128, 64, 8, 3), (64, 32, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 4, 3),
                (128, 64, 8, 2), (128, 32, 8, 2)],
        True: [(32, 32, 4, 2)] * 4 + [(16, 16, 4, 1), (16, 16, 4, 1), (16, 16, 4, 2), (16, 16, 4, 1)]},
    "few": {                           # forward, see FEW
        False: [(64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3),
                (128, 64, 8, 2), (128, 32, 8, 2)],
        True: [(32, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2), (32, 32, 4, 2), (16, 16, 4, 1), (16, 16, 4, 1),
               (16, 16, 4, 2), (16, 16, 4, 1)]},
    "d_queries": {
        False: [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2),
                (128, 32, 8, 2), (128, 32, 8, 2)],
        True: [(32, 32, 4, 2)] * 6 + [(16, 16, 4, 2)] * 2},
    "d_keys": {                        # the widest has no room for the 64 rows of Hopper's matrix unit
        False: [(32, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 3),
                (32, 64, 8, 2), (32, 32, 8, 2)],
        True: [(32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 4, 2), (16, 16, 4, 1),
               (16, 16, 4, 2), (16, 16, 8, 1)]}}


@triton.jit
def scores(q, k_ptr, v_ptr, k_row, v_row, start, M, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
           BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr):
    """Of all queries with a block of keys, -inf beyond the last key; and the block's values."""
    keys = start + tl.arange(0, BLOCK_M)
    k = load(k_ptr, keys * k_row, keys < M, EVEN_M, K, MAIN, TAIL)
    v = load(v_ptr, keys * v_row, keys < M, EVEN_M, K, MAIN, TAIL)
    x = inner(q, k)
    if not EVEN_M:
        x = tl.where((keys < M)[None, :], x, float("-inf"))
    return x, v


@triton.jit
def walk_unshifted(q, k_ptr, v_ptr, k_row, v_row, M, scale, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
                   BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, FIRST: tl.constexpr):
    """Sum of exp(scores) as they are, and with it the sum of values."""
    ROWS: tl.constexpr = q[0].shape[0]
    parts_of_l = tl.zeros((ROWS, NEIGHBOURS), tl.float32)
    if FIRST:
        one = tl.arange(0, 1)
        p_0 = tl.exp2(inner_rows(q, load(k_ptr, one, one == 0, True, K, MAIN, TAIL)) * scale)
        acc = outer(p_0, load(v_ptr, one, one == 0, True, K, MAIN, TAIL))
    else:
        acc = zeros(ROWS, MAIN, TAIL)
    for start in range(FIRST, M, BLOCK_M):
        x, v = scores(q, k_ptr, v_ptr, k_row, v_row, start, M, K, MAIN, TAIL, BLOCK_M, EVEN_M)
        p = tl.exp2(x * scale)
        parts_of_l += tl.sum(tl.reshape(p, (ROWS, BLOCK_M // NEIGHBOURS, NEIGHBOURS)), 1)
        acc = add(acc, p, v)
    l = tl.sum(parts_of_l, 1)
    return l + p_0 if FIRST else l, acc


@triton.jit
def walk(q, k_ptr, v_ptr, k_row, v_row, M, scale, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
         BLOCK_M: tl.constexpr, EVEN_M: tl.constexpr, FIRST: tl.constexpr, STAGES: tl.constexpr):
    """The same less the running maximum, which is returned too."""
    ROWS: tl.constexpr = q[0].shape[0]
    if FIRST:
        one = tl.arange(0, 1)
        m = inner_rows(q, load(k_ptr, one, one == 0, True, K, MAIN, TAIL)) * scale
        l = tl.full((ROWS,), 1.0, tl.float32)
        acc = outer(l, load(v_ptr, one, one == 0, True, K, MAIN, TAIL))
    else:
        m = tl.full((ROWS,), float("-inf"), tl.float32)
        l = tl.zeros((ROWS,), tl.float32)
        acc = zeros(ROWS, MAIN, TAIL)
    for start in tl.range(FIRST, M, BLOCK_M, num_stages=STAGES):
        x, v = scores(q, k_ptr, v_ptr, k_row, v_row, start, M, K, MAIN, TAIL, BLOCK_M, EVEN_M)
        m_new = tl.maximum(m, tl.max(x, 1) * scale)
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(x * scale - m_new[:, None])                          # one instruction: exponentials are the limit
        l = l * alpha + tl.sum(p, 1)
        acc = add(scaled(acc, alpha), p, v)
        m = m_new
    return m, l, acc


@triton.jit
def forward(q_ptr, k_ptr, v_ptr,                                         # (B, L, N, K), 2 x (B, M, N, K)
            o_ptr, lse_ptr,                                              # (B, L, N, K), (B, N, L)
            q_batch, q_row, k_batch, k_row, v_batch, v_row, L, M, scale,
            N: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
            BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_L: tl.constexpr, EVEN_M: tl.constexpr,
            FIRST: tl.constexpr, SHIFT: tl.constexpr):
    block, n, b = place(tl.cdiv(L, BLOCK_L), N)
    k_ptr += b * k_batch + n * K
    v_ptr += b * v_batch + n * K
    rows = block * BLOCK_L + tl.arange(0, BLOCK_L)
    q = load(q_ptr + b * q_batch + n * K, rows * q_row, rows < L, EVEN_L, K, MAIN, TAIL)
    if SHIFT:
        m, l, acc = walk(q, k_ptr, v_ptr, k_row, v_row, M, scale, K, MAIN, TAIL, BLOCK_M, EVEN_M, FIRST, None)
    else:
        l, acc = walk_unshifted(q, k_ptr, v_ptr, k_row, v_row, M, scale, K, MAIN, TAIL, BLOCK_M, EVEN_M, FIRST)
        m = tl.zeros((BLOCK_L,), tl.float32)
        if tl.max(tl.where((l > LEAST) & (l < MOST), 0, 1), 0) > 0:      # a sum out of range, or no number
            m, l, acc = walk(q, k_ptr, v_ptr, k_row, v_row, M, scale, K, MAIN, TAIL, AGAIN, False, 0, 1)
    store(o_ptr + (b * L * N + n) * K, rows * (N * K), rows < L, scaled(acc, 1 / l), K)
    tl.store(lse_ptr + (b * N + n) * L + rows, m + tl.log2(l), mask=rows < L)


@triton.jit
def d_queries(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, do_ptr,               # do (B, L, N, K)
              dq_ptr, delta_ptr,                                         # (B, L, N, K), (B, N, L)
              q_batch, q_row, k_batch, k_row, v_batch, v_row, do_batch, do_row, dq_batch, dq_row, L, M, scale, root,
              N: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
              BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_L: tl.constexpr, EVEN_M: tl.constexpr,
              FIRST: tl.constexpr):
    block, n, b = place(tl.cdiv(L, BLOCK_L), N)
    k_ptr += b * k_batch + n * K
    v_ptr += b * v_batch + n * K
    rows = block * BLOCK_L + tl.arange(0, BLOCK_L)
    q = load(q_ptr + b * q_batch + n * K, rows * q_row, rows < L, EVEN_L, K, MAIN, TAIL)
    do = load(do_ptr + b * do_batch + n * K, rows * do_row, rows < L, EVEN_L, K, MAIN, TAIL)
    o = load(o_ptr + (b * L * N + n) * K, rows * (N * K), rows < L, EVEN_L, K, MAIN, TAIL)
    lse = tl.load(lse_ptr + (b * N + n) * L + rows, mask=rows < L, other=0.0)
    delta = inner_rows(do, o)
    tl.store(delta_ptr + (b * N + n) * L + rows, delta, mask=rows < L)
    if FIRST:
        one = tl.arange(0, 1)
        k_0 = load(k_ptr, one, one == 0, True, K, MAIN, TAIL)
        v_0 = load(v_ptr, one, one == 0, True, K, MAIN, TAIL)
        p_0 = tl.exp2(inner_rows(q, k_0) * scale - lse)
        dq = outer(p_0 * (inner_rows(do, v_0) - delta), k_0)
    else:
        dq = zeros(BLOCK_L, MAIN, TAIL)
    for start in range(FIRST, M, BLOCK_M):
        keys = start + tl.arange(0, BLOCK_M)
        k = load(k_ptr, keys * k_row, keys < M, EVEN_M, K, MAIN, TAIL)
        v = load(v_ptr, keys * v_row, keys < M, EVEN_M, K, MAIN, TAIL)
        p = tl.exp2(inner(q, k) * scale - lse[:, None])
        if not EVEN_M:
            p = tl.where((keys < M)[None, :], p, 0.0)                    # a key of zeros may score too high for exp
        ds = p * (inner(do, v) - delta[:, None])
        dq = add(dq, ds, k)
    store(dq_ptr + b * dq_batch + n * K, rows * dq_row, rows < L, dq, K, root)


@triton.jit
def d_keys(q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, do_ptr,
           dk_ptr, dv_ptr,                                               # 2 x (SHARES*B, M, N, K), strides alike
           q_batch, q_row, k_batch, k_row, v_batch, v_row, do_batch, do_row, dk_batch, dk_row,
           B, L, M, share, scale, root,
           N: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
           BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, EVEN_L: tl.constexpr, EVEN_M: tl.constexpr):
    block, n, b = place(tl.cdiv(M, BLOCK_M), N)
    part = tl.program_id(1)                                              # of the queries: `share` of them
    q_ptr += b * q_batch + n * K
    do_ptr += b * do_batch + n * K
    lse_ptr += (b * N + n) * L
    delta_ptr += (b * N + n) * L
    keys = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k = load(k_ptr + b * k_batch + n * K, keys * k_row, keys < M, EVEN_M, K, MAIN, TAIL)
    v = load(v_ptr + b * v_batch + n * K, keys * v_row, keys < M, EVEN_M, K, MAIN, TAIL)
    dk = zeros(BLOCK_M, MAIN, TAIL)
    dv = zeros(BLOCK_M, MAIN, TAIL)
    for start in range(part * share, tl.minimum(part * share + share, L), BLOCK_L):
        rows = start + tl.arange(0, BLOCK_L)                             # beyond the last all is zero, and adds nothing
        q = load(q_ptr, rows * q_row, rows < L, EVEN_L, K, MAIN, TAIL)
        do = load(do_ptr, rows * do_row, rows < L, EVEN_L, K, MAIN, TAIL)
        if EVEN_L:
            lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
        else:
            lse = tl.load(lse_ptr + rows, mask=rows < L, other=0.0)
            delta = tl.load(delta_ptr + rows, mask=rows < L, other=0.0)
        p = tl.exp2(inner(k, q) * scale - lse[None, :])                  # (BLOCK_M, BLOCK_L): P^T
        dv = add(dv, p, do)
        ds = p * (inner(v, do) - delta[None, :])
        dk = add(dk, ds, q)
    into = (part * B + b) * dk_batch + keys * dk_row                     # one sum for both: that saves registers
    store(dk_ptr + n * K, into, keys < M, dk, K, root)
    store(dv_ptr + n * K, into, keys < M, dv, K)


# ---- How the work is cut -------------------------------------------------------------------------

def tiles(kernel: str, L: int, M: int, K: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """-> constants of the kernel, how it is launched. Large tiles that spill no registers: see the golden table."""
    width = next(i for i, most in enumerate(WIDTHS) if K <= most)
    block_l, block_m, warps, stages = SIZES[kernel][dtype == torch.float32][width]
    block_m = min(block_m, max(16, triton.next_power_of_2(M)))
    first = kernel != "d_keys" and K <= 96 and M % block_m == 1          # wider, no registers are left for it
    tile = {"BLOCK_L": block_l, "BLOCK_M": block_m, "EVEN_L": L % block_l == 0, "EVEN_M": (M - first) % block_m == 0}
    if kernel != "d_keys":
        tile["FIRST"] = int(first)
    return tile, options(warps, stages)


def shared(L: int, block_l: int, programs: int) -> tuple[int, int]:
    """Queries cut into shares when there are too few programs for the GPU. -> queries of a share, shares"""
    blocks = -(-L // block_l)
    shares = max(1, min(ENOUGH // programs, blocks // 4))
    share = -(-blocks // shares) * block_l
    return share, -(-L // share)


# ---- Operations ----------------------------------------------------------------------------------

@torch.library.custom_op("nanodisco::attention", mutates_args=())
def attend(packed: list[Tensor]) -> tuple[Tensor, Tensor]:
    """[qkv (B, L, 3, N, K)], or [q (B, L, 1, N, K), kv (B, M, 2, N, K)] -> o (B, L, N, K), LSE (B, N, L) in base 2"""
    q, k, v = unpacked(packed)
    (B, L, N, K), M = q.shape, k.shape[1]
    assert k.shape == (B, M, N, K), f"queries {tuple(q.shape)}, keys {tuple(k.shape)}: only their number may differ"
    o, lse = q.new_empty(B, L, N, K), q.new_empty(B, N, L, dtype=torch.float32)
    tile, launch = tiles("few" if B * N * L <= FEW else "forward", L, M, K, q.dtype)
    with torch.cuda.device_of(q):
        forward[(-(-L // tile["BLOCK_L"]) * B * N,)](
            q, k, v, o, lse, *strides(q), *strides(k), *strides(v), L, M, K ** -0.5 * LOG2_E,
            N, K, *parts(K), SHIFT=q.dtype != torch.bfloat16, **tile, **launch)
    return o, lse


@attend.register_fake
def _(packed):
    B, L, _, N, K = packed[0].shape
    return packed[0].new_empty(B, L, N, K), packed[0].new_empty(B, N, L, dtype=torch.float32)


@torch.library.custom_op("nanodisco::attention_backward", mutates_args=())
def attend_backward(packed: list[Tensor], o: Tensor, lse: Tensor, do: Tensor) -> list[Tensor]:
    """-> dQ, dK and dV, packed as Q, K and V are"""
    (q, k, v), do = unpacked(packed), heads_adjacent(do)
    (B, L, N, K), M = q.shape, k.shape[1]
    given = (*strides(q), *strides(k), *strides(v), *strides(do))
    scale, root = K ** -0.5 * LOG2_E, K ** -0.5
    gradients, delta = [x.new_empty(x.shape) for x in packed], torch.empty_like(lse)
    dq, dkv = gradients[0][:, :, 0], gradients[-1][:, :, -2:]            # (B, L, N, K), (B, M, 2, N, K)
    with torch.cuda.device_of(q):
        tile, launch = tiles("d_queries", L, M, K, q.dtype)
        d_queries[(-(-L // tile["BLOCK_L"]) * B * N,)](
            q, k, v, o, lse, do, dq, delta, *given, *strides(dq), L, M, scale, root, N, K, *parts(K), **tile, **launch)
        tile, launch = tiles("d_keys", L, M, K, q.dtype)
        blocks = -(-M // tile["BLOCK_M"]) * B * N
        share, shares = shared(L, tile["BLOCK_L"], blocks)
        into = dkv if shares == 1 else q.new_empty(shares * B, M, 2, N, K, dtype=torch.float32)
        dk, dv = into.unbind(2)
        d_keys[(blocks, shares)](
            q, k, v, lse, delta, do, dk, dv, *given, *strides(dk), B, L, M, share, scale, root, N, K, *parts(K),
            **tile, **launch)
        if shares > 1:
            dkv.copy_(into.unflatten(0, (shares, B)).sum(0))
    return gradients


@attend_backward.register_fake
def _(packed, o, lse, do):
    return [x.new_empty(x.shape) for x in packed]


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[0], *output)
    ctx.set_materialize_grads(False)                                     # nobody differentiates LSE


def _backward(ctx, do, _):
    *packed, o, lse = ctx.saved_tensors
    return attend_backward(packed, o, lse, do)


attend.register_autograd(_backward, setup_context=_keep)


def unpacked(packed: list[Tensor]) -> list[Tensor]:
    """-> Q, K, V, as views where kernels can read them"""
    return [heads_adjacent(x) for some in packed for x in some.unbind(2)]


def self_attention(qkv: Tensor) -> Tensor:
    """(B, L, 3, N, K) -> (B, L, N, K)"""
    if qkv.shape[1] <= short.longest(qkv):
        return short.attend(qkv.unsqueeze(2)).squeeze(2)
    return attend([qkv])[0]


def cross_attention(q: Tensor, kv: Tensor) -> Tensor:
    """(B, L, N, K), (B, M, 2, N, K) -> (B, L, N, K)"""
    return attend([q.unsqueeze(2), kv])[0]


def temporal_attention(qkv: Tensor, frames: int) -> Tensor:
    """(B*F, S, 3, N, K) -> (B*F, S, N, K)"""
    qkv = qkv.unflatten(0, (-1, frames))                                 # (B, F, S, 3, N, K)
    if frames <= short.longest(qkv):
        return short.attend(qkv).flatten(0, 1)
    o = self_attention(qkv.transpose(1, 2).flatten(0, 1))                # (B*S, F, N, K)
    return o.unflatten(0, (-1, qkv.shape[2])).transpose(1, 2).flatten(0, 1).contiguous()
