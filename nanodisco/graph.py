"""Graph: a function of tensors captured once as a CUDA graph and replayed, one launch instead of a thousand.

    step = Captured(Compiled(step))    # or either alone

At one frame a step of the networks takes a GPU less time than Python needs to ask for it, kernel by kernel.
A graph remembers all kernels and the memory that each reads and writes. So what changes from call to call is
copied into buffers of its own, the answer is copied out, and inputs of another shape get another graph.
"""
import sys
from collections.abc import Callable

import torch
from torch import Tensor

KEPT = 2                               # shapes whose graphs stay: batches of a track, and the shorter last one
WARM_UP = 3                            # calls before capturing: libraries choose kernels and make workspaces


class Compiled:
    """`function` through torch.compile, from its second call on: the first one fills Memos, in vain for a compiler."""

    def __init__(self, function: Callable[..., Tensor]):
        self.function, self.compiled = function, torch.compile(function, dynamic=False)
        self.begun = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        function, self.begun = self.compiled if self.begun else self.function, True
        return function(*inputs)


class Captured:
    """`function` of tensors on a GPU, with the same answers. What it closes over must stay where it is in memory.

    Where capturing fails that is said, and the function runs as it is. `record`: see below; tests have their own.
    """

    def __init__(self, function: Callable[..., Tensor], record: Callable | None = None):
        self.function, self.record = function, record or record_cuda
        self.graphs: dict[tuple, tuple[list[Tensor], Callable, Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.record is None:
            return self.function(*inputs)
        shape = tuple((x.shape, x.dtype, x.stride()) for x in inputs)
        if shape not in self.graphs:
            self._capture(shape, inputs)
            return self(*inputs)
        buffers, replay, out = self.graphs[shape]
        with torch.cuda.device_of(inputs[0]):
            for buffer, x in zip(buffers, inputs):
                buffer.copy_(x)
            replay()
            return out.clone()                                               # the next call writes over it

    def _capture(self, shape: tuple, inputs: tuple[Tensor, ...]) -> None:
        while len(self.graphs) >= KEPT:
            del self.graphs[next(iter(self.graphs))]
        buffers = [x.clone() for x in inputs]
        try:
            with torch.cuda.device_of(inputs[0]):
                replay, out = self.record(lambda: self.function(*buffers))
        except torch.OutOfMemoryError:                                   # without a graph there is not more
            raise
        except RuntimeError as error:
            reason = next(iter(str(error).splitlines()), "no reason is given")
            print(f"not captured as a CUDA graph, so slower: {reason}", file=sys.stderr)
            self.record = None
        else:
            self.graphs[shape] = buffers, replay, out


def record_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """-> what makes all of it happen again, and the tensor that the answer then lies in"""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # A stream of its own: the end of a graph takes from its stream the memory that matrix products work in, and what
    # other graphs were captured on that stream need it still. Other threads may ask after their own events meanwhile.
    with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
        out = function()
    return graph.replay, out
