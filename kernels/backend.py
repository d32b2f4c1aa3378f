"""Backend: which of an operation's two versions runs, plain PyTorch or our Triton kernel.

    NANODISCO_KERNELS=auto     Triton on a GPU where it can be imported, else PyTorch, said once (the default)
                      triton   Triton, or an error that says why it cannot; on a CPU it needs TRITON_INTERPRET=1
                      torch    PyTorch

A model never asks: each operation of this package does, for every call.
"""
import os
import sys
from functools import cache

import torch
from torch import Tensor

MODES = ("auto", "triton", "torch")
MODE = os.environ.get("NANODISCO_KERNELS", "auto")
said = set()                           # reasons why plain PyTorch runs, each printed once


def use_triton(x: Tensor, unfit: str = "") -> bool:
    """Whether the kernel is to run on this tensor. RuntimeError where it was demanded and cannot.

    unfit: why this operation's kernel is not for this input; "" if it is.
    """
    if MODE not in MODES:
        raise RuntimeError(f"NANODISCO_KERNELS is {MODE!r}; expected one of {', '.join(MODES)}")
    if MODE == "torch" or MODE == "auto" and x.device.type != "cuda":
        return False
    reason = why_not(x.device.type, unfit)
    if reason and MODE == "triton":
        raise RuntimeError(f"NANODISCO_KERNELS=triton, but {reason}")
    return not reason


@torch.compiler.assume_constant_result # asked while torch.compile traces, never later
def why_not(device: str, unfit: str) -> str:
    """Why the kernel cannot run on this kind of device; "" if it can. In mode auto each reason is printed, once."""
    reason = unfit or _reason(device)
    if reason and MODE == "auto" and reason not in said:
        print(f"kernels: plain PyTorch runs, {reason}", file=sys.stderr)
        said.add(reason)
    return reason


@torch.compiler.assume_constant_result
def shared_memory(device: torch.device) -> float:
    """Bytes that a program of a kernel can have at most. Only a GPU has a limit."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def _reason(device: str) -> str:
    try:
        import triton                                                    # noqa: F401  slow, so only where it is wanted
    except ImportError as error:
        return f"Triton cannot be imported ({error}); pip install triton"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton has no {device} backend; TRITON_INTERPRET=1 runs kernels there, slowly, to check them"
    from kernels import tiles_triton
    try:
        tiles_triton.launch_one(device)
    except Exception as error:         # no compiler, no header, an old GPU: each has another type
        return f"Triton cannot launch a kernel here ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    return ""
