"""ControlNet: a hint, shown to a frozen or trained UNet by a copy of its encoder (arXiv:2302.05543).

    residuals = zero_convs(encoder(z, t, tokens; conv_in(z) + hint_layers(hint)))

One residual for each of the UNet's skips and one for its middle. The last convolutions start as
zero, so a fresh ControlNet changes nothing. DisCo (arXiv:2307.00040, section 3) has two: the pose
net, whose hint is the pose picture, and the background net, whose hint is the background's latent.
Official names: `ControlNetModel`; `controlnet_cond_embedding`, `controlnet_down_blocks`,
`controlnet_mid_block`.
"""
from torch import Tensor, nn
from torch.nn.functional import silu

from nanodisco.config import ControlNetConfig, UNetConfig
from nanodisco.layers import ZeroConv2d
from nanodisco.memo import Memo
from nanodisco.transformer import Context
from nanodisco.unet import Encoder


class PixelHint(nn.Module):
    """Pictures down to the latent's size: convolutions, halving between widths, and a zero convolution.

    (B, 3, H, W) -> (B, C, h, w). For SD: 3 -> 16, 16 -> 32, 32 -> 96, 96 -> 256, -> 320 at an eighth.
    """

    def __init__(self, channels: int, widths: tuple[int, ...], out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for c_in, c_out in zip(widths, widths[1:]):
            self.blocks.append(nn.Conv2d(c_in, c_in, 3, padding=1))
            self.blocks.append(nn.Conv2d(c_in, c_out, 3, padding=1, stride=2))
        self.conv_out = ZeroConv2d(widths[-1], out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = silu(self.conv_in(x))
        for conv in self.blocks:
            h = silu(conv(h))
        return self.conv_out(h)


class LatentHint(nn.Module):
    """A latent needs one convolution.   (B, 4, h, w) -> (B, C, h, w)

    official: it starts as a copy of the UNet's conv_in, not as zero (see DisCo.start_controlnets).
    """

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv_in = nn.Conv2d(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_in(x)


class ControlNet(nn.Module):
    """Hint -> residuals for the UNet's skips and middle."""

    def __init__(self, config: ControlNetConfig, unet: UNetConfig):
        super().__init__()
        if config.hint == "pixels":
            self.hint = PixelHint(config.channels, config.widths, unet.widths[0])
        else:
            self.hint = LatentHint(config.channels + config.hole, unet.widths[0])
        self.encoder = Encoder(unet)
        self.zero_skips = nn.ModuleList(ZeroConv2d(c, c, 1) for c in self.encoder.widths_of_skips)
        self.zero_mid = ZeroConv2d(unet.widths[-1], unet.widths[-1], 1)

    def forward(self, z: Tensor, t: Tensor | Memo, tokens: Tensor | Context, hint: Tensor | Memo, frames: int = 1,
                scale: float = 1.0) -> list[Tensor]:
        """z (B*F, C, h, w), t (B,) or (1,), tokens (B, M, context), hint (B*F, B or 1, channels, H, W)
        -> one residual (B*F, …) for each skip, then one for the middle, all times `scale`

        Fewer hints than pictures: each is shown to the same number of adjacent ones.
        """
        h = Memo.of(hint).through(self.hint)                                # (B*F, B or 1, widths[0], h, w)
        if 1 < len(h) < len(z):
            h = h.repeat_interleave(len(z) // len(h), dim=0)
        skips, mid, _ = self.encoder(z, t, tokens, frames, hint=h)
        residuals = [zero(skip) for zero, skip in zip(self.zero_skips, skips)] + [self.zero_mid(mid)]
        return residuals if scale == 1.0 else [scale * residual for residual in residuals]
