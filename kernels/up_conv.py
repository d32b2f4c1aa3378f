"""Twice the size by nearest neighbour, then a 3 x 3 convolution: four of 2 x 2 pixels on the small picture.

Of the nine pixels that an output looks at, at most four differ. So the weights of equal ones are added beforehand.
Along one axis, with weights w0, w1, w2, outputs 2i and 2i + 1 look at

    2i:      x[i - 1] w0 + x[i] (w1 + w2)
    2i + 1:  x[i] (w0 + w1) + x[i + 1] w2

and along both axes four numbers are multiplied instead of nine.
"""
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, linear, pad


class UpConv2d(nn.Conv2d):
    """Any size by nearest neighbour, then a convolution.   (B, C_in, H, W) -> (B, C_out, *size)"""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return super().forward(interpolate(x, size=tuple(size), mode="nearest"))


def part_weights(weight: Tensor) -> list[Tensor]:
    """What each of the four kinds of outputs multiplies its 2 x 2 pixels by.   (O, C, 3, 3) -> 4 of (O, 4 C)"""
    def even_and_odd(w: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        first, middle, last = w.unbind(axis)
        return torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)

    precise = weight.permute(0, 2, 3, 1).to(torch.promote_types(weight.dtype, torch.float32))
    return [part.flatten(1).to(weight.dtype) for rows in even_and_odd(precise, 1) for part in even_and_odd(rows, 2)]


def up_conv(x: Tensor, weights: Sequence[Tensor], bias: Tensor | None,
            product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear) -> Tensor:
    """conv2d of twice the size, padding 1.   (B, C, H, W), 4 of (O, 4 C) -> (B, O, 2 H, 2 W), channels last

    product(x, weights[i], bias) is x weights[i]^T + bias, whatever form the matrices have by now.
    """
    batch, _, height, width = x.shape
    padded = pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    parts = [product(windows(padded[:, a:a + height + 1, b:b + width + 1], 2), weights[2 * a + b], bias)
             for a in (0, 1) for b in (0, 1)]                            # 4 of (B, H, W, O)
    y = parts[0].new_empty(batch, height, 2, width, 2, parts[0].shape[-1])
    for i, part in enumerate(parts):
        y[:, :, i // 2, :, i % 2] = part
    return y.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


def windows(x: Tensor, size: int) -> Tensor:
    """Each pixel with those to its right and below.   (B, H + size - 1, W + size - 1, C) -> (B, H, W, size^2 C)"""
    return x.unfold(1, size, 1).unfold(2, size, 1).permute(0, 1, 2, 4, 5, 3).flatten(3)
