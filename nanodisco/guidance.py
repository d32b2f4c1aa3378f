"""Guidance: the networks as one function of the noisy latent and the step, with nothing computed twice.

    eps = eps(z, none) + g (eps(z, reference) - eps(z, none))          (arXiv:2207.12598, eq. 6, g = 1 + w)

    guided = Guided(model, tokens, background, uncond, guidance=1.5)   # once a reference
    predict = guided(pose)                                             # once a batch of frames
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanodisco import diffusion
from nanodisco.disco import Conditions, DisCo
from nanodisco.graph import Captured, Compiled
from nanodisco.memo import Memo
from nanodisco.temporal import fold
from nanodisco.transformer import Context

KEPT = 2**28                           # numbers of pose pictures, of which is kept what the networks make of them
Predict = Callable[[Tensor, Tensor], Tensor]      # (zt, t (B,)) -> eps or v, of zt's shape


@dataclass(eq=False)
class Kept:
    """The networks with guidance and all that they are shown from step to step, each part of it a Memo."""
    model: DisCo
    tokens: Memo
    background: Memo | None
    guidance: float
    blind: bool                        # no reference is zeros, which are not attended to
    scales: tuple[float, float]

    def answer(self, zt: Tensor, t: Memo, hint: Memo | None) -> Tensor:
        """eps or v of zt; hint: the pose pictures."""
        half, context = fold(zt)[0].shape[0], Context(self.tokens)
        if self.guidance > 1:
            context = Context(self.tokens, rows=2 * half, blind=half if self.blind else 0)
        return _mixed(self.model(zt, t, Conditions(context, hint, self.background), *self.scales), self.guidance)

    def step(self, zt: Tensor, t: Tensor, hint: Tensor | None = None) -> Tensor:
        """The same of nothing but tensors, for a graph or a compiler.

        hint: what the pose net's first layers make of the pose pictures. The time embedding is made anew.
        """
        return self.answer(zt, Memo(t), None if hint is None else Memo.made(self.model.pose.hint, hint))


class Guided:
    """The network with classifier-free guidance, for one set of references and any number of pose pictures.

    tokens (R, M, context) and background (R, ...) of R references, each for the same number of adjacent
    pictures; `uncond` like tokens: what stands for no reference. Pose and background are never dropped.
    No guidance, and half the work, at guidance <= 1.

    With `cache` nothing is computed twice: keys and values of the tokens, pose and background hints and the
    time embeddings are kept; both halves are one until the first cross-attention; tokens of zeros are not
    attended to. `times`, a Memo of each step, may be shared by all Guided of one model: the steps are the same.
    On top of that all of a step can be one CUDA graph (`graph`; None: on a GPU), compiled before (`compiled`).
    """

    def __init__(self, model: DisCo, tokens: Tensor, background: Tensor | None, uncond: Tensor, guidance: float = 1.0,
                 pose_scale: float = 1.0, background_scale: float = 1.0, cache: bool = True,
                 times: dict[int, Memo] | None = None, graph: bool | None = None, compiled: bool = False):
        self.model, self.guidance, self.scales = model, guidance, (pose_scale, background_scale)
        self.times = {} if times is None else times
        self.background = None if background is None else background.to(model.dtype)
        blind = cache and guidance > 1 and not uncond.any()
        halves = [tokens] if guidance <= 1 or blind else [uncond, tokens]
        self.tokens = torch.cat(halves).to(model.dtype)
        self.kept = self.step = None
        if cache:
            shown = (None if x is None else Memo(x, keep=True) for x in (self.tokens, self.background))
            self.kept = Kept(model, *shown, guidance, blind, self.scales)
            graph = tokens.is_cuda if graph is None else graph
            step = Compiled(self.kept.step) if compiled else self.kept.step
            self.step = Captured(step) if graph else step if compiled else None

    def __call__(self, pose: Tensor | None) -> Predict:
        """pose (B, 3, [F,] H, W) in [0, 1] -> the network for these pictures"""
        pose = None if pose is None else pose.to(self.model.dtype)
        if self.kept is None:
            return self._plain(pose)
        return self._by_step(pose) if self.step else self._by_memos(pose)

    def _by_memos(self, pose: Tensor | None) -> Predict:
        hint = None if pose is None else Memo(fold(pose)[0], keep=True)

        def predict(zt: Tensor, t: Tensor) -> Tensor:
            return self.kept.answer(zt, self.times.setdefault(int(t[0]), Memo(t[:1], keep=True)), hint)
        return predict

    def _by_step(self, pose: Tensor | None) -> Predict:
        hint = () if pose is None else (self.model.pose.hint(fold(pose)[0]),)
        return lambda zt, t: self.step(zt, t[:1], *hint)

    def _plain(self, pose: Tensor | None) -> Predict:
        """official: both halves go through as one batch, the unconditional one first."""
        halves = 2 if self.guidance > 1 else 1

        def twice(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.cat([x] * halves)

        def predict(zt: Tensor, t: Tensor) -> Tensor:
            shown = Conditions(self.tokens, twice(pose), twice(self.background))
            return _mixed(self.model(twice(zt), twice(t), shown, *self.scales), self.guidance)
        return predict


def _mixed(out: Tensor, guidance: float) -> Tensor:
    return out if guidance <= 1 else diffusion.guide(*out.chunk(2), guidance)


def windows(frames: int, window: int, overlap: int) -> list[range]:
    """Stretches of `window` frames that cover a track; each but the last shares `overlap` with the next."""
    if frames <= window:
        return [range(frames)]
    starts = [*range(0, frames - window, window - overlap), frames - window]
    return [range(start, start + window) for start in starts]


def windowed(guided: Guided, pose: Callable[[range], Tensor], parts: list[range]) -> Predict:
    """A long clip through a network of short ones: where windows overlap their answers are mixed, each
    weighted by how far the frame lies from its window's end.   zt (1, C, F, h, w)

    `pose` gives the pose pictures (1, 3, F, H, W) of a range of frames. What the networks make of them is kept
    from step to step (85 windows of 16 frames at 256 x 256) and made anew at each step of a longer clip.
    """
    first = pose(parts[0])
    if len(parts) == 1:
        return guided(first)
    kept = [guided(pose(part)) for part in parts] if first.numel() * len(parts) <= KEPT else None

    def predict(zt: Tensor, t: Tensor) -> Tensor:
        total, weights = torch.zeros_like(zt), torch.zeros(zt.shape[2], device=zt.device)
        for i, part in enumerate(parts):
            network = kept[i] if kept else guided(pose(part))
            near = torch.arange(1, len(part) + 1, device=zt.device)
            weight = torch.minimum(near, near.flip(0)).float()
            frames = slice(part.start, part.stop)
            total[:, :, frames] += network(zt[:, :, frames], t) * weight[:, None, None]
            weights[frames] += weight
        return total / weights[:, None, None]
    return predict
