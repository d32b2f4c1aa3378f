"""Attention on a CPU for inference: oneDNN's matrix products, with as little between them as there can be.

    X = Q K^T / (sqrt(K) ln 2) - m      P = 2^X      [Y | l] = P [V | 1]      O = Y / l

m is one number of each query, which changes nothing: it is in P and in l alike. It only has to keep 2^X within what
a number can hold. The sums l cost nothing: a column of ones beside V makes the second product count them. They tell,
too, whether 2^X overflowed or nearly vanished; PyTorch's own attention, which looks for the largest score, takes over.
Shapes: B batch, L queries, M keys, N heads, K width of a head; all (B, N, L or M, K) here.
"""
from functools import cache
from math import e, log2

import torch
from torch import Tensor
from torch.nn.functional import linear, pad, scaled_dot_product_attention

AT_ONCE = 2**22                        # scores at a time, so that they stay in the processor's cache
MANY = 2**19                           # scores from which on bfloat16 is faster this way
LONG, WIDE = 1024, 32                  # queries and width of a head, from which on float32 is


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fastest there is here for inference.   (B, N, L, K), 2 x (B, N, M, K) -> (B, N, L, K)"""
    if torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and k.numel():
        many, large = q[..., 0].numel() * k.shape[2] >= MANY, q.shape[2] >= LONG and q.shape[3] >= WIDE
        if q.dtype == torch.bfloat16 and many and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return in_bfloat16(q, k, v)
        if q.dtype == torch.float32 and large and multiplies_float32():
            return in_float32(q, k, v)
    return scaled_dot_product_attention(q, k, v)


def in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Twice as fast as torch's own, which turns everything to float32 on the way.

    A score has eight bits between the products, too few if it is large. So m is taken from it inside of the first
    one, where all is float32 still: the largest score among every eighth key. As a rule that is nearly the largest
    of all, and the scores that count come out near 0, where bfloat16 is fine; else they are rounded as they would
    have been without m. PyTorch finds the largest of columns faster than of rows: so those scores are K Q^T, and
    negative, since -m is what is added.
    """
    out, scale = [], q.shape[-1] ** -0.5 * log2(e)
    queries, keys, values = q.flatten(0, 1), k.flatten(0, 1).contiguous(), pad(v.flatten(0, 1), (0, 1), value=1)
    for some in queries.split(max(1, AT_ONCE // (len(queries) * k.shape[2])), dim=1):
        sample = torch.baddbmm(q.new_empty(()), keys[:, ::8], some.transpose(1, 2), beta=0, alpha=-scale)
        scores = torch.baddbmm(sample.amin(1).unsqueeze(2), some, keys.transpose(1, 2), alpha=scale)
        out.append(scores.exp2_() @ values)
    y, total = torch.cat(out, dim=1).view(*q.shape[:-1], -1).split((v.shape[-1], 1), dim=-1)
    return y / total if _held(total) else scaled_dot_product_attention(q, k, v)


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A head at a time, and m = 0. torch's own asks MKL, which is slower on some processors."""
    queries = (q * (q.shape[-1] ** -0.5 * log2(e))).flatten(0, 1).contiguous()
    keys, values = k.flatten(0, 1).contiguous(), pad(v.flatten(0, 1).transpose(1, 2), (0, 0, 0, 1), value=1)
    out, rows = [], max(1, AT_ONCE // k.shape[2])
    for one, its_keys, its_values in zip(queries, keys, values):
        out += [_product(_product(some, its_keys).exp2_(), its_values) for some in one.split(rows)]
    y, total = torch.cat(out).view(*q.shape[:-1], -1).split((v.shape[-1], 1), dim=-1)
    return y / total if _held(total) else scaled_dot_product_attention(q, k, v)


def _held(total: Tensor) -> bool:
    """Whether the sums of 2^X tell that neither they nor Y overflowed, and that nothing that counts was lost."""
    return bool(((total > 2.0**-60) & (total < 2.0**100)).all())         # Y may be larger by as much as V is


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by oneDNN.   (L, K), (N, K), both contiguous -> (L, N)"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


@cache
def multiplies_float32() -> bool:
    """Whether oneDNN's product of plain matrices can be asked for: the operation is PyTorch's own but private."""
    x, weight = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.allclose(_product(x, weight), linear(x, weight))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
