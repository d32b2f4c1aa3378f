"""Dance: one run of sample.py, from pictures on disk to pictures on disk.

    load the weights ─ encode reference and background once ─ for each batch of poses: sample, decode, write

The picture model makes each frame by itself, batch after batch, so a track of any length streams. The
video model makes a clip at once, in windows that overlap; of a long one the poses are held, a byte a number.
"""
import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from nanodisco import inputs, transforms, video
from nanodisco.config import ClipConfig, to_dict
from nanodisco.data import TsvDataset
from nanodisco.disco import DisCo
from nanodisco.distributed import device_of
from nanodisco.errors import InputError
from nanodisco.files import write_text
from nanodisco.guidance import Guided, windowed, windows
from nanodisco.loading import for_inference, load, refuse_unfinished
from nanodisco.memo import Row, of_each
from nanodisco.sampling import frame_noise, sample, timesteps
from nanodisco.temporal import fold, unfold

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SEEN = 256                             # pixels of height that video.* is enlarged towards, so that one can see it
AT_ONCE = 4                            # pictures in the VAE decoder, whose activations are the largest of all
Say = Callable[[str], None]


@dataclass
class Shown:
    """What a batch of frames is made from; `names` are those of its files."""
    names: list[str]
    reference: Tensor                  # (R, 3, S, S) for CLIP
    background: Tensor                 # (R, 3, H, W) in [-1, 1]
    pose: np.ndarray                   # (B, H, W, 3) uint8
    photo: np.ndarray                  # (B or 1, H, W, 3) uint8, to show beside the result
    target: Tensor | None = None       # (B, 3, H, W) in [-1, 1], where it is known


def dance(given: Namespace, say: Say) -> int:
    """Carry out what the command line asks for.   -> the number of frames made"""
    given.device = device_of(given.device)
    given.dtype = given.dtype or ("fp32" if given.device == "cpu" else "bf16")
    source = Set(given, say) if given.data else Track(given, say)
    overrides = [f"--{name}={value}" for name, value in (("tokens", given.tokens), ("uncond", given.uncond)) if value]
    paths = [path for path in (given.sd, given.weights) if path]
    refuse_unfinished(paths[-1])
    model = load(*paths, overrides=overrides, dtype=DTYPES[given.dtype], seed=given.seed, say=say)
    if given.cfg > 1 and not given.uncond:
        say(f"guidance: without a reference the model sees {model.config.uncond} (--uncond)")
    factor = model.config.vae.factor
    for side, pixels in (("-W", given.width), ("-H", given.height)):
        if pixels % factor:
            raise InputError(f"{side} {pixels}; expected a multiple of {factor}, the latent factor of these weights")
    if (given.width, given.height) != model.config.size:
        say("these weights were trained on pictures of {}x{}; other sizes may look worse".format(*model.config.size))
    try:
        with torch.inference_mode():
            return _run(for_inference(model, given.device, say, given.compile), given, source)
    except torch.OutOfMemoryError as error:
        raise InputError(f"{given.device} is out of memory ({str(error).splitlines()[0]}); a smaller --batch, now "
                         f"{given.batch}, or smaller -W -H need less") from None


# ---- What to make -------------------------------------------------------------------------------------------

class Track:
    """One reference, many poses."""

    def __init__(self, given: Namespace, say: Say):
        self.size = (given.width, given.height)
        self.photo, self.mask = inputs.photo(given.ref, given.ref_mask, say)
        self.binary = given.ref_mask == "black"                          # as the official demo
        self.scene, self.hole, self.binary_hole = self.photo, self.mask, self.binary
        if given.background:
            self.scene, self.hole = inputs.scene(given.background, given.background_mask, say)
            self.binary_hole = given.background_mask == "black"
        self.poses = inputs.poses(given.poses, _canvas(given, self.photo.size), given.align, say)
        self.length = min(given.length or len(self.poses), len(self.poses))

    def batches(self, given: Namespace, clips: bool) -> list[range]:
        return _cut(self.length, self.length if clips else given.batch)

    def shown(self, frames: range, clip: ClipConfig, together: bool) -> Shown:
        pose = np.stack([transforms.frame(self.poses[i], self.size) for i in frames])
        return Shown([f"{i:06}" for i in frames],
                     transforms.reference(self.photo, self.mask, clip.image_size, self.binary, clip.crop)[None],
                     transforms.background(self.scene, self.hole, self.size, self.binary_hole)[None], pose,
                     transforms.frame(self.photo, self.size)[None])


class Set:
    """Rows of a validation set; --ref replaces their people, --background their scenes, --poses their poses."""

    def __init__(self, given: Namespace, say: Say):
        self.size, self.rows = (given.width, given.height), TsvDataset(given.data)
        self.photo = inputs.photo(given.ref, given.ref_mask, say) if given.ref else None
        self.scene = inputs.scene(given.background, given.background_mask, say) if given.background else None
        self.poses = inputs.poses(given.poses, _canvas(given, self.size), given.align, say) if given.poses else None
        self.binary = bool(given.ref) and given.ref_mask == "black"
        self.binary_hole = bool(given.background) and given.background_mask == "black"
        count = len(self.rows) if self.poses is None else min(len(self.rows), len(self.poses))
        self.length = min(given.length or count, count)

    def batches(self, given: Namespace, clips: bool) -> list[range]:
        if not clips:
            return _cut(self.length, given.batch)
        clips = self.rows.clips(given.window, given.every or given.window)
        found = [clip for clip in clips if clip.stop <= self.length]
        if not found:
            raise InputError(f"{given.data}: no clip of --window {given.window} frames in the first {self.length} rows")
        return found

    def shown(self, frames: range, clip: ClipConfig, together: bool) -> Shown:
        rows = [self.rows[i] for i in frames]
        alike = together or (self.photo and self.scene) or len({self.rows.video(i) for i in frames}) == 1
        own = [(row.reference, row.mask) for row in (rows[:1] if alike else rows)]       # each is encoded
        photos, scenes = ([given] * len(own) if given else own for given in (self.photo, self.scene))
        poses = [row.pose if self.poses is None else self.poses[i] for i, row in zip(frames, rows)]
        return Shown([row.key for row in rows],
                     torch.stack([transforms.reference(*photo, clip.image_size, self.binary, clip.crop)
                                  for photo in photos]),
                     torch.stack([transforms.background(*scene, self.size, self.binary_hole) for scene in scenes]),
                     np.stack([transforms.frame(pose, self.size) for pose in poses]),
                     np.stack([transforms.frame(photo[0], self.size) for photo in photos]),
                     torch.stack([transforms.target(row.target, self.size) for row in rows]))


def _canvas(given: Namespace, usual: tuple[int, int]) -> tuple[int, int]:
    """What keypoints refer to where their file does not say.   -> width, height"""
    return tuple(map(int, given.pose_size.split("x"))) if given.pose_size else usual


def _cut(length: int, size: int) -> list[range]:
    return [range(first, min(first + size, length)) for first in range(0, length, size)]


# ---- Making it ------------------------------------------------------------------------------------------------

def _run(model: DisCo, given: Namespace, source: Track | Set) -> int:
    video_model = model.config.unet.temporal
    noise = Noise(given, model)
    batches = source.batches(given, video_model)
    alpha_bars = model.alpha_bars()
    calls = timesteps(given.scheduler, given.steps, len(alpha_bars), zero_snr=bool(alpha_bars[-1] == 0))
    times = of_each(calls, model.device)
    guided = seen = None
    with Results(given, model) as results, tqdm(total=len(calls) * len(batches), unit="step", disable=None) as bar:
        for frames in batches:
            shown = source.shown(frames, model.config.clip, together=video_model)
            if seen is None or not all(map(torch.equal, seen, (shown.reference, shown.background))):
                guided, seen = _guided(model, given, shown, noise, times), (shown.reference, shown.background)
            for step in _steps(model, given, guided, shown, noise, frames):
                bar.update()
            results.write(shown, _pictures(model, fold(step.z)[0]))
    return results.count


def _guided(model: DisCo, given: Namespace, shown: Shown, noise: "Noise", times: dict[int, Row]) -> Guided:
    """Encode reference and background, once for all batches that show the same."""
    device = model.device
    seen = model.conditions(shown.reference.to(device), shown.background.to(device, model.dtype), None,
                            noise.background_noise(len(shown.background)))
    uncond = model.unconditional_tokens(seen.tokens)
    return Guided(model, seen.tokens, seen.background, uncond, given.cfg, given.pose_scale, given.background_scale,
                  cache=not given.no_cache, times=times, compiled=given.compile)


def _steps(model: DisCo, given: Namespace, guided: Guided, shown: Shown, noise: "Noise", frames: range) -> Iterator:
    def pose(part: range) -> Tensor:                                     # (B, 3, H, W) in [0, 1]
        return transforms.from_frames(shown.pose[part.start:part.stop], model.device).to(model.dtype)

    if model.config.unet.temporal:
        parts = windows(len(frames), given.window, given.overlap)
        predict = windowed(guided, lambda part: pose(part).transpose(0, 1)[None], parts)
    else:
        predict = guided(pose(range(len(frames))) if model.pose is not None else None)
    return sample(predict, noise.latents(frames), model.alpha_bars(), given.scheduler, given.steps, given.eta,
                  model.config.diffusion.prediction, noise=lambda i: noise.step_noise(frames, i))


def _pictures(model: DisCo, z: Tensor) -> Iterator[Tensor]:
    """Decode a few at a time.   (B, C, h, w) -> pieces of (B, 3, H, W) in [0, 1] on the CPU"""
    for part in z.split(AT_ONCE):
        picture = model.vae.to_picture(part.to(model.dtype)).float().cpu()
        if not picture.isfinite().all():
            raise InputError("the picture is not made of finite numbers; --dtype fp32, or scales nearer to 1, may help")
        yield picture


class Noise:
    """All random numbers of a run: from the seed, or from a file."""

    def __init__(self, given: Namespace, model: DisCo):
        self.given, self.clip, self.device = given, model.config.unet.temporal, model.device
        factor = model.config.vae.factor
        self.shape = (model.config.vae.channels, given.height // factor, given.width // factor)
        self.file = _latents(given.latents, self.shape) if given.latents else {}

    def latents(self, frames: range) -> Tensor:
        """(B, C, h, w), or (1, C, F, h, w) for the video model"""
        if "latents" in self.file:
            noise = self._of_file("latents", self.file["latents"], frames)
        elif self.given.noise == "official":
            generator = torch.Generator().manual_seed(self.given.seed)
            noise = torch.randn(len(frames), *self.shape, generator=generator)
        else:
            shared = [0] * len(frames)
            noise = frame_noise(self.given.seed, shared if self.given.noise == "shared" else frames, self.shape)
        return self._placed(noise)

    def step_noise(self, frames: range, step: int) -> Tensor:
        """What the sampler adds at this step: a frame's own, whatever --noise says of the start."""
        if "step_noise" in self.file:
            if step >= len(self.file["step_noise"]):
                raise InputError(f"{self.given.latents}: step_noise ends before step {step}")
            return self._placed(self._of_file("step_noise", self.file["step_noise"][step], frames))
        return self._placed(frame_noise(self.given.seed, frames, self.shape, step))

    def background_noise(self, count: int) -> Tensor | None:
        """For the background's posterior (R, C, h, w); None where its mean is taken."""
        if "background_noise" in self.file:
            return self.file["background_noise"][:1].expand(count, *self.shape).to(self.device)
        if self.given.posterior == "mean":
            return None
        return frame_noise(self.given.seed, [2**31] * count, self.shape).to(self.device)

    def _placed(self, noise: Tensor) -> Tensor:
        noise = noise.to(self.device)
        return unfold(noise, len(noise)) if self.clip else noise

    def _of_file(self, name: str, noise: Tensor, frames: range) -> Tensor:
        if frames.stop > len(noise):
            raise InputError(f"{self.given.latents}: {name} has {len(noise)} frames; {frames.stop} were asked for (-L)")
        return noise[frames.start:frames.stop]


def _latents(path: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a safetensors file ({error})") from None
    for name, leading in (("latents", 1), ("background_noise", 1), ("step_noise", 2)):
        if name in tensors and (tensors[name].ndim != leading + 3 or tensors[name].shape[leading:] != shape):
            raise InputError(f"{path}: {name} is {list(tensors[name].shape)}; expected {'… x ' * leading}"
                             f"{' x '.join(map(str, shape))}")
    if not tensors.keys() & {"latents", "background_noise", "step_noise"}:
        raise InputError(f"{path} holds {', '.join(tensors) or 'nothing'}; expected `latents`")
    return {name: tensor.float() for name, tensor in tensors.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:                                         # run from its folder, without pip
        return "not installed"


# ---- Writing it -----------------------------------------------------------------------------------------------

class Results:
    """The output folder. Each file in it appears whole: pictures at once, videos when the run has ended.

    Pictures stay if what comes after them fails; videos do not appear then.
    """

    def __init__(self, given: Namespace, model: DisCo):
        self.given, self.out, self.open = given, Path(given.out), ExitStack()
        self.official, self.temporal = given.layout == "disco", model.config.unet.temporal
        self.writers, self.count = [], 0
        self.settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        self.settings |= {"versions": {name: _version(name) for name in ("torch", "nanodisco")},
                          "threads": torch.get_num_threads(), "model": to_dict(model.config)}

    def __enter__(self) -> "Results":
        write_text(self.out / "settings.yaml", yaml.safe_dump(self.settings, sort_keys=False))
        formats = [] if self.official else self.given.format.split(",")
        for name in (name for name in formats if name != "png"):
            for what in ("video", "result"):
                writer = video.writer(self.out / f"{what}.{name}", self.given.fps)
                self.writers.append((what, self.open.enter_context(writer)))
        self.folder = self.out / "frames" if "png" in formats else None
        if self.official:
            self._official_settings()
        return self

    def __exit__(self, *error) -> None:
        self.open.__exit__(*error)
        if error[0] and not self.count:                                  # there is nothing to keep
            shutil.rmtree(self.out, ignore_errors=True)

    def write(self, shown: Shown, pictures: Iterable[Tensor]) -> None:
        """The frames of one batch, piece after piece.   pieces of (B, 3, H, W) in [0, 1]"""
        if self.official:
            self._official_references(shown)
        done = 0
        for piece in pictures:
            frames, here = transforms.to_frames(piece), slice(done, done + len(piece))
            if self.official:
                self._official_frames(shown, here, frames)
            photos = np.broadcast_to(shown.photo if len(shown.photo) == 1 else shown.photo[here], frames.shape)
            for frame, pose, photo in zip(frames, shown.pose[here], photos):
                beside = video.enlarged(video.side_by_side(photo, pose, frame), SEEN) if self.writers else None
                for what, write in self.writers:
                    write(beside if what == "video" else frame)
                if self.folder:
                    video.save(self.folder / f"{self.count:06}.png", frame)
                self.count += 1
            done = here.stop

    # official: the folders of its visualising evaluation, names to the letter

    def _official_references(self, shown: Shown) -> None:
        # official: the picture model's reference is un-normalised as if it were in [-1, 1], which gives wrong colours
        reference = transforms.from_clip(shown.reference) if self.temporal else shown.reference / 2 + 0.5
        names = shown.names[:1] if self.temporal else shown.names        # a clip has one
        for folder, pictures in (("ref", reference.clamp(0, 1)), ("ref_control", shown.background / 2 + 0.5)):
            frames = transforms.to_frames(pictures)
            for key, picture in zip(names, np.broadcast_to(frames, (len(names), *frames.shape[1:]))):
                video.save(self.out / folder / official_name(key), picture)

    def _official_frames(self, shown: Shown, here: slice, frames: np.ndarray) -> None:
        given = self.given
        pred = f"pred_gs{float(given.cfg)}_scale-cond{float(given.pose_scale)}-ref{float(given.background_scale)}"
        target = transforms.to_frames(shown.target[here] / 2 + 0.5)
        for folder, pictures in (("gt", target), ("cond", shown.pose[here]), (pred, frames)):
            for key, picture in zip(shown.names[here], pictures):
                name = official_name(key)
                if self.temporal:
                    name = Path(official_name(shown.names[0])).stem + "/" + official_frame_name(key)
                video.save(self.out / folder / name, picture)

    def _official_settings(self) -> None:
        given = self.given
        settings = {"controlnet_conditioning_scale_cond": float(given.pose_scale),
                    "controlnet_conditioning_scale_ref": float(given.background_scale),
                    "eval_save_filename": self.out.name, "guidance_scale": float(given.cfg),
                    "img_size": [given.height, given.width], "pos_resize_img": False, "seed": given.seed,
                    "visu_save": False}
        write_text(self.out / "Model_Setting.json", json.dumps(settings, indent=4))


def official_name(key: str) -> str:
    """TiktokDance_00335_0001.png -> TiktokDance_00335_0001png.png"""
    return key.replace("/", "").replace(".", "").replace(" ", "_") + ".png"


def official_frame_name(key: str) -> str:
    """Of a frame in the folder of its clip: the key, with an extension if it has none."""
    return key if Path(key).suffix else key + ".png"
