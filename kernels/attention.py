"""Softmax attention: every query looks at every key and takes a weighted mean of the values.

    O = softmax(Q K^T / sqrt(K)) V          (Attention Is All You Need, arXiv:1706.03762, eq. 1)

Shapes: B batch, L queries, M keys, N heads, K width of a head. The layout is (B, L, N, K): the
output of a linear layer seen with its heads apart, so nothing is transposed before or after. The
inputs may be strided views (of one packed QKV product, say); the output is contiguous.
"""
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SMALL = 256 * 256                      # queries times keys: torch's gradient on a CPU is slower there than the plain one


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v.   q (B, L, N, K), k and v (B, M, N, K) -> (B, L, N, K)"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                     # (B, N, L or M, K)
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[2] * k.shape[2] <= SMALL:
        weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(2, 3), dim=-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous()
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def temporal_attention(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """The same along the frames: each of the S places of a clip attends to itself in all F frames.

    q, k, v (B*F, S, N, K), frames of a clip adjacent -> (B*F, S, N, K)
    """
    shape = q.shape
    q, k, v = (x.unflatten(0, (-1, frames)).permute(0, 2, 3, 1, 4) for x in (q, k, v))   # (B, S, N, F, K)
    out = scaled_dot_product_attention(q, k, v)
    return out.permute(0, 3, 1, 2, 4).reshape(shape)
