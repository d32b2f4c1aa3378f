"""GroupNorm, then SiLU: what stands before every convolution of a diffusion UNet.

    xhat = (x + shift - mean_g) rstd_g      rstd_g = 1 / sqrt(var_g + eps); mean and biased variance of one group
    z    = weight * xhat + bias
    y    = silu(z) = z sigmoid(z)

GroupNorm: arXiv:1803.08494. Statistics are kept in float32 whatever the input is. A clip's frames
may share them: with `frames` = F the mean runs over the M = (C/groups) F H W values of a group in F
adjacent pictures.

The vector-Jacobian product, with g the gradient of z and sums over pixels (and pictures, for the first two):

    g       = dy sigmoid(z) (1 + z (1 - sigmoid(z)))          dy without the SiLU
    dbias   = sum g           dweight = sum g xhat
    c1      = sum of weight g over the group, / M             c2 = sum of weight g xhat over the group, / M
    dx      = rstd_g (weight g - c1 - c2 xhat)                dshift = sum dx

Bytes: forward one reading of x and one writing of y, backward one reading of x and of dy and one writing of
dx; the statistics take a reading of their own before, of which the second finds in cache what fits there.
"""
from torch import Tensor
from torch.nn.functional import group_norm, silu as silu_function

from kernels.backend import use_triton

BLOCKS = 65535                         # CUDA launches along two of three axes at most
PIXELS = 64 * BLOCKS                   # at least 64 to a block where there are many


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                    frames: int = 1, silu: bool = True, shift: Tensor | None = None) -> Tensor:
    """x (B*F, C, H, W), weight and bias (C,) -> (B*F, C, H, W), in memory channels last if x is

    shift (R, C) is added to x first, each row to B*F/R adjacent pictures.
    """
    if use_triton(x, _unfit(x)):
        from kernels.group_norm_silu_triton import group_norm_silu_triton
        return group_norm_silu_triton(x, weight, bias, groups, eps, frames, silu, shift)
    return group_norm_silu_reference(x, weight, bias, groups, eps, frames, silu, shift)


def _unfit(x: Tensor) -> str:
    """Why no kernel can be launched for x; "" if one can. Places in a picture are counted in 32 bits."""
    (N, C), pixels = x.shape[:2], x.shape[2] * x.shape[3]
    if N <= BLOCKS and pixels <= PIXELS and C * pixels < 2**31:
        return ""
    return (f"GroupNorm's kernel takes {BLOCKS:,} pictures of {PIXELS:,} pixels and 2^31 values each at most, "
            f"not {N:,} of {C:,} x {pixels:,}")


def group_norm_silu_reference(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                              frames: int = 1, silu: bool = True, shift: Tensor | None = None) -> Tensor:
    """The same in plain PyTorch."""
    if shift is not None:
        x = x + shift.repeat_interleave(len(x) // len(shift), dim=0)[:, :, None, None]
    if frames > 1:
        clips = x.unflatten(0, (-1, frames)).transpose(1, 2)             # (B, C, F, H, W)
        y = group_norm(clips, groups, weight, bias, eps).transpose(1, 2).reshape(x.shape)
    else:
        y = group_norm(x, groups, weight, bias, eps)
    return silu_function(y) if silu else y
