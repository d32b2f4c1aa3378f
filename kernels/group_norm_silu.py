"""GroupNorm, then SiLU: what stands before every convolution of a diffusion UNet.

    xhat = (x - mean_g) / sqrt(var_g + eps)      mean and biased variance over one group of channels
    y    = silu(weight * xhat + bias)            silu(x) = x / (1 + exp(-x))

GroupNorm: arXiv:1803.08494. Statistics are kept in float32 whatever the input is. A clip's frames
may share them: with `frames` = F the mean runs over (C/groups, F, H, W) of the F adjacent pictures.
"""
from torch import Tensor
from torch.nn.functional import group_norm, silu as silu_function


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float,
                    frames: int = 1, silu: bool = True, shift: Tensor | None = None) -> Tensor:
    """x (B*F, C, H, W), weight and bias (C,) -> (B*F, C, H, W)

    shift (R, C) is added to x first, each row to B*F/R adjacent pictures.
    """
    if shift is not None:
        x = x + shift.repeat_interleave(len(x) // len(shift), dim=0)[:, :, None, None]
    if frames > 1:
        clips = x.unflatten(0, (-1, frames)).transpose(1, 2)             # (B, C, F, H, W)
        y = group_norm(clips, groups, weight, bias, eps).transpose(1, 2).reshape(x.shape)
    else:
        y = group_norm(x, groups, weight, bias, eps)
    return silu_function(y) if silu else y
