"""Sampling: from noise to latents, one step after another.

`sample` is a generator: it yields after every call of the network, so the caller can draw a progress
bar, show a preview or stop. The formulas of the steps are in diffusion.py.

    for step in sample(predict, noise, model.alpha_bars()): ...
    picture = model.vae.to_picture(step.z)

`predict` is the network with its guidance, see guidance.py.
"""
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanodisco import diffusion
from nanodisco.errors import InputError

Predict = Callable[[Tensor, Tensor], Tensor]      # (zt, t (B,)) -> eps or v, of zt's shape
Noise = Callable[[int], Tensor]                   # index of the step -> fresh noise, of zt's shape

SCHEDULERS = ("ddim", "ddpm", "pndm", "dpm++")


@dataclass
class Step:
    """One call of the network and the move that it led to."""
    index: int
    t: int
    z: Tensor                          # the latent after the move


def timesteps(scheduler: str, steps: int, of: int, zero_snr: bool = False) -> list[int]:
    """At which of the `of` training steps a scheduler calls the network, in order; in brackets 10 of 1000."""
    if zero_snr:                                                         # [999, 899, …, 99]: it has to start there
        return [round(of - i * of / steps) - 1 for i in range(steps)]
    if scheduler == "dpm++":                                             # [999, 899, …, 100]
        return [round((of - 1) * i / steps) for i in range(steps, 0, -1)]
    offset = 0 if scheduler == "ddpm" else 1                             # [901, 801, …, 1]; official: DDPM's end at 0
    leading = [min(i * (of // steps) + offset, of - 1) for i in reversed(range(steps))]
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
    if prediction == "epsilon" and a[-1] == 0:
        raise InputError("prediction epsilon says nothing at zero signal (zero_snr), where sampling starts; expected "
                         "v, as prediction=model.config.diffusion.prediction")
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


def frame_noise(seed: int, frames: Iterable[int], shape: tuple[int, ...], step: int = -1) -> Tensor:
    """Noise that belongs to each frame, whatever batch it is made in.   shape (C, h, w) -> (F, C, h, w)

    step -1: what the frame starts from; else what the sampler adds at that step.
    """
    noise = []
    for frame in frames:
        state = int(np.random.SeedSequence([seed, frame, step + 1]).generate_state(1, np.uint64)[0])
        noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(state)))
    return torch.stack(noise)
