"""The same networks by diffusers and transformers, with the same random weights: oracles that need no file.

    ours = copy_weights(randomised(diffusers.UNet2DConditionModel(...)), UNet(config), "unet.")

Both sides run in float64, where only a different formula can tell them apart: an eps of 1e-6 for 1e-5 shows.
"""
import torch
from formula import parts
from torch import Tensor, nn

from nanodisco import names
from nanodisco.config import UNetConfig

SAME = {"rtol": 1e-10, "atol": 1e-10}  # two orders of summation in float64 differ by 1e-13

OFFICIAL = {"unet.": "unet.", "pose.": "controlnet.nets.0.", "vae.": "vae.", "clip.vision.": "clip_image_encoder."}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Nothing at zero or one, where a swap or a forgotten term would not show. float64, eval."""
    net = net.double().eval()
    for i, (name, p) in enumerate(net.named_parameters()):
        noise = normal(*p.shape, seed=1000 * seed + i)
        if p.ndim > 1:
            p.copy_(noise / p[0].numel() ** 0.5)
        else:
            p.copy_(0.1 * noise + name.endswith("weight"))               # a weight with one axis scales a norm
    return net


@torch.no_grad()
def copy_weights(theirs: nn.Module, ours: nn.Module, prefix: str) -> nn.Module:
    """`theirs` into `ours`, which is called `prefix` inside of DisCo. No tensor of either side is left over."""
    left = {OFFICIAL[prefix] + key: tensor for key, tensor in theirs.state_dict().items() if "position_ids" not in key}
    ours = ours.double().eval()
    for name, tensor in ours.state_dict().items():
        for key, view in parts(prefix + name, tensor).items():
            weight = left.pop(names.vae_spelling(key, new=True))
            assert view.shape == weight.shape, f"{name} {tuple(view.shape)}, {key} {tuple(weight.shape)}"
            view.copy_(weight)
    assert not left, f"{len(left)} tensors have no place in ours: {', '.join(list(left)[:10])}"
    return ours


def encoder_arguments(config: UNetConfig) -> dict:
    """Our sizes as diffusers spells them for a UNet's way down, and so for a ControlNet."""
    return {"in_channels": config.channels, "block_out_channels": config.widths, "layers_per_block": config.layers,
            "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in config.attention],
            "attention_head_dim": config.heads,                          # theirs: the number of heads, by that name
            "cross_attention_dim": config.context, "norm_num_groups": config.groups}
