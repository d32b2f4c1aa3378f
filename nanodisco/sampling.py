"""Sampling: from noise to latents, one step after another.

`sample` is a generator: it yields after every call of the network, so the caller can draw a progress
bar, show a preview or stop. The formulas of the steps are in diffusion.py.

    guided = Guided(model, tokens, background, uncond, guidance=1.5)
    for step in sample(guided(pose), noise, model.alpha_bars()): ...
    picture = model.vae.to_picture(step.z)
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nanodisco import diffusion
from nanodisco.disco import Conditions, DisCo
from nanodisco.errors import InputError
from nanodisco.memo import Memo
from nanodisco.temporal import fold
from nanodisco.transformer import Context

Predict = Callable[[Tensor, Tensor], Tensor]      # (zt, t (B,)) -> eps or v, of zt's shape
Noise = Callable[[int], Tensor]                   # index of the step -> fresh noise, of zt's shape

SCHEDULERS = ("ddim", "ddpm", "pndm", "dpm++")


@dataclass
class Step:
    """One call of the network and the move that it led to."""
    index: int
    t: int
    z: Tensor                          # the latent after the move


class Guided:
    """The network with classifier-free guidance, for one set of references and any number of pose pictures.

    tokens (R, M, context) and background (R, ...) of R references, each for the same number of adjacent
    pictures; `uncond` like tokens: what stands for no reference. Pose and background are never dropped.
    No guidance, and half the work, at guidance <= 1.

    With `cache` nothing is computed twice: keys and values of the tokens, pose and background hints and the
    time embeddings are kept; both halves are one until the first cross-attention; tokens of zeros are not
    attended to. `times` may be shared by all Guided of one model: the steps are the same.
    """

    def __init__(self, model: DisCo, tokens: Tensor, background: Tensor | None, uncond: Tensor, guidance: float = 1.0,
                 pose_scale: float = 1.0, background_scale: float = 1.0, cache: bool = True,
                 times: dict[int, Memo] | None = None):
        self.model, self.guidance, self.cache = model, guidance, cache
        self.scales = (pose_scale, background_scale)
        self.times = {} if times is None else times
        self.background = None if background is None else background.to(model.dtype)
        self.blind = cache and guidance > 1 and not uncond.any()
        halves = [tokens] if guidance <= 1 or self.blind else [uncond, tokens]
        self.tokens = torch.cat(halves).to(model.dtype)
        if cache:
            self.tokens = Memo(self.tokens, keep=True)
            self.background = None if background is None else Memo(self.background, keep=True)

    def __call__(self, pose: Tensor | None) -> Predict:
        """pose (B, 3, [F,] H, W) in [0, 1] -> the network for these pictures"""
        return (self._kept if self.cache else self._plain)(None if pose is None else pose.to(self.model.dtype))

    def _kept(self, pose: Tensor | None) -> Predict:
        hint = None if pose is None else Memo(fold(pose)[0], keep=True)

        def predict(zt: Tensor, t: Tensor) -> Tensor:
            half = fold(zt)[0].shape[0]
            context = Context(self.tokens)
            if self.guidance > 1:
                context = Context(self.tokens, rows=2 * half, blind=half if self.blind else 0)
            step = self.times.setdefault(int(t[0]), Memo(t[:1], keep=True))
            return self._answer(self.model(zt, step, Conditions(context, hint, self.background), *self.scales))
        return predict

    def _plain(self, pose: Tensor | None) -> Predict:
        """official: both halves go through as one batch, the unconditional one first."""
        halves = 2 if self.guidance > 1 else 1

        def twice(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.cat([x] * halves)

        def predict(zt: Tensor, t: Tensor) -> Tensor:
            shown = Conditions(self.tokens, twice(pose), twice(self.background))
            return self._answer(self.model(twice(zt), twice(t), shown, *self.scales))
        return predict

    def _answer(self, out: Tensor) -> Tensor:
        return out if self.guidance <= 1 else diffusion.guide(*out.chunk(2), self.guidance)


def timesteps(scheduler: str, steps: int, of: int, zero_snr: bool = False) -> list[int]:
    """At which of the `of` training steps a scheduler calls the network, in order."""
    if zero_snr:
        return diffusion.trailing_timesteps(steps, of)
    if scheduler == "dpm++":
        return diffusion.linspace_timesteps(steps, of)
    leading = diffusion.leading_timesteps(steps, of, offset=0 if scheduler == "ddpm" else 1)
    return leading[:2] + leading[1:] if scheduler == "pndm" else leading


def sample(predict: Predict, z: Tensor, alpha_bars: Tensor, scheduler: str = "ddim", steps: int = 50,
           eta: float = 0.0, prediction: str = "epsilon", noise: Noise | None = None) -> Iterator[Step]:
    """Walk z (B, C, [F,] h, w) from noise to a clean latent, yielding each step.

    `noise` is needed by ddpm and by ddim with eta > 0. official: DDIM and PNDM end at the training
    step 0, which still holds a little noise; DDPM and DPM-Solver++ end at none.
    """
    a = alpha_bars.tolist()                                              # in double precision from here on
    if scheduler not in SCHEDULERS:
        raise InputError(f"scheduler {scheduler!r}; expected one of {', '.join(SCHEDULERS)}")
    if not 1 <= steps <= len(a):
        raise InputError(f"{steps} sampling steps; expected 1 to {len(a)}")
    if scheduler == "pndm" and a[-1] == 0:
        raise InputError("pndm cannot start from zero signal (zero_snr); use ddim, ddpm or dpm++")
    calls = timesteps(scheduler, steps, len(a), zero_snr=a[-1] == 0)
    last = a[0] if scheduler in ("ddim", "pndm") else 1.0
    if scheduler == "pndm":
        yield from _pndm(predict, z, a, calls, last, prediction)
        return
    z0_last = a_last = None
    for i, t in enumerate(calls):
        a_prev = a[calls[i + 1]] if i + 1 < len(calls) else last
        z0, eps = _predicted(predict, z, t, a, prediction)
        if scheduler == "ddim":
            z = diffusion.ddim_step(z0, eps, a[t], a_prev, eta, noise(i) if eta > 0 else None)
        elif scheduler == "ddpm":
            z = diffusion.ddpm_step(z0, z, a[t], a_prev, noise(i) if a_prev < 1 else None)
        else:
            z = diffusion.dpm_step(z0, z, a[t], a_prev, z0_last, a_last)
        z0_last, a_last = z0, a[t]
        yield Step(i, t, z)


def _pndm(predict: Predict, z: Tensor, a: list[float], calls: list[int], last: float,
          prediction: str) -> Iterator[Step]:
    """The first move is made twice: once to look ahead, then again along the mean of both predictions."""
    history: list[Tensor] = []
    start, t_from = z, calls[0]
    for i, t in enumerate(calls):
        a_prev = a[calls[i + 1]] if i + 1 < len(calls) else last
        eps = _predicted(predict, z, t, a, prediction)[1]
        if i == 1:
            move = (eps + history[-1]) / 2
        else:
            history = [*history[-3:], eps]
            move, start, t_from = diffusion.adams_bashforth(history), z, t
        z = diffusion.pndm_step(start, move, a[t_from], a_prev)
        yield Step(i, t, z)


def _predicted(predict: Predict, z: Tensor, t: int, a: list[float], prediction: str) -> tuple[Tensor, Tensor]:
    """Call the network at step t.   -> (z0, eps)"""
    out = predict(z, torch.full((len(z),), t, dtype=torch.long, device=z.device))
    return diffusion.split(out, z, a[t], prediction)
