"""Convolution of 3 x 3 pixels, for inference: what is added afterwards is added on the way out.

    y[b, i, j, o] = bias[o] + more[b, i, j, o] + sum over u, v, c of x[b, i+u-1, j+v-1, c] w[o, u, v, c]

with zeros around the picture. As a product of matrices, channels last: a row for each of the M = B H W pixels, a column
for each output, and 9 C_in numbers summed. With one or two pictures the result is too small to be shared out among all
multiprocessors, but those 9 C_in numbers are many. So they are shared out too: each of S programs sums its part of
them for the same tile of the result, and a second pass sums the parts.

Bytes: the weights and `more` once, x once for each tile of outputs, y once, and where S > 1 another 8 S for each
number of y, which stay in the cache. No backward: training keeps cuDNN.
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from kernels.backend import use_triton

TYPES = (torch.bfloat16, torch.float16, torch.float32)
CHANNELS = 16                          # of others Triton cannot tell that pixels begin where 16 bytes can be read
FEW = 160                              # tiles of 64 x 64 numbers of the result up to which cuDNN is slower, on an H200


class Conv2d(nn.Conv2d):
    """nn.Conv2d, to whose result something may be added.   (B, C_in, H, W), (B, C_out, H', W') -> (B, C_out, H', W')"""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if more is None else more + y


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) + more.   (B, C_in, H, W), (C_out, C_in, 3, 3) -> (B, C_out, H, W)

    All channels last; weights that are not are copied, each time. more, of the result's shape, is added to it.
    """
    if is_small(x, weight) and use_triton(x, why_unfit(x, weight, bias, more)):
        from kernels.conv_triton import conv3x3_triton
        return conv3x3_triton(x, weight, bias, more)
    return conv3x3_reference(x, weight, bias, more)


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is the faster one. In float32 cuDNN is, which has TF32."""
    return -(-x[:, 0].numel() // 64) * -(-len(weight) // 64) <= FEW and x.element_size() == 2


def why_unfit(*tensors: Tensor | None) -> str:
    """Why the kernel is not for x, the weights and what is added; "" if it is."""
    x, weight, *_ = tensors = [t for t in tensors if t is not None]
    if x.dtype not in TYPES or any(t.dtype != x.dtype for t in tensors):
        return f"conv3x3 is for one of 3 types, not {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    if x.shape[1] % CHANNELS:
        return f"conv3x3 is for multiples of {CHANNELS} channels, not {x.shape[1]}"
    if max(x.numel(), weight.numel(), x.numel() // x.shape[1] * len(weight)) >= 2**31:
        return "conv3x3 counts numbers in 32 bits"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "conv3x3 has no gradient"
    return ""


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch."""
    y = conv2d(x, weight, bias, padding=1)
    return y if more is None else more + y
