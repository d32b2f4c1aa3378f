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

from kernels.backend import shared_memory, use_triton

FEW = 160                              # tiles of 64 x 64 numbers of the result up to which cuDNN is slower, on an H200
CHANNELS = 16                          # of others Triton cannot tell that pixels begin where 16 bytes can be read
OUTPUTS = 64                           # fewer leave a part of each tile empty
SHARED = 163_840                       # bytes of shared memory of the largest tile, which only large GPUs have


class Conv2d(nn.Conv2d):
    """nn.Conv2d, to whose result something may be added.   (B, C_in, H, W), (B, C_out, H', W') -> (B, C_out, H', W')"""

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if more is None else more + y


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """conv2d(x, weight, bias, padding=1) + more.   (B, C_in, H, W), (C_out, C_in, 3, 3) -> (B, C_out, H, W)

    All channels last; weights that are not are copied, each time. more, of the result's shape, is added to it. What
    the kernel is not for is PyTorch's in every mode: large pictures, float32, which cuDNN multiplies as TF32, training.
    """
    if _suits(x, weight, bias, more) and use_triton(x):
        from kernels.conv_triton import conv3x3_triton
        return conv3x3_triton(x, weight, bias, more)
    return conv3x3_reference(x, weight, bias, more)


def _suits(x: Tensor, weight: Tensor, bias: Tensor | None, more: Tensor | None) -> bool:
    """Whether the kernel can, and is the faster one."""
    tensors = [t for t in (x, weight, bias, more) if t is not None]
    tiles = -(-x[:, 0].numel() // 64) * -(-len(weight) // 64)
    return (x.dtype in (torch.bfloat16, torch.float16) and all(t.dtype == x.dtype for t in tensors)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and x.shape[1] % CHANNELS == 0 and len(weight) >= OUTPUTS and tiles <= FEW
            and shared_memory(x.device) >= SHARED)


def conv3x3_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, more: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch."""
    y = conv2d(x, weight, bias, padding=1)
    return y if more is None else more + y
