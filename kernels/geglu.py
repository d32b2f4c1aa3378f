"""GEGLU: a gated linear unit whose gate is a GELU (arXiv:2002.05202).

    y = value * gelu(gate)          gelu(x) = x Phi(x), the exact one with erf
"""
from torch import Tensor
from torch.nn.functional import gelu


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels is the value, the second the gate.   (..., 2 D) -> (..., D)"""
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)
