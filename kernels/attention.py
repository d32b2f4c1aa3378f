"""Softmax attention: every query looks at every key and takes a weighted mean of the values.

    X = Q K^T / sqrt(K)     P = softmax(X)     O = P V          (Attention Is All You Need, arXiv:1706.03762, eq. 1)

Shapes: B batch, L queries, M keys, N heads, K width of a head. The layout is (B, L, N, K): the
output of a linear layer seen with its heads apart, so nothing is transposed before or after. Q, K
and V of one layer stay packed, (B, L, 3, N, K), and so do their gradients: kernels read and write
them where they lie. The inputs may be strided views; outputs and gradients are contiguous.

The vector-Jacobian product, for the gradient dO of the output:

    LSE_i = log sum_j exp(X_ij)     so that P = exp(X - LSE) is there again without its L M numbers being kept
    dV = P^T dO     dP = dO V^T
    delta_i = sum_j P_ij dP_ij = sum_k dO_ik O_ik
    dX = P (dP - delta)     dQ = dX K / sqrt(K)     dK = dX^T Q / sqrt(K)

A kernel moves B N (2 L K + 2 M K) numbers, Q, K, V and O, and B N L of float32, LSE; backward reads these
and dO, and writes dQ, dK, dV. P stays on the chip. The kernels take heads of 8, 16, ... 256 in float32,
bfloat16 and float16; the VAE's one head of 512 is plain PyTorch's in every mode.
"""
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import attention_cpu
from kernels.backend import shared_memory, use_triton

SMALL = 256 * 256                      # queries times keys: torch's gradient on a CPU is slower than the plain one
WIDEST = 256                           # head of a kernel
WIDE, SHARED = 160, 196_608            # wider heads need so many bytes of shared memory, which only large GPUs have
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def self_attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v of one sequence.   (B, L, 3, N, K) -> (B, L, N, K)"""
    if not _for_a_kernel(qkv):
        return attention_reference(*qkv.unbind(2))
    from kernels import attention_triton
    return attention_triton.self_attention(*_autocast(qkv))


def cross_attention(q: Tensor, kv: Tensor) -> Tensor:
    """The same with keys and values of another one.   (B, L, N, K), (B, M, 2, N, K) -> (B, L, N, K)"""
    if not _for_a_kernel(q):
        return attention_reference(q, *kv.unbind(2))
    from kernels import attention_triton
    return attention_triton.cross_attention(*_autocast(q, kv))


def temporal_attention(qkv: Tensor, frames: int) -> Tensor:
    """Self-attention along the frames: each of the S places of a clip attends to itself in all F frames.

    (B*F, S, 3, N, K), frames of a clip adjacent -> (B*F, S, N, K)
    """
    if not _for_a_kernel(qkv):
        return temporal_attention_reference(*qkv.unbind(2), frames)
    from kernels import attention_triton
    return attention_triton.temporal_attention(*_autocast(qkv), frames)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in plain PyTorch; on a CPU for inference what attention_cpu.py makes of it.

    q (B, L, N, K), k and v (B, M, N, K) -> (B, L, N, K)
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                     # (B, N, L or M, K)
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.shape[2] * k.shape[2] <= SMALL:
        weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(2, 3), dim=-1)
        return (weights.to(v.dtype) @ v).transpose(1, 2).contiguous()
    if q.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return attention_cpu.attention(q, k, v).transpose(1, 2).contiguous()
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def temporal_attention_reference(q: Tensor, k: Tensor, v: Tensor, frames: int) -> Tensor:
    """The same along frames.   3 x (B*F, S, N, K) -> (B*F, S, N, K)"""
    shape = q.shape
    q, k, v = (x.unflatten(0, (-1, frames)).permute(0, 2, 3, 1, 4) for x in (q, k, v))   # (B, S, N, F, K)
    out = scaled_dot_product_attention(q, k, v)
    return out.permute(0, 3, 1, 2, 4).reshape(shape)


def _for_a_kernel(q: Tensor) -> bool:
    width, unfit = q.shape[-1], ""
    if width % 8:
        unfit = f"attention's kernel takes heads whose width is a multiple of 8, not {width}"
    elif q.dtype not in DTYPES:
        unfit = f"attention's kernel takes float32, bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    elif width > WIDE and shared_memory(q.device) < SHARED:
        unfit = (f"attention's kernel for heads of {width} needs {SHARED:,} bytes of shared memory, "
                 "more than this GPU has")
    return width <= WIDEST and q.numel() > 0 and use_triton(q, unfit)


def _autocast(*xs: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that torch's own attention would compute in."""
    device = xs[0].device.type
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in xs) if torch.is_autocast_enabled(device) else xs
