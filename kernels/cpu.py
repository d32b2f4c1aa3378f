"""Weights prepacked for oneDNN: convolutions and linear layers on a CPU without re-blocking at each call.

oneDNN multiplies with weights cut into blocks that fit the processor's registers. PyTorch hands it
plain weights, so it blocks them anew at every call, which at the small sizes of a UNet can take longer
than the multiplication. `prepack` swaps the layers for twins that block their weight once, at the
first call, and drop the plain one. For inference only: a packed layer has no gradient and cannot be
saved, and the first call decides for which size the blocks are best (any other size is right too).

The operations are PyTorch's own but private (torch.compile ends in them). So they are tried first,
and where they are missing or wrong the model stays as it is.
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear


class PackedLinear(nn.Module):
    """nn.Linear.   (..., K) -> (..., N)"""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.plain, self.packed = layer.weight.data, None
        self.bias = None if layer.bias is None else layer.bias.data

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            rows = x.numel() // x.shape[-1]
            self.packed, self.plain = torch.ops.mkldnn._reorder_linear_weight(self.plain, rows), None
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class PackedConv2d(nn.Module):
    """nn.Conv2d; its output is channels last.   (B, C_in, H, W) -> (B, C_out, H', W')"""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.plain, self.packed = layer.weight.data, None
        self.bias = None if layer.bias is None else layer.bias.data
        self.geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if self.packed is None:
            plain = self.plain.contiguous(memory_format=torch.channels_last)
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(plain, *self.geometry, list(x.shape))
            self.plain = None
        return torch.ops.mkldnn._convolution_pointwise(x, self.packed, self.bias, *self.geometry, "none", [], "")


def unavailable(dtype: torch.dtype) -> str:
    """Why packed layers cannot be used for this dtype; "" if they can, tried on a small layer of each kind."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN has no {str(dtype).removeprefix('torch.')} here"
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2, 8, 6, 5, generator=generator).to(dtype)
        conv, line = nn.Conv2d(8, 16, 3, padding=1).to(dtype), nn.Linear(5, 7).to(dtype)
        try:
            got = PackedConv2d(conv)(x), PackedLinear(line)(x)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            return f"PyTorch {torch.__version__} refuses them ({str(error).splitlines()[0]})"
        wanted = conv2d(x, conv.weight, conv.bias, padding=1), linear(x, line.weight, line.bias)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    if any((a - b).abs().max() > allowed * b.abs().max() for a, b in zip(got, wanted)):
        return f"PyTorch {torch.__version__} answers with wrong numbers"
    return ""


def prepack(model: nn.Module) -> None:
    """Swap every Conv2d and Linear inside `model` for its packed twin, in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
                setattr(parent, name, PackedConv2d(layer))
            elif isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
                setattr(parent, name, PackedLinear(layer))
