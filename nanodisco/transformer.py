"""Transformer: where pixels of a level look at each other and at the tokens of the reference photo.

    SpatialTransformer   h + out(block(in(norm(h))))           pixels as a sequence of L = H*W tokens
    block                self-attention, [attention along frames,] cross-attention to the tokens,
                         feed-forward; each behind a LayerNorm and around a residual

From Stable Diffusion (arXiv:2112.10752, section 3.3). Shapes: L pixels, M tokens (257 of CLIP), D
width, N heads, K = D/N. Official names: `Transformer2DModel`, `BasicTransformerBlock`, `attn1`
(self), `attn2` (cross), `tem_attn`; `to_q`, `to_k`, `to_v` are packed here into one matrix.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import GEGLU, add_layer_norm, cross_attention, group_norm_silu, self_attention
from nanodisco.memo import Memo
from nanodisco.temporal import TemporalAttention


@dataclass
class Context:
    """What cross-attention looks at.

    Under classifier-free guidance both halves are the same pictures until the first cross-attention:
    so the networks may be given one half, and it becomes `rows` there, the unconditional half first.
    Without a bias in K and V, tokens of zeros add nothing but the output's bias: rows that have only
    those are `blind` and skip the work.
    """
    tokens: Memo                       # (R, M, context): R references, each of the same number of adjacent rows
    rows: int = 0                      # pictures from the first cross-attention on; 0: as many as there are
    blind: int = 0                     # the first so many of them see no tokens

    @classmethod
    def of(cls, tokens: "Tensor | Context") -> "Context":
        """Plain tokens as a Context that keeps nothing; a Context as it is."""
        return tokens if isinstance(tokens, Context) else cls(Memo(tokens))


def in_rows(x: Tensor, rows: int) -> Tensor:
    """x, repeated for both halves if `rows` counts both and x was made before they parted."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))           # repeat would give up channels last


class GroupNorm(nn.GroupNorm):
    """Without SiLU, and of each picture by itself. On a GPU torch's own would give up channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, silu=False)


class LayerNorm(nn.LayerNorm):
    """Of h and what is added to it: the sum, which goes on, and the same normed.   2 x (B, L, D) -> 2 x (B, L, D)

    If `more` is of the last pictures alone, `fill` (D,) is added to the others.
    """

    def forward(self, h: Tensor, more: Tensor | None = None, fill: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_layer_norm(h, more, self.weight, self.bias, self.eps, fill)


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(K)) V with Q, K, V of the same sequence.   (B, L, D) -> (B, L, D)"""

    def __init__(self, width: int, heads: int, bias: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))             # (B, L, 3, N, K)
        return self.out(self_attention(qkv).flatten(2))


class CrossAttention(nn.Module):
    """Queries of the pixels, keys and values of the tokens.   (B*F, L, D), (B, M, context) -> (B*F, L, D)

    The F frames of a clip share one set of tokens: they are seen as one picture of F*L pixels.
    """

    def __init__(self, width: int, heads: int, context: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor | Memo) -> Tensor:
        kv = Memo.of(tokens).through(self.kv).unflatten(-1, (2, self.heads, -1))        # (B, M, 2, N, K)
        q = self.q(x).view(len(kv), -1, self.heads, kv.shape[-1])        # (B, F*L, N, K)
        return self.out(cross_attention(q, kv).view(x.shape))


class FeedForward(nn.Module):
    """linear(geglu(linear(x))), four times as wide inside.   (B, L, D) -> (B, L, D)"""

    def __init__(self, width: int):
        super().__init__()
        self.up = GEGLU(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class TransformerBlock(nn.Module):
    """Self-attention, [temporal attention,] cross-attention, feed-forward, each with its residual."""

    def __init__(self, width: int, heads: int, context: int, temporal: bool):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.self_attn = SelfAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.cross_attn = CrossAttention(width, heads, context)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)
        self.temporal = TemporalAttention(width, heads) if temporal else None
        # official: has a norm for the temporal attention and never uses it (norm2 serves twice). It
        # is kept, untrained, so that the official checkpoints come back out as they went in.
        self.unused_norm = nn.LayerNorm(width).requires_grad_(False) if temporal else None

    def forward(self, h: Tensor, context: Context, frames: int) -> Tensor:
        # (B*F, L, D) -> (B*F or context.rows, L, D)
        h, x = self.norm1(h)                                             # each adds what came before it, and norms
        h, x = self.norm2(h, self.self_attn(x))
        if self.temporal is not None:
            h, x = self.norm2(h, self.temporal(x, frames))
        seen, fill = self._look_at_tokens(x, context)
        h, x = self.norm3(in_rows(h, context.rows or len(h)), seen, fill)
        return h + self.ff(x)

    def _look_at_tokens(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        # (B*F, L, D) -> of those that see tokens (B*F or context.rows, less context.blind, L, D); of the others (D,)
        seeing = (context.rows or len(x)) - context.blind                # the first `blind` rows see no tokens
        if len(x) < seeing:                                              # one half so far: here they part
            x = x.repeat(context.rows // len(x), 1, 1)
        seen = self.cross_attn(x[-seeing:], context.tokens)              # of all rows, or of the half that there is
        return seen, self.cross_attn.out.bias if context.blind else None


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of each picture.   (B*F, C, H, W) -> (B*F or context.rows, C, H, W)

    official: its norm is per frame and has its own eps, 1e-6, where the ResBlocks have 1e-5.
    """

    def __init__(self, channels: int, heads: int, context: int, groups: int, temporal: bool = False):
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, heads, context, temporal)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Context, frames: int = 1) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)                      # (B*F, L, C)
        h = self.proj_out(self.block(self.proj_in(h), context, frames))
        return in_rows(x, len(h)) + h.transpose(1, 2).unflatten(2, x.shape[2:])
