"""The formula behind the golden values: weights and inputs that need no download.

The numbers in golden/ were recorded by running the official program. Its weights and inputs are

    u = Philox(key = CRC-32 of the name), as float64 in [-1, 1)
    weight   two or more axes: u sqrt(3 / fan_in)    norm scale: 1 + 0.1 u    other vectors: 0.1 u
    input    normal: u sqrt(3)    01: (u + 1) / 2    pm1: u    clip: CLIP's normalisation of 01

where a weight's name and shape are the official ones. Ours are views of them, so `fill` writes through.

    model("image").unet(given("latents"), given("timesteps"), given("tokens"))     shared: never change it
"""
import functools
import json
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nanodisco import names
from nanodisco.config import ClipConfig, ControlNetConfig, DiffusionConfig, ModelConfig, UNetConfig, VAEConfig
from nanodisco.disco import Batch, DisCo, Draws

GOLDEN = Path(__file__).parent / "golden"

# Tolerances are a share of the largest golden value; float32 on a CPU scatters by up to 2e-6 of it.
MODULE, RUN, LOSS, GRADIENT = 2e-5, 5e-5, 1e-5, 1e-4

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)

NORMAL = {
    (2, 4, 8, 8): ["latents", "bg_latents", "noise", "init_latents", "posterior_noise_background",
                   "posterior_noise_target"],
    (2, 17, 32): ["tokens"], (10, 2, 4, 8, 8): ["ddpm_noise"],
    (2, 4, 9, 7): ["odd_latents", "odd_bg_latents"], (2, 4, 16, 24): ["wide_latents", "wide_bg_latents"],
    (2, 4, 4, 8, 8): ["t_latents", "t_noise", "t_init_latents"], (8, 4, 8, 8): ["t_posterior_noise_target"],
    (1, 4, 4, 4): ["sampler_x"], (50, 1, 4, 4, 4): ["sampler_noise"], (5, 4, 4, 4): ["sampler_a", "sampler_b"],
    (1, 4, 32, 32): ["full_latents", "full_bg_latents"], (1, 257, 768): ["full_tokens"]}

INPUTS = {name: ("normal", shape) for shape, group in NORMAL.items() for name in group} | {
    "clip_image": ("clip", (2, 3, 56, 56)), "full_clip_image": ("clip", (1, 3, 224, 224)),
    "pose": ("01", (2, 3, 64, 64)), "odd_pose": ("01", (2, 3, 72, 56)), "wide_pose": ("01", (2, 3, 128, 192)),
    "t_pose": ("01", (2, 3, 4, 64, 64)), "full_pose": ("01", (1, 3, 256, 256)),
    "background": ("pm1", (2, 3, 64, 64)), "target": ("pm1", (2, 3, 64, 64)),
    "t_target": ("pm1", (2, 3, 4, 64, 64)), "full_image": ("pm1", (1, 3, 256, 256))}


# ---- Numbers from names --------------------------------------------------------------------------

def bits(name: str, n: int) -> np.ndarray:
    return np.random.Philox(key=zlib.crc32(name.encode())).random_raw(n)


def uniform(name: str, shape) -> np.ndarray:
    """float64 in [-1, 1), C order."""
    n = int(np.prod(shape))
    return ((bits(name, n) >> np.uint64(11)).astype(np.float64) * 2.0 ** -53 * 2 - 1).reshape(shape)


def weight(key: str, shape, gain: float = 1.0) -> Tensor:
    """The tensor with the official name `key`. `gain` shrinks all but the norm scales, which makes each eps show."""
    u = uniform(key, shape)
    if len(shape) == 1 and key.endswith(".weight"):                      # the scale of a norm
        return torch.from_numpy((1 + 0.1 * u).astype(np.float32))
    w = u * (3 / np.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.1 * u
    w = w.astype(np.float32)
    return torch.from_numpy(w if gain == 1.0 else (w.astype(np.float64) * gain).astype(np.float32))


def input(name: str, kind: str, shape) -> Tensor:
    u = uniform(f"input:{name}", shape)
    x = {"normal": u * 3 ** 0.5, "01": (u + 1) / 2, "pm1": u}[kind] if kind != "clip" else (
        ((u + 1) / 2 - CLIP_MEAN) / CLIP_STD)
    return torch.from_numpy(x.astype(np.float32))


@functools.cache
def given(name: str) -> Tensor:
    """An input by its name alone; `timesteps` are the two of every call of a module."""
    return torch.tensor([17, 801]) if name == "timesteps" else input(name, *INPUTS[name])


# ---- Models --------------------------------------------------------------------------------------

def parts(ours: str, tensor: Tensor, stage1: bool = False) -> dict[str, Tensor]:
    """Our tensor as views with the official names and shapes: packed q, k, v apart, and so on."""
    name = names.official(ours, stage1)
    tensor = tensor.T if name.transposed else tensor
    tensor = tensor[..., None, None] if name.conv1x1 else tensor
    return dict(zip(name.theirs, tensor.chunk(len(name.theirs)), strict=True))


@torch.no_grad()
def fill(net: nn.Module, prefix: str = "", stage1: bool = False, gain: float = 1.0) -> nn.Module:
    """Formula weights for a network that is called `prefix` inside of DisCo."""
    for ours, tensor in net.state_dict().items():
        for key, view in parts(prefix + ours, tensor, stage1).items():
            view.copy_(weight(key, view.shape, gain))
    return net.eval()


def config(official: dict, **changes) -> ModelConfig:
    """The official `config.json`s of a base model as ours."""
    u, v, c = official["unet"], official["vae"], official["image_encoder"]
    return replace(ModelConfig(
        UNetConfig(u["in_channels"], tuple(u["block_out_channels"]),
                   tuple("CrossAttn" in block for block in u["down_block_types"]), u["layers_per_block"],
                   u["attention_head_dim"], u["cross_attention_dim"], u["norm_num_groups"]),
        VAEConfig(v["latent_channels"], tuple(v["block_out_channels"]), v["layers_per_block"],
                  v["norm_num_groups"], scaling=0.18215),
        ClipConfig(c["image_size"], c["patch_size"], c["hidden_size"], c["num_hidden_layers"],
                   c["num_attention_heads"], c["intermediate_size"], c["projection_dim"]),
        DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012),
        pose=ControlNetConfig("pixels", 3, (16, 32, 96, 256)), background=ControlNetConfig("latents", 4)), **changes)


def build(variant: str = "image", gain: float = 1.0, tokens: str = "local", uncond: str = "zeros") -> DisCo:
    """A fresh tiny model with formula weights.   variant: image | stage1 | temporal"""
    tiny = config(golden("config.json"), tokens=tokens, uncond=uncond)
    tiny = replace(tiny, unet=replace(tiny.unet, temporal=variant == "temporal"),
                   pose=None if variant == "stage1" else tiny.pose)
    return fill(DisCo(tiny), stage1=variant == "stage1", gain=gain)


shared = functools.cache(build)


def model(variant: str = "image", gain: float = 1.0, tokens: str = "local", uncond: str = "zeros") -> DisCo:
    """The same, built once: for tests that only look. One that trains or changes it takes `build`."""
    return shared(variant, gain, tokens, uncond)


def training_data(prefix: str = "", pose: str | None = "pose", drop_reference: bool = False,
                  drop_pose: bool = False) -> tuple[Batch, Draws]:
    """The two samples that every golden loss is of; of clips with the prefix t_."""
    target = given(f"{prefix}target")
    frames = target.shape[2] if target.ndim == 5 else 1
    return (Batch(target, given("clip_image"), given("background"), pose and given(prefix + pose)),
            Draws(given("timesteps"), given(f"{prefix}noise"), given(f"{prefix}posterior_noise_target"),
                  given("posterior_noise_background"), torch.full((2,), drop_reference),
                  torch.full((2, frames), drop_pose)))


@contextmanager
def recorded(net: nn.Module, paths: dict[str, str]):
    """name -> output of the module at that path inside of `net`, filled while the block runs `net`."""
    seen: dict[str, Tensor] = {}
    hooks = [net.get_submodule(path).register_forward_hook(
        lambda module, args, out, name=name: seen.update({name: out})) for name, path in paths.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def recorded_residuals(net: DisCo):
    """What the ControlNets together hand to the UNet, filled while the block runs `net`."""
    seen: list[Tensor] = []
    hook = net.unet.register_forward_pre_hook(lambda module, args: seen.extend(args[3]))
    try:
        yield seen
    finally:
        hook.remove()


def gradients(net: nn.Module, stage1: bool = False) -> dict[str, Tensor | None]:
    """Official name -> gradient (or None) of each trainable parameter."""
    return {key: part if p.grad is not None else None for ours, p in net.named_parameters() if p.requires_grad
            for key, part in parts(ours, p if p.grad is None else p.grad, stage1).items()}


def norm(tensors) -> float:
    """Length of all of these tensors as one vector."""
    return sum(t.double().square().sum().item() for t in tensors) ** 0.5


# ---- Golden values -------------------------------------------------------------------------------

@functools.cache
def golden(path: str) -> dict:
    return json.loads((GOLDEN / path).read_text()) if path.endswith(".json") else load_file(GOLDEN / path)


def assert_close(got: Tensor, wanted: Tensor, tol: float, name: str = "") -> None:
    """max |got - wanted| <= tol max |wanted|. NaN is not close to anything."""
    assert got.shape == wanted.shape, f"{name}: shape {tuple(got.shape)}, golden {tuple(wanted.shape)}"
    worst, largest = (x.double().abs().max().item() for x in (got.double() - wanted, wanted))
    assert worst <= tol * largest, f"{name}: off by {worst:.1e} where the largest value is {largest:.1e}; " \
                                   f"allowed {tol:.0e} of it"


def assert_all_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tol: float) -> None:
    """Each tensor of `got` is the one of that name in `wanted`."""
    assert got, "nothing to compare"
    for name in got:
        assert_close(got[name], wanted[name], tol, name)
