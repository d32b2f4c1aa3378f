"""UNet: the network that looks at a noisy latent and says what is noise in it.

Down through levels of falling size, a middle, and up again, where each level also sees the skip
that its twin on the way down left behind. Stable Diffusion's (arXiv:2112.10752); with `temporal` it
is DisCo's video model. Official names: `UNet2DConditionModel`, and `UNet3DConditionModel` of
DisCo; parts `down_blocks`, `mid_block`, `up_blocks`.

    z (B*F, C, h, w) ─ conv_in ─ down ─ … ─ down ─ mid ─ up ─ … ─ up ─ conv_out ─ (B*F, C, h, w)
                          └───────┴── skips ──┴──────────┘
"""
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from nanodisco.config import UNetConfig
from nanodisco.layers import Columns, Down, GroupNormSiLU, ResBlock, TimeEmbedding, Up
from nanodisco.memo import Memo
from nanodisco.transformer import Context, SpatialTransformer, in_rows

EPS = 1e-5                             # of the norms in ResBlocks and before conv_out


class Level(nn.Module):
    """ResBlocks of one size, each followed by a transformer if `attention`; then Down or Up or neither."""

    def __init__(self, inputs: list[int], width: int, attention: bool, config: UNetConfig,
                 down: Down | None = None, up: Up | None = None):
        super().__init__()
        c = config
        self.res = nn.ModuleList(ResBlock(c_in, width, c.groups, EPS, 4 * c.widths[0], c.temporal)
                                 for c_in in inputs)
        self.attn = nn.ModuleList(SpatialTransformer(width, c.heads, c.context, c.groups, c.temporal)
                                  for _ in inputs) if attention else None
        self.down, self.up = down, up

    def step(self, i: int, h: Tensor, emb: Memo, tokens: Context, frames: int) -> Tensor:
        """The i-th ResBlock and its transformer.   (B*F, inputs[i], h, w) -> (B*F or tokens.rows, width, h, w)"""
        h = self.res[i](h, emb, frames)
        return h if self.attn is None else self.attn[i](h, tokens, frames)


class Middle(nn.Module):
    """ResBlock, transformer, ResBlock at the smallest size."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        c, width = config, config.widths[-1]
        self.res = nn.ModuleList(ResBlock(width, width, c.groups, EPS, 4 * c.widths[0], c.temporal)
                                 for _ in range(2))
        self.attn = nn.ModuleList([SpatialTransformer(width, c.heads, c.context, c.groups, c.temporal)])

    def forward(self, h: Tensor, emb: Memo, tokens: Context, frames: int) -> Tensor:
        h = self.attn[0](self.res[0](h, emb, frames), tokens, frames)
        return self.res[1](h, emb, frames)


class Encoder(nn.Module):
    """The UNet's way down and its middle; also what a ControlNet is a copy of.

    `widths_of_skips` are the channels of the skips, in order: conv_in's output, then those of each
    level's ResBlocks and of its Down.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.time = TimeEmbedding(widths[0], 4 * widths[0])
        self.joined: nn.Linear | None = None                             # see join_time_layers
        self.down = nn.ModuleList()
        self.widths_of_skips = [widths[0]]
        for i, width in enumerate(widths):
            inputs = [widths[max(i - 1, 0)]] + [width] * (config.layers - 1)
            down = Down(width) if i < len(widths) - 1 else None
            self.down.append(Level(inputs, width, config.attention[i], config, down=down))
            self.widths_of_skips += [width] * (config.layers + (down is not None))
        self.mid = Middle(config)

    def embed(self, t: Tensor) -> Tensor:
        """What every ResBlock is told about the step.   (B,) -> (B, E)"""
        emb = silu(self.time(t))
        return emb if self.joined is None else self.joined(emb)

    @torch.no_grad()
    def join_time_layers(self, blocks: list[ResBlock]) -> None:
        """Make all that these ResBlocks make of the embedding in one product. For inference: not to be saved."""
        if self.joined is not None:
            return
        layers, stops = [block.time for block in blocks], [*accumulate(block.time.out_features for block in blocks)]
        self.joined = nn.Linear(layers[0].in_features, stops[-1], device="meta")
        self.joined.weight, self.joined.bias = (
            nn.Parameter(torch.cat([getattr(layer, name) for layer in layers]), requires_grad=False)
            for name in ("weight", "bias"))
        for block, layer, stop in zip(blocks, layers, stops):
            block.time = Columns(stop - layer.out_features, stop)

    def forward(self, z: Tensor, t: Tensor | Memo, tokens: Tensor | Context, frames: int = 1,
                hint: Tensor | None = None) -> tuple[list[Tensor], Tensor, Memo]:
        """z (B*F, C, h, w), t (B,) or (1,) for all, tokens (B, M, context), hint (B*F, widths[0], h, w) added
        after conv_in -> skips, middle (B*F or tokens.rows, widths[-1], h', w'), what `embed` makes of t
        """
        emb, tokens = Memo.of(t).then(self.embed), Context.of(tokens)
        h = self.conv_in(z)
        if hint is not None:
            h = h + hint
        skips = [h]
        for level in self.down:
            for i in range(len(level.res)):
                h = level.step(i, h, emb, tokens, frames)
                skips.append(h)
            if level.down is not None:
                h = level.down(h)
                skips.append(h)
        return skips, self.mid(h, emb, tokens, frames), emb


class UNet(nn.Module):
    """eps or v of a noisy latent, given the step and the tokens. Any size; odd sizes too."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        widths, layers = config.widths, config.layers
        self.encoder = Encoder(config)
        self.up = nn.ModuleList()
        skips, below = list(self.encoder.widths_of_skips), widths[-1]
        for i, width in reversed(list(enumerate(widths))):               # coarsest first, as in the official names
            inputs = []
            for _ in range(layers + 1):
                inputs.append(below + skips.pop())
                below = width
            self.up.append(Level(inputs, width, config.attention[i], config, up=Up(width) if i > 0 else None))
        self.norm_out = GroupNormSiLU(config.groups, widths[0], EPS)
        self.conv_out = nn.Conv2d(widths[0], config.channels, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor | Memo, tokens: Tensor | Context, residuals: list[Tensor] | None = None,
                frames: int = 1, encoded: tuple[list[Tensor], Tensor, Memo] | None = None) -> Tensor:
        """z (B*F, C, h, w), t (B,) or (1,), tokens (B, M, context) -> (B*F, C, h, w)

        `residuals` of ControlNets, one for each skip and one for the middle, are added after the way
        down has run: the encoder itself never sees them. `encoded`: what it made of these, if it has run.
        """
        tokens = Context.of(tokens)
        skips, h, emb = encoded or self.encoder(z, t, tokens, frames)
        if residuals is not None:
            *to_skips, to_middle = residuals
            assert len(to_skips) == len(skips), f"{len(to_skips)} residuals for {len(skips)} skips"
            skips = [skip + residual for skip, residual in zip(skips, to_skips)]
            h = h + to_middle
        for level in self.up:
            for i in range(len(level.res)):
                h = level.step(i, torch.cat([h, in_rows(skips.pop(), len(h))], dim=1), emb, tokens, frames)
            if level.up is not None:
                h = level.up(h, skips[-1].shape[2:])
        return self.conv_out(self.norm_out(h, frames))
