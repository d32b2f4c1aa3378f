"""Sizes: which model a file's tensors make, read from their shapes; and diffusers' `config.json`.

Shapes tell everything but the number of heads, the groups of the norms and the noise schedule. Those
come from the `config.json` files of an official folder, or from a YAML file of ours.
All names here are the official ones (names.py).
"""
import json
import math
import re
from pathlib import Path

from nanodisco.config import ModelConfig
from nanodisco.errors import InputError

Shapes = dict[str, tuple[int, ...]]


# ---- From shapes ---------------------------------------------------------------------------------------

def from_shapes(shapes: Shapes) -> dict:
    """What the shapes say of a ModelConfig, as nested dicts. Networks that are not there are left out."""
    found = {}
    if "unet.conv_in.weight" in shapes:
        found["unet"] = _unet(shapes)
    if "vae.quant_conv.weight" in shapes:
        found["vae"] = _vae(shapes)
    if "clip_image_encoder.vision_model.embeddings.class_embedding" in shapes:
        found["clip"] = _clip(shapes)
    for number, name in enumerate(("pose", "background")):
        prefix = f"controlnet.nets.{number}.controlnet_cond_embedding."
        if prefix + "conv_in.weight" in shapes:
            found[name] = _hint(shapes, prefix)
    hint, vae = found.get("background", {}), found.get("vae", {})
    if hint.get("hint") == "latents" and hint["channels"] == vae.get("channels", 0) + 1:
        hint |= {"channels": vae["channels"], "hole": True}
    found["tokens"] = "local" if "refer_clip_proj.weight" in shapes else "local-clip"
    return found


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor that tells a size."""
    if name not in shapes:
        raise InputError(f"tensor {name} is missing, which tells the size of its network")
    if len(shapes[name]) != axes:
        raise InputError(f"tensor {name} has the shape {list(shapes[name])}; expected {axes} axes")
    return shapes[name]


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest index at the {} of the pattern; 0 if there is none."""
    regex = re.compile(re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    return max((int(match[1]) + 1 for name in shapes if (match := regex.fullmatch(name))), default=0)


def _levels(shapes: Shapes, blocks: str) -> tuple[list[int], int]:
    """Widths of the levels, ResBlocks a level."""
    levels = _count(shapes, blocks + "{}.resnets.0.conv1.weight")
    widths = [_shape(shapes, f"{blocks}{i}.resnets.0.conv1.weight", 4)[0] for i in range(levels)]
    return widths, _count(shapes, blocks + "0.resnets.{}.conv1.weight")


def _unet(shapes: Shapes) -> dict:
    widths, layers = _levels(shapes, "unet.down_blocks.")
    attention = [f"unet.down_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(len(widths))]
    keys = _shape(shapes, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", 2)
    return {"channels": _shape(shapes, "unet.conv_in.weight", 4)[1], "widths": widths, "attention": attention,
            "layers": layers, "context": keys[1], "temporal": "unet.mid_block.resnets.0.tem_conv.weight" in shapes}


def _vae(shapes: Shapes) -> dict:
    widths, layers = _levels(shapes, "vae.encoder.down_blocks.")
    return {"channels": _shape(shapes, "vae.quant_conv.weight", 4)[0] // 2, "widths": widths, "layers": layers,
            "stem": math.isqrt(_shape(shapes, "vae.encoder.conv_in.weight", 4)[1] // 3),
            "linear": "vae.linear_in.weight" in shapes}


def _clip(shapes: Shapes) -> dict:
    tower = "clip_image_encoder.vision_model."
    width, _, patch, _ = _shape(shapes, tower + "embeddings.patch_embedding.weight", 4)
    tokens, _ = _shape(shapes, tower + "embeddings.position_embedding.weight", 2)
    return {"image_size": math.isqrt(tokens - 1) * patch, "patch": patch, "width": width,
            "layers": _count(shapes, tower + "encoder.layers.{}.layer_norm1.weight"),
            "mlp": _shape(shapes, tower + "encoder.layers.0.mlp.fc1.weight", 2)[0],
            "projection": _shape(shapes, "clip_image_encoder.visual_projection.weight", 2)[0]}


def _hint(shapes: Shapes, prefix: str) -> dict:
    first, channels, _, _ = _shape(shapes, prefix + "conv_in.weight", 4)
    blocks = _count(shapes, prefix + "blocks.{}.weight")
    if not blocks:
        return {"hint": "latents", "channels": channels}
    return {"hint": "pixels", "channels": channels,
            "widths": [first] + [_shape(shapes, f"{prefix}blocks.{i}.weight", 4)[0] for i in range(1, blocks, 2)]}


# ---- config.json ------------------------------------------------------------------------------------------

SCHEDULES = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}   # ours: theirs
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
FILES = {"unet": "unet/config.json", "vae": "vae/config.json", "image_encoder": "image_encoder/config.json",
         "scheduler": "scheduler/scheduler_config.json"}


def read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there; an official folder has one beside its weights") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no keys; expected a diffusers configuration")
    return values


def from_config_json(files: dict[str, dict]) -> dict:
    """What the shapes do not say, as nested dicts of a ModelConfig. `files`: network -> its config.json."""
    found = {}
    if unet := files.get("unet"):
        heads = unet.get("attention_head_dim")                 # official: the NUMBER of heads, whatever its name says
        if isinstance(heads, list):
            if len(set(heads)) != 1:
                raise InputError(f"unet/config.json: attention_head_dim {heads}: only one number for all levels "
                                 "is supported, as in SD 1.x")
            heads = heads[0]
        found["unet"] = {"heads": heads, "groups": unet.get("norm_num_groups")}
    if vae := files.get("vae"):
        found["vae"] = {"groups": vae.get("norm_num_groups"), "scaling": vae.get("scaling_factor")}
    if clip := files.get("image_encoder"):
        found["clip"] = {"heads": clip.get("num_attention_heads"), "activation": clip.get("hidden_act")}
    if scheduler := files.get("scheduler"):
        ours = {theirs: ours for ours, theirs in (SCHEDULES | PREDICTIONS).items()}
        found["diffusion"] = {
            "steps": scheduler.get("num_train_timesteps"), "beta_start": scheduler.get("beta_start"),
            "beta_end": scheduler.get("beta_end"),
            "schedule": ours.get(scheduler.get("beta_schedule"), scheduler.get("beta_schedule")),
            "prediction": ours.get(scheduler.get("prediction_type"), scheduler.get("prediction_type")),
            "zero_snr": scheduler.get("rescale_betas_zero_snr")}
    return {name: {key: value for key, value in group.items() if value is not None} for name, group in found.items()}


def to_config_json(config: ModelConfig) -> dict[str, dict]:
    """The config.json of each network in a diffusers folder; from_config_json and shapes take it back."""
    unet, vae, clip, diffusion = config.unet, config.vae, config.clip, config.diffusion
    kind = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": unet.heads,
            "block_out_channels": list(unet.widths), "center_input_sample": False,
            "cross_attention_dim": unet.context, "down_block_types": [kind[a] for a in unet.attention],
            "downsample_padding": 1, "dual_cross_attention": False, "flip_sin_to_cos": True, "freq_shift": 0,
            "in_channels": unet.channels, "layers_per_block": unet.layers, "mid_block_scale_factor": 1,
            "norm_eps": 1e-5, "norm_num_groups": unet.groups, "only_cross_attention": False,
            "out_channels": unet.channels,
            "up_block_types": [kind[a].replace("Down", "Up") for a in reversed(unet.attention)],
            "use_linear_projection": False},
        "vae": {
            "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": list(vae.widths),
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths), "in_channels": 3,
            "latent_channels": vae.channels, "layers_per_block": vae.layers, "norm_num_groups": vae.groups,
            "out_channels": 3, "scaling_factor": vae.scaling,
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths)},
        "image_encoder": {
            "architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model",
            "hidden_act": clip.activation, "hidden_size": clip.width, "image_size": clip.image_size,
            "intermediate_size": clip.mlp, "layer_norm_eps": 1e-5, "num_attention_heads": clip.heads,
            "num_channels": 3, "num_hidden_layers": clip.layers, "patch_size": clip.patch,
            "projection_dim": clip.projection},
        "scheduler": {
            "_class_name": "PNDMScheduler", "num_train_timesteps": diffusion.steps,
            "beta_schedule": SCHEDULES[diffusion.schedule], "prediction_type": PREDICTIONS[diffusion.prediction],
            **({} if diffusion.schedule == "cosine" else
               {"beta_start": diffusion.beta_start, "beta_end": diffusion.beta_end}),
            "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
            **({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
               if diffusion.zero_snr else {})},
    }


def check_config_json(files: dict[str, dict], config: ModelConfig, folder: Path) -> None:
    """Refuse a folder whose config.json asks for something else than its tensors or our code do."""
    free = ("_class_name", "architectures", "clip_sample", "set_alpha_to_one", "skip_prk_steps", "steps_offset",
            "timestep_spacing", "attention_head_dim")      # the sampler's the official code sets; heads may be a list
    for network, expected in to_config_json(config).items():
        for key, value in expected.items():
            there = files.get(network, {}).get(key)
            if there is not None and there != value and key not in free:
                raise InputError(f"{folder / FILES[network]}: {key} is {there}; the weights and this code have {value}")
