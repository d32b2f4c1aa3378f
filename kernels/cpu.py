"""Weights prepacked for oneDNN: convolutions and linear layers on a CPU without re-blocking at each call.

oneDNN multiplies with weights cut into blocks that fit the processor's registers. PyTorch hands it
plain weights, so it blocks them anew at every call, which at the small sizes of a UNet can take longer
than the multiplication. `prepack` swaps the layers for twins that block their weight once. For
inference only: a packed layer has no gradient and cannot be saved.

The operations are PyTorch's own but private (torch.compile ends in them). So they are tried first,
and where they are missing or wrong the model stays as it is.
"""
import ctypes
import sys

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

ROWS, SIZE = 256, 8                    # of the input that the blocks are chosen for; measured to suit other sizes too

class PackedLinear(nn.Module):
    """nn.Linear.   (..., K) -> (..., N)"""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data.flatten(1), ROWS)
        self.bias = None if layer.bias is None else layer.bias.data

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class PackedPointwise(PackedLinear):
    """nn.Conv2d of one pixel: a linear layer over the channels.   (B, C_in, H, W) -> (B, C_out, H, W)"""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class PackedConv2d(nn.Module):
    """nn.Conv2d; its output is channels last.   (B, C_in, H, W) -> (B, C_out, H', W')"""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        plain = layer.weight.data.contiguous(memory_format=torch.channels_last)
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(
            plain, *self.geometry, [1, layer.in_channels, SIZE, SIZE])
        self.bias = None if layer.bias is None else layer.bias.data

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")


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
    """Swap every Conv2d and Linear inside `model` for its packed twin, one by one, in place."""
    for name in list(model._modules):                    # by name: a list of layers would keep all plain weights
        layer = model._modules[name]
        if isinstance(layer, nn.Conv2d):
            setattr(model, name, PackedPointwise(layer) if layer.kernel_size == (1, 1) else PackedConv2d(layer))
        elif isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            setattr(model, name, PackedLinear(layer))
        else:
            if layer is not None:
                prepack(layer)
            continue
        leave_to_the_file(layer.weight.data)


def leave_to_the_file(weight: Tensor) -> None:
    """Weights of a safetensors file are a map of it. Once they are packed, their pages need no memory any more.

    They stay readable: Linux fetches them again from the file. Memory that has no file behind it stays as it is.
    """
    page, page_out = 4096, 21                                            # of mman.h
    first, end = -(-weight.data_ptr() // page) * page, (weight.data_ptr() + weight.nbytes) // page * page
    if sys.platform == "linux" and end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), page_out)


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, where the next layer needs one of the same size.

    Otherwise each activation of 32 MB and more is fresh memory from the system, cleared page by page.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_max, trim_threshold = -4, -1                                # of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
