"""DisCo: who sees which condition, and the loss (arXiv:2307.00040, section 3).

    foreground photo ── CLIP ──► tokens ──► cross-attention of all three networks
    background ── VAE ──► latent ──► background ControlNet ─┐
    pose picture ──────────────────► pose ControlNet ───────┴─ summed ──► UNet ──► eps or v

Three conditions, each with its own door, so each can be swapped alone. Attribute pre-training
(stage 1) is the same class without a pose net; video the same with `unet.temporal`. Official name:
`Net` in `net.py`, `TemConvNet` for video.
"""
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, mse_loss

from nanodisco import diffusion
from nanodisco.clip import ImageEncoder
from nanodisco.config import ModelConfig
from nanodisco.controlnet import ControlNet
from nanodisco.memo import Memo
from nanodisco.temporal import fold, unfold
from nanodisco.together import together
from nanodisco.transformer import Context
from nanodisco.unet import UNet
from nanodisco.vae import VAE


@dataclass
class Conditions:
    """What the networks are shown. Memos (frames of a clip folded) keep what the networks make of them."""
    tokens: Tensor | Context           # (B, M, context), of the reference
    pose: Tensor | Memo | None = None  # (B, 3, [F,] H, W) in [0, 1]
    background: Tensor | Memo | None = None    # (B, C, h, w) latent, or (B, 3, H, W) in [-1, 1] for a pixel hint


@dataclass
class Batch:
    """Training data: what to draw and what is known about it."""
    target: Tensor                     # (B, 3, [F,] H, W) in [-1, 1]
    reference: Tensor                  # (B, 3, S, S), CLIP-normalised, zero outside the person
    background: Tensor                 # (B, 3, H, W) in [-1, 1], zero where the person stood
    pose: Tensor | None = None         # (B, 3, [F,] H, W) in [0, 1]


@dataclass
class Draws:
    """Everything random in one training step, so that the loss itself is a function.

    Each of B samples is noised K times; row i K + k of what is drawn for that is of sample i.
    """
    timesteps: Tensor                  # (B*K,) int64; a clip has one
    noise: Tensor                      # like the latent (B*K, C, [F,] h, w)
    target: Tensor                     # posterior noise of the target (B*F, C, h, w)
    background: Tensor                 # posterior noise of the background (B, C, h, w)
    drop_reference: Tensor             # (B*K,) bool: train without this reference
    drop_pose: Tensor                  # (B*K, F) bool: train without this frame's pose


class DisCo(nn.Module):
    """All networks of a ModelConfig. `pose` and `background` are None where the configuration has none."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vae = VAE(config.vae)
        self.clip = ImageEncoder(config.clip, config.unet.context, config.tokens)
        self.unet = UNet(config.unet)
        self.pose = ControlNet(config.pose, config.unet) if config.pose else None
        self.background = ControlNet(config.background, config.unet) if config.background else None

    @torch.no_grad()
    def start_controlnets(self) -> None:
        """Both nets begin as copies of the UNet's encoder (ControlNet, arXiv:2302.05543, section 3.1).

        official: the background's one convolution begins as a copy of the UNet's conv_in.
        """
        for net in (self.pose, self.background):
            if net is not None:
                net.encoder.load_state_dict(self.unet.encoder.state_dict())
        if self.background is not None and self.config.background.hint == "latents":
            theirs, ours = self.unet.encoder.conv_in, self.background.hint.conv_in
            ours.weight[:, :theirs.in_channels].copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)

    def alpha_bars(self) -> Tensor:
        """The noise schedule.   (steps,) float32 on the model's device"""
        return diffusion.alpha_bars(self.config.diffusion).to(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.unet.norm_out.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.unet.norm_out.weight.device

    def conditions(self, reference: Tensor, background: Tensor | None, pose: Tensor | None,
                   noise: Tensor | None = None) -> Conditions:
        """Encode the pictures of a `Batch` once, for every step to come.

        noise (B, C, h, w): sample the background's posterior, as official; None: take its mean.
        """
        if self.background is not None and self.config.background.hint == "latents":
            latent = self.vae.to_latent(background, noise)
            if self.config.background.hole:                              # it is 0 there: see transforms.background
                hole = (background == 0).all(dim=1, keepdim=True).to(latent.dtype)
                latent = torch.cat([latent, avg_pool2d(hole, self.config.vae.factor)], dim=1)
            background = latent
        return Conditions(self.clip(reference), pose, background)

    def unconditional_tokens(self, tokens: Tensor) -> Tensor:
        """What stands for "no reference".   (B, M, context) -> the same

        official: zeros if the model was trained without dropping references, else CLIP of zeros.
        """
        if self.config.uncond == "zeros" or self.config.tokens == "global":
            return torch.zeros_like(tokens)
        size, weight = self.config.clip.image_size, self.clip.vision.ln_pre.weight
        return self.clip(weight.new_zeros(1, 3, size, size)).to(tokens.dtype).expand_as(tokens)

    def forward(self, zt: Tensor, t: Tensor | Memo, conditions: Conditions,
                pose_scale: float = 1.0, background_scale: float = 1.0) -> Tensor:
        """eps or v.   zt (B, C, h, w) or (B, C, F, h, w), t (B,) or (1,) -> the shape and dtype of zt

        The networks compute in the dtype of their weights, whatever that of zt is. With a Context of two
        halves the answer has both, the unconditional one first.
        """
        z, frames = fold(zt.to(self.dtype))
        tokens, pose, background = (x.to(self.dtype) if isinstance(x, Tensor) else x
                                    for x in (conditions.tokens, conditions.pose, conditions.background))
        networks = [partial(self.unet.encoder, z, t, tokens, frames)]
        if self.pose is not None:
            assert pose is not None, "this model has a pose net; it needs a pose"
            hint = pose if isinstance(pose, Memo) else fold(pose)[0]
            networks.append(partial(self.pose, z, t, tokens, hint, frames, pose_scale))
        if self.background is not None:
            assert background is not None, "this model has a background net; it needs a background"
            networks.append(partial(self.background, z, t, tokens, background, frames, background_scale))
        encoded, *found = together(*networks, z=z, channels=self.config.unet.widths[0])
        residuals = [sum(more, first) for first, *more in zip(*found)] if found else None
        out = self.unet(z, t, tokens, residuals, frames, encoded).to(zt.dtype)
        return unfold(out, frames) if zt.ndim == 5 else out

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, drop_reference: float = 0.0,
             drop_pose: float = 0.0, drop_whole_batch: bool = False, noises: int = 1) -> Draws:
        """The random numbers of one step for targets (B, 3, [F,] H, W), in the official order.

        They lie where the generator does. Both probabilities are a sample's own. official: one coin drops the
        reference of all samples or of none (drop_whole_batch), and a frame's pose in every sample.
        """
        factor, channels, device = self.config.vae.factor, self.config.vae.channels, generator.device
        samples, frames = shape[0], shape[2] if len(shape) == 5 else 1
        size, rows = (shape[-2] // factor, shape[-1] // factor), samples * noises
        of_clip = (rows, channels, frames, *size) if len(shape) == 5 else (rows, channels, *size)
        coins = torch.rand(rows, generator=generator, device=device)
        dropped = (coins[:1].expand(rows) if drop_whole_batch else coins) < drop_reference
        hidden = torch.rand(rows, frames, generator=generator, device=device) < drop_pose
        return Draws(
            target=torch.randn(samples * frames, channels, *size, generator=generator, device=device),
            noise=torch.randn(of_clip, generator=generator, device=device),
            timesteps=torch.randint(self.config.diffusion.steps, (rows,), generator=generator, device=device),
            background=torch.randn(samples, channels, *size, generator=generator, device=device),
            drop_reference=dropped, drop_pose=hidden)

    def loss(self, batch: Batch, draws: Draws, min_snr: float | None = None, on: str = "prediction",
             weight: Tensor | float = 1.0) -> Tensor:
        """Mean squared error of the predicted eps (DDPM eq. 14) or v, in float32.   -> ()

        `min_snr`: weight each sample by min(SNR, min_snr) (arXiv:2303.09556); None: all alike.
        `on`: epsilon | v | x0: the error of what the answer implies for that instead. official: "x0" is a
        choice of its command line that crashes.
        `weight` (B, 1, [F,] h, w): how many times each place of the latents counts.
        """
        def repeated(x: Tensor) -> Tensor:                               # (B, …) -> (B*K, …)
            return x.repeat_interleave(len(draws.timesteps) // len(batch.target), dim=0)
        prediction = self.config.diffusion.prediction
        on = prediction if on == "prediction" else on
        target, frames = fold(batch.target)
        z0 = self.vae.to_latent(target, draws.target)                    # (B*F, C, h, w)
        z0 = repeated(unfold(z0, frames) if batch.target.ndim == 5 else z0)
        conditions = self.conditions(batch.reference, batch.background, batch.pose, draws.background)
        conditions = Conditions(*(None if x is None else repeated(x)
                                  for x in (conditions.tokens, conditions.pose, conditions.background)))
        drop = draws.drop_reference[:, None, None]
        if drop.any():
            conditions.tokens = torch.where(drop, self.unconditional_tokens(conditions.tokens), conditions.tokens)
        if conditions.pose is not None and draws.drop_pose.any():
            conditions.pose = hide_pose(conditions.pose, draws.drop_pose)

        a = diffusion.at(self.alpha_bars(), draws.timesteps, z0)
        zt = diffusion.add_noise(z0, draws.noise, a)
        out = self(zt, draws.timesteps, conditions).float()
        if on != prediction:
            z0_hat, eps_hat = diffusion.split(out, zt, a, prediction)
            out = {"x0": z0_hat, "epsilon": eps_hat, "v": diffusion.velocity(z0_hat, eps_hat, a)}[on]
        wanted = {"x0": z0, "epsilon": draws.noise, "v": diffusion.velocity(z0, draws.noise, a)}[on]
        errors = mse_loss(out, wanted.float(), reduction="none")
        errors = errors * (repeated(weight) if isinstance(weight, Tensor) else weight)
        if min_snr is not None:
            errors = errors * diffusion.min_snr_weight(a, min_snr, on)
        return errors.mean()


def hide_pose(pose: Tensor, hidden: Tensor) -> Tensor:
    """official: a hidden pose is a plain picture of its own first pixel.

    pose (B, 3, [F,] H, W), hidden (B, F) bool -> like pose
    """
    pictures, _ = fold(pose)                                             # (B*F, 3, H, W)
    plain = pictures[:, :, :1, :1].expand_as(pictures)
    pictures = torch.where(hidden.reshape(-1, 1, 1, 1), plain, pictures)
    return unfold(pictures, hidden.shape[1]) if pose.ndim == 5 else pictures
