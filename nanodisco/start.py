"""Start: the model that a recipe begins with, and the random numbers and the loss of one of its steps."""
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nanodisco import loading, lora, optim
from nanodisco.config import ModelConfig, to_dict
from nanodisco.data import Training
from nanodisco.disco import Batch, DisCo, Draws
from nanodisco.errors import InputError
from nanodisco.recipe import DataConfig, Recipe, TrainConfig

PICTURES = 400                         # that principal components are taken of
VAE_PARTS = {"vae": "vae.", "decoder": ("vae.decoder.", "vae.from_latent.", "vae.linear_out.")}       # that train
TOLD = ("pose", "background", "diffusion", "tokens", "uncond")


def model(recipe: Recipe, say: Callable[[str], None]) -> DisCo:
    """From the files of `start`, or new, drawn from the recipe's seed. In float32; in eval mode: nothing drops out.

    Files say how large their networks are; the recipe's model says the rest: networks that they lack, tokens,
    what is predicted. InputError if the recipe's pictures are none for this model.
    """
    config = recipe.model if recipe.pose or recipe.model is None else replace(recipe.model, pose=None)
    if recipe.start:
        told = (to_dict(config) if config else {}) | ({"uncond": recipe.uncond} if recipe.uncond else {})
        overrides = [f"--{name}={json.dumps(told[name])}" for name in TOLD if told.get(name) is not None]
        overrides += [f"--clip.crop={json.dumps(config.clip.crop)}"] if config else []
        made = loading.load(*recipe.start, variant=recipe.variant or None, overrides=overrides, seed=recipe.train.seed,
                            say=say)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(recipe.train.seed)       # those of GPUs stay as they are
            made = DisCo(replace(config, uncond=recipe.uncond or config.uncond))
            made.start_controlnets()
    if not recipe.pose:
        made.pose, made.config = None, replace(made.config, pose=None)
    _require_fit(recipe.data, made.config)
    made.config = replace(made.config, size=(recipe.data.width, recipe.data.height))
    return made.eval()


def _require_fit(data: DataConfig, config: ModelConfig) -> None:
    if data.frames > 1 and not config.unet.temporal:
        raise InputError(f"data.frames is {data.frames}, but this is a picture model; expected 1, or variant: temporal "
                         "(model.unet.temporal: true)")
    for side, pixels in (("width", data.width), ("height", data.height)):
        if pixels % config.vae.factor:
            raise InputError(f"data.{side} is {pixels}; expected a multiple of {config.vae.factor}, the latent factor "
                             "of this model")


def trainable(net: DisCo, recipe: Recipe) -> list[nn.Parameter]:
    """Let what the recipe names train and freeze all else.   -> those that train"""
    t, names = recipe.train, [name for name, _ in net.named_parameters()]
    if recipe.stage == "diffusion":
        names = optim.trainable(names, t.unet, freeze_pose=t.freeze_pose, freeze_background=t.freeze_background,
                                only_pose=t.only_pose, substring_fault=t.substring_fault, clip=t.clip)
    else:
        names = [name for name in names if name.startswith(VAE_PARTS[recipe.stage])]
    if t.lora_rank:
        names = lora.add(net, names, t.lora_rank, t.seed)
    if parameters := optim.select(net, names):
        return parameters
    raise InputError("nothing is left to train; see train.unet, train.only_pose, train.freeze_…")


def draws(net: DisCo, share: torch.Size, whole: int, train: TrainConfig, step: int) -> Draws:
    """All random numbers of a step, for the `whole` batch: each process makes them all and takes its own rows.

    They are drawn on the CPU, so that they are the same on every machine.   share: shape of its targets
    """
    state = int(np.random.SeedSequence([train.seed, step]).generate_state(1, np.uint64)[0])
    return net.draw((whole, *share[1:]), torch.Generator().manual_seed(state), train.drop_reference, train.drop_pose,
                    train.drop_whole_batch, train.noises)


def rows(draws: Draws, first: int, count: int) -> Draws:
    """Those of some samples of a batch."""
    samples = len(draws.background)
    return Draws(**{name: x.unflatten(0, (samples, -1))[first:first + count].flatten(0, 1)
                    for name, x in vars(draws).items()})


def principal_components(net: DisCo, dataset: Training) -> None:
    """Let a VAE with a linear path begin where these pictures are."""
    pictures = torch.stack([dataset[0, i]["target"] for i in range(min(PICTURES, len(dataset)))])
    net.vae.start_linear(pictures)


class VAELoss(nn.Module):
    """Of the VAE alone."""

    def __init__(self, model: DisCo, train: TrainConfig):
        super().__init__()
        self.vae, self.person = model.vae, train.person
        self.noise = train.latent_noise / model.config.vae.scaling / model.config.diffusion.steps

    def forward(self, samples: dict[str, Tensor], draws: Draws) -> Tensor:
        """Of a part of a batch, its mean.   -> ()"""
        noise, t = (x.to(samples["target"].device) for x in (draws.target, draws.timesteps))
        return self.vae.loss(samples["target"], noise, 1 + (self.person - 1) * samples["person"], self.noise * t)


class Loss(nn.Module):
    """A model's loss as a module of its own, so that it can be distributed."""

    def __init__(self, model: DisCo, train: TrainConfig):
        super().__init__()
        self.model, self.train_config = model, train

    def forward(self, samples: dict[str, Tensor], draws: Draws) -> Tensor:
        """Of a part of a batch, its mean.   -> ()"""
        there = Draws(**{name: x.to(samples["target"].device) for name, x in vars(draws).items()})
        batch = Batch(samples["target"], samples["reference"], samples["background"], samples.get("pose"))
        t, weight = self.train_config, 1.0
        if t.person != 1:
            weight = 1 + (t.person - 1) * interpolate(samples["person"], there.noise.shape[2:], mode="area")
        return self.model.loss(batch, there, t.min_snr or None, t.loss, weight)
