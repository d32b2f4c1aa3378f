"""Muon: matrices move by the orthogonal part of their momentum, everything else by AdamW.

    M <- 0.95 M + 0.05 G          U = 0.05 G + 0.95 M, that is, M once more ahead (Nesterov)
    W <- (1 - lr decay) W - 0.2 sqrt(max(rows, columns)) lr  O        O = (U U^T)^(-1/2) U

(Keller Jordan, 2024; the factor of 0.2 gives a step the size of AdamW's, so that one learning rate does for both:
arXiv:2502.16982, eq. 4.) A gradient of a weight matrix is mostly a few directions; O has all of them, equally large.
A convolution is the matrix of its filters: its first axis by all others. Not what sees pictures or noise, what embeds,
and what begins as nothing: the first and last convolutions, positions, times, ControlNets' zero convolutions, what
temporal layers end with, LoRA's factors.
"""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
LIKE_ADAM = 0.2
SMALLEST = 16                          # side of a matrix that is worth it
NOT_HIDDEN = ("conv_in.", "conv_out.", "vision.conv1.", "zero_", "positional_embedding", ".time.linear",
              ".temporal.conv.", ".temporal.out.", ".parametrizations.")


def matrices(named: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    """Those that Muon moves."""
    return [p for name, p in named if p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= SMALLEST
            and not any(part in name for part in NOT_HIDDEN)]


Make = Callable[[list[nn.Parameter]], list[Tensor]]
Each = Callable[[list[nn.Parameter], Make], list[Tensor]]


class Muon(torch.optim.AdamW):
    """AdamW of which `matrices` are exempt. State of a matrix: its momentum.

    each: make(list), which makes something of each; World.each shares the work out among processes.
    """

    def __init__(self, parameters: list[nn.Parameter], matrices: list[nn.Parameter], each: Each, **options):
        theirs = {id(p) for p in matrices}
        groups = [{"params": [p for p in parameters if id(p) not in theirs]},
                  {"params": sorted(matrices, key=Tensor.numel)}]        # dealt out in turn, they are equal shares
        super().__init__([group for group in groups if group["params"]], **options)
        self.matrices, self.each = theirs, each
        self._step_supports_amp_scaling = False                          # GradScaler then leaves out what overflowed

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            moved = [p for p in group["params"] if id(p) in self.matrices and p.grad is not None]
            if not moved:
                continue
            for p in moved:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            torch._foreach_lerp_([self.state[p]["momentum"] for p in moved], [p.grad for p in moved], 1 - MOMENTUM)
            directions = self.each(moved, self._directions)
            torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
            for p, direction in zip(moved, directions):
                p.add_(direction, alpha=-group["lr"] * LIKE_ADAM * max(p.shape[0], p[0].numel()) ** 0.5)
                p.grad = None                                            # AdamW leaves it alone then
        return super().step(closure)

    def _directions(self, parameters: list[nn.Parameter]) -> list[Tensor]:
        """Those of one shape at once on a GPU, where launches take the time; one by one on a CPU."""
        alike: dict[object, list[nn.Parameter]] = {}
        for i, p in enumerate(parameters):
            alike.setdefault((p.shape[0], p[0].numel()) if p.is_cuda else i, []).append(p)
        made = {}
        for some in alike.values():
            ahead = [p.grad.lerp(self.state[p]["momentum"], MOMENTUM).flatten(1) for p in some]
            made |= zip(some, orthogonal(torch.stack(ahead)) if len(some) > 1 else [orthogonal(ahead[0])])
        return [made[p].view_as(p) for p in parameters]


def orthogonal(x: Tensor) -> Tensor:
    """(x x^T)^(-1/2) x, roughly: singular values become 0.7 to 1.2.   ([N,] R, C) -> the same, in bfloat16's values

    Five Newton-Schulz steps of a quintic whose slope at zero is steep, which is worth more than accuracy here.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall, add_product = x.shape[-2] > x.shape[-1], torch.addmm if x.ndim == 2 else torch.baddbmm
    y = x.mT.bfloat16().contiguous() if tall else x.bfloat16()
    y = y / (torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        s = y @ y.mT
        y = add_product(y, add_product(s, s, s, beta=b, alpha=c), y, beta=a)       # a y + (b s + c s s) y
    return (y.mT if tall else y).to(x.dtype)
