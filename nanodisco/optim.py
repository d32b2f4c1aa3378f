"""Optim: what trains, how fast, and the running average that is kept.

    AdamW with betas (0.9, 0.98), or Muon (muon.py)
    a linear warm-up, then linear decay to almost nothing, or a constant rate
    EMA   average <- d average + (1 - d) weights, after every step n = 0, 1, …;   d = min(decay, (1 + n) / (10 + n))
"""
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanodisco.errors import InputError
from nanodisco.layers import ResBlock
from nanodisco.muon import Each, Muon, matrices
from nanodisco.names import official
from nanodisco.transformer import SpatialTransformer

FLOOR = 1e-8                           # official: the rate never gets smaller
UNET = {                               # patterns of the UNet's tensors that train; ControlNets and projection do anyway
    "null": (),
    "crossattn-kv": ("unet.*.cross_attn.kv.weight",),
    "crossattn": ("unet.*.cross_attn.*",),
    "transblocks": ("unet.*.block.*",),
    "all": ("unet.*",),
    "tem": ("unet.*.temporal.*", "unet.*.unused_norm.*"),
}


def trainable(names: Iterable[str], unet: str = "all", freeze_pose: bool = False, freeze_background: bool = False,
              only_pose: bool = False, substring_fault: bool = False, clip: bool = False) -> list[str]:
    """Which tensors of a DisCo train. The VAE never does, CLIP only if `clip`, and then not what is not used of it.

    unet: a key of UNET, or patterns of our tensor names with commas between them, as "unet.up.*,unet.conv_out.*".
    only_pose: nothing but the pose net. InputError for a pattern that matches nothing.
    substring_fault: official: it looks for "nets.0" and "nets.1" anywhere in a name and so finds
    "resnets.0" and "resnets.1" too, in both nets.
    """
    names = list(names)
    patterns = UNET[unet] if unet in UNET else tuple(unet.split(","))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"train.unet: {pattern!r} matches no tensor of this model; expected one of "
                             f"{', '.join(UNET)}, or patterns such as unet.up.*")

    def of_net(name: str, i: int) -> bool:
        if substring_fault:
            return name.startswith(("pose.", "background.")) and f"nets.{i}" in official(name).theirs[0]
        return name.startswith(("pose.", "background.")[i])

    def trains(name: str) -> bool:
        if only_pose:
            return of_net(name, 0)
        if name.startswith(("pose.", "background.")):
            return not (freeze_pose and of_net(name, 0)) and not (freeze_background and of_net(name, 1))
        if name == "clip.vision.proj" and "clip.proj.weight" in names:
            return False                                                 # our own projection takes its place
        return name.startswith("clip.") and (clip or name.startswith("clip.proj.")) or any(
            fnmatchcase(name, pattern) for pattern in patterns)
    return [name for name in names if trains(name)]


def select(model: nn.Module, names: Iterable[str]) -> list[nn.Parameter]:
    """Let these train and freeze all others.   -> those that train, in the model's order

    official: counts a norm that is never used (`unused_norm`) among those that train; it gets no gradient.
    """
    chosen = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and ".unused_norm." not in name)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer(model: nn.Module, kind: str, each: Each, **options) -> torch.optim.AdamW:
    """For all that trains.   kind: adamw | muon; each: see Muon; options: AdamW's"""
    trains = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if kind == "muon":
        return Muon([p for _, p in trains], matrices(trains), each, fused=True, **options)
    return torch.optim.AdamW([p for _, p in trains], fused=True, **options)


def remembered(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> dict[str, Tensor]:
    """Room for what it keeps of p from step to step, by name; with any values."""
    if isinstance(optimizer, Muon) and id(p) in optimizer.matrices:
        return {"momentum": torch.empty_like(p)}
    return {"step": p.new_empty((), dtype=torch.float32), "exp_avg": torch.empty_like(p),
            "exp_avg_sq": torch.empty_like(p)}


def learning_rate(step: int, steps: int, base: float, warmup: float = 0.1, constant: bool = False) -> float:
    """Of step 0, 1, …: up over the first `warmup` share of the steps, then down, or staying.   >= FLOOR"""
    rising = int(steps * warmup)
    if step < rising:
        share = step / rising
    elif constant:
        share = 1.0
    else:
        share = (steps - step) / max(steps - rising, 1)
    return max(base * share, FLOOR)


def decay(step: int, highest: float) -> float:
    """Of the average at step 0, 1, …: small at first, or it would remember the weights that training began with."""
    return min(highest, (1 + step) / (10 + step))


class Average:
    """The exponential moving average of the tensors that train, in float32."""

    def __init__(self, named: Iterable[tuple[str, Tensor]]):
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in named if tensor.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """average <- decay average + (1 - decay) weights"""
        weights = [p.detach().float() for name, p in model.named_parameters() if name in self.tensors]
        torch._foreach_lerp_(list(self.tensors.values()), weights, 1 - decay)

    @contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """For a while the model has the average in the place of its weights."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                parameter.data, self.tensors[name] = self.tensors[name], parameter.data


def checkpoint_activations(model: nn.Module) -> None:
    """Let ResBlocks and transformers forget their activations and compute them again in the backward pass."""
    for module in model.modules():
        if isinstance(module, (ResBlock, SpatialTransformer)):
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False,
                                               preserve_rng_state=False)          # nothing in them draws
