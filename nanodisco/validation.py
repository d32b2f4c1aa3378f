"""Validation: what is seen of a run while it trains, and its curve when it has ended.

    RUN/log.jsonl                      a line of numbers for each step that is logged, and for each validation
    RUN/validation/step-0000500.png    reference | pose | truth | picture, of held-out samples
    RUN/loss.png                       the loss, step by step

Validation draws nothing from the run's random numbers: a run is the same with and without.
"""
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from nanodisco import dancers, judge, metrics, transforms, video
from nanodisco.data import Training
from nanodisco.disco import DisCo
from nanodisco.errors import InputError
from nanodisco.recipe import Recipe
from nanodisco.temporal import fold

SEED = 899                             # of the held-out dancers: not those that evaluate.py takes by itself
STEPS, GUIDANCE = 20, 1.5              # guidance where references are dropped in training, else 1


class Log:
    """The run's log file and, if asked for, TensorBoard or wandb beside it.

    What TensorBoard has of later steps is void from now on; wandb has a run of its own for each piece.
    """

    def __init__(self, folder: Path, recipe: Recipe, step: int):
        self.path = folder / "log.jsonl"
        openers = {"": lambda *_: lambda line: None, "tensorboard": _tensorboard, "wandb": _wandb}
        self.more = openers[recipe.train.logger](folder, step)

    def write(self, line: dict) -> None:
        """A dict of numbers with `step` among them. Shown too, where nobody watches the bar."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if not sys.stderr.isatty():                                      # where tqdm shows no bar
            print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                            for name, value in line.items() if value is not None), flush=True)
        self.more(line)


def _tensorboard(folder: Path, step: int) -> Callable[[dict], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("train.logger: TensorBoard is not installed; pip install tensorboard") from None
    writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(line: dict) -> None:
        for name, value in line.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, line["step"])
        writer.flush()
    return write


def _wandb(folder: Path, step: int) -> Callable[[dict], None]:
    try:
        import wandb
    except ImportError:
        raise InputError("train.logger: wandb is not installed; pip install wandb") from None
    run = wandb.init(project="nanodisco", name=folder.name, dir=folder)
    return lambda line: run.log(line, step=line["step"])


def validate(model: DisCo, recipe: Recipe, picture: Path) -> dict[str, float]:
    """Make held-out samples, write them beside the truth, and score them.   -> {"val_psnr": …}"""
    with torch.no_grad():
        of = _of_dancers if recipe.data.kind == "dancers" else _of_rows
        found, frames = of(model, recipe)
    judge.write_sheet(picture, frames)
    return {f"val_{name}": round(value, 4) for name, value in found.items() if not math.isnan(value)}


def _guidance(recipe: Recipe) -> float:
    return GUIDANCE if recipe.train.drop_reference else 1.0


def _of_dancers(model: DisCo, recipe: Recipe) -> tuple[dict, list]:
    first = recipe.data.first - dancers.HELD_OUT                         # one held-out person's own model?
    of = judge.pairs(recipe.train.validate_count, SEED, recipe.data.height, same=model.pose is None,
                     person=first if first >= 0 else None)
    made = judge.imagined(model, of, STEPS, _guidance(recipe), SEED) if recipe.stage == "diffusion" else (
        judge.through_vae(model, of))
    return judge.scores(made, of), judge.sheet(made, of, model.pose is not None)


def _of_rows(model: DisCo, recipe: Recipe) -> tuple[dict, list]:
    """Rows of `data.validation`, from all over the set."""
    config = replace(recipe.data, path=recipe.data.validation, crop=(), slide=False)
    rows = Training(config, model.config.clip, model.pose is not None, recipe.train.seed)
    places = np.linspace(0, len(rows) - 1, min(recipe.train.validate_count, len(rows))).astype(int)
    shown, frames, columns = recipe.data.frames, [], {"psnr": [], "ssim": []}
    for number, i in enumerate(places):
        sample = {name: tensor[None] for name, tensor in rows[0, int(i)].items()}
        target, pose = fold(sample["target"])[0], fold(sample["pose"])[0] if "pose" in sample else None
        if recipe.stage != "diffusion":
            made = model.vae.to_picture(model.vae.to_latent(target.to(model.device)))
        else:
            made = judge.generated(model, sample["reference"], sample["background"], pose,
                                   list(range(number * shown, (number + 1) * shown)), STEPS, _guidance(recipe), SEED,
                                   graph=False)          # one for each row would cost more than it saves
        truth, made = transforms.to_frames(target / 2 + 0.5), transforms.to_frames(made)
        columns["psnr"] += list(metrics.psnr(made, truth))
        columns["ssim"] += list(metrics.ssim(made, truth))
        size = (truth.shape[2], truth.shape[1])
        photo = Image.fromarray(transforms.to_frames(transforms.from_clip(sample["reference"]).clamp(0, 1))[0])
        drawn = transforms.to_frames(pose) if pose is not None else np.zeros_like(truth)
        for k in range(len(truth)):
            frames += [np.asarray(photo.resize(size)), drawn[k], truth[k], made[k]]
    return {name: float(np.mean(values)) for name, values in columns.items()}, frames


# ---- The curve -------------------------------------------------------------------------------------------------

WIDE, HIGH, LEFT, BELOW, FINE = 900, 480, 80, 50, 3      # pixels; drawn FINE times as large and reduced
SMOOTH = 0.05                                            # share of the points that a running mean is taken of


def curve(log: Path, picture: Path) -> None:
    """The loss of the logged steps, and its running mean, over a logarithmic axis."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    points = [(line["step"], line["loss"]) for line in lines if (line.get("loss") or 0) > 0]
    if len(points) < 2:
        return
    steps, losses = (np.array(values, float) for values in zip(*points))
    low, high = np.log(losses.min()) - 0.05, np.log(losses.max()) + 0.05
    paper = Image.new("RGB", (WIDE * FINE, HIGH * FINE), "white")
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(size=14 * FINE)

    def at(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (WIDE - LEFT - 20)
        y = 20 + (high - np.log(loss)) / (high - low) * (HIGH - BELOW - 20)
        return x * FINE, y * FINE
    for loss in _ticks(np.exp(low), np.exp(high)):
        draw.line([at(steps[0], loss), at(steps[-1], loss)], "#dddddd", FINE)
        draw.text((at(steps[0], loss)[0] - 8 * FINE, at(steps[0], loss)[1]), f"{loss:g}", "#444444", font, anchor="rm")
    for step in _marks(steps[0], steps[-1]):
        draw.text((at(step, 1.0)[0], (HIGH - BELOW + 12) * FINE), f"{step:g}", "#444444", font, anchor="mt")
    draw.text((WIDE // 2 * FINE, (HIGH - 6) * FINE), "step", "#444444", font, anchor="mb")
    draw.text((8 * FINE, 8 * FINE), "loss", "#444444", font, anchor="lt")
    draw.line([at(*point) for point in zip(steps, losses)], "#b8cbe4", FINE)
    width = max(int(len(losses) * SMOOTH), 1)
    mean = np.convolve(losses, np.full(width, 1 / width), mode="valid")
    draw.line([at(*point) for point in zip(steps[width - 1:], mean)], "#1f4e8c", 2 * FINE)
    video.save(picture, np.asarray(paper.reduce(FINE)))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between the two: 1, 2, 5 times powers of ten; as `_marks` if those are fewer than three."""
    ticks = [float(f"{digit * 10.0 ** power:.3g}") for power in range(-12, 12) for digit in (1, 2, 5)]
    found = [tick for tick in ticks if low <= tick <= high]
    return found if len(found) >= 3 else [float(f"{tick:.6g}") for tick in _marks(low, high)]


def _marks(first: float, last: float) -> list[float]:
    """Three to eight multiples of 1, 2 or 5 times a power of ten between the two."""
    power = 10.0 ** math.floor(math.log10(last - first))
    apart = next(power * part for part in (2, 1, 0.5, 0.2) if (last - first) / (power * part) >= 3)
    return list(np.arange(math.ceil(first / apart), math.floor(last / apart) + 1) * apart)
