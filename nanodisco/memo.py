"""Memo: what layers make of an input that does not change from step to step, made once.

Sampling calls the networks fifty times with the same tokens, the same pose picture and the same
background, and every frame goes through the same steps. So all that depends on these alone (keys and
values of cross-attention, the hint's convolutions, the projections of the time embedding) can be kept.
Training makes it anew each time: the layers themselves change.

    tokens = Memo(tokens, keep=True)
    k_v = tokens.through(layer)        # layer(tokens) at the first call, the same tensor afterwards
    times = of_each([981, 961, 941])
    times[961].through(layer)          # layer of all three at once, at the first call; of them the row of 961
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Memo:
    """A tensor and, if `keep`, what layers made of it."""

    def __init__(self, x: Tensor, keep: bool = False):
        self.x, self.keep = x, keep
        self._made: dict[Callable, Memo] = {}

    @classmethod
    def of(cls, x: "Tensor | Memo") -> "Memo":
        """A plain tensor as a Memo that keeps nothing; a Memo as it is."""
        return x if isinstance(x, Memo) else cls(x)

    @classmethod
    def made(cls, layer: Callable, x: Tensor) -> "Memo":
        """Of an input that nobody needs any more: only what `layer` made of it, which is x."""
        memo = cls(x)
        memo._made[layer] = cls(x)
        return memo

    def then(self, layer: Callable[[Tensor], Tensor]) -> "Memo":
        """layer(x) as a Memo, for layers further on."""
        if layer in self._made:
            return self._made[layer]
        made = Memo(layer(self.x), self.keep)
        if self.keep:
            self._made[layer] = made
        return made

    def through(self, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """layer(x)."""
        return self.then(layer).x


class Row(Memo):
    """One row of a kept Memo. Layers are given all of its rows, and so read their weights once for all of them."""

    def __init__(self, memo: Memo, i: int):
        super().__init__(memo.x[i:i + 1])
        self.memo, self.i = memo, i

    def then(self, layer: Callable[[Tensor], Tensor]) -> "Row":
        return Row(self.memo.then(layer), self.i)


def of_each(numbers: Sequence[int], device: torch.device | None = None) -> dict[int, Row]:
    """A Memo (1,) of each number, for layers that treat rows alike."""
    memo = Memo(torch.tensor(numbers, device=device), keep=True)
    return {number: Row(memo, i) for i, number in enumerate(numbers)}
