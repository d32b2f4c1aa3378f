"""GEGLU: a gated linear unit whose gate is a GELU (arXiv:2002.05202).

    y = value gelu(gate)            gelu(x) = x Phi(x), the exact one: Phi(x) = (1 + erf(x / sqrt 2)) / 2

The vector-Jacobian product, with phi the derivative of Phi, the bell curve exp(-x^2 / 2) / sqrt(2 pi):

    dvalue = dy gelu(gate)          dgate = dy value (Phi(gate) + gate phi(gate))

Bytes: forward one reading of x and one writing of y, half as wide; backward one reading of x and of dy and one
writing of dx. Nothing but x is kept.
"""
from torch import Tensor, nn
from torch.nn.functional import gelu

from kernels.backend import use_triton


def geglu(x: Tensor) -> Tensor:
    """The first half of the channels is the value, the second the gate.   (..., 2 D) -> (..., D)"""
    if use_triton(x):
        from kernels.geglu_triton import geglu_triton
        return geglu_triton(x)
    return geglu_reference(x)


def geglu_reference(x: Tensor) -> Tensor:
    """The same in plain PyTorch."""
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


class GEGLU(nn.Linear):
    """geglu of a linear layer whose outputs are value and gate.   (..., K) -> (..., D)"""

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, 2 * c_out)

    def forward(self, x: Tensor) -> Tensor:
        return geglu(super().forward(x))
