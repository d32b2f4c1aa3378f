"""Judge: how good pictures are, by a protocol.

    dancers   every picture is known: the true frame of a held-out person in a held-out room and pose

    psnr, ssim     of the whole picture, ssim of its grey levels
    iou            of the silhouette, where a picture differs from the empty room by more than 0.10, with the mask
    colour         how wrong the mean colour of a region is: skin, hair, shirt, legs, shoes; in grey levels of 255
    shirt_legs     of these two alone
    background     how wrong a pixel is where nobody is
    hole           … and where the reference's person stood
"""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nanodisco import dancers, metrics, transforms, video
from nanodisco.disco import DisCo
from nanodisco.guidance import Guided
from nanodisco.sampling import frame_noise, sample
from nanodisco.temporal import fold, unfold

DIFFERENT = 0.10 * 255
REGIONS = {"colour": (dancers.SKIN, dancers.HAIR, dancers.SHIRT, dancers.LEGS, dancers.SHOES),
           "shirt_legs": (dancers.SHIRT, dancers.LEGS)}
BATCH = 16
FRAMES = 8                             # of the clip that a video model makes around a target


@dataclass(frozen=True)
class Pair:
    """A reference and the frame to make of it."""
    number: int                        # of the pair, which its noise follows from
    reference: dancers.Sample
    target: dancers.Sample
    who: tuple[int, int, int]          # seeds of the target's person, room and dance
    frame: int                         # of the dance

    def pose(self, later: int = 0) -> Image.Image:
        """Of the target, or of a frame so many before or after it."""
        size = len(self.target.picture)
        shown = self.target if later == 0 else dancers.sample(*self.who, self.frame + later, size)
        return Image.fromarray(dancers.pose_picture(shown.keypoints, size))


def pairs(count: int, seed: int, size: int, stranger: int = 0, person: int | None = None,
          same: bool = False) -> list[Pair]:
    """Held-out people, rooms and dances: frame 0 and another.

    stranger: the reference shows the person of so many pairs further on, in the same pose and room.
    person: all pairs are of this held-out person in their own room; only the dances differ.
    same: the frame to make is the reference itself, as in attribute pre-training.
    """
    found, first = [], dancers.HELD_OUT + seed * 10**6
    for i in range(first, first + count):
        frame = 0 if same else int(np.random.default_rng([i, 3]).integers(4, dancers.LOOP))
        shown, own = first + (i - first + stranger) % count, i
        if person is not None:
            shown = own = dancers.HELD_OUT + person
        found.append(Pair(i - first, dancers.sample(shown, own, own, 0, size), dancers.sample(own, own, i, frame, size),
                          (own, own, i), frame))
    return found


def scores(made: np.ndarray, of: list[Pair]) -> dict[str, float]:
    """made: uint8 (N, S, S, 3), a picture for each pair -> mean of each column"""
    truth = np.stack([pair.target.picture for pair in of])
    columns = {"psnr": list(metrics.psnr(made, truth)), "ssim": list(metrics.ssim(made, truth))}
    for picture, pair in zip(made.astype(np.float64), of):
        for name, value in _of_known(picture, pair).items():
            columns.setdefault(name, []).append(value)
    return {name: _mean([value for value in values if not np.isnan(value)]) for name, values in columns.items()}


def _of_known(picture: np.ndarray, pair: Pair) -> dict[str, float]:
    target, wrong = pair.target, np.abs(picture - pair.target.picture).mean(-1)
    person, before = target.mask > 127, pair.reference.mask > 127
    seen = np.abs(picture - target.background).max(-1) > DIFFERENT
    regions = {label: float(np.abs(picture[there].mean(0) - target.picture[there].mean(0)).mean())
               for label in REGIONS["colour"] if (there := target.labels == label).any()}
    found = {"iou": (seen & person).sum() / max((seen | person).sum(), 1)}
    for name, labels in REGIONS.items():
        found[name] = _mean([regions[label] for label in labels if label in regions])
    nobody = target.mask == 0
    return found | {"background": _mean(wrong[nobody]), "hole": _mean(wrong[before & nobody])}


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def imagined(model: DisCo, of: list[Pair], steps: int, cfg: float, seed: int,
             progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """What the model makes of each reference and pose.   -> uint8 (N, S, S, 3)

    A video model makes a clip of FRAMES of the dance, in which the target is the middle one.
    """
    size, made, clip = len(of[0].target.picture), [], model.config.clip
    around = range(-(FRAMES // 2), FRAMES - FRAMES // 2) if model.config.unet.temporal else range(1)
    for start in range(0, len(of), BATCH):
        part = of[start:start + BATCH]
        photos = [(Image.fromarray(pair.reference.picture), Image.fromarray(pair.reference.mask)) for pair in part]
        reference = torch.stack([transforms.reference(*photo, clip.image_size, crop=clip.crop) for photo in photos])
        background = torch.stack([transforms.background(*photo, (size, size)) for photo in photos])
        pose = None
        if model.pose is not None:
            pose = torch.stack([transforms.pose(pair.pose(later), (size, size)) for pair in part for later in around])
        numbers = [pair.number * len(around) + i for pair in part for i in range(len(around))]
        pictures = generated(model, reference, background, pose, numbers, steps, cfg, seed)
        made.append(transforms.to_frames(pictures[len(around) // 2::len(around)]))
        progress(len(part))
    return np.concatenate(made)


@torch.no_grad()
def generated(model: DisCo, reference: Tensor, background: Tensor, pose: Tensor | None, numbers: list[int],
              steps: int, cfg: float, seed: int, graph: bool | None = None) -> Tensor:
    """Sampled by DDIM. A clip's frames are adjacent: R references, R or R F poses.   -> (R F, 3, H, W) in [0, 1]

    reference (R, 3, S, S), background (R, 3, H, W), pose (R F, 3, H, W); `numbers` of the R F pictures: their noise.
    graph: see Guided.
    """
    factor, channels = model.config.vae.factor, model.config.vae.channels
    shape = (channels, background.shape[2] // factor, background.shape[3] // factor)
    shown = model.conditions(reference.to(model.device), background.to(model.device, model.dtype), None)
    guided = Guided(model, shown.tokens, shown.background, model.unconditional_tokens(shown.tokens), cfg,
                    graph=graph)
    z, frames = frame_noise(seed, numbers, shape).to(model.device), len(numbers) // len(reference)
    pose = None if pose is None else pose.to(model.device)
    if model.config.unet.temporal:
        z, pose = unfold(z, frames), None if pose is None else unfold(pose, frames)
    *_, step = sample(guided(pose), z, model.alpha_bars(), "ddim", steps, prediction=model.config.diffusion.prediction)
    return model.vae.to_picture(fold(step.z)[0].to(model.dtype))


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


def sheet(made: np.ndarray, of: list[Pair], with_pose: bool = True) -> list[np.ndarray]:
    """reference, pose (black if the model sees none), truth, picture, … of each pair"""
    return [frame for picture, pair in zip(made, of)
            for frame in (pair.reference.picture, np.asarray(pair.pose()) * np.uint8(with_pose), pair.target.picture,
                          picture)]


def write_sheet(path: Path, frames: list[np.ndarray]) -> None:
    """Two pairs a row, twice as large, the edges of pixels kept."""
    picture = Image.fromarray(video.contact_sheet(frames, columns=8))
    video.save(path, np.asarray(picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)))
