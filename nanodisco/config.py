"""Configuration: what a model is, as frozen dataclasses; YAML in and out; `--a.b=c` on top.

One dataclass a network. A size has no default, so a file that forgets one cannot be built: sizes
come from a YAML file, from the `config.json` of an official folder, or from the shapes of its
tensors (sizes.py). YAML keys are the field names; an unknown one is refused with the nearest name.

    config = load("config/model/sd-image-variations.yaml", ["--unet.temporal=true"])
"""
import copy
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from nanodisco.errors import InputError


@dataclass(frozen=True)
class UNetConfig:
    channels: int                      # of the latent, in and out
    widths: tuple[int, ...]            # channels of each level, finest first
    attention: tuple[bool, ...]        # which levels have transformers; the middle always has one
    layers: int                        # ResBlocks a level on the way down; one more on the way up
    heads: int                         # attention heads, the same at every level
    context: int                       # width of the cross-attention tokens
    groups: int                        # of every GroupNorm
    temporal: bool = False             # with the layers along frames (video)


@dataclass(frozen=True)
class VAEConfig:
    channels: int                      # of the latent
    widths: tuple[int, ...]            # channels of each level, finest first; each level after the first halves
    layers: int                        # ResBlocks a level of the encoder; the decoder has one more
    groups: int                        # of every GroupNorm
    scaling: float                     # latents are multiplied by it to have a variance near one
    stem: int = 1                      # nano: squares of so many pixels become channels first; 1: no
    linear: bool = False               # nano: a linear encoder and decoder beside, which start as principal components

    @property
    def factor(self) -> int:
        """Pixels of the picture per pixel of the latent, each way."""
        return self.stem * 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class ClipConfig:
    image_size: int                    # pixels, square
    patch: int                         # pixels of a patch: (image_size / patch)^2 + 1 tokens
    width: int
    layers: int
    heads: int
    mlp: int                           # hidden width of the feed-forward layers
    projection: int                    # width of CLIP's shared image and text space
    activation: str = "quick_gelu"     # or gelu
    crop: bool = False                 # nano: show the person's box instead of the photo's middle

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1


@dataclass(frozen=True)
class ControlNetConfig:
    """A hint and a copy of the UNet's encoder. Its other sizes are the UNet's."""
    hint: str                          # pixels: a stack of convolutions | latents: one convolution
    channels: int                      # of the hint
    widths: tuple[int, ...] = ()       # of the pixel stack; each after the first halves. () for latents
    hole: bool = False                 # nano: with latents, one channel more that says where the person stood


@dataclass(frozen=True)
class DiffusionConfig:
    steps: int                         # of the noise schedule in training
    schedule: str                      # scaled_linear (Stable Diffusion) | linear | cosine
    beta_start: float | None = None    # noise of the first step and of the last; the cosine schedule has none
    beta_end: float | None = None
    prediction: str = "epsilon"        # what the UNet predicts: epsilon | v
    zero_snr: bool = False             # rescale so that the last step is pure noise


@dataclass(frozen=True)
class ModelConfig:
    unet: UNetConfig
    vae: VAEConfig
    clip: ClipConfig
    diffusion: DiffusionConfig
    pose: ControlNetConfig | None = None          # None: attribute pre-training (stage 1) has no pose
    background: ControlNetConfig | None = None
    tokens: str = "local"              # local: trained projection | local-clip: CLIP's own | global: one token
    uncond: str = "zeros"              # unconditional tokens: zeros | clip-zero (CLIP of an all-zero picture)
    size: tuple[int, ...] = (256, 256)   # of the pictures it was trained on: width, height

    def __post_init__(self):
        """Refuse what cannot be built, or would fail only when it is used."""
        unet, clip, diffusion = self.unet, self.clip, self.diffusion
        for group in ("unet", "vae", "clip", "diffusion", "pose", "background"):
            _require_positive_sizes(group, getattr(self, group))
        require(unet.widths[0] % 2 == 0, "unet.widths", f"begins with {unet.widths[0]}; the time embedding needs "
                "an even number: half of it cosines, half sines")
        require(len(unet.widths) == len(unet.attention), "unet.attention",
                f"has {len(unet.attention)} entries, unet.widths {len(unet.widths)}: give one a level")
        for field, sizes, by, parts in (("unet.widths", unet.widths, "unet.groups", unet.groups),
                                        ("unet.widths", unet.widths, "unet.heads", unet.heads),
                                        ("vae.widths", self.vae.widths, "vae.groups", self.vae.groups),
                                        ("clip.width", [clip.width], "clip.heads", clip.heads),
                                        ("clip.image_size", [clip.image_size], "clip.patch", clip.patch)):
            for size in sizes:
                require(size % parts == 0, field, f"{size} is not divisible by {by} {parts}")
        require(self.vae.channels == unet.channels, "unet.channels",
                f"is {unet.channels}, but the VAE's latent has {self.vae.channels}")
        one_of("clip.activation", clip.activation, ("quick_gelu", "gelu"))
        one_of("tokens", self.tokens, ("local", "local-clip", "global"))
        require(len(self.size) == 2 and min(self.size) > 0, "size", f"is {list(self.size)}; expected width, height")
        one_of("uncond", self.uncond, ("zeros", "clip-zero"))
        one_of("diffusion.schedule", diffusion.schedule, ("scaled_linear", "linear", "cosine"))
        one_of("diffusion.prediction", diffusion.prediction, ("epsilon", "v"))
        require(diffusion.prediction == "v" or not diffusion.zero_snr, "diffusion.zero_snr",
                "needs diffusion.prediction: v (epsilon says nothing about a step without signal)")
        require(self.tokens == "local" or clip.projection == unet.context, "unet.context",
                f"is {unet.context}, but tokens={self.tokens} have CLIP's width {clip.projection}")
        for name in ("pose", "background"):
            net = getattr(self, name)
            if net is None:
                continue
            one_of(f"{name}.hint", net.hint, ("pixels", "latents"))
            if net.hint == "latents":
                require(name == "background", "pose.hint", "is 'latents'; expected 'pixels': a pose is a picture")
                require(net.channels == self.vae.channels, f"{name}.channels",
                        f"is {net.channels}, but the VAE's latent has {self.vae.channels}")
            else:
                require(not net.hole, f"{name}.hole", "needs hint: latents")
                require(2 ** (len(net.widths) - 1) == self.vae.factor, f"{name}.widths",
                        f"has {len(net.widths)} entries, the first at full size, each further one at half; the latent "
                        f"is at 1/{self.vae.factor}")
        if diffusion.schedule != "cosine":
            first, last = diffusion.beta_start, diffusion.beta_end
            require(first is not None and last is not None and 0 < first <= last < 1, "diffusion.beta_start",
                    f"to beta_end is {first} to {last}; expected 0 < beta_start <= beta_end < 1")


def require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise InputError(f"{field} {message}")


def _require_positive_sizes(group: str, config) -> None:
    """Every number of a network is a size: at least 1, and the scaling above 0."""
    for field in dataclasses.fields(config) if config else ():
        value = getattr(config, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if type(number) in (int, float) and not field.name.startswith("beta_"):
                require(math.isfinite(number) and number > 0, f"{group}.{field.name}",
                        f"holds {number}; expected more than 0")
        require(len(numbers) > 0 or field.default == (), f"{group}.{field.name}", "is empty; give one value a level")


def one_of(field: str, value: str, allowed: Sequence[str]) -> None:
    require(value in allowed, field, f"is {value!r}; expected one of {', '.join(filter(None, allowed))}")


def nearest(name: str, known) -> str:
    """`; did you mean X?`, or `; expected one of …` where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(known)}"


def from_dict(cls, values, where: str = ""):
    """A plain dict (from YAML) as the dataclass `cls`, nested ones too. Refuses what does not fit."""
    if not isinstance(values, dict):
        raise InputError(f"{where.rstrip('.') or 'configuration'} is {values!r}; expected keys and values")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            deeper = [f"{name}.{key}" for name in fields for group in typing.get_args(hints[name]) or [hints[name]]
                      if dataclasses.is_dataclass(group) and key in group.__dataclass_fields__]
            raise InputError(f"unknown key {where}{key}" + (f"; did you mean {' or '.join(deeper)}?" if deeper else
                                                            nearest(str(key), fields)))
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"missing key {where}{name} ({_type_name(hints[name])})")
    return cls(**{key: _convert(value, hints[key], where + key) for key, value in values.items()})


def _convert(value, hint, where: str):
    if isinstance(hint, types.UnionType):                               # X | None
        return None if value is None else _convert(value, typing.get_args(hint)[0], where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where + ".")
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):                        # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool) == isinstance(value, bool):
        return value
    raise InputError(f"{where} is {value!r}; expected {_type_name(hint)}")


def _type_name(hint) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list of {_type_name(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "a group of keys"
    return getattr(hint, "__name__", str(hint))


def to_dict(config) -> dict:
    """The dataclass as plain dicts and lists, ready for YAML; `from_dict` takes it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))            # tuples become lists


def override(values: dict, arguments: list[str]) -> dict:
    """`--unet.heads=4` set in a copy of the nested dict. The value is read as YAML."""
    values = copy.deepcopy(values)
    for argument in arguments:
        path, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise InputError(f"cannot read {argument!r}; expected --group.key=value or --key=value")
        *groups, key = path.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise InputError(f"cannot set {path}: {group!r} is a value, not a group of keys")
        try:
            place[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"cannot read the value of {argument!r} as YAML") from None
    return values


def read_yaml(path: str | Path) -> dict:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise InputError(f"{path} is not YAML (line {line})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds no keys; expected a YAML file of keys and values")
    return values


def load(path: str | Path, arguments: list[str] = ()) -> ModelConfig:
    """A YAML file as a ModelConfig, with `--a.b=c` arguments on top."""
    try:
        return from_dict(ModelConfig, override(read_yaml(path), list(arguments)))
    except InputError as error:
        raise InputError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
