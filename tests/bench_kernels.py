"""Our kernels against PyTorch's best on one GPU, shape by shape; each in per cent of what the machine can do.

    python tests/bench_kernels.py --json kernels.json              # on a GPU, 4 minutes
    python tests/bench_kernels.py --only temporal norm             # some tables
    python tests/bench_kernels.py                                  # without a GPU: tiny shapes, plain versions, 10 s

Columns: milliseconds of ours; of the fastest of PyTorch's fused attentions (with the kernel that really ran); of
plain PyTorch operation by operation; of those through torch.compile. Each is recorded as a CUDA graph and its replay
timed with a cold L2 cache, so that no host is measured; medians. What can take under 10 us is recorded 20 times in a
graph: its inputs are in the L2 cache, as in a network (marked *); convolutions, whose weights are not, once. `limit`
is the time that arithmetic, exponentials or bytes alone would take, whichever is longest, at the ceilings that are
measured first; a byte counts once for each input that is read and each output that is written. `error` is relative L2
against float64. `aim`: how many times as fast as the fastest other column ours is to be. Ours is timed twice; `spread`
is the difference.

bf16, 8 heads, memory as the models have it: packed Q, K, V, and their gradients too; channels last.
"""
import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d, group_norm, scaled_dot_product_attention, silu

sys.path.insert(0, str(Path(__file__).parent.parent))
from kernels import (add_layer_norm, backend, cross_attention, geglu, group_norm_silu,  # noqa: E402
                     self_attention, temporal_attention)
from kernels.add_layer_norm import add_layer_norm_reference  # noqa: E402
from kernels.conv import conv3x3  # noqa: E402
from kernels.geglu import geglu_reference  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
FUSED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
         "efficient": SDPBackend.EFFICIENT_ATTENTION}
HEADS, FRAMES, GROUPS = 8, 16, 32
TOKENS = 257                           # of CLIP
LARGE = 2**31                          # scores that plain attention would keep in memory, some times over: left out


@dataclass
class Case:
    """One line: functions of the same result, and what that result takes."""
    name: str
    inputs: list[Tensor]
    ours: Callable
    plain: Callable
    flops: float
    exps: float
    bytes: int                         # that are read and written
    fused: dict = field(default_factory=dict)
    few: int = 1                       # of the first axis, to be repeated in float64
    backward: bool = False             # the gradients, of which that of the first input is compared
    compiled: bool = True              # whether torch.compile is worth its seconds here
    cold: bool = False                 # in a network its inputs come from memory, however short it is
    aim: float = 1.0

    def ready(self, function: Callable, exact: bool = False) -> Callable:
        """What is to be timed: `function` of the inputs, or after it has gone forward the way back."""
        inputs = [x[:self.few].double() if x.ndim > 1 else x.double() for x in self.inputs] if exact else self.inputs
        if not self.backward:
            return lambda: function(*inputs)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        dy = torch.randn(len(self.inputs[0]), *out[0].shape[1:], generator=torch.Generator(DEVICE).manual_seed(0),
                         device=DEVICE)
        dys = [dy[:len(o)].to(o).contiguous(memory_format=layout_of(o)) for o in out]
        return lambda: torch.autograd.grad(out, leaves, dys, retain_graph=True)[0]

    def error(self, ours: Tensor | tuple, wanted: Tensor | tuple) -> float:
        """Relative L2 of the last result, in the part that `wanted` has."""
        ours, wanted = (found[-1] if isinstance(found, tuple) else found for found in (ours, wanted))
        return ((ours[:len(wanted)].double() - wanted).norm() / wanted.norm()).item()


def layout_of(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


# ---- Attention --------------------------------------------------------------------------------------------

def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, L, N, K), 2 x (B, M, N, K) -> (B, L, N, K)"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return (torch.softmax(q @ k.transpose(2, 3) * q.shape[-1] ** -0.5, dim=-1) @ v).transpose(1, 2).contiguous()


def fused_attention(choice: SDPBackend) -> Callable:
    def function(q, k, v):
        with sdpa_kernel(choice):
            out = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).contiguous()
    return function


def along_frames(function: Callable) -> Callable:
    """An attention of (B, L, N, K) for clips (B*F, S, N, K): with the copies that bring the frames together."""
    def temporal(q, k, v):
        S = q.shape[1]
        folded = [x.unflatten(0, (-1, FRAMES)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]     # (B*S, F, N, K)
        return function(*folded).unflatten(0, (-1, S)).transpose(1, 2).flatten(0, 1)
    return temporal


def packed(B: int, L: int, M: int, K: int) -> list[Tensor]:
    """qkv, or q and kv, as linear layers leave them."""
    shapes = [(B, L, 3, HEADS, K)] if L == M else [(B, L, HEADS, K), (B, M, 2, HEADS, K)]
    return [torch.randn(shape, device=DEVICE, dtype=DTYPE) for shape in shapes]


def unpacked(q: Tensor, kv: Tensor | None = None) -> tuple[Tensor, ...]:
    """(qkv,) or (q, kv) -> q, k, v"""
    return q.unbind(2) if kv is None else (q, *kv.unbind(2))


def attention_case(name, inputs, ours, adapt, scores, K, backward=False, **others) -> Case:
    """`adapt` makes an attention of (B, L, N, K) into one of these q, k, v. `scores`: how many there are.

    Forward two products of matrices, backward five; q, k, v and o, then those and as many gradients.
    """
    def peer(function: Callable) -> Callable:
        return lambda *inputs: adapt(function)(*unpacked(*inputs))

    fused = {name: peer(fused_attention(choice)) for name, choice in FUSED.items()} if GPU else {}
    traffic = sum(x.nbytes for x in [*inputs, unpacked(*inputs)[0]])
    return Case(name, inputs, ours, peer(plain_attention), (10 if backward else 4) * scores * K, scores,
                (2 if backward else 1) * traffic, fused, backward=backward, **others)


def attention_cases(B: int, backward: bool = False) -> Iterator[Case]:
    sizes = [(40, 1024), (40, 4096), (80, 256), (80, 1024), (160, 64), (160, 256), (160, 16)] if GPU else [(40, 64)]
    for tokens in (0, TOKENS):
        for K, L in sizes:
            M = tokens or L
            aim = 0.8 if backward else 1.3 if tokens else 1.05 if K == 40 else 1.0     # of the fastest
            kind, ours = ("cross", cross_attention) if tokens else ("self", self_attention)
            yield attention_case(f"{kind} d{K} {L}x{M} B{B}", packed(B, L, M, K), ours, lambda f: f, B * HEADS * L * M,
                                 K, backward, aim=aim, compiled=B > 2 and not backward)


def temporal_cases(B: int = 2) -> Iterator[Case]:
    for K, S in [(40, 1024), (80, 256), (160, 64), (40, 4096)] if GPU else [(40, 16)]:
        yield attention_case(f"temporal d{K} {B * S}x{FRAMES}", packed(B * FRAMES, S, S, K),
                             lambda qkv: temporal_attention(qkv, FRAMES), along_frames,
                             B * S * HEADS * FRAMES**2, K, few=FRAMES, aim=3.0)


# ---- GroupNorm and SiLU -----------------------------------------------------------------------------------

def plain_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With the copy back to channels last that the next convolution needs, where PyTorch's norm leaves them."""
    return silu(group_norm(x, GROUPS, weight, bias, 1e-5)).contiguous(memory_format=torch.channels_last)


def norm_cases(backward: bool = False) -> Iterator[Case]:
    sizes = [(320, 32, 32), (640, 32, 32), (960, 32, 32), (640, 16, 32), (1280, 16, 32), (1920, 16, 32), (2560, 8, 32),
             (128, 256, 1), (512, 64, 1),                                # of the VAE
             (320, 32, 2), (1280, 8, 2)]                                 # of a step of one frame
    for C, side, B in sizes if GPU else [(64, 16, 2)]:
        x = torch.randn(B, C, side, side, device=DEVICE, dtype=DTYPE).to(memory_format=torch.channels_last)
        weight, bias = 1 + 0.1 * torch.randn(C, device=DEVICE, dtype=DTYPE), 0.1 * torch.ones_like(x[0, :, 0, 0])
        others = dict(backward=backward, compiled=B > 2 and not backward, aim=3.0)
        traffic = (3 if backward else 2) * x.nbytes
        yield Case(f"norm {C}@{side} B{B}, {x.nbytes / 1e6:.1f} MB", [x, weight, bias],
                   lambda x, weight, bias: group_norm_silu(x, weight, bias, GROUPS, 1e-5), plain_group_norm_silu,
                   0, 0, traffic, **others)
        if C == 320:                                                     # with the time embedding, as in a ResBlock
            yield Case(f"norm {C}@{side} B{B}, shifted", [x, weight, bias, torch.randn_like(x[:, :, 0, 0])],
                       lambda x, weight, bias, shift: group_norm_silu(x, weight, bias, GROUPS, 1e-5, shift=shift),
                       lambda x, weight, bias, shift: plain_group_norm_silu(x + shift[:, :, None, None], weight, bias),
                       0, 0, traffic, **others)


# ---- Pointwise --------------------------------------------------------------------------------------------

def pointwise_cases(B: int = 32, backward: bool = False) -> Iterator[Case]:
    """GEGLU, and a residual with the LayerNorm behind it, which is timed with both of its results."""
    sizes = [(320, 1024), (640, 256), (1280, 64)] if GPU else [(32, 16)]
    others = dict(backward=backward, compiled=not backward, aim=2.0)
    for C, L in sizes:
        x = torch.randn(B, L, 8 * C, device=DEVICE, dtype=DTYPE)
        yield Case(f"GEGLU {L}x{8 * C}", [x], geglu, geglu_reference, 0, 0, x.nbytes * (5 if backward else 3) // 2,
                   **others)
    for C, L in sizes:
        x, more = torch.randn(2, B, L, C, device=DEVICE, dtype=DTYPE)
        weight, bias = 1 + 0.1 * torch.randn(C, device=DEVICE, dtype=DTYPE), 0.1 * torch.ones_like(x[0, 0])
        yield Case(f"add + LayerNorm {L}x{C}", [x, more, weight, bias], add_layer_norm, add_layer_norm_reference,
                   0, 0, 4 * x.nbytes, **others)


# ---- Convolutions of one frame ----------------------------------------------------------------------------

def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, more: Tensor) -> Tensor:
    return more + conv2d(x, weight, bias, padding=1)


def conv_cases() -> Iterator[Case]:
    sizes = [(320, 320, 32, 1), (320, 320, 32, 2), (960, 320, 32, 2), (640, 640, 16, 2), (1920, 640, 16, 2),
             (1280, 1280, 8, 2), (2560, 1280, 8, 2), (1280, 1280, 4, 2), (2560, 1280, 4, 2)]
    for C, N, side, B in sizes if GPU else [(16, 16, 8, 1)]:
        x, weight, more = (torch.randn(shape, device=DEVICE, dtype=DTYPE).to(memory_format=torch.channels_last)
                           for shape in ((B, C, side, side), (N, C, 3, 3), (B, N, side, side)))
        inputs = [x, weight / (9 * C) ** 0.5, torch.randn(N, device=DEVICE, dtype=DTYPE), more]
        yield Case(f"conv {B}x{C}->{N}@{side}", inputs, conv3x3, plain_conv, 18 * C * more.numel(), 0,
                   sum(t.nbytes for t in inputs) + more.nbytes, few=N, compiled=False, cold=True)


TABLES = {"attention, B = 32": lambda: attention_cases(32 if GPU else 2),
          "temporal": temporal_cases,
          "norm": norm_cases,
          "conv": conv_cases,
          "attention backward": lambda: attention_cases(32 if GPU else 2, backward=True),
          "norm backward": lambda: norm_cases(backward=True),
          "pointwise": lambda: pointwise_cases(32 if GPU else 2),
          "pointwise backward": lambda: pointwise_cases(32 if GPU else 2, backward=True),
          "attention, B = 2": lambda: attention_cases(2) if GPU else []}


# ---- Time -------------------------------------------------------------------------------------------------

def milliseconds(case: Case, function: Callable, times: int) -> float:
    """The median of replays of a graph on a GPU that has `function` so many times."""
    import triton

    stream = torch.cuda.Stream()                                         # a backward pass runs where its forward ran
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = case.ready(function)
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            run()
    return triton.testing.do_bench(graph.replay, warmup=25, rep=100, return_mode="median") / times


def on_cpu(functions: list[Callable], rounds: int = 15) -> list[float]:
    """Medians; in turns, so that a busy machine slows all alike."""
    seen = [[] for _ in functions]
    for _ in range(rounds):
        for function, times in zip(functions, seen):
            began = time.perf_counter()
            function()
            times.append(1000 * (time.perf_counter() - began))
    return [statistics.median(times[1:]) for times in seen]


def kernel_that_ran(run: Callable) -> str:
    """The one that took longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    longest = max(profiler.key_averages(), key=lambda event: event.device_time_total, default=None)
    if longest is None:
        return "not known: the profiler saw nothing"
    return longest.key.split("(")[0].removeprefix("void ")[:60]


def ceilings() -> dict:
    """What this machine does at best: TFLOP/s of a product, TB/s of a copy; T/s of exponentials as counted."""
    import triton

    a, b = torch.randn(2, 8192, 8192, device=DEVICE, dtype=DTYPE)
    x = torch.randn(2**29, device=DEVICE, dtype=DTYPE)
    y = torch.empty_like(x)
    product = triton.testing.do_bench(lambda: a @ b, warmup=100, rep=300, return_mode="median")
    copy = triton.testing.do_bench(lambda: y.copy_(x), warmup=100, rep=300, return_mode="median")
    of_chip = triton.runtime.driver.active.utils.get_device_properties(torch.cuda.current_device())
    exps = 16 * of_chip["multiprocessor_count"] * of_chip["sm_clock_rate"] * 1e3
    return {"flops": 2 * 8192**3 / product * 1e3, "bytes": 2 * x.nbytes / copy * 1e3, "exps": exps}


def limit(case: Case, machine: dict) -> float:
    """Milliseconds that this machine needs at least."""
    return 1e3 * max(getattr(case, what) / machine[what] for what in ("flops", "exps", "bytes"))


# ---- Tables -----------------------------------------------------------------------------------------------

def measured(case: Case, machine: dict, compile_too: bool) -> dict:
    """A line of a table on a GPU. A version that this PyTorch refuses is left out and named."""
    backend.MODE = "triton"
    row = {"name": case.name, "aim": case.aim, "limit": limit(case, machine), "refused": {}}
    row["recorded"] = 20 if row["limit"] < 0.01 and not case.cold else 1
    twice = [milliseconds(case, case.ours, row["recorded"]) for _ in range(2)]
    row |= {"ours": statistics.mean(twice), "spread": abs(twice[0] - twice[1]) / min(twice)}
    row["error"] = case.error(case.ready(case.ours)(), case.ready(case.plain, exact=True)())
    others = dict(case.fused) | ({"plain": case.plain} if case.exps < LARGE else {})
    if compile_too and case.compiled and case.exps < LARGE:
        torch._dynamo.reset()
        others["compiled"] = torch.compile(case.plain, dynamic=False)
    for name, function in others.items():
        try:
            row[name] = milliseconds(case, function, row["recorded"])
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["refused"][name] = str(error).splitlines()[0][:100]
            torch.cuda.synchronize()
    fused = [name for name in case.fused if name in row]
    if fused:
        row["fused"] = min(fused, key=row.get)
        row["kernel"] = kernel_that_ran(case.ready(case.fused[row["fused"]]))
    seconds = row["ours"] / 1e3
    row |= {"TFLOP/s": case.flops / seconds / 1e12, "GB/s": case.bytes / seconds / 1e9}
    row["times"] = min(row[name] for name in others if name in row) / row["ours"]
    return row


def line(row: dict) -> str:
    columns = [row.get(name) for name in ("ours", row.get("fused"), "plain", "compiled")]
    cells = " ".join(f"{'-':>8}" if value is None else f"{value:8.4f}" for value in columns)
    rate = f"{row['TFLOP/s']:6.0f} TFLOP/s" if row["TFLOP/s"] else f"{row['GB/s']:6.0f} GB/s   "
    verdict = "ok" if row["times"] >= row["aim"] else "< "
    return (f"{row['name'] + ' *' * (row['recorded'] > 1):30}{cells} {rate} {row['limit'] / row['ours']:5.0%} "
            f"{row['error']:8.1e} {row['times']:6.2f} {verdict} {row['aim']:4.2f} {row['spread']:6.1%}  "
            f"{row.get('kernel', '')}")


def on_gpu(tables: dict, seconds: float, compile_too: bool, keep: Callable[[dict], None]) -> dict:
    """keep: called after each line with all of them; a benchmark may run out of time."""
    began, machine = time.monotonic(), ceilings()
    print(f"ceilings: {machine['flops'] / 1e12:.0f} TFLOP/s bf16, copy {machine['bytes'] / 1e12:.2f} TB/s, "
          f"{machine['exps'] / 1e12:.1f} T exponentials/s (counted)")
    result = {"ceilings": machine, "tables": {}, "left out": [], "failed": {}}
    for title, cases in tables.items():
        print(f"\n{title:30}" + " ".join(f"{name:>8}" for name in ("ours", "fused", "plain", "compiled"))
              + f" {'':14} limit    error  times    aim spread  fused kernel")
        rows = result["tables"][title] = []
        for case in cases():
            spent = time.monotonic() - began
            if spent > seconds:
                result["left out"].append(case.name)
                continue
            try:
                rows.append(measured(case, machine, compile_too and spent < seconds / 2))
                keep(result)
                print(line(rows[-1]), flush=True)
            except Exception as error:                                   # an unattended run goes on; its status is 1
                result["failed"][case.name] = f"{type(error).__name__}: {error}"
                print(f"{case.name:30} FAILED: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
            torch.cuda.empty_cache()
    if result["left out"]:
        print(f"\nleft out after {seconds:.0f} s: {', '.join(result['left out'])}")
    return result


def without_gpu(tables: dict) -> dict:
    """Only to see that it runs: the versions of this package for a CPU against the plain ones, tiny."""
    torch.set_num_threads(1)
    backend.MODE, result = "torch", {}
    print("no GPU: plain versions only, on tiny shapes in float32\n" + " " * 34 + "ours / plain   error")
    for title, cases in tables.items():
        for case in cases():
            ours, wanted = case.ready(case.ours), case.ready(case.plain, exact=True)()
            mine, plain = on_cpu([ours, case.ready(case.plain)])
            error = case.error(ours(), wanted)
            result.setdefault(title, []).append({"name": case.name, "ratio": mine / plain, "error": error})
            print(f"{case.name:22} {'backward' if case.backward else '':10} {mine / plain:12.2f} {error:7.0e}",
                  flush=True)
    return {"tables": result}


def driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "not known: no nvidia-smi"
    asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                           text=True)
    return asked.stdout.strip().split("\n")[0]


def machine_and_versions() -> dict:
    found = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "python": platform.python_version(),
             "torch": torch.__version__}
    if GPU:
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "driver": driver(),
                  "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "triton": triton.__version__}
    return found


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    top.add_argument("--only", nargs="+", metavar="WORD", help="tables with one of these words in their name")
    top.add_argument("--seconds", type=float, default=240, help="begin no line after so many; default 240")
    top.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes seconds a line")
    top.add_argument("--json", metavar="FILE", help="write the numbers there")
    given = top.parse_args()
    tables = {title: cases for title, cases in TABLES.items()
              if not given.only or any(word in title for word in given.only)}
    result = {"machine": machine_and_versions()}
    print(result["machine"])

    def keep(found: dict) -> None:
        result.update(found)
        if given.json:
            Path(given.json).write_text(json.dumps(result, indent=1))
    keep(on_gpu(tables, given.seconds, not given.no_compile, keep) if GPU else without_gpu(tables))
    sys.exit(bool(result.get("failed")))


if __name__ == "__main__":
    main()
