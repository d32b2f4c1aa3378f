"""LoRA: a layer learns a small difference, the product of two thin matrices, and its weight stays as it was.

    W = W_0 + up down        (arXiv:2106.09685, section 4.1, with alpha = rank)   up (out, r), down (r, in)

`up` starts as zero: a model begins as it was. A checkpoint holds the merged W beside the factors, so what
is sampled from or exported knows nothing of this file.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from nanodisco.errors import InputError

ORIGINAL, FACTORS = ".parametrizations.weight.original", ".parametrizations.weight.0."


class LowRank(nn.Module):
    """A weight (out, in) -> that weight + up down"""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator):
        super().__init__()
        rows, columns = weight.shape
        down = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)       # the same on every device
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def add(model: nn.Module, names: list[str], rank: int, seed: int) -> list[str]:
    """Give each linear layer of the UNet whose weight is among `names` its factors, which train in its place.

    -> the names that train now: the factors, and those of `names` outside of the UNet
    """
    generator, factors = torch.Generator().manual_seed(seed), []
    for name in names:
        path, _, last = name.rpartition(".")
        layer = model.get_submodule(path)
        if name.startswith("unet.") and last == "weight" and isinstance(layer, nn.Linear):
            parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, generator))
            factors += [path + FACTORS + part for part in ("down", "up")]
    if not factors:
        raise InputError("train.lora_rank: train.unet names no weight of a linear layer; expected crossattn, "
                         "crossattn-kv, transblocks, all, tem or patterns")
    return factors + [name for name in names if not name.startswith("unet.")]


def belongs(name: str) -> bool:
    """Whether a tensor of this name is there only while LoRA trains."""
    return ".parametrizations." in name


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with W in the place of W_0 and its factors, in the names of a model without LoRA."""
    found = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(ORIGINAL)
        if path != name:
            found[path + ".weight"] = tensor + tensors[path + FACTORS + "up"] @ tensors[path + FACTORS + "down"]
        elif not belongs(name):
            found[name] = tensor
    return found
