"""Distributed: the processes that torchrun starts, as one run. A process by itself is a run of one.

    world = World.join()
    if world.rank == 0: print("once")
    loss = world.sum(loss)
"""
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed.nn            # noqa: F401  before there is a group, or its functions' defaults would hold that
from torch import Tensor, distributed

from kernels import backend
from nanodisco.errors import InputError

PATIENCE = timedelta(hours=2)          # all wait while one validates or saves


def device_of(name: str) -> str:
    """The device that "auto" means here, or the named one.

    InputError if that is not there, or cannot do what NANODISCO_KERNELS asks for.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        x = torch.zeros(1, device=name)
        x.item()
    except (RuntimeError, AssertionError, ValueError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise InputError(f"--device {name} is not there; expected one of {', '.join(there)}") from error
    try:
        backend.use_triton(x)
    except RuntimeError as error:
        raise InputError(str(error)) from None
    return name


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: str

    @staticmethod
    def join(device: str = "auto") -> "World":
        """NCCL on GPUs, gloo on CPUs; the variables that torchrun sets say who is who."""
        rank, size, local = (int(os.environ.get(name, default)) for name, default in
                             (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if device in ("auto", "cuda") and local < torch.cuda.device_count():
            torch.cuda.set_device(local)                                 # before anything is put on the first
        device = device_of(device)
        if device == "cuda" and local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this machine has no GPU of its own; there are "
                             f"{torch.cuda.device_count()} (torchrun --nproc-per-node)")
        if size > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=rank, world_size=size,
                                           store=_store(size), timeout=PATIENCE)
        return World(rank, size, f"cuda:{local}" if device == "cuda" else device)

    def sum(self, x: Tensor) -> Tensor:
        """Over all processes, the same on each."""
        if self.size > 1:
            distributed.all_reduce(x)
        return x

    def each(self, parameters: list[Tensor], make: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """make(parameters), on all processes, although each makes what is of every `size`-th only.

        What is made of one has its shape and bfloat16's values, or is rounded to them.
        """
        if self.size == 1 or not parameters:
            return make(parameters)
        sizes = [p.numel() for p in parameters]
        whole = torch.zeros(sum(sizes), dtype=torch.bfloat16, device=self.device)
        views = [part.view_as(p) for part, p in zip(whole.split(sizes), parameters)]
        own = slice(self.rank, None, self.size)
        for view, made in zip(views[own], make(parameters[own])):
            view.copy_(made)
        self.sum(whole)                                                  # of zeros and one other: exact
        return views

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Its threads end with the group, if nothing else holds that.

        One that outlived it might still have to let go of a tensor, which aborts the process while Python ends.
        """
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _store(size: int) -> distributed.Store:
    """Where the processes leave their addresses for each other.

    torchrun with an address keeps one for all restarts, in which the addresses of those that died still are;
    so each restart gets shelves of its own. On several machines agents may count restarts differently.
    """
    store, _, _ = next(distributed.rendezvous("env://"))
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < size:
        return store
    return distributed.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
