"""Judge: how good pictures are, by a protocol.

    dancers   every picture is known: the true frame of a held-out person in a held-out room and pose

    psnr, ssim     of the whole picture, ssim of its grey levels
    iou            of the silhouette, where a picture differs from the empty room by more than 0.10, with the mask
    colour         how wrong the mean colour of a region is: skin, hair, shirt, legs, shoes; in grey levels of 255
    shirt_legs     of these two alone
    background     how wrong a pixel is where nobody is, nor was in the reference
    hole           how wrong a pixel is where the reference's person stood and nobody is now
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nanodisco import dancers, metrics, transforms, video
from nanodisco.disco import DisCo
from nanodisco.files import appearing
from nanodisco.guidance import Guided
from nanodisco.sampling import frame_noise, sample

DIFFERENT = 0.10 * 255
REGIONS = {"colour": (dancers.SKIN, dancers.HAIR, dancers.SHIRT, dancers.LEGS, dancers.SHOES),
           "shirt_legs": (dancers.SHIRT, dancers.LEGS)}
BATCH = 16


@dataclass(frozen=True)
class Pair:
    """A reference and the frame to make of it."""
    number: int                        # of the pair, which its noise follows from
    reference: dancers.Sample
    target: dancers.Sample


def pairs(count: int, seed: int, size: int, stranger: int = 0) -> list[Pair]:
    """Held-out people, rooms and dances: frame 0 and another.

    stranger: the reference shows the person of so many pairs further on, in the same pose and room.
    """
    found, first = [], dancers.HELD_OUT + seed * 10**6
    for i in range(first, first + count):
        frame = int(np.random.default_rng([i, 3]).integers(4, dancers.LOOP))
        shown = first + (i - first + stranger) % count
        found.append(Pair(i - first, dancers.sample(shown, i, i, 0, size), dancers.sample(i, i, i, frame, size)))
    return found


def scores(made: np.ndarray, of: list[Pair]) -> dict[str, float]:
    """made: uint8 (N, S, S, 3), a picture for each pair -> mean of each column"""
    truth = np.stack([pair.target.picture for pair in of])
    columns = {"psnr": list(metrics.psnr(made, truth)), "ssim": list(metrics.ssim(made, truth))}
    for picture, pair in zip(made.astype(np.float64), of):
        for name, value in _of_known(picture, pair).items():
            columns.setdefault(name, []).append(value)
    return {name: float(np.nanmean(values)) for name, values in columns.items()}


def _of_known(picture: np.ndarray, pair: Pair) -> dict[str, float]:
    target, wrong = pair.target, np.abs(picture - pair.target.picture).mean(-1)
    person, before = target.mask > 127, pair.reference.mask > 127
    seen = np.abs(picture - target.background).max(-1) > DIFFERENT
    regions = {label: float(np.abs(picture[there].mean(0) - target.picture[there].mean(0)).mean())
               for label in REGIONS["colour"] if (there := target.labels == label).any()}
    found = {"iou": (seen & person).sum() / max((seen | person).sum(), 1)}
    for name, labels in REGIONS.items():
        found[name] = _mean([regions[label] for label in labels if label in regions])
    clear = (target.mask == 0) & (pair.reference.mask == 0)
    return found | {"background": _mean(wrong[clear]), "hole": _mean(wrong[before & ~person & (target.mask == 0)])}


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def imagined(model: DisCo, of: list[Pair], steps: int, cfg: float, seed: int,
             progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """What the model makes of each reference and pose.   -> uint8 (N, S, S, 3)"""
    size, made, clip = len(of[0].target.picture), [], model.config.clip
    factor, channels = model.config.vae.factor, model.config.vae.channels
    for start in range(0, len(of), BATCH):
        part = of[start:start + BATCH]
        photos = [(Image.fromarray(pair.reference.picture), Image.fromarray(pair.reference.mask)) for pair in part]
        reference = torch.stack([transforms.reference(*photo, clip.image_size, crop=clip.crop) for photo in photos])
        background = torch.stack([transforms.background(*photo, (size, size)) for photo in photos])
        pose = torch.stack([transforms.pose(Image.fromarray(dancers.pose_picture(pair.target.keypoints, size)),
                                            (size, size)) for pair in part])
        with torch.inference_mode():
            shown = model.conditions(reference.to(model.device), background.to(model.device, model.dtype), None)
            guided = Guided(model, shown.tokens, shown.background, model.unconditional_tokens(shown.tokens), cfg)
            noise = frame_noise(seed, [pair.number for pair in part], (channels, size // factor, size // factor))
            walk = sample(guided(pose.to(model.device)), noise.to(model.device), model.alpha_bars(), "ddim", steps,
                          prediction=model.config.diffusion.prediction)
            *_, step = walk
            pictures = model.vae.to_picture(step.z.to(model.dtype))
        made.append(transforms.to_frames(pictures))
        progress(len(part))
    return np.concatenate(made)


def through_vae(model: DisCo, of: list[Pair]) -> np.ndarray:
    """The true frames, encoded and decoded: no model of these latents can do better.   -> uint8 (N, S, S, 3)"""
    made = []
    for start in range(0, len(of), BATCH):
        frames = [Image.fromarray(pair.target.picture) for pair in of[start:start + BATCH]]
        x = torch.stack([transforms.target(frame, frame.size) for frame in frames]).to(model.device, model.dtype)
        with torch.inference_mode():
            made.append(transforms.to_frames(model.vae.to_picture(model.vae.to_latent(x))))
    return np.concatenate(made)


def copied(of: list[Pair]) -> np.ndarray:
    """The reference as it is.   -> uint8 (N, S, S, 3)"""
    return np.stack([pair.reference.picture for pair in of])


def write_sheet(path: Path, made: np.ndarray, of: list[Pair]) -> None:
    """Reference | pose | truth | picture, two pairs a row, twice as large."""
    frames = []
    for picture, pair in zip(made, of):
        pose = dancers.pose_picture(pair.target.keypoints, len(picture))
        frames += [pair.reference.picture, pose, pair.target.picture, picture]
    sheet = Image.fromarray(video.contact_sheet(frames, columns=8))
    with appearing(path) as place:
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(place)
