"""Winograd's 3 x 3 convolution: four outputs by 16 multiplications instead of 36 (arXiv:1509.09308, section 4.1).

    Y = A^T ((G g G^T) * (B^T d B)) A         * is number by number

           1  0 -1  0            1    0    0            1  1  1  0         d (4, 4) input, two further for each tile
    B^T =  0  1  1  0     G =  1/2  1/2  1/2     A^T =  0  1 -1 -1         g (3, 3) weight
           0 -1  1  0          1/2 -1/2  1/2                               Y (2, 2) output
           0  1  0 -1            0    0    1

Of all channels, each of the 16 numbers of a tile is a matrix product: (tiles, C) times (C, O). What comes
before and after is additions, whose rounding is no worse than that of the longer sums they replace. In
float32: a bfloat16 between the three parts would triple the error. For inference: it writes into views,
which neither autograd nor torch.compile can follow.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

STRIP = 2**23                          # numbers of transformed input at a time: 32 MB


def transform_weight(weight: Tensor) -> Tensor:
    """G g G^T of each pair of channels.   (O, C, 3, 3) -> (16, O, C)"""
    for _ in range(2):                                                   # the last axis, 3, becomes the first one, 4
        first, middle, last = weight.unbind(-1)
        ends, middle = (first + last) / 2, middle / 2
        weight = torch.stack([first, ends + middle, ends - middle, last])
    return weight.flatten(0, 1)


def winograd_conv3x3(x: Tensor, weights: list[Tensor] | Tensor, bias: Tensor | None,
                     product: Callable[[Tensor, Tensor], Tensor] = linear) -> Tensor:
    """conv2d(x, weight, bias, padding=1).   (B, C, H, W), 16 of (O, C) -> (B, O, H, W)

    Channels last; with odd sides a view of a picture with even ones. product(x, weights[i]) is x weights[i]^T,
    whatever form the 16 matrices of `transform_weight` have by now.
    """
    height, width = x.shape[2:]
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))        # whole tiles
    tiles_across = padded.shape[2] // 2 - 1
    rows = max(1, STRIP // (16 * max(1, len(x)) * tiles_across * x.shape[1]))            # of tiles
    strips = [_strip(padded[:, i:i + 2 * rows + 2], weights, product) for i in range(0, height, 2 * rows)]
    y = strips[0] if len(strips) == 1 else torch.cat(strips, dim=1)
    if bias is not None:
        y += bias
    return y[:, :height, :width].permute(0, 3, 1, 2)


def _strip(x: Tensor, weights: list[Tensor] | Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(B, 2 h + 2, 2 w + 2, C) -> (B, 2 h, 2 w, O)"""
    batch, h, w, channels = len(x), x.shape[1] // 2 - 1, x.shape[2] // 2 - 1, x.shape[3]
    down = x.new_empty(4, batch, h, 2 * w + 2, channels)                 # B^T d
    _times_b([x[:, i:i + 2 * h:2] for i in range(4)], down)
    both = x.new_empty(4, 4, batch, h, w, channels)                      # B^T d B
    _times_b([down[:, :, :, j:j + 2 * w:2] for j in range(4)], both.transpose(0, 1))
    m = [product(d, u) for d, u in zip(both.flatten(0, 1), weights)]     # 16 of (B, h, w, O)
    across = m[0].new_empty(2, 4, *m[0].shape)                           # M A
    for i in range(4):
        _times_a(m[4 * i:4 * i + 4], across[:, i])
    y = m[0].new_empty(batch, h, 2, w, 2, m[0].shape[-1])                # A^T M A
    for j in range(2):
        _times_a(across[j], y[:, :, :, :, j].permute(2, 0, 1, 3, 4))
    return y.flatten(3, 4).flatten(1, 2)


def _times_b(d: list[Tensor], out: Tensor) -> None:
    torch.sub(d[0], d[2], out=out[0])
    torch.add(d[1], d[2], out=out[1])
    torch.sub(d[2], d[1], out=out[2])
    torch.sub(d[1], d[3], out=out[3])


def _times_a(m: list[Tensor] | Tensor, out: Tensor) -> None:
    torch.add(m[0], m[1], out=out[0]).add_(m[2])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])
