"""The GroupNorm + SiLU kernels, compiled for an H100 or H200 without one: do they keep to the machine's limits?

    python tests/compile_group_norm.py                 # a table; exits 1 where a limit is broken

Kernels are compiled as launches of the shapes below would have it: a launch is run with a recorder in the place of
the GPU, so that tile sizes and what is known of alignment are those of the program. Triton must not be imported
with TRITON_INTERPRET set, so this is a process of its own.

A row: {"name", "kernel", "types": argument -> Triton type, "constants", "aligned": arguments that are multiples of
16, "options" of the compiler, "loads" and "stores": how many of 16 bytes each thread needs at least for its tiles}.
"""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
SHARED = 227 * 1024                    # bytes that a program can have on sm_90
NARROW = 8                             # loads of 2 bytes: a thread's weights, biases and shifts, never pixels
TILES = {"_statistics": (1, 0), "_apply": (1, 1), "_small": (2, 1), "_sums": (2, 0), "_gradient_of_x": (2, 1)}

# pictures, channels, height, frames, rows of shift, channels last
SHAPES = [(32, 320, 32, 1, 32, True), (2, 320, 32, 1, 0, True), (32, 640, 16, 1, 1, True), (2, 1280, 8, 1, 1, True),
          (32, 1280, 4, 16, 2, True), (32, 960, 32, 16, 0, True), (1, 128, 256, 1, 0, True), (16, 512, 64, 1, 0, True),
          (2, 320, 32, 1, 0, False), (2, 1280, 8, 1, 1, False)]


def group_norm_rows() -> list[dict]:
    """Every kernel of every shape in bf16, of the first shape in all types; each variant once."""
    rows = {}
    for i, shape in enumerate(SHAPES):
        for name in DTYPES if i == 0 else ["bf16"]:
            for row in launches(*shape, dtype=name):
                rows.setdefault(repr({**row, "name": 0}), row)
    return list(rows.values())


def launches(N, C, height, frames, rows_of_shift, last, dtype) -> list[dict]:
    """What the forward and the backward pass of a shape launch."""
    import torch

    from kernels.group_norm_silu_triton import launch_backward, launch_forward
    kind, layout = getattr(torch, DTYPES[dtype]), torch.channels_last if last else torch.contiguous_format
    x = torch.empty(N, C, height, height, dtype=kind, device="meta").to(memory_format=layout)
    weight = torch.empty(C, dtype=kind, device="meta")
    shift = weight.new_empty(rows_of_shift, C) if rows_of_shift else None
    seen = []

    def record(kernel, *args, grid, warmup, **options):
        seen.append(row_of(kernel, args, options, f"{C}@{height} x{N} {dtype}{'' if last else ' NCHW'}"))

    with patch("triton.runtime.jit.JITFunction.run", record):
        y, stats = launch_forward(x, weight, weight, shift, 32, 1e-5, frames, True, kind)
        launch_backward(y, x, weight, weight, stats, 32, frames, True, shift is not None)
    return seen


def row_of(kernel, args, options, shape: str) -> dict:
    """A launch as a row. As when it is launched, a None is a constant, and so is a 1."""
    import torch

    short = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    constants = {name: value for name, value in options.items() if name in kernel.arg_names}
    options = {name: value for name, value in options.items() if name not in constants}
    types, aligned = {}, set()
    for name, value in zip(kernel.arg_names, args):
        if value is None or isinstance(value, int) and value == 1:
            constants[name] = value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        types[name] = short[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        if is_tensor or value % 16 == 0:
            aligned.add(name)
    loads, stores = TILES.get(kernel.__name__, (0, 0))
    channels = constants.get("WIDTH", constants.get("BC", 0))            # lanes past the width read nothing
    tile = constants.get("CHUNK", 0) * channels * args[0].element_size() // (16 * 32 * options["num_warps"])
    return {"name": f"{kernel.__name__.lstrip('_')} {shape}", "kernel": kernel, "types": types, "constants": constants,
            "aligned": aligned, "options": options, "loads": loads * tile, "stores": stores * tile}


def compiled(row: dict) -> dict:
    """Registers, spilled bytes, bytes of shared memory; instructions that read and write global memory, by width."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = row["kernel"].arg_names
    signature = {name: row["types"].get(name, "constexpr") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in sorted(row["aligned"])}
    source = ASTSource(row["kernel"], signature, constexprs=row["constants"], attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=row["options"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    count = {name: len(re.findall(pattern, code)) for name, pattern in {
        "loads": r"\bLDG(STS)?\S*\.128", "stores": r"\bSTG\S*\.128", "narrow": r"\bLDG\S*\.[US](16|8)\b",
        "spills": r"\b(LDL|STL)\b", "instructions": r"/\*[0-9a-f]{4}\*/"}.items()}
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]), "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "shared": made.metadata.shared, **count}


def _cuobjdump(option: str, file: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def broken(row: dict, found: dict) -> list[str]:
    """Which limits a kernel does not keep."""
    limits = {"spills": found["stack"] or found["spills"], "shared memory": found["shared"] > SHARED,
              "tiles not read by 16 bytes": found["loads"] < row["loads"],
              "tiles not written by 16 bytes": found["stores"] < row["stores"],
              "2-byte loads": found["narrow"] > NARROW}
    return [name for name, is_broken in limits.items() if is_broken]


def main() -> None:
    columns = ["registers", "stack", "shared", "loads", "stores", "narrow", "instructions"]
    print("loads and stores: of 16 bytes; narrow: loads of 2 bytes or 1")
    print(f"{'':34} warps", *(f"{name:>{max(6, len(name))}}" for name in columns))
    failed = False
    for row in group_norm_rows():
        found = compiled(row)
        faults = broken(row, found)
        failed |= bool(faults)
        print(f"{row['name']:34} {row['options']['num_warps']:5}",
              *(f"{found[name]:{max(6, len(name))}}" for name in columns), ", ".join(faults), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "TRITON_INTERPRET is set: nothing would be compiled"
    sys.path.insert(0, str(ROOT))
    main()
