"""Temporal layers: convolution and attention along the frames of a clip, and folding the frames.

Video reuses every 2-D layer: the frames of a clip are folded into the batch, (B, C, F, H, W) to
(B*F, C, H, W) with the frames of a clip adjacent, and layers that need the frame axis are told F.
Two kinds of layer look along it: a convolution of three frames after each ResBlock's last
convolution, and attention over all frames in each transformer block. Both start as zero, so they
add nothing until they are trained. There is no positional encoding of frames. From the variant of
DisCo (arXiv:2307.00040) with temporal modelling. Official names: `tem_conv`, `tem_attn`.
"""
from torch import Tensor, nn
from torch.nn.functional import conv2d

from kernels import group_norm_silu, temporal_attention


def fold(x: Tensor) -> tuple[Tensor, int]:
    """(B, C, F, H, W) -> (B*F, C, H, W), F. A picture (B, C, H, W) is returned as it is, with F = 1."""
    if x.ndim == 4:
        return x, 1
    return x.transpose(1, 2).flatten(0, 1), x.shape[2]


def unfold(x: Tensor, frames: int) -> Tensor:
    """(B*F, C, H, W) -> (B, C, F, H, W): the inverse of `fold` on a clip."""
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


class Zero:
    """Of a layer that adds nothing until it is trained."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class ZeroConv1d(Zero, nn.Conv1d):
    pass


class ZeroLinear(Zero, nn.Linear):
    pass


class TemporalConv(nn.Module):
    """y = conv(silu(norm(x))): each pixel and its neighbours one frame before and after.

    The norm's statistics are pooled over the clip. Official: `tem_norm`, `tem_conv` of a ResBlock.
    """

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.conv = ZeroConv1d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, frames: int) -> Tensor:                 # (B*F, C, H, W) -> the same
        norm = self.norm
        h = group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps, frames)
        h = h.unflatten(0, (-1, frames)).transpose(1, 2).flatten(3)      # (B, C, F, H*W)
        h = conv2d(h, self.conv.weight[..., None], self.conv.bias, padding=(1, 0))
        return h.transpose(1, 2).reshape(x.shape)


class TemporalAttention(nn.Module):
    """Self-attention of each place over the frames of its clip. Official: `tem_attn` of a block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = ZeroLinear(width, width)

    def forward(self, x: Tensor, frames: int) -> Tensor:                 # (B*F, L, D) -> the same
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))             # (B*F, L, 3, N, K)
        return self.out(temporal_attention(qkv, frames).flatten(2))
