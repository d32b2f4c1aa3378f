"""From one photo and a track of poses to a video.

    python sample.py                                                      # a synthetic dancer, by the small model
    python sample.py --ref me.png --poses dir/                            # a photo with transparency
    python sample.py --sd sd-image-variations-diffusers --weights mp_rank_00_model_states.pt \\
                     --ref me.jpg --ref-mask mask.png --background beach.jpg --poses dance.json
"""
import argparse
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

from nanodisco import config
from nanodisco.errors import InputError, run

ROOT = Path(__file__).parent
NANO = ROOT / "weights" / "nano"
EXAMPLE = {"ref": NANO / "example/reference.png", "background": NANO / "example/background.png",
           "poses": NANO / "example/dance.json"}
WEIGHTS = (ROOT / "weights" / "disco", NANO)             # the first that is there, where --weights names none
SCHEDULERS = ("ddim", "ddpm", "pndm", "dpm++")
FORMATS = ("mp4", "gif", "webp", "png")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="sample.py", description="A person from a photo dances a track of poses.",
                                  epilog="docs/from-disco.md has these flags beside those of the official program.")
    top.add_argument("--ref", metavar="IMG", help="photo of the person; without it and --poses the shipped "
                     "example dances")
    top.add_argument("--ref-mask", metavar="IMG|black", help="white is the person; black: the person was cut out on "
                     "black; default: the photo's transparency, else MediaPipe's")
    top.add_argument("--background", metavar="IMG", help="default: the photo without the person")
    top.add_argument("--background-mask", metavar="IMG|black", help="white (or what is black) is a hole to be filled; "
                     "default: what is transparent")
    top.add_argument("--poses", metavar="DIR|JSON|TSV|VIDEO", help="pose pictures; OpenPose, DWPose or "
                     "COCO keypoints; a video, if MediaPipe is installed")
    top.add_argument("--pose-size", metavar="WxH", help="frame size of keypoints that do not say it (default: --ref's)")
    top.add_argument("--align", metavar="JSON", help="move the track to where this pose, the reference's own, stands")
    top.add_argument("--data", metavar="YAML", help="a validation set of TSV files instead of --ref and --poses; "
                     "--ref, --background and --poses replace the set's people, scenes and poses")
    top.add_argument("--layout", choices=("disco",), help="with --data: the folders of the official evaluation")
    top.add_argument("--weights", metavar="DIR|FILE", help="default: weights/disco if it is there, else weights/nano")
    top.add_argument("--sd", metavar="DIR", help="Stable Diffusion folder that --weights comes on top of")
    top.add_argument("-W", "--width", type=int, help="pixels of the result (default: as the weights' "
                     "config.yaml says, else 256)")
    top.add_argument("-H", "--height", type=int, help="the same")
    top.add_argument("-L", "--length", type=int, metavar="FRAMES", help="make only the first so many frames")
    top.add_argument("--steps", type=int, help="sampling steps (default 50; of the example 20)")
    top.add_argument("--cfg", type=float, default=1.5, help="guidance; 1 is none and twice as fast (default 1.5)")
    top.add_argument("--scheduler", choices=SCHEDULERS, default="ddim", help="default ddim")
    top.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 no noise, 1 as ddpm (default 0)")
    top.add_argument("--seed", type=int, default=42, help="default 42")
    top.add_argument("--noise", choices=("frame", "shared", "official"), help="start from noise of each frame's own, "
                     "the same for all, or one reseeded generator a batch (default frame; of the example shared)")
    top.add_argument("--latents", metavar="FILE", help="safetensors with `latents` to start from (F, C, h, w), and "
                     "perhaps `background_noise` (1, C, h, w) and `step_noise` (steps, F, C, h, w)")
    top.add_argument("--posterior", choices=("mean", "sample"), default="mean", help="the VAE's latent of the "
                     "background: its mean, or a random draw as in the official program (default mean)")
    top.add_argument("--uncond", choices=("zeros", "clip-zero"), help="what guidance shows in place of the reference "
                     "(default: as the weights say; official weights do not, and get zeros)")
    top.add_argument("--tokens", choices=("local", "local-clip", "global"), help="what CLIP gives of the photo: all "
                     "tokens by the trained or by CLIP's own projection, or one (default: as the weights say)")
    top.add_argument("--pose-scale", type=float, default=1.0, help="strength of the pose net (default 1)")
    top.add_argument("--background-scale", type=float, default=1.0, help="strength of the background net (default 1)")
    top.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, bf16 on a GPU")
    top.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default auto)")
    top.add_argument("--batch", type=int, default=4, help="picture model: frames made together (default 4)")
    top.add_argument("--fps", type=float, default=8.0, help="of the video (default 8)")
    top.add_argument("--window", type=int, default=16, help="video model: frames it sees at once (default 16)")
    top.add_argument("--overlap", type=int, help="video model: frames that windows share (default 4, or all but one)")
    top.add_argument("--every", type=int, metavar="ROWS", help="video model with --data: rows between clips; "
                     "1 as the official evaluation (default: --window, so that clips do not overlap)")
    top.add_argument("--format", default="mp4,png", help=f"any of {','.join(FORMATS)}; png: a folder (default mp4,png)")
    top.add_argument("--no-cache", action="store_true", help="compute everything at each step, as the official code")
    top.add_argument("--compile", action="store_true", help="compile the networks first (torch.compile): minutes of "
                     "waiting; what it gains on a GPU has not been measured yet")
    top.add_argument("--out", metavar="DIR", help="a new folder (default: output/<date>-<time>-<seed>)")
    return top


def judge(given: argparse.Namespace) -> None:
    """All that can be refused before torch is imported."""
    if not (given.data or given.ref or given.poses) and EXAMPLE["ref"].exists():
        of_example(given)
    given.steps, given.noise = 50 if given.steps is None else given.steps, given.noise or "frame"
    if not given.data and not (given.ref and given.poses):
        needed = {"--ref IMG": given.ref, "--poses DIR": given.poses}
        missing = " and ".join(flag for flag, value in needed.items() if not value)
        raise InputError(f"{missing} missing; expected a photo of a person and the poses to dance (or --data YAML)")
    if given.layout and not given.data:
        raise InputError("--layout disco needs --data YAML")
    if given.overlap is None:
        given.overlap = max(min(4, given.window - 1), 0)
    for flag, value, low, high in (("--steps", given.steps, 1, 1000), ("--batch", given.batch, 1, 4096),
                                   ("--length", given.length, 1, None), ("--width", given.width, 8, 8192),
                                   ("--height", given.height, 8, 8192), ("--window", given.window, 1, None),
                                   ("--every", given.every, 1, None),
                                   ("--overlap", given.overlap, 0, given.window - 1), ("--seed", given.seed, 0, 2**63)):
        if value is not None and (value < low or (high is not None and value > high)):
            raise InputError(f"{flag} {value}; expected {low} {'or more' if high is None else f'to {high}'}")
    for flag, value in (("--eta", given.eta), ("--cfg", given.cfg), ("--pose-scale", given.pose_scale),
                        ("--background-scale", given.background_scale)):
        if not 0 <= value < float("inf"):
            raise InputError(f"{flag} {value}; expected 0 or more")
    if given.compile and given.no_cache:
        raise InputError("--compile and --no-cache do not go together; leave one away")
    if not 0.1 <= given.fps <= 240:
        raise InputError(f"--fps {given.fps}; expected 0.1 to 240")
    for side, value in (("-W", given.width), ("-H", given.height)):
        if value and value % 4:
            raise InputError(f"{side} {value}; expected a multiple of the latent factor (8 for Stable Diffusion, 4 for "
                             f"nano), as {value // 8 * 8 + 8}")
    given.format = ",".join(dict.fromkeys(given.format.split(",")))      # each once
    if unknown := [name for name in given.format.split(",") if name not in FORMATS]:
        raise InputError(f"--format {unknown[0]!r}; expected any of {','.join(FORMATS)}")
    if given.fps > 100 and (animated := {"gif", "webp"}.intersection(given.format.split(","))):
        raise InputError(f"--fps {given.fps:g} with --format {','.join(sorted(animated))}: those can have 100 frames a "
                         "second; expected fewer, or --format mp4")
    if given.pose_size and not (len(parts := given.pose_size.split("x")) == 2
                                and all(part.isdecimal() and int(part) > 0 for part in parts)):
        raise InputError(f"--pose-size {given.pose_size}; expected WxH, as 1080x1920")
    if not given.weights:
        given.weights = next((str(place) for place in WEIGHTS if place.exists()), None)
        if not given.weights and not given.sd:
            raise InputError("no weights: neither weights/disco nor weights/nano is there; name some with --weights "
                             "(README: Official weights)")
    given.width, given.height = (asked or usual for asked, usual in zip((given.width, given.height), trained(given)))
    for path in (given.ref, given.background, given.poses, given.data, given.weights, given.sd, given.latents,
                 given.align, *(mask for mask in (given.ref_mask, given.background_mask) if mask != "black")):
        if path and not Path(path).exists():
            raise InputError(f"{path} is not there")
    given.out = Path(given.out or f"output/{datetime.now():%Y%m%d-%H%M%S}-{given.seed}")
    if given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise InputError(f"{given.out} is already there and not empty; choose another --out")


def of_example(given: argparse.Namespace) -> None:
    """Nobody is named: the shipped model shows its own example; --background still replaces the room, and so on."""
    for name, path in EXAMPLE.items():
        setattr(given, name, getattr(given, name) or str(path))
    given.weights, given.noise = given.weights or str(NANO), given.noise or "shared"
    given.steps = 20 if given.steps is None else given.steps


def trained(given: argparse.Namespace) -> tuple[int, int]:
    """The size of the pictures that the weights were trained on."""
    told = Path(given.weights or "") / "config.yaml"
    return config.load(told).size if told.exists() else (256, 256)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    given = parser().parse_args(argv)
    judge(given)
    if given.weights == str(NANO) and given.ref not in (None, str(EXAMPLE["ref"])):
        say("weights/nano draws synthetic people only; for a photo of a real one name the official weights "
            "(README: Official weights)")
    began = time.perf_counter()
    from nanodisco import dance                              # imports torch
    made = dance.dance(given, say)
    seconds = time.perf_counter() - began
    print(f"{made} frame{'s' * (made != 1)} of {given.width}x{given.height} in {seconds:.1f} s: {given.out}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # as Ctrl-C: what is half-written goes
    run(main)
