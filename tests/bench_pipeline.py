"""One denoising step, its memory, and loading: this project against diffusers with the same weights.

    python tests/bench_pipeline.py                                 # full size, bf16 and fp32, some minutes
    python tests/bench_pipeline.py --dtype bf16 --compiled         # also torch.compile with freezing: many minutes
    python tests/bench_pipeline.py --tiny --rounds 2               # only to see that it runs
    python tests/bench_pipeline_gpu.py --help                      # what runs where there is a GPU, and its flags

A step is UNet + pose ControlNet + background ControlNet with guidance 2 at 32 x 32 latents, 257 tokens. Each
program is a process of its own; ours and one other take turns, so that a busy machine slows both of them alike.
Loading is from the disk until the model can be called. Whatever a program puts off until it is called (reading the
file, packing weights) shows in the next number: loading and the first step together, less the time of a step.
Printed: medians, and ratios ours / theirs, of steps the median of the pairs'. Weights are random and written to a
temporary folder (6.3 GB in fp32) in both spellings.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
THEIRS = ("diffusers NCHW", "diffusers NHWC")
STEPS = range(981, 0, -20)             # as DDIM has them
LOADS = 3                              # times that each program is started to see how long it loads
AIMS = {"bf16": 0.55, "fp32": 0.45}    # of a step, against the faster memory format


# ---- The programs, each in a process ----------------------------------------------------------------------

def inputs(config, dtype, frames=1, side=32, device="cpu"):
    import torch

    generator, pixels = torch.Generator().manual_seed(0), side * config.vae.factor
    shapes = {"z": (frames, config.unet.channels, side, side), "tokens": (1, config.clip.tokens, config.unet.context),
              "pose": (frames, 3, pixels, pixels), "background": (1, config.unet.channels, side, side)}
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}


def ours(folder: Path, dtype):
    import open_clip  # noqa: F401  imported here, and diffusers below, so that neither counts as loading
    import torch

    from nanodisco.guidance import Guided
    from nanodisco.loading import for_inference, load
    from nanodisco.memo import of_each

    began = time.perf_counter()
    model = load(folder / "ours", dtype=dtype, say=lambda text: None)
    model.vae = model.clip = None                                        # not part of a step; diffusers loads neither
    model = for_inference(model, "cpu")
    given = inputs(model.config, dtype)
    guided = Guided(model, given["tokens"], given["background"], torch.zeros_like(given["tokens"]), guidance=2.0,
                    times=of_each(STEPS))
    predict = guided(given["pose"])
    return time.perf_counter() - began, lambda t: predict(given["z"], torch.tensor([t]))


def diffusers(folder: Path, dtype, channels_last: bool, compiled: str, frames: int = 1, side: int = 32,
              device: str = "cpu"):
    """compiled: the mode of torch.compile, "" for none."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel
    from diffusers.utils import logging

    from nanodisco.config import load as load_config

    logging.set_verbosity_error()
    began = time.perf_counter()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype)
    pose = ControlNetModel.from_pretrained(folder / "pose", torch_dtype=dtype)
    background = ControlNetModel.from_pretrained(folder / "background", torch_dtype=dtype, ignore_mismatched_sizes=True)
    hint = background.controlnet_cond_embedding                          # DisCo's has one convolution of the latent
    background.controlnet_cond_embedding = torch.nn.Conv2d(unet.config.in_channels, hint.conv_out.out_channels, 3,
                                                           padding=1).to(dtype)
    from safetensors.torch import load_file
    background.controlnet_cond_embedding.load_state_dict(load_file(folder / "hint.safetensors"))
    nets = [net.eval().to(device) for net in (unet, pose, background)]
    config, given = load_config(folder / "ours" / "config.yaml"), {}
    for name, x in inputs(config, dtype, frames, side, device).items():
        x = x if len(x) == frames else x.repeat(frames, *[1] * (x.ndim - 1))
        given[name] = torch.cat([x * (name != "tokens"), x])
    if channels_last:
        nets = [net.to(memory_format=torch.channels_last) for net in nets]
        given = {name: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
                 for name, x in given.items()}
    unet, pose, background = [torch.compile(net, mode=compiled) for net in nets] if compiled else nets

    loaded = time.perf_counter() - began

    def step(t):
        if "autotune" in compiled:                                       # its graphs write over what they gave before
            torch.compiler.cudagraph_mark_step_begin()
        z, tokens = given["z"], given["tokens"]
        a, a_mid = pose(z, t, tokens, controlnet_cond=given["pose"], return_dict=False)
        b, b_mid = background(z, t, tokens, controlnet_cond=given["background"], return_dict=False)
        out, = unet(z, t, tokens, down_block_additional_residuals=[x + y for x, y in zip(a, b)],
                    mid_block_additional_residual=a_mid + b_mid, return_dict=False)
        without, with_reference = out.chunk(2)
        return without + 2.0 * (with_reference - without)
    return loaded, step


def peak() -> float:
    """GiB of memory at most so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def work(program: str, folder: Path, dtype_name: str) -> None:
    """Answer each line on stdin with one step: seconds, and a few numbers of the result."""
    sys.path.insert(0, str(ROOT))
    import torch

    dtype = getattr(torch, DTYPES[dtype_name])
    if program == "ours":
        loaded, step = ours(folder, dtype)
    else:
        compiled = "default" if "compiled" in program else ""
        loaded, step = diffusers(folder, dtype, "NHWC" in program or bool(compiled), compiled)
    torch.set_grad_enabled(False)
    print(json.dumps({"loaded": loaded}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        out = step(torch.tensor(int(line)) if program != "ours" else int(line))
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": peak(),
                          "out": out.float().flatten()[::37].tolist()}), flush=True)


# ---- The comparison ---------------------------------------------------------------------------------------

def write_weights(folder: Path, dtype_name: str, tiny: bool) -> None:
    """The same random weights for both."""
    import torch
    from safetensors.torch import save_file

    from nanodisco import sizes, weights
    from nanodisco.config import load as load_config
    from nanodisco.disco import DisCo

    shrink = ["--unet.widths=[32, 64, 128, 128]", "--clip.layers=1", "--vae.widths=[32, 32, 32, 32]"] if tiny else []
    config = load_config(ROOT / "config" / "model" / "sd-image-variations.yaml", shrink)
    torch.manual_seed(0)
    model = DisCo(config)
    with torch.no_grad():
        for parameter in model.parameters():                             # no zero convolutions: all residuals count
            parameter.normal_(std=parameter[0].numel() ** -0.5) if parameter.ndim > 1 else parameter.add_(
                0.05 * torch.randn_like(parameter))
    model = model.to(getattr(torch, DTYPES[dtype_name]))
    folder.mkdir(parents=True, exist_ok=True)
    weights.write_folder(folder / "ours", model.state_dict(), config)
    official = weights.to_official(model.state_dict())
    json_of_unet = sizes.to_config_json(config)["unet"]
    for name, prefix in (("unet", "unet."), ("pose", "controlnet.nets.0."), ("background", "controlnet.nets.1.")):
        net = {key.removeprefix(prefix): tensor.contiguous() for key, tensor in official.items()
               if key.startswith(prefix)}
        if name == "background":
            start = "controlnet_cond_embedding.conv_in."
            save_file({key.removeprefix(start): net.pop(key) for key in list(net) if key.startswith(start)},
                      folder / "hint.safetensors")
        (folder / name).mkdir()
        save_file(net, folder / name / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        of_net = {key: value for key, value in json_of_unet.items() if "up_block" not in key and key != "out_channels"}
        of_net |= {"_class_name": "ControlNetModel"}
        (folder / name / "config.json").write_text(json.dumps(json_of_unet if name == "unet" else of_net))


def compare(dtype: str, rounds: int, compiled: bool, tiny: bool) -> dict:
    programs = ["ours", *THEIRS] + (["diffusers compiled"] if compiled else [])
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder), dtype, tiny)
        environment = os.environ | {"TORCHINDUCTOR_FREEZING": "1"}
        seen = {name: [] for name in programs}
        workers, ratios = {}, {}
        loads, firsts = ({name: [] for name in programs} for _ in range(2))

        def start(name: str) -> None:
            command = [sys.executable, __file__, "--work", name, "--folder", folder, "--dtype", dtype]
            workers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                             env=environment)

        def answer(name: str) -> dict:
            return json.loads(workers[name].stdout.readline() or sys.exit(f"{name} has ended, as it says above"))

        def step(name: str, t: int) -> dict:
            print(t, file=workers[name].stdin, flush=True)
            return answer(name)

        for name in ["ours", *THEIRS] * LOADS:                           # each alone: files in use cannot be forgotten
            forget_files(Path(folder))
            start(name)
            loads[name].append(answer(name)["loaded"])
            firsts[name].append(step(name, 981)["seconds"] + loads[name][-1])
            workers[name].kill()
            workers.pop(name).wait()
        for name in programs[1:]:                                        # two at a time: four may not fit into memory
            for one in ("ours", name):
                start(one)
                answer(one)
                step(one, 981)
            for i in range(1, rounds + 1):
                for one in workers:
                    seen[one].append(step(one, 981 - 20 * i))
            ratios[name] = statistics.median(mine["seconds"] / theirs["seconds"] for mine, theirs in
                                             zip(seen["ours"][-rounds:], seen[name]))
            for worker in workers.values():
                worker.stdin.close()
                worker.wait()
            workers.clear()
    medians = {}
    for name in programs:
        medians[name] = {"step": statistics.median(one["seconds"] for one in seen[name])}
        if loads[name]:
            medians[name] |= {"load": statistics.median(loads[name]),
                              "first": statistics.median(firsts[name]) - medians[name]["step"]}
        medians[name] |= {"peak": seen[name][-1]["peak"], "ours / it": ratios.get(name), "out": seen[name][-1]["out"]}
    return medians


def forget_files(folder: Path) -> None:
    """Drop the weights from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(dtype: str, found: dict) -> dict:
    print(f"\n{dtype}: seconds a step | to load | … with the first step, less a step | peak GiB | largest difference "
          "from ours")
    for name, row in found.items():
        scale = max(map(abs, found["ours"]["out"]))
        difference = max(abs(a - b) for a, b in zip(row["out"], found["ours"]["out"])) / scale
        load, first = (f"{row[what]:6.2f}" if what in row else "     –" for what in ("load", "first"))
        print(f"  {name:20} {row['step']:7.3f} | {load} | {first} | {row['peak']:5.2f} | {difference:.1e}")
    ratios = {name: {"step": row["ours / it"]} | {what: found["ours"][what] / row[what]
                                                  for what in ("load", "first", "peak") if what in row}
              for name, row in found.items() if name != "ours"}
    for name, row in ratios.items():
        print(f"  ours / {name}: " + ", ".join(f"{what} {ratio:.2f}" for what, ratio in row.items()))
    print(f"  aims: step {AIMS[dtype]} against the faster of both, 1.05 against compiled; load 0.7; peak 1.1")
    return ratios


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: both; a GPU has bf16 only")
    top.add_argument("--rounds", type=int, help="steps to take the median of (default 7; on a GPU 20)")
    top.add_argument("--compiled", action="store_true", help="also against torch.compile with freezing (a GPU: always)")
    top.add_argument("--tiny", action="store_true", help="small networks, to see that it runs")
    top.add_argument("--json", metavar="FILE", help="write the numbers there")
    top.add_argument("--work", help=argparse.SUPPRESS)
    top.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = top.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    if torch.cuda.is_available():
        import bench_pipeline_gpu
        if given.dtype or given.rounds or given.compiled:
            top.error("--dtype, --rounds and --compiled are for a CPU; see tests/bench_pipeline_gpu.py --help")
        bench_pipeline_gpu.main((["--tiny"] if given.tiny else []) + (["--json", given.json] if given.json else []))
        return
    if given.work:
        work(given.work, given.folder, given.dtype[0])
        return
    import diffusers

    processor = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                      if line.startswith("model name")), platform.processor())
    machine = {"processor": processor, "threads": torch.get_num_threads(),
               "capability": torch.backends.cpu.get_cpu_capability(),
               "torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version()}
    print(machine)
    result = {"machine": machine}
    for dtype in given.dtype or DTYPES:
        found = compare(dtype, given.rounds or 7, given.compiled, given.tiny)
        result[dtype] = {"ratios": report(dtype, found), "programs": {
            name: {key: value for key, value in row.items() if key != "out"} for name, row in found.items()}}
    if given.json:
        Path(given.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
