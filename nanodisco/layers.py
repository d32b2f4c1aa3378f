"""Layers that UNet, ControlNet and VAE are made of: time embedding, ResBlock, Down, Up.

    ResBlock   y = conv2(silu(norm2(conv1(silu(norm1(x))) + time))) [+ temporal] + skip(x)

From DDPM's UNet (arXiv:2006.11239, appendix B) as Stable Diffusion has it (arXiv:2112.10752).
Shapes: B pictures (of a clip: B*F, see temporal.py), C channels, H W pixels, E width of the time
embedding. Official names: `ResnetBlock2D`, `Downsample2D`, `Upsample2D`, `TimestepEmbedding`.
"""
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from kernels import Conv2d, UpConv2d, group_norm_silu
from nanodisco.memo import Memo
from nanodisco.temporal import TemporalConv, Zero


def time_features(t: Tensor, width: int) -> Tensor:
    """cos and sin of t at width/2 frequencies, 1 down to nearly 1/10000.   (B,) -> (B, width) float32

    f_i = 10000^(-i / (width/2)); first all cos, then all sin. Attention Is All You Need, section 3.5.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies                            # (B, width/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    """The step number as a vector: linear(silu(linear(time_features(t))))."""

    def __init__(self, features: int, width: int):
        super().__init__()
        self.features = features
        self.linear1 = nn.Linear(features, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:                              # (B,) -> (B, E)
        x = time_features(t, self.features).to(self.linear1.bias.dtype)
        return self.linear2(silu(self.linear1(x)))


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm and SiLU as one operation, with the statistics of a clip pooled over its frames."""

    def forward(self, x: Tensor, frames: int = 1, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, frames, shift=shift)


class ResBlock(nn.Module):
    """Two convolutions, each behind a norm and a SiLU, around which the input is carried along.

    With a time embedding (UNet, ControlNet) it is added between them; the VAE has none. With
    `temporal` a convolution along the frames follows. official: norm statistics of a clip run over
    all of its frames, so a video model with untrained temporal layers is not the picture model.
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float,
                 time_width: int | None = None, temporal: bool = False):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_width, c_out) if time_width else None
        self.norm2 = GroupNormSiLU(groups, c_out, eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.temporal = TemporalConv(c_out, groups, eps) if temporal else None
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Memo | None = None, frames: int = 1) -> Tensor:
        # (B*F, C_in, H, W), silu of the time embedding (B or 1, E) -> (B*F, C_out, H, W)
        h = self.conv1(self.norm1(x, frames))
        shift = emb.through(self.time) if emb is not None else None      # (B or 1, C_out)
        h = self.norm2(h, frames, shift)
        if self.temporal is None:
            return self.conv2(h, self.skip(x))
        h = self.conv2(h)
        return self.skip(x) + (h + self.temporal(h, frames))

    @torch.no_grad()
    def fold_biases(self) -> None:
        """Move biases of the convolutions into others that are added anyway. For inference: not to be saved."""
        if self.time is not None and self.conv1.bias is not None:        # both are added to what norm2 sees
            self.time.bias += self.conv1.bias
            self.conv1.bias = None
        if isinstance(self.skip, nn.Conv2d) and self.temporal is None and self.conv2.bias is not None:
            self.skip.bias += self.conv2.bias
            self.conv2.bias = None


class Columns(nn.Module):
    """What is this layer's of a product that many have joined, see Encoder.join_time_layers.   (B, all) -> (B, C)"""

    def __init__(self, start: int, stop: int):
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start:self.stop]


class Down(nn.Module):
    """Half the size by a convolution of stride 2.   (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))

    The UNet pads one pixel on each side; the VAE (`one_sided`) only right and bottom: floor(H/2).
    """

    def __init__(self, channels: int, one_sided: bool = False):
        super().__init__()
        self.padding = (0, 1, 0, 1) if one_sided else (1, 1, 1, 1)       # left, right, top, bottom
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, self.padding))


class Up(nn.Module):
    """Nearest neighbour, then a convolution.   (B, C, H, W) -> (B, C, *size), default twice the size

    A UNet asks for the size of the skip that comes next: so odd sizes work.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = UpConv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        return self.conv(x, size or (2 * x.shape[2], 2 * x.shape[3]))


class ZeroConv2d(Zero, nn.Conv2d):
    """ControlNet's way of joining a trained network unnoticed."""
