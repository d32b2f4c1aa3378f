"""Weights: official files in, official files out.

    diffusers    folder with unet/ vae/ image_encoder/ (.safetensors or .bin), as SD image variations has it
    CompVis      .ckpt of Stable Diffusion (its UNet and VAE)
    DisCo        mp_rank_00_model_states.pt, or the `module` dict in it: stage 1, image, temporal
    nanodisco    our folder: model.safetensors, config.yaml

Whatever the format, `open_weights` gives tensors under the official names of a DisCo `module` dict
in one spelling; `to_ours` and `to_official` go between those and the names of our networks. Every
tensor is used, or dropped by a rule that names it, or the file is refused.
"""
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanodisco import names, sizes, unpickle
from nanodisco.config import ModelConfig, load as load_config, to_dict
from nanodisco.errors import InputError
from nanodisco.files import appearing

Tensors = dict[str, Tensor]

HEADER = 1 << 18                       # bytes of a safetensors file that are not numbers, at most
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAPPED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
UNET_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin",
              "diffusion_pytorch_model.fp16.safetensors")
COMPONENT_FILES = {"unet": UNET_FILES, "vae": UNET_FILES,
                   "image_encoder": ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors")}
DEEPSPEED_FILE = "mp_rank_00_model_states.pt"


@dataclass
class Weights:
    """What one file or folder holds."""
    path: Path
    kind: str                                            # diffusers | CompVis | DisCo | nanodisco
    tensors: Tensors                                     # official names, older VAE spelling, stage 1 as nets.1
    dropped: list[str] = field(default_factory=list)     # names that are known and of no use
    known: dict = field(default_factory=dict)            # of the ModelConfig, beyond what shapes say
    config_json: dict = field(default_factory=dict)      # network -> its config.json
    note: str = ""                                       # what else the file tells of itself

    @property
    def variant(self) -> str:
        """base (no ControlNets) | stage1 | image | temporal"""
        if any(".tem_conv." in name for name in self.tensors):
            return "temporal"
        if any(name.startswith("controlnet.nets.0.") for name in self.tensors):
            return "image"
        return "stage1" if any(name.startswith("controlnet.") for name in self.tensors) else "base"


# ---- Opening ------------------------------------------------------------------------------------------------

def open_weights(path: str | Path) -> Weights:
    """Recognise a file or folder and give its tensors under their official names."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path} is not there; expected a weights file or folder")
    try:
        found = _open_folder(path) if path.is_dir() else _open_file(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    for name, tensor in found.tensors.items():
        if tensor.dtype not in DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{path}: {name} is {dtype}; expected float32, float16 or bfloat16 weights")
    return found


def read_tensors(path: Path):
    """The content of one weights file: a dict of tensors, or whatever the checkpoint holds."""
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; download or copy it again")
    if path.suffix != ".safetensors":
        return unpickle.load(path)
    try:
        return _map_safetensors(path)
    except SafetensorError as error:
        raise InputError(f"{path} is not a whole safetensors file ({path.stat().st_size:,} bytes; "
                         f"{str(error).splitlines()[0]}); download or copy it again") from None


def _map_safetensors(path: Path) -> Tensors:
    """Tensors that are the file itself, seen as memory: of each nothing is read before somebody looks at it.

    safetensors' own get_tensor looks at each, so a model would be there only when its whole file has been read.
    """
    with safe_open(path, framework="pt") as checked, path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header, tensors = json.loads(file.read(length)), {}
        block = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
        for name in checked.keys():
            dtype, begin = MAPPED.get(header[name]["dtype"]), 8 + length + header[name]["data_offsets"][0]
            if dtype is None or begin % dtype.itemsize:
                tensors[name] = checked.get_tensor(name)
            else:
                tensors[name] = torch.empty(0, dtype=dtype).set_(block, begin // dtype.itemsize, header[name]["shape"])
    return tensors


def _open_folder(folder: Path) -> Weights:
    parts = _parts(folder)
    if parts and (folder / "config.yaml").exists():
        config = load_config(folder / "config.yaml")
        ours = {name: tensor for part in parts for name, tensor in read_tensors(part).items()}
        return Weights(folder, "nanodisco", to_official(ours), known=to_dict(config))
    if any((folder / name).is_dir() for name in COMPONENT_FILES):
        return _open_diffusers(folder)
    if (folder / DEEPSPEED_FILE).exists():
        return _open_file(folder / DEEPSPEED_FILE)
    if (folder / "latest").exists():                                     # DeepSpeed's log folder names its newest tag
        tag = (folder / "latest").read_text().strip()
        return _open_file(folder / tag / DEEPSPEED_FILE)
    if (folder / "config.yaml").exists() or parts:
        missing = "model.safetensors" if (folder / "config.yaml").exists() else "config.yaml"
        raise InputError(f"{folder} has no {missing}; a nanodisco folder holds model.safetensors and config.yaml")
    if (folder / "last").exists():
        raise InputError(f"{folder} is a run of train.py; its weights are in {folder / 'last'}")
    raise InputError(f"{folder} holds no weights; expected unet/ vae/ image_encoder/ (Stable Diffusion), "
                     f"{DEEPSPEED_FILE} (DisCo), or model.safetensors with config.yaml (nanodisco)")


def _parts(folder: Path) -> list[Path]:
    """model.safetensors, or what it was cut into: model-00001-of-00002.safetensors, …; [] if there is none."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    parts = sorted(folder.glob("model-*-of-*.safetensors"))
    if parts and len(parts) != int(parts[0].stem.rpartition("-")[2]):
        raise InputError(f"{folder} holds {len(parts)} of the parts of {parts[0].name}; copy the others beside it")
    return parts


def _open_diffusers(folder: Path) -> Weights:
    found = Weights(folder, "diffusers", {})
    files = found.config_json
    for component, prefix in names.DIFFUSERS_FOLDERS.items():
        if not (folder / component).is_dir():
            continue                                                     # a later file may have it
        files[component] = sizes.read_json(folder / sizes.FILES[component])
        path = next((folder / component / name for name in COMPONENT_FILES[component]
                     if (folder / component / name).exists()), None)
        if path is None:
            raise InputError(f"{folder / component} holds no weights; expected {COMPONENT_FILES[component][0]} "
                             f"or {COMPONENT_FILES[component][1]}")
        tensors = read_tensors(path)
        _require_state_dict(tensors, path, f"the weights of {component}")
        for name, tensor in tensors.items():
            _take(found, prefix + name, tensor)
    if (folder / sizes.FILES["scheduler"]).exists():
        files["scheduler"] = sizes.read_json(folder / sizes.FILES["scheduler"])
    found.known = sizes.from_config_json(files)
    return found


def _open_file(path: Path) -> Weights:
    if not path.exists():
        raise InputError(f"{path} is not there; expected a weights file")
    content, note = read_tensors(path), ""
    for key in ("module", "models", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict) and content[key]:
            steps = content.get("global_steps", content.get("global_step"))
            note = f"under {key!r}" + (f", step {steps}" if isinstance(steps, int) else "")
            content = content[key]
            break
    _require_state_dict(content, path, "a DisCo or Stable Diffusion checkpoint")
    if any(name.startswith("model.diffusion_model.") for name in content):
        return _from_compvis(Weights(path, "CompVis", {}, note=note), content)
    alone = next((prefix for name, prefix in names.TELLING.items() if name in content), None)
    if alone:                                                            # one network out of a diffusers folder
        return _from_diffusers_part(path, alone, content)
    if not any(name.startswith(("unet.", "controlnet.")) for name in content):
        some = ", ".join(sorted(content)[:3])
        raise InputError(f"{path} is of another network (its tensors: {some}, …); expected a DisCo checkpoint "
                         "or a Stable Diffusion .ckpt")
    found = Weights(path, "DisCo", {}, note=note)
    numbered = any(name.startswith("controlnet.nets.") for name in content)
    for name, tensor in content.items():
        if name.startswith("controlnet.") and not numbered:              # stage 1 has one net, without a number
            name = "controlnet.nets.1." + name.removeprefix("controlnet.")
        _take(found, name, tensor)
    return found


def _from_diffusers_part(path: Path, prefix: str, content: Tensors) -> Weights:
    found = Weights(path, "diffusers", {}, note="one network of a folder")
    for name, tensor in content.items():
        _take(found, prefix + name, tensor)
    if (path.parent / "config.json").exists():
        component = next(name for name, p in names.DIFFUSERS_FOLDERS.items() if p == prefix)
        found.config_json = {component: sizes.read_json(path.parent / "config.json")}
        found.known = sizes.from_config_json(found.config_json)
    return found


def _from_compvis(found: Weights, content: Tensors) -> Weights:
    spelled = names.compvis_names(content)
    for name, tensor in content.items():
        if name in spelled:
            _take(found, spelled[name], tensor[..., 0, 0] if _is_conv1x1_there(spelled[name], tensor) else tensor)
        elif names.COMPVIS_DROPPED.match(name):
            found.dropped.append(name)
        else:
            found.tensors[name] = tensor                                 # unexpected: to_ours will say so
    return found


def _is_conv1x1_there(name: str, tensor: Tensor) -> bool:
    """The VAE's attention is linear in official names and a 1x1 convolution in CompVis's."""
    return name.startswith("vae.") and ".attentions." in name and tensor.ndim == 4


def _take(found: Weights, name: str, tensor: Tensor) -> None:
    if name == names.POSITION_IDS:
        found.dropped.append(name)
    else:
        found.tensors[names.vae_spelling(name, new=False)] = tensor


def _require_state_dict(content, path: Path, expected: str) -> None:
    """Tensors under strings and nothing else."""
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no tensors by name; expected {expected}")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise InputError(f"{path}: {name!r} holds {type(value).__name__} instead of a plain tensor; "
                             f"expected {expected}")


# ---- Between the official names and ours ----------------------------------------------------------------------

def require_fit(tensors: Tensors, shapes: dict[str, torch.Size], source: str) -> None:
    """An InputError unless these official tensors are just those of a model with these tensors of ours.

    `shapes`: our names -> shapes; `source` names the files in the message.
    """
    expected = official_shapes(shapes)
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [f"{name} {list(tensors[name].shape)} instead of {list(expected[name])}"
                 for name in expected if name in tensors and tuple(tensors[name].shape) != expected[name]]
    if missing or unexpected or misshapen:
        raise InputError(f"{source} does not fit this model: " + "; ".join(
            f"{len(bad)} {what} ({', '.join(bad[:10])}{', …' if len(bad) > 10 else ''})"
            for what, bad in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if bad))


def to_ours(tensors: Tensors, shapes: dict[str, torch.Size]) -> Tensors:
    """Official tensors as ours, for a model with these tensors of ours, which they fit."""
    ours = {}
    for key, shape in shapes.items():
        name = names.official(key)
        tensor = _joined([tensors[theirs] for theirs in name.theirs])
        ours[key] = (tensor.T.contiguous() if name.transposed else tensor).reshape(shape)
    return ours


def _joined(parts: list[Tensor]) -> Tensor:
    """torch.cat, but not a copy where the parts lie one behind the other already, as in our own files."""
    first, end = parts[0], parts[0].data_ptr()
    block = first.untyped_storage().data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.untyped_storage().data_ptr() != block or not part.is_contiguous():
            return torch.cat(parts)
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


def to_official(ours: Tensors) -> Tensors:
    """Our tensors under official names: the inverse of `to_ours`."""
    official = {}
    for key, tensor in ours.items():
        name = names.official(key)
        tensor = tensor.T if name.transposed else tensor
        tensor = tensor[..., None, None] if name.conv1x1 else tensor
        official.update(zip(name.theirs, tensor.chunk(len(name.theirs))))
    return official


def official_shapes(shapes: dict[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """Shapes of our tensors as the shapes of the official ones."""
    on_meta = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in to_official(on_meta).items()}


# ---- Writing --------------------------------------------------------------------------------------------------

def write_folder(folder: Path, ours: Tensors, config: ModelConfig, at_most: int = 0) -> None:
    """Our own format: model.safetensors and config.yaml.

    at_most: bytes of a file; a larger model is cut into model-00001-of-00002.safetensors, … (0: never).
    """
    parts: list[Tensors] = [{}]
    for name, tensor in ours.items():
        if at_most and sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > at_most - HEADER and parts[-1]:
            parts.append({})
        parts[-1][name] = tensor
    with appearing(folder) as place:
        place.mkdir()
        for i, part in enumerate(parts):
            of = f"-{i + 1:05}-of-{len(parts):05}" if len(parts) > 1 else ""
            _save(part, place / f"model{of}.safetensors")
        (place / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")


def write_disco(path: Path, ours: Tensors, config: ModelConfig) -> None:
    """The `module` dict of the official program, as .safetensors, or in a .pt that the program loads."""
    module = _with_position_ids(to_official(ours), config)
    if config.pose is None:                                              # stage 1
        module = {name.replace("controlnet.nets.1.", "controlnet."): tensor for name, tensor in module.items()}
    with appearing(path) as place:
        _save(module, place)


def write_diffusers(folder: Path, ours: Tensors, config: ModelConfig, old_names: bool = False) -> None:
    """A folder that diffusers and transformers open: unet/ vae/ image_encoder/ scheduler/.

    `old_names`: the VAE attention's names of 2022 and CLIP's position_ids, as the official files have.
    """
    official = to_official({key: tensor for key, tensor in ours.items() if key.startswith(("unet.", "vae.", "clip."))})
    if old_names:
        official = _with_position_ids(official, config)
    with appearing(folder) as place:
        for component, prefix in names.DIFFUSERS_FOLDERS.items():
            (place / component).mkdir(parents=True)
            tensors = {names.vae_spelling(name, new=not old_names).removeprefix(prefix): tensor
                       for name, tensor in official.items() if name.startswith(prefix)}
            _save(tensors, place / component / COMPONENT_FILES[component][0])
        for network, values in sizes.to_config_json(config).items():
            path = place / sizes.FILES[network]
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _with_position_ids(official: Tensors, config: ModelConfig) -> Tensors:
    return official | {names.POSITION_IDS: torch.arange(config.clip.tokens)[None]}


def _save(tensors: Tensors, path: Path) -> None:
    """Write tensors by name, each with memory of its own: a view would drag all of its memory along."""
    tensors = {name: _alone(tensor) for name, tensor in tensors.items()}
    try:
        if path.suffix == ".safetensors":
            save_file(tensors, path, {"format": "pt"})
        else:
            torch.save({"module": tensors}, path)
    except (SafetensorError, RuntimeError) as error:                     # how a full disk shows itself there
        raise OSError(str(error).splitlines()[0]) from None


def _alone(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
