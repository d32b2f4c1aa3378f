"""VAE: pictures to latents, a fraction of the size, and back (Stable Diffusion, arXiv:2112.10752, 3.1).

    encode   x (B, 3, H, W) in [-1, 1] -> a normal distribution over latents (B, C, H/f, W/f)
    decode   z (B, C, h, w) -> (B, 3, h*f, w*f), about [-1, 1]

f = stem 2^(levels - 1): 8 for SD. Networks work on latents times `scaling` (0.18215 for SD), which gives
them a variance near one: `to_latent` and `to_picture` apply it. Official name: `AutoencoderKL`.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, unfold

from nanodisco.config import VAEConfig
from nanodisco.layers import Down, GroupNormSiLU, ResBlock, Up
from nanodisco.transformer import GroupNorm, SelfAttention

EPS = 1e-6                             # of every norm here; the UNet has 1e-5
COLOURS = 3
LITTLE = -6.0                          # logarithm of the posterior's variance when training begins
KL_WEIGHT = 2e-4


@dataclass
class Posterior:
    """q(z | x) = N(mean, exp(logvar)), before scaling.   mean, logvar (B, C, h, w)"""
    mean: Tensor
    logvar: Tensor                     # within [-30, 20]

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise; the mean itself if there is no noise.   (B, C, h, w)"""
        return self.mean if noise is None else self.mean + (0.5 * self.logvar).exp() * noise


class PixelAttention(nn.Module):
    """One head of self-attention over all pixels, with biases.   (B, C, H, W) -> the same"""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels, EPS)
        self.attn = SelfAttention(channels, heads=1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attn(self.norm(x).flatten(2).transpose(1, 2))           # (B, H*W, C)
        return x + h.transpose(1, 2).reshape(x.shape)


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the smallest size.   (B, C, h, w) -> the same"""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(width, width, groups, EPS) for _ in range(2))
        self.attn = PixelAttention(width, groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.res[1](self.attn(self.res[0](h)))


class Level(nn.Module):
    """ResBlocks of one size, then Down or Up or neither."""

    def __init__(self, c_in: int, width: int, layers: int, groups: int, resize: nn.Module | None):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else width, width, groups, EPS) for i in range(layers))
        self.resize = resize or nn.Identity()

    def forward(self, h: Tensor) -> Tensor:                              # (B, c_in, h, w) -> (B, width, h', w')
        for res in self.res:
            h = res(h)
        return self.resize(h)


class PictureEncoder(nn.Module):
    """(B, 3, H, W) -> mean and logvar side by side (B, 2 C, h, w)"""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths, config.groups
        self.stem = config.stem
        self.conv_in = nn.Conv2d(COLOURS * config.stem ** 2, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers, groups,
                  Down(width, one_sided=True) if i < len(widths) - 1 else None)
            for i, width in enumerate(widths))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = GroupNormSiLU(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(pixel_unshuffle(x, self.stem) if self.stem > 1 else x)
        for level in self.down:
            h = level(h)
        return self.conv_out(self.norm_out(self.mid(h)))


class PictureDecoder(nn.Module):
    """(B, C, h, w) -> (B, 3, H, W)"""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.widths[::-1], config.groups              # coarsest first
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.mid = Middle(widths[0], groups)
        self.up = nn.ModuleList(
            Level(widths[max(i - 1, 0)], width, config.layers + 1, groups,
                  Up(width) if i < len(widths) - 1 else None)
            for i, width in enumerate(widths))
        self.norm_out = GroupNormSiLU(groups, widths[-1], EPS)
        self.stem = config.stem
        self.conv_out = nn.Conv2d(widths[-1], COLOURS * config.stem ** 2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in self.up:
            h = level(h)
        x = self.conv_out(self.norm_out(h))
        return pixel_shuffle(x, self.stem) if self.stem > 1 else x


class VAE(nn.Module):
    """Encoder, decoder, and the 1x1 convolution that each has on the latent's side."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.scaling = config.scaling
        self.encoder = PictureEncoder(config)
        self.decoder = PictureDecoder(config)
        self.to_moments = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)      # official: quant_conv
        self.from_latent = nn.Conv2d(config.channels, config.channels, 1)             # official: post_quant_conv
        self.linear_in = self.linear_out = None
        if config.linear:
            self.linear_in = nn.Conv2d(COLOURS, config.channels, config.factor, stride=config.factor)
            self.linear_out = nn.ConvTranspose2d(config.channels, COLOURS, config.factor, stride=config.factor)

    @torch.no_grad()
    def start_linear(self, pictures: Tensor) -> None:
        """Let it begin as principal components of the squares of these pictures (B, 3, H, W) in [-1, 1].

        The linear path encodes and decodes them; everything else adds nothing yet. A component of variance v
        is divided by v^(1/4), between keeping its size and making all alike, and then all by one number: the
        latent's variance is 1.
        """
        factor, count = self.linear_in.stride[0], self.linear_in.out_channels
        squares = unfold(pictures, factor, stride=factor).transpose(1, 2).flatten(0, 1).double()       # (N, 3 f f)
        mean = squares.mean(0)
        variance, axes = torch.linalg.eigh((squares - mean).T @ (squares - mean) / len(squares))
        variance, axes = variance.flip(0)[:count], axes.flip(1)[:, :count].T                           # (C, 3 f f)
        scale = variance ** -0.25 / (variance ** 0.5).mean() ** 0.5
        self.linear_in.weight.copy_((axes * scale[:, None]).view_as(self.linear_in.weight))
        self.linear_in.bias.copy_(-(axes * scale[:, None]) @ mean)
        self.linear_out.weight.copy_((axes / scale[:, None]).view_as(self.linear_out.weight))
        self.linear_out.bias.copy_(mean.view(COLOURS, -1).mean(1))
        for silent in (self.to_moments, self.decoder.conv_out):
            nn.init.zeros_(silent.weight)
            nn.init.zeros_(silent.bias)
        self.to_moments.bias[count:] = LITTLE                            # of the logarithm of the variance

    def encode(self, x: Tensor) -> Posterior:
        """x (B, 3, H, W) in [-1, 1] -> q(z | x) with mean and logvar (B, C, h, w)"""
        x = x.to(self.to_moments.weight.dtype)
        mean, logvar = self.to_moments(self.encoder(x)).chunk(2, dim=1)
        if self.linear_in is not None:
            mean = mean + self.linear_in(x)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w), not scaled -> (B, 3, H, W), about [-1, 1], not clamped"""
        z = z.to(self.from_latent.weight.dtype)
        x = self.decoder(self.from_latent(z))
        return x if self.linear_out is None else x + self.linear_out(z)

    def to_latent(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the networks see: scaling * (mean + std * noise).   (B, 3, H, W) -> (B, C, h, w)

        official: always samples the posterior, at inference too. Without noise it is the mean.
        """
        return self.scaling * self.encode(x).sample(noise)

    def to_picture(self, z: Tensor) -> Tensor:
        """The inverse: z (B, C, h, w), scaled -> (B, 3, H, W) in [0, 1]"""
        return (self.decode(z / self.scaling) / 2 + 0.5).clamp(0, 1)

    def loss(self, x: Tensor, noise: Tensor, weight: Tensor, disturbed: Tensor) -> Tensor:
        """How much is lost on the way, with the price of the latent's information.   -> ()

        |x' - x| + (x' - x)^2 + 1/2 |gradient of x' - gradient of x|, each pixel times `weight` (B, 1, H, W), plus
        KL_WEIGHT times the divergence of q(z | x) from N(0, 1) a latent number (arXiv:1312.6114, appendix B).

        disturbed (B,): standard deviation of what is added to a latent besides. A decoder that has seen none
        but clean latents makes speckles of the small errors of a diffusion model (arXiv:2510.11690).
        """
        posterior = self.encode(x)
        latent = posterior.sample(noise) + disturbed[:, None, None, None] * noise
        wrong = (self.decode(latent) - x).float()
        error = (weight * (wrong.abs() + wrong.square())).mean()
        for axis in (2, 3):
            error = error + 0.5 * (weight.narrow(axis, 1, weight.shape[axis] - 1) * wrong.diff(dim=axis).abs()).mean()
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        return error + KL_WEIGHT * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
