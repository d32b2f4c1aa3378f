"""Loading: weights files, one after another, become one DisCo.

    model = load("sd-image-variations-diffusers", "mp_rank_00_model_states.pt")

Later files win. What no file holds is started as the official program starts it: ControlNets as
copies of the first file's UNet, the token projection as CLIP's own, temporal layers without effect.
"""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kernels import cpu, gpu
from nanodisco import sizes, weights
from nanodisco.config import ModelConfig, from_dict, load as load_config, override, read_yaml, to_dict
from nanodisco.disco import DisCo
from nanodisco.errors import InputError
from nanodisco.layers import ResBlock
from nanodisco.names import official
from nanodisco.weights import Tensors, Weights

ASSUMED = Path(__file__).parent.parent / "config" / "model" / "sd-image-variations.yaml"
ORDER = ("base", "stage1", "image", "temporal")      # each holds what the ones before it hold, and more
NETS = {"pose": "controlnet.nets.0.", "background": "controlnet.nets.1."}
HINT = "controlnet_cond_embedding."
PROJECTION = "refer_clip_proj.weight"
ENCODER = ("unet.conv_in.", "unet.time_embedding.", "unet.down_blocks.", "unet.mid_block.")


def load(*paths: str | Path, variant: str | None = None, config: str | Path | None = None,
         overrides: list[str] = (), dtype: torch.dtype | None = torch.float32, seed: int = 0,
         say: Callable[[str], None] = print) -> DisCo:
    """Build the model that these files make, on the CPU, in eval mode. Bad files are an InputError.

    variant: stage1 | image | temporal; None: what the files hold, image for a base model alone.
    config: a YAML file for what shapes do not say; overrides: `--unet.heads=4` on top.
    dtype: of all weights; None keeps what the files have. seed: for what is started afresh.
    """
    files = [weights.open_weights(path) for path in paths]
    model, tensors, started = fit(files, variant, config, overrides, say)
    held = {key: tensor.shape for key, tensor in model.state_dict().items() if not _is_fresh(key, started)}
    ours = weights.to_ours(tensors, held)
    model.load_state_dict(model.state_dict() | ours, assign=True)         # the others stay on meta until they are drawn
    _initialise(model, seed)
    for file in files:
        if file.variant == "stage1" and model.pose is not None:
            say(f"{file.path}: of attribute pre-training; its UNet, image encoder and background net go on as such")
        elif file.variant == "image" and model.config.unet.temporal:
            say(f"{file.path}: of single pictures; all its networks go on in the video model")
    for part in started:
        say(f"not in the files: {part}")
    return model.to(dtype).eval() if dtype else model.eval()


def fit(files: list[Weights], variant: str | None = None, config: str | Path | None = None, overrides: list[str] = (),
        say: Callable[[str], None] = print) -> tuple[DisCo, Tensors, dict[str, tuple[str, ...]]]:
    """Find the model that these files make and hold them against it; an InputError if they do not fit.

    -> the model on the meta device, all official tensors, {what was started: parts of the names still to be drawn}
    """
    source = " + ".join(str(file.path) for file in files)
    tensors, started = _merge(files, variant or _variant_of(files))
    try:
        model_config = _config_of(files, tensors, started, config, overrides, say)
    except InputError as error:
        named = any(str(file.path) in str(error) for file in files)
        raise error if named else InputError(f"{source}: {error}") from None
    if model_config.tokens == "local" and PROJECTION not in tensors:
        tensors[PROJECTION] = tensors["clip_image_encoder.visual_projection.weight"].clone()
        started["token projection; started as a copy of CLIP's own"] = ()
    if model_config.tokens != "local" and any(text.startswith("--tokens=") for text in overrides):
        tensors.pop(PROJECTION, None)                    # of no use to the tokens that were asked for
    with torch.device("meta"):
        model = DisCo(model_config)
    held = {key: tensor.shape for key, tensor in model.state_dict().items() if not _is_fresh(key, started)}
    weights.require_fit(tensors, held, source)
    return model, tensors, started


def _variant_of(files: list[Weights]) -> str:
    most = max(files, key=lambda file: ORDER.index(file.variant)).variant
    return "image" if most == "base" else most


def _merge(files: list[Weights], variant: str) -> tuple[Tensors, dict[str, tuple[str, ...]]]:
    """All tensors of the files, later ones winning, and copies for nets that none of them holds.

    -> tensors, {what was started and how: parts of the names that stay to be initialised}
    """
    tensors: Tensors = {}
    for file in files:
        if ORDER.index(file.variant) > ORDER.index(variant):
            raise InputError(f"{file.path} holds the model {file.variant}; it cannot be read as {variant}")
        tensors |= file.tensors
    together = " + ".join(str(file.path) for file in files)
    absent = [part.rstrip(".") for part in ("unet.", "vae.", "clip_image_encoder.") if not _has(tensors, part)]
    if absent:
        raise InputError(f"{together}: no weights of {', '.join(absent)}; name a folder of SD image variations first")
    base = next(file for file in files if _has(file.tensors, "unet."))
    started: dict[str, tuple[str, ...]] = {}
    for net, prefix in NETS.items():
        if _has(tensors, prefix) or (net == "pose" and variant == "stage1"):
            continue
        tensors |= {prefix + name.removeprefix("unet."): tensor.clone()
                    for name, tensor in base.tensors.items() if name.startswith(ENCODER)}
        new = (prefix + "controlnet_down_blocks.", prefix + "controlnet_mid_block.")
        if net == "background":                  # official: its first convolution starts as the UNet's, not as zero
            tensors |= {prefix + HINT + name.removeprefix("unet."): tensor.clone()
                        for name, tensor in base.tensors.items() if name.startswith("unet.conv_in.")}
        else:
            new += (prefix + HINT,)
        started[f"{net} net; started as a copy of the UNet's encoder in {base.path}"] = new
    if variant == "temporal" and not any(".tem_conv." in name for name in tensors):
        started["temporal layers; started without effect"] = (".tem_",)
    return tensors, started


def _has(tensors: Tensors, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in tensors)


def _is_fresh(ours: str, started: dict[str, tuple[str, ...]]) -> bool:
    theirs = official(ours).theirs[0]
    return any(part in theirs for parts in started.values() for part in parts)


def _config_of(files: list[Weights], tensors: Tensors, started: dict, path, overrides, say) -> ModelConfig:
    """Shapes first; then the given YAML file, or what came with the files; then SD's usual values, said."""
    usual = read_yaml(ASSUMED)
    given = [to_dict(load_config(path))] if path else [file.known for file in files]
    values = sizes.from_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    unfilled = [part for parts in started.values() for part in parts]
    if ".tem_" in unfilled:
        values["unet"]["temporal"] = True
    if NETS["pose"] + HINT in unfilled:
        values["pose"] = next((known["pose"] for known in reversed(given) if known.get("pose")), usual["pose"])
    assumed = []
    for group in ("unet", "vae", "clip", "diffusion"):
        told = {key: value for known in given for key, value in known.get(group, {}).items()}
        shown = {key: value for key, value in values.get(group, {}).items() if value is not None}
        guessed = {key: value for key, value in usual[group].items() if key not in told | shown}
        assumed += [f"{group}.{key} {value}" for key, value in guessed.items()
                    if not any(text.startswith(f"--{group}.{key}=") for text in overrides)]
        values[group] = guessed | told | shown
    told = {key: known[key] for known in given for key in ("tokens", "uncond", "size") if key in known}
    if values["tokens"] == "local" or all(file.variant == "base" for file in files):
        told["tokens"] = "local"                                         # by the trained projection, or to train one
    if assumed:
        say(f"not in the files, taken from {ASSUMED.name}: " + ", ".join(assumed))
    try:
        config = from_dict(ModelConfig, override(values | told, list(overrides)))
    except InputError as error:
        guess = (f" (not in the files, so assumed: {', '.join(assumed)}; `python -m nanodisco.convert import … "
                 "--config YAML` says otherwise)") if assumed else ""
        raise InputError(f"{error}{guess}") from None
    for file in files:
        sizes.check_config_json(file.config_json, config, file.path)
    return config


def _initialise(model: nn.Module, seed: int) -> None:
    """Give every module that no file filled its own start, drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)                        # those of GPUs stay as they are
        for module in model.modules():
            if any(tensor.is_meta for tensor in module.parameters(recurse=False)):
                module.to_empty(device="cpu", recurse=False)
                module.reset_parameters()


def refuse_unfinished(path: str | Path) -> None:
    """InputError for a checkpoint of train.py that has a VAE only; all its other networks are as they were drawn."""
    made_by = Path(path) / "training.yaml"
    stage = read_yaml(made_by)["recipe"]["stage"] if made_by.exists() else "diffusion"
    if stage != "diffusion":
        raise InputError(f"{path} is of stage {stage}, so its UNet is not trained; expected the run of a later stage")


def for_inference(model: DisCo, device: str = "cpu", say: Callable[[str], None] = print,
                  compiled: bool = False) -> DisCo:
    """On its device in the fastest form there, in place. It cannot be trained or saved afterwards.

    compiled: torch.compile comes next, which knows nothing of weights that are packed already.
    """
    model.requires_grad_(False)
    if device != "cpu":
        for module in model.modules():
            if isinstance(module, ResBlock):
                module.fold_biases()
        for net in (model.unet, model.pose, model.background):
            if net is not None:
                net.encoder.join_time_layers([module for module in net.modules() if isinstance(module, ResBlock)])
        gpu.prepare(model)
        return gpu.move(model, device)
    cpu.keep_freed_memory()                                              # of activations, packed or not
    if compiled:
        return model
    if why := cpu.unavailable(model.dtype):
        say(f"without prepacked weights, so slower: {why}")
        return model
    for net in (model.unet, model.pose, model.background, model.vae):
        if net is not None:
            cpu.prepack(net)
    return model
