"""Weights prepacked for oneDNN: convolutions and linear layers on a CPU without re-blocking at each call.

oneDNN multiplies with weights cut into blocks that fit the processor's registers. PyTorch hands it
plain weights, so it blocks them anew at every call, which at the small sizes of a UNet can take longer
than the multiplication. `prepack` swaps the layers for twins that block their weight once, at their
first call, when the size of the input is known. For inference only: a packed layer has no gradient and
cannot be saved, and torch.compile does not take it.

The operations are PyTorch's own but private (torch.compile ends in them). So they are tried first,
and where they are missing or wrong the model stays as it is.
"""
import ctypes
import sys
from collections.abc import Callable, Sequence
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad

from kernels.geglu import GEGLU, geglu_reference
from kernels.gpu import is_plain
from kernels.up_conv import UpConv2d, part_weights, up_conv, windows
from kernels.winograd import transform_weight, winograd_conv3x3

FEW = 128                              # pixels of a batch; for so few a convolution is faster as a matrix product
WIDE = 256                             # channels before and after, from which on Winograd's is faster


class PackedLinear(nn.Module):
    """nn.Linear.   (..., K) -> (..., N)"""

    def __init__(self, layer: nn.Linear | nn.Conv2d, files: Sequence[range] = ()):
        super().__init__()
        self.weight, self.packed = layer.weight.data, False
        self.bias = None if layer.bias is None else layer.bias.data
        self.of_a_file = is_of(files, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        if not self.packed:
            self._pack(torch.ops.mkldnn._reorder_linear_weight(self._matrix(), x[..., 0].numel()))
        return _packed_product(x, self.weight, self.bias)

    def _matrix(self) -> Tensor:
        """(N, K)"""
        return self.weight.flatten(1)

    def _pack(self, packed: Tensor | list[Tensor]) -> None:
        if self.of_a_file:
            leave_to_the_file(self.weight)
        self.weight, self.packed = packed, True


class PackedGEGLU(PackedLinear):
    """GEGLU, value and gate each a product: so the gate's GELU is part of it.   (..., K) -> (..., D)"""

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            halves, rows = self._matrix().chunk(2), x[..., 0].numel()
            self._pack([torch.ops.mkldnn._reorder_linear_weight(half, rows) for half in halves])
            self.bias = self.bias.chunk(2)
        gate = torch.ops.mkldnn._linear_pointwise(x, self.weight[1], self.bias[1], "gelu", [], "none")
        return _packed_product(x, self.weight[0], self.bias[0]).mul_(gate)


class PackedPointwise(PackedLinear):
    """nn.Conv2d of one pixel: a linear layer over the channels.   (B, C_in, H, W) -> (B, C_out, H, W)"""

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)


class PackedConv2d(PackedLinear):
    """Conv2d of conv.py or nn.Conv2d; its output is channels last.   (B, C_in, H, W) -> (B, C_out, H', W')

    A 3 x 3 convolution of few pixels takes the time of reading its weights; a product of matrices reads
    them about twice as fast as oneDNN's convolution. One of many pixels takes the time of its
    multiplications; in float32 Winograd's has fewer, for 16/9 of the weights.
    """

    def __init__(self, layer: nn.Conv2d, files: Sequence[range] = ()):
        super().__init__(layer, files)
        self.geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
        # One of the three below. Not bound to this layer: a layer that holds itself outlives its last use.
        self.convolve: Callable[[PackedConv2d, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if not self.packed:
            self.convolve = self._suited_to(x)
        y = self.convolve(self, x)
        return y if more is None else more + y

    def _suited_to(self, x: Tensor) -> Callable[["PackedConv2d", Tensor], Tensor]:
        if self.weight.shape[2:] == (3, 3) and self.geometry == ((1, 1), (1, 1), (1, 1), 1):
            if x[:, 0].numel() <= FEW:
                return PackedConv2d._as_product
            if x.dtype == torch.float32 and min(self.weight.shape[:2]) >= WIDE:
                return PackedConv2d._by_winograd
        return PackedConv2d._directly

    def _directly(self, x: Tensor) -> Tensor:
        if not self.packed:
            plain = self.weight.contiguous(memory_format=torch.channels_last)
            self._pack(torch.ops.mkldnn._reorder_convolution_weight(plain, *self.geometry, x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, self.bias, *self.geometry, "none", [], "")

    def _as_product(self, x: Tensor) -> Tensor:
        return self._product(windows(pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)), 3)).permute(0, 3, 1, 2)

    def _by_winograd(self, x: Tensor) -> Tensor:
        if not self.packed:
            tiles = x[:, 0].numel() // 4
            self._pack([torch.ops.mkldnn._reorder_linear_weight(u, tiles) for u in transform_weight(self.weight)])
        return winograd_conv3x3(x, self.weight, self.bias, _packed_product)

    def _matrix(self) -> Tensor:
        return self.weight.permute(0, 2, 3, 1).flatten(1)


class PackedUpConv2d(nn.Module):
    """UpConv2d.   (B, C_in, H, W) -> (B, C_out, *size), channels last, in parts where that is twice the size"""

    def __init__(self, layer: UpConv2d, files: Sequence[range] = ()):
        super().__init__()
        self.plain, self.parts = layer, None             # the layer itself for other sizes
        self.of_a_file = is_of(files, layer.weight)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(size) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.plain(x, size)
        if self.parts is None:
            parts, pixels = part_weights(self.plain.weight), x[:, 0].numel()
            self.parts = [torch.ops.mkldnn._reorder_linear_weight(part, pixels) for part in parts]
            if self.of_a_file:
                leave_to_the_file(self.plain.weight)
        return up_conv(x, self.parts, self.plain.bias, _packed_product)


def _packed_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of a weight that was packed.   (..., K) -> (..., N)"""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def unavailable(dtype: torch.dtype) -> str:
    """Why packed layers cannot be used for this dtype; "" if they can, tried on small layers."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN has no {str(dtype).removeprefix('torch.')} here"
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        few, x = (torch.randn(2, 8, 6, width, generator=generator).to(dtype) for width in (5, FEW))
        layers = nn.Conv2d(8, 16, 3, padding=1), nn.Linear(5, 7), GEGLU(5, 7)
        conv, line, gated = (layer.to(dtype) for layer in layers)
        try:
            got = [PackedConv2d(conv)(x), PackedConv2d(conv)(few), PackedLinear(line)(few), PackedGEGLU(gated)(few)]
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            return f"PyTorch {torch.__version__} refuses them ({reason})"
        wanted = [conv2d(each, conv.weight, conv.bias, padding=1) for each in (x, few)]
        wanted += [linear(few, line.weight, line.bias), geglu_reference(linear(few, gated.weight, gated.bias))]
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    if any((a - b).abs().max() > allowed * b.abs().max() for a, b in zip(got, wanted)):
        return f"PyTorch {torch.__version__} answers with wrong numbers"
    return ""


def prepack(model: nn.Module, files: Sequence[range] | None = None) -> None:
    """Swap every Conv2d and Linear inside `model` for its packed twin, one by one, in place."""
    files = mapped_files() if files is None else files
    for name in list(model._modules):                    # by name: a list of layers would keep all plain weights
        layer = model._modules[name]
        if isinstance(layer, UpConv2d):
            setattr(model, name, PackedUpConv2d(layer, files))
        elif isinstance(layer, nn.Conv2d):
            setattr(model, name, (PackedPointwise if is_plain(layer, 1) else PackedConv2d)(layer, files))
        elif type(layer) is GEGLU:
            setattr(model, name, PackedGEGLU(layer, files))
        elif isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
            setattr(model, name, PackedLinear(layer, files))
        elif layer is not None:
            prepack(layer, files)


def mapped_files() -> list[range]:
    """The addresses at which files are seen as memory, as a safetensors file is. Linux tells; none elsewhere."""
    try:
        maps = [line.split() for line in Path("/proc/self/maps").read_bytes().split(b"\n") if line]
    except OSError:
        return []
    return [range(*(int(end, 16) for end in place.split(b"-"))) for place, _, _, _, inode, *_ in maps if inode != b"0"]


def is_of(files: Sequence[range], weight: Tensor) -> bool:
    return any(weight.data_ptr() in place for place in files)


def leave_to_the_file(weight: Tensor) -> None:
    """Weights of a file that is seen as memory: once they are packed, their pages need no memory any more.

    They stay readable, as the file has them: Linux fetches them again. What was written to them since is lost.
    """
    dont_need = 4                                                        # of mman.h
    first, end = (address // PAGESIZE * PAGESIZE for address in (weight.data_ptr() + PAGESIZE - 1,
                                                                 weight.data_ptr() + weight.nbytes))
    if end > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), dont_need)


def keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed, where the next layer needs one of the same size.

    Otherwise each activation of 32 MB and more is fresh memory from the system, cleared page by page.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        mmap_max, trim_threshold = -4, -1                                # of malloc.h
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def suit_small_tensors() -> None:
    """For training on a CPU: no fresh memory at each step; and torch's fused attention is slower than the plain one."""
    keep_freed_memory()
    torch.backends.cuda.enable_flash_sdp(False)                          # of the CPU too, whatever it is called
