"""The step on a GPU: ms, frames a second and memory, against diffusers, and what each of our switches is worth.

    python tests/bench_pipeline.py                  # where there is a GPU this is what runs
    python tests/bench_pipeline_gpu.py --tiny       # anywhere: only to see that it runs

A step is UNet + pose ControlNet + background ControlNet with guidance 2, in bf16, of one reference and 1 or 16
frames. Programs have the same random weights and run one after the other; times are medians of ROUNDS steps
between synchronisations, after warming up. What a switch of ours is worth is measured at the first size only.
Training is of batches of 32, forward and backward, with and without checkpointing of activations.
"""
import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

ROUNDS, WARM_UP, BATCH = 20, 3, 32
NORMS = "group_norm_silu", "add_layer_norm"
OPERATIONS = "attention", *NORMS, "geglu", "conv"
OURS = {"ours": {}, "ours, no kernels": {"plain": OPERATIONS}}
SWITCHES = {"ours, no graph": {"graph": False}, "ours, no cache": {"cache": False, "graph": False},
            "ours, nets in turn": {"at_once": 0}, "ours, nets at once": {"at_once": 16},
            "ours, no attention": {"plain": ("attention",)}, "ours, no norms": {"plain": NORMS},
            "ours, no GEGLU": {"plain": ("geglu",)}, "ours, no convolutions": {"plain": ("conv",)}}
THEIRS = {"diffusers": {}, "diffusers NHWC": {"channels_last": True}}
TRAINING = {"kernels": {}, "no kernels": {"plain": OPERATIONS}, "kernels, checkpointing": {"checkpointing": True},
            "kernels, no graph": {"graph": False}, "no kernels, no graph": {"plain": OPERATIONS, "graph": False}}
SLOW_TO_START = {"ours, compiled": {"compiled": True},
                 "diffusers compiled": {"channels_last": True, "compiled": "default"},
                 "diffusers max-autotune": {"channels_last": True, "compiled": "max-autotune"}}


def synchronise(device: str) -> None:
    import torch
    if device == "cuda":
        torch.cuda.synchronize()


def timed(step, device: str, rounds: int = ROUNDS) -> tuple:
    """-> median ms of a step and the most memory it needed, weights with it; some numbers of its answer"""
    import torch
    for _ in range(WARM_UP):
        out = step()
    synchronise(device)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    # reserved, not allocated: a graph's own memory is allocated once, before its first replay
    peak = torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else float("nan")
    some = None if out is None else out.float().flatten()[::37].cpu()
    return {"ms": 1000 * statistics.median(seconds), "gib": peak}, some


def run_plain(operations: tuple[str, ...]) -> None:
    """Have PyTorch run these operations from now on, and our kernels the others."""
    from kernels.backend import use_triton
    for name in OPERATIONS:
        setattr(import_module(f"kernels.{name}"), "use_triton",
                (lambda *input_and_reason: False) if name in operations else use_triton)


@cache
def usual_frames_at_once() -> int:
    from nanodisco.together import FEW
    return FEW


@lru_cache(maxsize=1)                  # programs of ours are one model under other switches
def our_model(folder: Path, device: str):
    import torch

    from nanodisco.loading import for_inference, load
    model = load(folder / "ours", dtype=torch.bfloat16, say=lambda text: None)
    model.vae = model.clip = None
    return for_inference(model, device) if device != "cpu" else model


def our_step(folder: Path, device: str, frames: int, side: int, graph: bool | None = None, cache: bool = True,
             compiled: bool = False, at_once: int | None = None, plain: tuple[str, ...] = ()):
    """at_once: frames up to which the networks run at the same time, if not the usual; plain: without our kernels."""
    import torch
    from bench_pipeline import inputs

    from nanodisco import together
    from nanodisco.graph import Captured
    from nanodisco.guidance import Guided
    run_plain(plain)
    usual = usual_frames_at_once()                                       # before it is changed for the first time
    together.FEW = usual if at_once is None else at_once
    model = our_model(folder, device)
    given = inputs(model.config, torch.bfloat16, frames, side, device)
    guided = Guided(model, given["tokens"], given["background"], torch.zeros_like(given["tokens"]), guidance=2.0,
                    cache=cache, graph=graph if device == "cuda" else False, compiled=compiled)
    predict, t = guided(given["pose"]), torch.full((frames,), 481, device=device)

    def step():
        out = predict(given["z"], t)
        if isinstance(guided.step, Captured) and not guided.step.graphs:
            raise RuntimeError("was not captured as a CUDA graph")
        return out
    return step


def their_step(folder: Path, device: str, frames: int, side: int, channels_last: bool = False, compiled: str = ""):
    import torch
    from bench_pipeline import diffusers
    from diffusers.utils import logging
    our_model.cache_clear()                                              # or their memory would hold ours too
    logging.set_verbosity_error()                                        # it does not know DisCo's background hint
    torch._dynamo.reset()                                                # or a second size makes all sizes dynamic
    _, step = diffusers(folder, torch.bfloat16, channels_last, compiled, frames, side, device)
    t = torch.tensor(481, device=device)
    return lambda: step(t)


def training_step(folder: Path, device: str, side: int, batch: int, plain: tuple[str, ...] = (), graph: bool = True,
                  checkpointing: bool = False):
    """Forward and backward of UNet and ControlNets; no optimizer, no encoders: they are the same in both.

    graph: both as one CUDA graph, so that it is the GPU that is measured and not the host.
    """
    import torch
    from bench_pipeline import inputs

    from nanodisco.disco import Conditions
    from nanodisco.graph import record_cuda
    from nanodisco.loading import load
    from nanodisco.optim import checkpoint_activations
    our_model.cache_clear()
    run_plain(plain)
    model = load(folder / "ours", say=lambda text: None)
    model.vae = model.clip = None
    model = model.to(device, memory_format=torch.channels_last).requires_grad_(True)
    if checkpointing:
        checkpoint_activations(model)
    given = inputs(model.config, torch.float32, batch, side, device)
    tokens, background = (given[name].repeat(batch, *[1] * (given[name].ndim - 1)) for name in ("tokens", "background"))
    shown = Conditions(tokens, given["pose"], background)
    t = torch.full((batch,), 481, device=device)

    def step():
        model.zero_grad(set_to_none=True)
        with torch.enable_grad(), torch.autocast(device, torch.bfloat16):
            model(given["z"], t, shown).float().square().mean().backward()
    if not graph or device != "cuda":
        return step
    replay, _ = record_cuda(step)
    return lambda keep=(step, model, given): replay()                    # a graph does not keep what it works on


def row(name: str, make, device: str, frames: int, rounds: int, first: list) -> dict | None:
    """Time one program; a program that cannot run is told, and the table goes on.

    first: the answer of the first program of this table, which the others are held against.
    """
    import torch
    try:
        with torch.no_grad():
            found, out = timed(make(), device, rounds)
    except Exception as error:                                           # of compilers, of libraries: any kind
        print(f"  {name:24} failed: {type(error).__name__}: {str(error)[:80].splitlines()[:1]}", flush=True)
        return None
    finally:
        gc.collect()
        if device == "cuda":
            torch._C._cuda_clearCublasWorkspaces()                       # or the next program's memory would hold them
            torch.cuda.empty_cache()
    found["frames_per_second"] = frames / (50 * found["ms"] / 1000)      # of fifty steps
    difference = ""
    if out is not None:
        first[:] = first or [out]
        found["difference"] = ((out - first[0]).abs().max() / first[0].abs().max()).item()
        difference = f"{found['difference']:10.1e}"
    numbers = f"{found['ms']:9.2f} {found['frames_per_second']:9.2f} {found['gib']:8.2f}"
    print(f"  {name:24} {numbers} {difference}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    import torch

    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--tiny", action="store_true", help="small networks, few steps: to see that it runs")
    top.add_argument("--frames", type=int, nargs="+", default=[1, 16])
    top.add_argument("--size", type=int, nargs="+", default=[256, 512], help="pixels (default 256 512)")
    top.add_argument("--skip", nargs="*", default=[], metavar="PROGRAM",
                     choices=[*OURS, *SWITCHES, *THEIRS, *SLOW_TO_START, "training"])
    top.add_argument("--folder", metavar="DIR", type=Path, help="the random weights stay there, or are there already")
    top.add_argument("--only-write", action="store_true", help="write the weights to --folder and end")
    top.add_argument("--seconds", type=float, default=float("inf"), help="begin no program after so many")
    top.add_argument("--json", metavar="FILE", help="write the numbers there")
    given = top.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.only_write and not given.folder:
        top.error("--only-write needs --folder")
    rounds, batch = (2, 2) if given.tiny else (ROUNDS, BATCH)
    from bench_kernels import machine_and_versions
    from bench_pipeline import write_weights

    from nanodisco.files import appearing
    result = {"machine": machine_and_versions() | {"diffusers": version("diffusers")}, "tiny": given.tiny}
    print(result["machine"])

    def keep(key: str, found: dict | None) -> None:                      # at once: a benchmark may run out of time
        result[key] = found
        if given.json:
            Path(given.json).parent.mkdir(parents=True, exist_ok=True)
            Path(given.json).write_text(json.dumps(result, indent=1))

    began, left_out, answers = time.monotonic(), [], {}

    def in_time(key: str) -> bool:
        if time.monotonic() - began > given.seconds:
            left_out.append(key)
            return False
        return True

    with tempfile.TemporaryDirectory() as name:
        folder = (given.folder or Path(name)) / "weights"
        if not folder.exists():
            with appearing(folder) as place:                             # whole, or another time
                write_weights(place, "bf16", given.tiny)
        if given.only_write:
            return

        def steps(size: int, programs: dict) -> None:
            programs = {name: options for name, options in programs.items() if name not in given.skip}
            for frames in given.frames if programs else ():
                print(f"\n{size} x {size}, {frames} frame(s), bf16, guidance 2\n{'':26} {'ms/step':>9} {'frames/s':>9} "
                      f"{'GiB':>8} difference")
                for program, options in programs.items():
                    step = our_step if program.startswith("ours") else their_step
                    make = partial(step, folder, device, frames, size // 8, **options)
                    if in_time(f"{size} {frames} {program}"):
                        keep(f"{size} {frames} {program}",
                             row(program, make, device, frames, rounds, answers.setdefault((size, frames), [])))

        def training(size: int) -> None:
            print(f"\ntraining, {size} x {size}, batch {batch}, bf16 autocast, forward and backward")
            for program, options in TRAINING.items():
                if not in_time(f"{size} training {program}"):
                    continue
                make = partial(training_step, folder, device, size // 8, batch, **options)
                found = row(program, make, device, batch, max(rounds // 4, 2), [])
                keep(f"{size} training {program}", found)
                if found:
                    print(f"  {'':22} {1000 * batch / found['ms']:9.1f} pictures a second")

        first, *others = given.size
        steps(first, OURS | THEIRS)
        if "training" not in given.skip:
            training(first)
        for size in others:
            steps(size, {"ours": {}} | THEIRS)
        steps(first, SWITCHES)
        for size in given.size:
            steps(size, SLOW_TO_START)                                   # last: minutes each before the first step
    if left_out:
        print(f"\nleft out after {given.seconds:.0f} s: {', '.join(left_out)}")
    sys.exit(any(found is None for found in result.values()))


if __name__ == "__main__":
    main()
