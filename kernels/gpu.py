"""Inference on a GPU: convolutions whose bias, and what else is added to their result, cost nothing.

cuDNN's convolution leaves the bias to PyTorch, which adds it by a kernel that reads and writes the whole result
again. A product of matrices adds it on the way out: so convolutions of one pixel are linear layers, and small ones of
3 x 3 pixels have a kernel of our own (conv.py). `prepare` swaps the layers; the weights are the same memory.
(Biases of large 3 x 3 convolutions find other homes: ResBlock.fold_biases of nanodisco/layers.py.)
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear

from kernels.conv import CHANNELS, conv3x3
from kernels.up_conv import UpConv2d

ALIGNED = 512                          # bytes: where PyTorch's allocator too would have each tensor begin


def is_plain(layer: nn.Conv2d, size: int) -> bool:
    """A convolution of so many pixels each way that keeps the size of the picture."""
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups) == (
        (size, size), (1, 1), (size // 2, size // 2), (1, 1), 1)


class Pointwise(nn.Module):
    """nn.Conv2d of one pixel, channels last.   (B, C_in, H, W) -> (B, C_out, H, W)"""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Conv3x3(nn.Module):
    """Conv2d of conv.py, of 3 x 3 pixels.   (B, C_in, H, W), (B, C_out, H, W) -> (B, C_out, H, W)"""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return conv3x3(x, self.weight, self.bias, more)


class UpConv3x3(nn.Module):
    """UpConv2d of up_conv.py.   (B, C_in, H, W) -> (B, C_out, *size)"""

    def __init__(self, layer: UpConv2d):
        super().__init__()
        self.conv = Conv3x3(layer)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(interpolate(x, size=tuple(size), mode="nearest"))


def prepare(model: nn.Module) -> None:
    """Swap every such Conv2d inside `model` in place."""
    for name, layer in list(model.named_children()):
        if not isinstance(layer, nn.Conv2d):
            prepare(layer)
        elif is_plain(layer, 1):
            setattr(model, name, Pointwise(layer))
        elif is_plain(layer, 3) and layer.in_channels % CHANNELS == 0:
            setattr(model, name, (UpConv3x3 if isinstance(layer, UpConv2d) else Conv3x3)(layer))


def move(model: nn.Module, device: str) -> nn.Module:
    """To the device, in place, convolutions channels last (also those along frames), and all weights in one piece.

    In pieces of their own, which the allocator rounds up, Stable Diffusion's take 3 % more. No two layers share one.
    """
    def padded(x: Tensor) -> int:
        return -(-x.nbytes // ALIGNED) * ALIGNED

    room = torch.empty(sum(map(padded, (*model.parameters(), *model.buffers()))), dtype=torch.uint8, device=device)
    taken = 0

    def moved(x: Tensor) -> Tensor:
        nonlocal taken
        place = room[taken:taken + x.nbytes].view(x.dtype)
        taken += padded(x)
        if x.ndim < 3:
            return place.view(x.shape).copy_(x)
        return place.view(x.movedim(1, -1).shape).movedim(-1, 1).copy_(x)

    return model._apply(moved)
