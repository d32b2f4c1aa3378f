"""Compile every kernel for an H100 without one, and count what the machine code says.

    python tests/compile_kernels.py                the table
    python tests/compile_kernels.py d40            rows with this in their name
    python tests/compile_kernels.py --write        into tests/golden/kernels/sm90.json; --json: as that, to stdout

Operations are called as a model calls them, on memory that is never touched, and each launch of a kernel
is compiled instead, with the tiles, the constants and the alignment it would be launched with. A process
of its own, without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""
import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kernels import attention_triton
from kernels.add_layer_norm_triton import add_layer_norm_triton
from kernels.conv_triton import conv3x3_triton
from kernels.geglu_triton import geglu_triton
from kernels.group_norm_silu_triton import group_norm_silu_triton

GOLDEN = Path(__file__).parent / "golden" / "kernels" / "sm90.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---- Rows: name, call ------------------------------------------------------------------------------

def packed(B: int, L: int, N: int, K: int, dtype=BF16):
    return (torch.empty(B, L, 3, N, K, dtype=dtype),)


def crossed(B: int, L: int, M: int, N: int, K: int, dtype=BF16):
    return torch.empty(B, L, N, K, dtype=dtype), torch.empty(B, M, 2, N, K, dtype=dtype)


def attention(*packed):
    differentiated(attention_triton.cross_attention if len(packed) > 1 else attention_triton.self_attention, *packed)


def temporal(frames, qkv):
    differentiated(lambda qkv: attention_triton.temporal_attention(qkv, frames), qkv)


def norm(N: int, C: int, height: int, frames: int = 1, shifts: int = 1, last: bool = True, dtype=BF16):
    x = torch.empty(N, C, height, height, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    vectors = torch.empty(C, dtype=dtype), torch.empty(C, dtype=dtype), torch.empty(shifts, C, dtype=dtype)
    differentiated(lambda x, weight, bias, shift: group_norm_silu_triton(
        x, weight, bias, 32, 1e-5, frames, True, shift), x, *vectors)


def conv(B: int, C: int, N: int, side: int, dtype=BF16):
    x, weight, more = (torch.empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
                       for shape in ((B, C, side, side), (N, C, 3, 3), (B, N, side, side)))
    conv3x3_triton(x, weight, torch.empty(N, dtype=dtype), more)


def geglu(*shape: int, dtype=BF16):
    differentiated(geglu_triton, torch.empty(shape, dtype=dtype))


def residual(*shape: int, dtype=BF16):
    differentiated(add_layer_norm_triton, *torch.empty(2, *shape, dtype=dtype),
                   *torch.empty(2, shape[-1], dtype=dtype))


def residual_of_half(*shape: int, dtype=BF16):
    x, (weight, bias, fill) = torch.empty(shape, dtype=dtype), torch.empty(3, shape[-1], dtype=dtype)
    add_layer_norm_triton(x, x[len(x) // 2:], weight, bias, 1e-5, fill)


def differentiated(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    found = function(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    torch.autograd.grad(found, inputs, [torch.empty_like(o) for o in found])


OTHERS = (8, 64, 96, 128, 192, 256)    # widths of heads that Stable Diffusion has not: each of WIDTHS, its widest
ROWS = dict([
    ("self d40 1024", lambda: attention(*packed(32, 1024, 8, 40))),
    ("self d80 256", lambda: attention(*packed(32, 256, 8, 80))),
    ("self d160 64", lambda: attention(*packed(32, 64, 8, 160))),
    ("self d160 256", lambda: attention(*packed(32, 256, 8, 160))),
    ("self d40 1024 few", lambda: attention(*packed(2, 1024, 8, 40))),
    ("self d80 256 few", lambda: attention(*packed(2, 256, 8, 80))),
    ("cross d40 1024x257 few", lambda: attention(*crossed(2, 1024, 257, 8, 40))),
    ("cross d80 256x257 few", lambda: attention(*crossed(2, 256, 257, 8, 80))),
    ("cross d40 1024x257", lambda: attention(*crossed(32, 1024, 257, 8, 40))),
    ("cross d80 256x257", lambda: attention(*crossed(32, 256, 257, 8, 80))),
    ("cross d160 64x257", lambda: attention(*crossed(32, 64, 257, 8, 160))),
    ("temporal d40 16", lambda: temporal(16, *packed(32, 1024, 8, 40))),
    ("temporal d80 16", lambda: temporal(16, *packed(32, 256, 8, 80))),
    ("temporal d160 16", lambda: temporal(16, *packed(32, 64, 8, 160))),
    *((f"cross d{K} 256x257", lambda K=K: attention(*crossed(32, 256, 257, 8, K))) for K in OTHERS),
    *((f"temporal d{K} 16", lambda K=K: temporal(16, *packed(32, 64, 8, K))) for K in OTHERS),
    *((f"cross d{K} 300x77 few", lambda K=K: attention(*crossed(2, 300, 77, 8, K))) for K in OTHERS),
    *((f"cross d{K} 300x77 few float32", lambda K=K: attention(*crossed(2, 300, 77, 8, K, FP32))) for K in OTHERS),
    *((f"temporal d{K} 16 float32", lambda K=K: temporal(16, *packed(32, 64, 8, K, FP32))) for K in (160, 192, 256)),
    ("self d40 1024 float16", lambda: attention(*packed(32, 1024, 8, 40, FP16))),
    ("self d40 1024 float32", lambda: attention(*packed(2, 1024, 8, 40, FP32))),
    ("norm 320@32", lambda: norm(32, 320, 32, shifts=32)),
    ("norm 320@32 float32", lambda: norm(32, 320, 32, shifts=32, dtype=FP32)),
    ("norm 320@32 NCHW", lambda: norm(2, 320, 32, last=False)),
    ("norm 960@32 frames 16", lambda: norm(32, 960, 32, frames=16)),
    ("norm 640@16", lambda: norm(32, 640, 16)),
    ("norm 640@16 few", lambda: norm(2, 640, 16)),
    ("norm 1280@8", lambda: norm(2, 1280, 8)),
    ("conv 1280 1280@8", lambda: conv(2, 1280, 1280, 8)),
    ("conv 640 640@16", lambda: conv(2, 640, 640, 16)),
    ("conv 960 320@32", lambda: conv(2, 960, 320, 32)),
    ("conv 512 512@32", lambda: conv(1, 512, 512, 32)),
    ("conv 48 16@8 float16", lambda: conv(1, 48, 16, 8, FP16)),
    ("geglu 1024x2560", lambda: geglu(32, 1024, 2560)),
    ("geglu 1024x2560 float32", lambda: geglu(32, 1024, 2560, dtype=FP32)),
    ("add_layer_norm 320", lambda: residual(32, 1024, 320)),
    ("add_layer_norm 640", lambda: residual(32, 256, 640)),
    ("add_layer_norm 1280", lambda: residual(32, 64, 1280)),
    ("add_layer_norm 320 of half", lambda: residual_of_half(32, 1024, 320)),
    ("add_layer_norm 640 of half", lambda: residual_of_half(32, 256, 640)),
    ("add_layer_norm 1280 of half", lambda: residual_of_half(32, 64, 1280)),
    ("add_layer_norm 320 float32", lambda: residual(32, 1024, 320, dtype=FP32)),
])


# ---- From a launch to its counts -------------------------------------------------------------------

def launches(call) -> list[tuple]:
    """-> [(kernel, its arguments, its options)] of what the call would launch"""
    seen, run = [], JITFunction.run

    def note(kernel, *args, grid, warmup, **given):
        given |= dict(zip(kernel.arg_names, args))
        seen.append((kernel, {name: given.pop(name) for name in kernel.arg_names}, given))

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = run
    return seen


def source(kernel, arguments: dict) -> ASTSource:
    """Types, constants and multiples of 16, as Triton itself finds them at a launch."""
    types, constants, aligned = {}, {}, {}
    for i, (name, x) in enumerate(arguments.items()):
        as_it_is = kernel.params[i].do_not_specialize
        if kernel.params[i].is_constexpr or x is None or isinstance(x, int) and x == 1 and not as_it_is:
            types[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            types[name] = POINTERS[x.dtype]
            if x.storage_offset() * x.element_size() % 16 == 0:          # from an aligned start: a GPU's allocator's
                aligned[(i,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if isinstance(x, float) else "i32" if abs(x) < 2 ** 31 else "i64"
            if isinstance(x, int) and x % 16 == 0 and not as_it_is:
                aligned[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, types, constexprs=constants, attrs=aligned)


def counts(kernel, arguments: dict, options: dict) -> dict[str, int]:
    compiled = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage, sass = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return {"warps": options["num_warps"], "registers": registers, "stack": stack, "shared": compiled.metadata.shared,
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)), "HGMMA": len(re.findall(r"\bHGMMA\b", sass)),
            "narrow loads": len(re.findall(r"\bLDG\.E\.(?:U|S)(?:8|16)\b", sass)),
            "16-byte loads": len(re.findall(r"\bLDG(?:STS)?\.E\.(?:[\w.]+\.)?128\b", sass)),
            "16-byte stores": len(re.findall(r"\bSTG\.E\.128\b", sass))}


def row(name: str) -> dict[str, dict[str, int]]:
    """{"self d40 1024: forward": {"registers": 128, ...}, ...}"""
    return {f"{name}: {kernel.fn.__name__.lstrip('_')}": counts(kernel, arguments, options)
            for kernel, arguments, options in launches(ROWS[name])}


def table(names=tuple(ROWS)) -> dict[str, dict[str, int]]:
    """Those of some rows, as many at a time as there are processors."""
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:    # ROWS cannot be sent to another process
        return {key: found for part in pool.map(row, names) for key, found in part.items()}


def written(found: dict) -> str:
    """One line a kernel, so that a change shows as a line."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counted)}" for name, counted in found.items())
    return f'{{"triton": "{triton.__version__}", "kernels": {{\n{rows}\n}}}}\n'


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("words", nargs="*", metavar="WORD", help="only rows with all of these in their name, as d40")
    top.add_argument("--json", action="store_true", help="as the golden file, to stdout")
    top.add_argument("--write", action="store_true", help="into the golden file")
    given = top.parse_args()
    names = [name for name in ROWS if all(word in name for word in given.words)]
    if not names:
        top.error(f"no row has all of {given.words} in its name; without words all are shown")
    if given.write and given.words:
        top.error("--write is for all rows")
    found = table(names)
    if given.json:
        print(written(found))
        return
    for name, counted in found.items():
        print(f"{name:38}", "  ".join(f"{key} {n}" for key, n in counted.items()))
    if given.write:
        GOLDEN.parent.mkdir(parents=True, exist_ok=True)
        GOLDEN.write_text(written(found))


if __name__ == "__main__":
    main()
