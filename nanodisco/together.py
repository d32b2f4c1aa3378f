"""Together: networks that do not need each other, at the same time, where that is faster. For inference.

On a GPU a kernel of one frame leaves most of it idle: networks captured in a CUDA graph are branches of it.
On a CPU the threads that share a layer wait for each other at its end: two networks with half of the cores each
wait less than one with all of them (measured on two cores). Each network needs memory of its own then.
"""
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch

from kernels import backend

FEW = 4                                # pictures up to which it is faster,
WIDE = 128                             # and channels from which on, on a CPU


def together(*networks: Callable, z: torch.Tensor, channels: int) -> list:
    """What each of them returns, all at once on a GPU, the last two at once on a CPU. None of them may call this.

    z: the pictures that they work on; channels: what they have at their narrowest.
    """
    if len(z) <= FEW and not (torch.compiler.is_compiling() or torch.is_grad_enabled()):
        if z.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return _as_branches(networks, z.device)
        if z.device.type == "cpu" and len(networks) > 1 and channels >= WIDE and _threads_suit():
            *before, first, second = networks
            return [network() for network in before] + _in_two_threads(first, second)
    return [network() for network in networks]


def _threads_suit() -> bool:
    """Autocast is on in one thread only, and Triton's interpreter is for one; an odd number of cores has no halves."""
    return not (torch.is_autocast_enabled("cpu") or backend.MODE == "triton" or torch.get_num_threads() % 2)


def _as_branches(networks: Sequence[Callable], device: torch.device) -> list:
    first, *others = networks                                            # it has no stream, so no memory, of its own
    main, results = torch.cuda.current_stream(device), []
    sides = _streams(device, len(others))
    for side, network in zip(sides, others):
        side.wait_stream(main)
        with torch.cuda.stream(side):
            results.append(network())
    results.insert(0, first())
    for side in sides:
        main.wait_stream(side)
    return results


@cache
def _streams(device: torch.device, count: int) -> list:
    """The same each time: a stream that has multiplied matrices once keeps memory for it."""
    return [torch.cuda.Stream(device) for _ in range(count)]


def _in_two_threads(first: Callable, second: Callable) -> list:
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def beside():
        torch.set_num_threads(threads // 2)                              # of this thread; so are the modes
        with torch.inference_mode(inference), torch.no_grad():
            return second()

    try:
        torch.set_num_threads(threads // 2)
        later = _helper().submit(beside)
        try:
            return [first(), later.result()]
        finally:
            wait([later])
    finally:
        torch.set_num_threads(threads)


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_helper.cache_clear)              # a child has none of the parent's threads
