"""A residual and the LayerNorm behind it: what stands before every attention and feed-forward of a transformer.

    sum    = x + more                               in its own type: the norm sees what the next residual sees
    xhat   = (sum - mean) rstd                      rstd = 1 / sqrt(var + eps); mean and biased variance of a row
    normed = weight xhat + bias

LayerNorm: arXiv:1607.06450. Statistics are kept in float32 whatever the input is. The vector-Jacobian product, with
means over a row of D numbers:

    g      = dnormed weight
    dx     = dmore = dsum + rstd (g - mean(g) - xhat mean(g xhat))
    dweight, dbias = sums of dnormed xhat and dnormed over all rows

Bytes: forward one reading of x and more and one writing of sum and normed; backward one reading of sum, dsum and
dnormed and one writing of dx. Apart, the operations would read the sum once more, forward and backward.

Where all pictures but the last are to get the same row, `more` is of the last ones alone and `fill` is that row.
"""
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kernels.backend import use_triton

WIDEST = 8192                          # a row is held in registers


def add_layer_norm(x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5,
                   fill: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x and more (..., D), weight and bias (D,) -> sum, normed, both (..., D). Without `more` the sum is x itself.

    With `fill` (D,), x is (B, ..., D) and `more`, of B pictures at most, belongs to the last of them: each row of the
    others gets `fill`.
    """
    if use_triton(x, _unfit(x)):
        from kernels.add_layer_norm_triton import add_layer_norm_triton
        if fill is not None and _want_gradients(x, more, weight, bias, fill):
            more, fill = filled(more, fill, len(x)), None                # the kernel's gradients are of the plain form
        return add_layer_norm_triton(x, more, weight, bias, eps, fill)
    return add_layer_norm_reference(x, more, weight, bias, eps, fill)


def _unfit(x: Tensor) -> str:
    """Why no kernel can be launched for x; "" if one can."""
    D = x.shape[-1]
    return "" if D <= WIDEST else f"LayerNorm's kernel takes rows of {WIDEST:,} numbers at most, not of {D:,}"


def _want_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def filled(more: Tensor, fill: Tensor, pictures: int) -> Tensor:
    """So many pictures, of which `more` is the last; each row of the others is `fill`, in its type."""
    return torch.cat([fill.to(more.dtype).expand(pictures - len(more), *more.shape[1:]), more])


def add_layer_norm_reference(x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5,
                             fill: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch."""
    more = more if fill is None else filled(more, fill, len(x))
    x = x if more is None else x + more
    return x, layer_norm(x, weight.shape, weight, bias, eps)
