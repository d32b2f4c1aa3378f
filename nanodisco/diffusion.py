"""Diffusion: how noise is put in and taken out. Pure functions of tensors: no networks, no state.

    zt = sqrt(a) z0 + sqrt(1 - a) eps         a: share of signal power left at step t (the papers' alpha-bar)

A network sees zt and t and predicts eps, or v = sqrt(a) eps - sqrt(1 - a) z0. Either gives both ends
of the line, z0 and eps; a sampler then puts the next, less noisy zt on a line through them.

    DDPM          arXiv:2006.11239  eq. 4, 7        DDIM          arXiv:2010.02502  eq. 12, 16
    PNDM          arXiv:2202.09778  eq. 9 to 12     DPM-Solver++  arXiv:2211.01095  algorithm 2
    v-prediction  arXiv:2202.00512  section 4       zero SNR      arXiv:2305.08891  algorithm 1
    min-SNR       arXiv:2303.09556  eq. 7           cosine        arXiv:2102.09672  eq. 17

z0, zt, eps, v (B, C, [F,] h, w). `a` is a float, or a tensor that broadcasts against them.
"""
import math

import torch
from torch import Tensor

from nanodisco.config import DiffusionConfig


# ---- The noise schedule --------------------------------------------------------------------------

def alpha_bars(config: DiffusionConfig) -> Tensor:
    """a at every training step: a_t = prod over s <= t of (1 - beta_s).   -> (steps,) float32, falling"""
    n = config.steps
    if config.schedule == "scaled_linear":           # Stable Diffusion: linear in sqrt(beta)
        betas = torch.linspace(config.beta_start ** 0.5, config.beta_end ** 0.5, n) ** 2
    elif config.schedule == "linear":                # DDPM, section 4
        betas = torch.linspace(config.beta_start, config.beta_end, n)
    else:                                            # cosine, eq. 17, with its beta <= 0.999
        f = torch.cos((torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999).float()
    a = torch.cumprod(1 - betas, dim=0)
    return zero_terminal_snr(a) if config.zero_snr else a


def zero_terminal_snr(a: Tensor) -> Tensor:
    """Shift and scale sqrt(a) so that the last step holds no signal and the first stays as it was."""
    root = a.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


# ---- Going up: what the network sees and is asked for --------------------------------------------

def at(a: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """The entries a[t] shaped to broadcast against `like`.   (steps,), (B,) -> (B, 1, 1, 1[, 1])"""
    return a.to(like.device)[t].view(-1, *[1] * (like.ndim - 1))


def add_noise(z0: Tensor, eps: Tensor, a) -> Tensor:
    """zt = sqrt(a) z0 + sqrt(1 - a) eps.   DDPM eq. 4"""
    return a ** 0.5 * z0 + (1 - a) ** 0.5 * eps


def velocity(z0: Tensor, eps: Tensor, a) -> Tensor:
    """v = sqrt(a) eps - sqrt(1 - a) z0: the direction in which zt turns from z0 to eps."""
    return a ** 0.5 * eps - (1 - a) ** 0.5 * z0


def split(out: Tensor, zt: Tensor, a, prediction: str) -> tuple[Tensor, Tensor]:
    """What the network said, as the clean latent and the noise it implies.   -> (z0, eps)"""
    if prediction == "v":
        return a ** 0.5 * zt - (1 - a) ** 0.5 * out, a ** 0.5 * out + (1 - a) ** 0.5 * zt
    return (zt - (1 - a) ** 0.5 * out) / a ** 0.5, out


def min_snr_weight(a: Tensor, gamma: float, prediction: str) -> Tensor:
    """Weight of a sample's loss so that it counts as min(SNR, gamma) times the loss on z0.   SNR = a / (1 - a)

    `prediction` is what the squared error is measured on: epsilon | v | x0. (B,) -> (B,)
    With zero terminal SNR use v or x0: the error on epsilon says nothing there (its weight is 1).
    """
    snr = a / (1 - a)
    capped = snr.clamp(max=gamma)
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)                                # = capped / snr, also at snr = 0
    return capped / (snr + 1) if prediction == "v" else capped


def guide(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, arXiv:2207.12598 eq. 6, as u + scale (c - u): scale 1 is no guidance."""
    return uncond + scale * (cond - uncond)


# ---- Coming down: one step -------------------------------------------------------------------------

def ddim_step(z0: Tensor, eps: Tensor, a: float, a_prev: float,
              eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """DDIM eq. 12: predicted clean latent + direction to zt + fresh noise (none if eta = 0)."""
    sigma = eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5     # eq. 16
    z = a_prev ** 0.5 * z0 + max(1 - a_prev - sigma ** 2, 0.0) ** 0.5 * eps
    return z if noise is None else z + sigma * noise


def ddpm_step(z0: Tensor, zt: Tensor, a: float, a_prev: float, noise: Tensor | None = None) -> Tensor:
    """DDPM eq. 7: a draw from q(z_prev | zt, z0); its mean alone if there is no noise."""
    alpha = a / a_prev
    mean = a_prev ** 0.5 * (1 - alpha) / (1 - a) * z0 + alpha ** 0.5 * (1 - a_prev) / (1 - a) * zt
    if noise is None:
        return mean
    variance = max((1 - a_prev) / (1 - a) * (1 - alpha), 1e-20)          # official: fixed_small
    return mean + variance ** 0.5 * noise


def adams_bashforth(history: list[Tensor]) -> Tensor:
    """PNDM eq. 12: the next move's eps, extrapolated from the last up to four, newest last."""
    weights = ((1,), (3, -1), (23, -16, 5), (55, -59, 37, -9))[min(len(history), 4) - 1]
    return sum(w * eps for w, eps in zip(weights, reversed(history))) / sum(weights)


def pndm_step(zt: Tensor, eps: Tensor, a: float, a_prev: float) -> Tensor:
    """PNDM eq. 11: move zt from noise level a to a_prev along eps, which may mix several predictions."""
    return ddim_step(*split(eps, zt, a, "epsilon"), a, a_prev)


def dpm_step(z0: Tensor, zt: Tensor, a: float, a_prev: float,
             z0_last: Tensor | None = None, a_last: float | None = None) -> Tensor:
    """DPM-Solver++(2M): exact for a z0 that is linear in lambda, the log of signal over noise.

    z_prev = sigma_prev / sigma zt - alpha_prev (e^-h - 1) D,    h = lambda_prev - lambda
    D = z0 + (z0 - z0_last) h / (2 h_last)      from the second step on, but for the last; else D = z0
    """
    h = _log_snr(a_prev) - _log_snr(a)
    d = z0
    if z0_last is not None and math.isfinite(h) and a_last != a:
        d = z0 + (z0 - z0_last) * (h / (2 * (_log_snr(a) - _log_snr(a_last))))
    return ((1 - a_prev) / (1 - a)) ** 0.5 * zt - a_prev ** 0.5 * math.expm1(-h) * d


def _log_snr(a: float) -> float:
    """lambda = log(sqrt(a) / sqrt(1 - a)), infinite at both ends."""
    if a <= 0 or a >= 1:
        return -math.inf if a <= 0 else math.inf
    return 0.5 * math.log(a / (1 - a))
