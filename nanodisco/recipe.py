"""Recipe: one stage of training as a YAML file.

    model: ../model/sd-image-variations.yaml     # or its keys; without it the files of `start` say what it is
    start: [sd-image-variations-diffusers, pretrained/last]
    data: {kind: tsv, path: train.yaml}
    train: {epochs: 20, batch: 256, lr: 2e-4}

Files are looked for beside the YAML file first, then from where the command is run.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

from nanodisco.config import ModelConfig, from_dict, one_of, override, read_yaml, require, to_dict
from nanodisco.errors import InputError


@dataclass(frozen=True)
class DataConfig:
    kind: str                          # dancers: drawn when they are needed | tsv: the official program's files
    path: str = ""                     # of the YAML file of a tsv set
    validation: str = ""               # the same, of a set that is not trained on; dancers have one
    clips: int = 0                     # dancers: how many, each another person, room and dance
    first: int = 0                     # dancers: seed of the first clip's person, room and dance
    width: int = 256                   # pixels
    height: int = 256
    frames: int = 1                    # of a sample: 1 is a picture, more a clip for the video model
    every: int = 1                     # frames of the track from one frame of a clip to the next
    crop: tuple[float, ...] = ()       # share of the area, least and most, that a random crop keeps; []: the middle
    slide: bool = False                # crop within a random square along the longer side, not within all of it
    reference: str = "first"           # first frame of the video | random frame of it | same: the target itself
    workers: int = 0                   # processes that prepare samples; 0: the training process does


@dataclass(frozen=True)
class TrainConfig:
    batch: int                         # samples of one update, over all processes and parts
    lr: float                          # highest learning rate
    steps: int = 0                     # updates of the weights; 0: as many as `epochs` are
    epochs: int = 0                    # times through the data. official: whole batches only are counted
    accumulate: int = 1                # parts that a process cuts its share of a batch into; 1: none
    warmup: float = 0.1                # share of the steps
    constant_lr: bool = False          # after the warm-up; false: linearly down
    optimizer: str = "adamw"           # or muon: for the matrices, AdamW for the rest
    noises: int = 1                    # noisings of each sample in an update; it is drawn and encoded once
    weight_decay: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.98)
    clip_norm: float = 0.0             # of the gradient; 0: as it is
    ema: float = 0.0                   # decay of the running average of the weights; 0: none
    precision: str = "fp32"            # of the computation: fp32 | bf16 | fp16; weights are always fp32
    checkpointing: bool = False        # compute activations again in the backward pass: less memory, more time
    loss: str = "prediction"           # what the error is measured on: prediction | epsilon | v | x0
    min_snr: float = 0.0               # cap of the weight of a step; 0: all steps alike
    person: float = 1.0                # how many times the places count where the target shows the person; 1: as all
    latent_noise: float = 0.0          # decoder: std of what latents are disturbed by, from 0 to this; 0: by nothing
    drop_reference: float = 0.0        # share of samples trained without reference, for guidance
    drop_whole_batch: bool = False     # official: one coin for all references of a batch
    drop_pose: float = 0.0             # share of frames trained without pose
    unet: str = "all"                  # null | crossattn-kv | crossattn | transblocks | all | tem | patterns
    clip: bool = False                 # train the image encoder too
    freeze_pose: bool = False
    freeze_background: bool = False
    only_pose: bool = False            # nothing but the pose net
    lora_rank: int = 0                 # LoRA: of the difference that the UNet's linear layers learn; 0: their weights
    substring_fault: bool = False      # official: freezes by substring, and so some of the other net too
    seed: int = 42
    log_every: int = 10                # steps
    logger: str = ""                   # beside RUN/log.jsonl: tensorboard | wandb
    save_every: int = 500
    keep: int = 2                      # newest checkpoints that stay; 0: all
    validate_every: int = 0            # steps between pictures and scores of held-out samples; 0: none
    validate_count: int = 16           # held-out samples


@dataclass(frozen=True)
class Recipe:
    data: DataConfig
    train: TrainConfig
    stage: str = "diffusion"           # or vae: the pictures' way to latents and back | decoder: only the way back
    pose: bool = True                  # false: without a pose net, as in attribute pre-training
    model: ModelConfig | None = None   # None: as the files of `start` say; with both, files say the sizes they have
    start: tuple[str, ...] = ()        # weights to start from; later files win
    variant: str = ""                  # of `start`: stage1 | image | temporal; "": what the files hold
    uncond: str = ""                   # what stands for no reference: zeros | clip-zero; "": as the model says
    out: str = ""                      # folder of the run; "": output/<name of the YAML file>

    def __post_init__(self):
        t, d = self.train, self.data
        for field, value, *allowed in (
                ("stage", self.stage, "diffusion", "vae", "decoder"), ("data.kind", d.kind, "dancers", "tsv"),
                ("data.reference", d.reference, "first", "random", "same"),
                ("train.precision", t.precision, "fp32", "bf16", "fp16"),
                ("train.optimizer", t.optimizer, "adamw", "muon"),
                ("train.logger", t.logger, "", "tensorboard", "wandb"),
                ("train.loss", t.loss, "prediction", "epsilon", "v", "x0"),
                ("uncond", self.uncond, "", "zeros", "clip-zero"),
                ("variant", self.variant, "", "stage1", "image", "temporal")):
            one_of(field, value, allowed)
        for least, names in ((1, ("batch", "noises", "accumulate", "log_every", "save_every", "validate_count",
                                  "frames", "every", "width", "height")),
                             (0, ("keep", "workers", "seed", "lora_rank", "weight_decay", "min_snr", "person",
                                  "clip_norm", "latent_noise", "first", "validate_every", "steps", "epochs"))):
            for name in names:
                where, group = ("train", t) if hasattr(t, name) else ("data", d)
                require(getattr(group, name) >= least, f"{where}.{name}",
                        f"is {getattr(group, name)}; expected {least} or more")
        for name in ("warmup", "ema", "drop_reference", "drop_pose"):
            require(0 <= getattr(t, name) <= 1, f"train.{name}", f"is {getattr(t, name)}; expected 0 to 1")
        require((t.steps > 0) != (t.epochs > 0), "train.steps",
                f"is {t.steps}, train.epochs {t.epochs}; expected one of them, 1 or more")
        require(0 < t.lr < math.inf, "train.lr", f"is {t.lr}; expected more than 0")
        require(len(t.betas) == 2 and all(0 <= beta < 1 for beta in t.betas), "train.betas",
                f"is {list(t.betas)}; expected two numbers from 0 to below 1")
        if d.kind == "dancers":
            require(d.clips > 0, "data.clips", "is missing; expected the number of dancers' clips")
            for name, value in (("path", d.path), ("validation", d.validation)):
                require(not value, f"data.{name}", f"is {value}, but data.kind is dancers, which are drawn; expected "
                        "data.kind tsv")
        else:
            require(d.path, "data.path", "is missing; expected the YAML file of a set of TSV files")
            require(d.validation or not t.validate_every, "data.validation", "is missing; expected the YAML file of a "
                    "set to validate on, or train.validate_every 0")
        require(len(d.crop) == 2 and 0 < d.crop[0] <= d.crop[1] <= 1 or not d.crop and not d.slide, "data.crop",
                f"is {list(d.crop)}; expected two shares of the area, as [0.5, 1.0]" + ", for data.slide" * d.slide)
        if self.stage != "diffusion":
            require(t.noises == 1, "train.noises", f"is {t.noises}; expected 1: only stage diffusion noises samples")
            require(d.frames == 1, "data.frames", f"is {d.frames}; expected 1: a VAE sees single pictures")
        require(self.stage == "decoder" or not t.latent_noise, "train.latent_noise",
                f"is {t.latent_noise}; expected 0, or stage decoder: an encoder would only speak louder")
        require(self.start or self.stage != "decoder", "start", "is missing; stage decoder goes on from the weights of "
                "a VAE")
        if self.model is None and not self.start:
            raise InputError("neither model nor start is given; expected a configuration, or weights to start from")


def load(path: str | Path, arguments: list[str] = ()) -> Recipe:
    """A YAML file as a Recipe, with `--train.lr=1e-4` arguments on top. Paths in it become paths from here."""
    path = Path(path)
    values = read_yaml(path)
    for text in [text for text in arguments if text.startswith("--model=") and text.endswith(".yaml")]:
        arguments, values["model"] = [other for other in arguments if other != text], text.removeprefix("--model=")
    if isinstance(values.get("model"), str):
        values["model"] = read_yaml(_found(path, values["model"]))
    asked = [name for name in ("steps", "epochs") if any(text.startswith(f"--train.{name}=") for text in arguments)]
    if len(asked) == 1 and isinstance(values.get("train"), dict):        # the one takes the other's place
        values["train"] = {name: value for name, value in values["train"].items() if name not in ("steps", "epochs")}
    try:
        recipe = from_dict(Recipe, override(values, list(arguments)))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    missing = [name for name in recipe.start if not _found(path, name).exists()]
    if missing:
        raise InputError(f"{path}: start: {missing[0]} is not there; it is what this stage goes on from "
                         "(the last checkpoint of the stage before, or downloaded weights)")
    place = {"start": tuple(str(_found(path, name)) for name in recipe.start),
             "out": recipe.out or f"output/{path.stem}"}
    data = {name: str(_found(path, value)) for name in ("path", "validation") if (value := getattr(recipe.data, name))}
    return replace(recipe, data=replace(recipe.data, **data), **place)


def lasting(recipe: Recipe) -> dict:
    """What must stay as it is when a run goes on: all but places, and how it is watched and saved."""
    values = to_dict(recipe)
    for group, names in ((values, ("out", "start")), (values["data"], ("path", "validation", "workers")),
                         (values["train"], ("log_every", "logger", "save_every", "keep", "validate_every",
                                            "validate_count"))):
        for name in names:
            del group[name]
    return values


def _found(beside: Path, name: str) -> Path:
    near = beside.parent / name
    return near if near.exists() else Path(name)
