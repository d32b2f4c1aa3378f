"""Inference on a GPU: convolutions of one pixel as matrix products, whose bias costs nothing.

cuDNN's convolution leaves the bias to PyTorch, which adds it by a kernel that reads and writes the whole result
again. A product of matrices adds it on the way out. `prepare` swaps the layers; the weights are the same memory.
(Biases of 3 x 3 convolutions find other homes: ResBlock.fold_biases of nanodisco/layers.py.)
"""
from torch import Tensor, nn
from torch.nn.functional import linear

GEOMETRY = ((1, 1), (1, 1), (0, 0), 1) # kernel, stride, padding, groups of a convolution of one pixel


def is_pointwise(layer: nn.Conv2d) -> bool:
    return GEOMETRY == (layer.kernel_size, layer.stride, layer.padding, layer.groups)


class Pointwise(nn.Module):
    """nn.Conv2d of one pixel, channels last.   (B, C_in, H, W) -> (B, C_out, H, W)"""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def prepare(model: nn.Module) -> None:
    """Swap every such Conv2d inside `model` in place."""
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Conv2d) and is_pointwise(layer):
            setattr(model, name, Pointwise(layer))
        else:
            prepare(layer)
