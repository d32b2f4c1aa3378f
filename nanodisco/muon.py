"""Muon: matrices move by the orthogonal part of their momentum, everything else by AdamW.

    M <- 0.95 M + 0.05 G          U = 0.05 G + 0.95 M, that is, M once more ahead (Nesterov)
    W <- (1 - lr decay) W - 0.2 sqrt(max(rows, columns)) lr  O        O = (U U^T)^(-1/2) U

(Keller Jordan, 2024; the factor of 0.2 gives a step the size of AdamW's, so that one learning rate does for both:
arXiv:2502.16982, eq. 4.) A gradient of a weight matrix is mostly a few directions; O has all of them, equally large.
A convolution is the matrix of its filters, (out, in * height * width). Not what sees pictures, makes latents or
embeds: the first and last convolutions, ControlNets' zero convolutions, positions, times.
"""
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
LIKE_ADAM = 0.2
SMALLEST = 16                          # side of a matrix that is worth it
NOT_HIDDEN = ("conv_in.", "conv_out.", "vision.conv1.", "zero_", "positional_embedding", ".time.linear")


def matrices(named: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Those that Muon moves."""
    return [p for name, p in named if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= SMALLEST
            and not any(part in name for part in NOT_HIDDEN)]


class Muon(torch.optim.AdamW):
    """AdamW of which `matrices` are exempt. State of a matrix: its momentum."""

    def __init__(self, parameters: list[nn.Parameter], matrices: list[nn.Parameter], **options):
        theirs = {id(p) for p in matrices}
        groups = [{"params": [p for p in parameters if id(p) not in theirs]}, {"params": matrices}]
        super().__init__([group for group in groups if group["params"]], **options)
        self.matrices = theirs

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if id(p) in self.matrices and p.grad is not None:
                    self._move(p, group["lr"], group["weight_decay"])
                    p.grad = None                                        # AdamW leaves it alone then
        return super().step(closure)

    def _move(self, p: nn.Parameter, lr: float, decay: float) -> None:
        momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum.lerp_(p.grad, 1 - MOMENTUM)
        way = orthogonal(p.grad.lerp(momentum, MOMENTUM).flatten(1)).view_as(p)
        p.mul_(1 - lr * decay).add_(way, alpha=-lr * LIKE_ADAM * max(p.shape[0], p[0].numel()) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """(x x^T)^(-1/2) x, roughly: singular values become 0.7 to 1.2.   (R, C) -> the same, in bfloat16 inside

    Five Newton-Schulz steps of a quintic whose slope at zero is steep, which is worth more than accuracy here.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.bfloat16() if len(x) <= x[0].numel() else x.bfloat16().T
    y = y / (y.norm() + 1e-7)
    for _ in range(5):
        square = y @ y.T
        y = a * y + (b * square + c * square @ square) @ y
    return (y if len(x) <= x[0].numel() else y.T).to(x.dtype)
