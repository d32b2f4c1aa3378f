"""Attention's kernels against its formula in float64: on a GPU, or on a CPU in Triton's interpreter.

Errors are relative in the L2 norm. The interpreter cuts bfloat16 off where a GPU rounds, so half of the
limits is the interpreter's. Seeds are fresh (conftest.py).
"""
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import attention as dispatch
from kernels import attention_triton, backend
from kernels.attention import attention_reference, temporal_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
pytestmark = pytest.mark.usefixtures("fresh")
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))

STREAMING = {                          # B, L, M, N, K
    "blocks and a rest": (1, 70, 70, 2, 40),
    "even blocks": (1, 128, 128, 1, 40),
    "CLIP's 257 tokens": (1, 70, 257, 1, 40),
    "257 tokens, no room for the first": (1, 20, 257, 1, 160),
    "several pictures and heads": (3, 20, 24, 2, 8),
    "one key": (2, 9, 1, 1, 16),
    "one query": (6, 1, 35, 4, 16),
    "few keys, queries shared out": (1, 530, 6, 4, 8)} | {
    f"width {K}": (1, 35, 33, 2, K) for K in (8, 24, 56, 64, 72, 80, 96, 128, 160, 192, 256)}

SHORT = {                              # clips B, frames F, places S, N, K
    "16 frames": (2, 16, 6, 2, 40),
    "16 frames, even tiles": (1, 16, 8, 1, 80),
    "frames that do not divide a tile": (2, 5, 7, 1, 24),
    "one frame": (3, 1, 5, 1, 8),
    "more frames than half a tile": (1, 40, 2, 1, 8),
    "more frames than a tile": (1, 70, 2, 1, 8),
    "width 160": (1, 16, 3, 1, 160),
    "width 256": (1, 3, 3, 1, 256)}

PICTURES = {                           # B, L, N, K
    "blocks and a rest": (2, 70, 2, 40),
    "even blocks": (1, 128, 1, 40),
    "queries shared out": (1, 260, 1, 8),
    "width 160, blocks and a rest": (1, 70, 1, 160),
    "16 pixels": (3, 16, 2, 40),
    "64 pixels": (2, 64, 1, 160),
    "an odd number": (2, 21, 1, 8)}


# ---- Inputs and errors ---------------------------------------------------------------------------

@pytest.fixture(autouse=True)
def memory_full_of_nan():
    """What torch gives to a kernel for its outputs, so that a number that was not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def packed(B: int, L: int, *parts_and_heads: int, dtype=torch.float32) -> Tensor:
    """(B, L, [parts,] N, K), in a tensor with NaN around it, so that a number read from outside shows."""
    room = torch.full((B + 1, L + 3, *parts_and_heads), float("nan"), device=DEVICE, dtype=dtype)
    inside = room[:B, :L]
    inside.copy_(torch.randn(inside.shape))
    return inside.detach().requires_grad_()


def inputs(B, L, M, N, K, dtype):
    return packed(B, L, N, K, dtype=dtype), packed(B, M, 2, N, K, dtype=dtype)


def parts(*packed: Tensor) -> list[Tensor]:
    """Q, K, V of (B, L, 3, N, K), or of (B, L, N, K) and (B, M, 2, N, K); or their gradients."""
    return [part for x in packed for part in (x.unbind(2) if x.ndim == 5 else [x])]


def formula(*packed: Tensor) -> Tensor:
    q, k, v = parts(*packed)
    x = torch.einsum("blnk, bmnk -> bnlm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnlm, bmnk -> blnk", x.softmax(-1), v)


def temporal_formula(qkv: Tensor, frames: int) -> Tensor:
    """Place by place."""
    return torch.cat([torch.cat([formula(clip[:, s:s + 1].transpose(0, 1)).transpose(0, 1)
                                 for s in range(qkv.shape[1])], 1) for clip in qkv.split(frames)])


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    difference = got.detach().double().cpu() - wanted.detach()
    # Of one key, dQ and dK are exactly zero: as if they were sums of nine numbers, which its queries are
    size = wanted.norm() or 3 * wanted.numel() ** 0.5
    return (difference.norm() / size).item()


def assert_is(ours, wanted, *packed: Tensor) -> None:
    """ours(*packed) and each part of its gradients, like those of wanted in float64."""
    exact = [x.detach().double().cpu().requires_grad_() for x in packed]
    o, o_exact = ours(*packed), wanted(*exact)
    do = torch.randn(o.shape).to(o)
    got = o, *parts(*torch.autograd.grad(o, packed, do))
    exact = o_exact, *parts(*torch.autograd.grad(o_exact, exact, do.double().cpu()))
    assert o.is_contiguous() and o.dtype == packed[0].dtype
    errors = {name: error(*pair) for name, *pair in zip(("o", "dq", "dk", "dv"), got, exact)}
    assert all(e <= LIMITS[o.dtype] for e in errors.values()), errors    # a NaN is not


# ---- Numbers -------------------------------------------------------------------------------------

@DTYPES
@pytest.mark.parametrize("B, L, M, N, K", STREAMING.values(), ids=STREAMING)
def test_cross_attention_is_its_formula(B, L, M, N, K, dtype):
    assert_is(attention_triton.cross_attention, formula, *inputs(B, L, M, N, K, dtype))


@pytest.mark.parametrize("wrong", [(1, 5, 2, 8), (2, 5, 1, 8), (2, 5, 2, 16)], ids=["pictures", "heads", "width"])
def test_keys_of_other_pictures_or_heads_than_the_queries_are_refused(wrong):
    B, M, N, K = wrong
    with pytest.raises(AssertionError, match="only their number may differ"):
        attention_triton.cross_attention(packed(2, 3, 2, 8), packed(B, M, 2, N, K))


@pytest.mark.parametrize("B, L, M, N, K", STREAMING.values(), ids=STREAMING)
def test_tiles_for_many_queries_give_the_formula_too(monkeypatch, B, L, M, N, K):
    """What a test can wait for are few."""
    monkeypatch.setattr(attention_triton, "FEW", 0)
    assert_is(attention_triton.cross_attention, formula, *inputs(B, L, M, N, K, torch.bfloat16))


@DTYPES
@pytest.mark.parametrize("B, F, S, N, K", SHORT.values(), ids=SHORT)
def test_temporal_attention_is_the_formula_at_each_place(B, F, S, N, K, dtype):
    assert_is(lambda qkv: attention_triton.temporal_attention(qkv, F), lambda qkv: temporal_formula(qkv, F),
              packed(B * F, S, 3, N, K, dtype=dtype))


@DTYPES
@pytest.mark.parametrize("B, L, N, K", PICTURES.values(), ids=PICTURES)
def test_self_attention_is_its_formula(B, L, N, K, dtype):
    assert_is(attention_triton.self_attention, formula, packed(B, L, 3, N, K, dtype=dtype))


@DTYPES
@pytest.mark.filterwarnings("ignore::RuntimeWarning")                    # numpy's, of the interpreter: inf is meant
@pytest.mark.parametrize("M", [70, 257], ids=["70 keys", "257 keys"])
@pytest.mark.parametrize("score", [400, -400, 0], ids=["all high", "all low", "far apart"])
def test_scores_may_be_beyond_what_exp_can_give(score, M, dtype):
    """exp(89) is no float32, and exp(-104) is 0. The second picture's scores are usual."""
    q, kv = (x.detach().clone() for x in inputs(2, 40, M, 1, 40, dtype))
    q[0, ..., 0] = 16 * 40 ** 0.5
    kv[0, :, 0, :, 0] = score / 16 if score else 10 * torch.randn(M, 1)
    o, lse = attention_triton.attend([q.unsqueeze(2), kv])
    q, k, v = (x.double().cpu() for x in parts(q, kv))
    wanted = torch.logsumexp(torch.einsum("blnk, bmnk -> bnlm", q, k) / 40 ** 0.5, -1) * math.log2(math.e)
    assert error(o, formula(q, k, v)) <= max(LIMITS[dtype], 1e-4)        # float32 knows 577 to 3e-5
    assert error(lse, wanted) <= 1e-5


def test_plain_versions_are_the_formula():
    qkv = packed(2 * 3, 4, 3, 2, 8).double()
    torch.testing.assert_close(attention_reference(*parts(qkv)), formula(qkv))
    torch.testing.assert_close(temporal_attention_reference(*parts(qkv), 3), temporal_formula(qkv, 3))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")                    # numpy's, of keys beyond the last: not kept
@pytest.mark.parametrize("L, M", [(40, 40), (40, 3), (8, 8)])
def test_scores_far_from_zero_do_not_overflow(L, M):
    own = L == M
    given = [packed(1, L, 3, 1, 8)] if own else inputs(1, L, M, 1, 8, torch.float32)
    given = [(x * 100).detach().requires_grad_() for x in given]         # scores of tens of thousands
    o = (attention_triton.self_attention if own else attention_triton.cross_attention)(*given)
    assert error(o, formula(*(x.detach().double().cpu() for x in given))) < 1e-3
    assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), given))


def test_one_row_of_tokens_serves_several_pictures():
    q, kv = packed(3, 9, 2, 8), packed(1, 20, 2, 2, 8)
    assert_is(lambda q, kv: attention_triton.cross_attention(q, kv.expand(3, -1, -1, -1, -1)),
              lambda q, kv: formula(q, kv.expand(3, -1, -1, -1, -1)), q, kv)


@pytest.mark.parametrize("L", [20, 12], ids=["long", "short"])
def test_any_layout_is_taken(L):
    """Heads before rows, the width not last, gradients of one number for all."""
    q = torch.randn(2, 3, L, 8, device=DEVICE).transpose(1, 2).requires_grad_()
    kv = torch.randn(2, 30, 2, 8, 3, device=DEVICE).transpose(3, 4).requires_grad_()
    qkv = torch.randn(2, L, 3, 8, 3, device=DEVICE).transpose(3, 4).requires_grad_()
    for ours, given in ((attention_triton.cross_attention, (q, kv)), (attention_triton.self_attention, (qkv,))):
        assert_is(ours, formula, *given)
        exact = [x.detach().double().cpu().requires_grad_() for x in given]
        gradients = parts(*torch.autograd.grad(ours(*given).sum(), given))
        for got, wanted in zip(gradients, parts(*torch.autograd.grad(formula(*exact).sum(), exact))):
            assert error(got, wanted) < 2e-5                             # sums that cancel


def test_twice_is_the_same_bit_for_bit():
    q, kv = inputs(1, 300, 20, 1, 8, torch.float32)
    runs = []
    for _ in range(2):
        o = attention_triton.cross_attention(q, kv)
        runs.append((o, *torch.autograd.grad(o, (q, kv), torch.ones_like(o))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_memory_for_outputs_is_full_of_nan_here():
    x = torch.zeros(3, device=DEVICE)
    assert all(y.isnan().all() for y in (x.new_empty(3, 4), torch.empty_like(x)))


# ---- Tiles ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("K, main, tail", [
    (8, 16, 0), (16, 16, 0), (24, 32, 0), (40, 32, 16), (64, 64, 0), (72, 64, 16), (80, 64, 16), (96, 64, 32),
    (120, 128, 0), (160, 128, 32), (256, 256, 0)])
def test_a_width_is_cut_where_that_saves_work(K, main, tail):
    from kernels.tiles_triton import parts
    assert parts(K) == (main, tail)


@pytest.mark.parametrize("L, block, programs", [
    (16384, 64, 80), (1024, 64, 1280), (70, 64, 1), (4096, 32, 3), (530, 64, 1)])
def test_shares_of_the_queries_cover_all_of_them_once(L, block, programs):
    share, shares = attention_triton.shared(L, block, programs)
    assert share % block == 0 and share * (shares - 1) < L <= share * shares
    assert shares == 1 or programs * shares <= attention_triton.ENOUGH


# ---- PyTorch around them -------------------------------------------------------------------------

WAYS = {                               # operation, shapes of its inputs: each way to a kernel
    "self": (kernels.self_attention, (1, 20, 3, 1, 8)),
    "self, short": (kernels.self_attention, (1, 9, 3, 1, 8)),
    "cross": (kernels.cross_attention, (1, 9, 1, 8), (1, 5, 2, 1, 8)),
    "temporal": (lambda qkv: kernels.temporal_attention(qkv, 2), (4, 3, 3, 1, 8))}


class Seen(TorchDispatchMode):
    """The names of all operations but those that only look at memory otherwise."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names += [] if op.is_view else [op.name()]
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("operation, shapes", [(way[0], way[1:]) for way in WAYS.values()], ids=WAYS)
def test_gradients_are_written_where_they_stay(operation, shapes, monkeypatch):
    """Nothing copies dQ, dK and dV into the gradient of the layer that made Q, K and V."""
    monkeypatch.setattr(backend, "MODE", "triton")
    made = [packed(*shape) for shape in shapes]
    o = operation(*made)
    do = torch.ones_like(o)
    with Seen() as seen:
        gradients = torch.autograd.grad(o, made, do)
    name, = seen.names
    assert name.startswith("nanodisco::") and name.endswith("_backward")
    assert all(gradient.is_contiguous() for gradient in gradients)


def test_operations_keep_the_rules_of_torch_library():
    q, kv, qkv = (x.detach().requires_grad_() for x in (packed(1, 9, 1, 1, 8), packed(1, 5, 2, 1, 8),
                                                        packed(1, 9, 3, 1, 8)))
    for given in ([q, kv], [qkv]):
        torch.library.opcheck(attention_triton.attend, (given,))
        o, lse = (x.detach() for x in attention_triton.attend(given))
        torch.library.opcheck(attention_triton.attend_backward, ([x.detach() for x in given], o, lse, o))
    short = attention_triton.short
    clip = packed(2, 3, 3, 1, 8).detach()[:, :, None].requires_grad_()
    torch.library.opcheck(short.attend, (clip,))
    torch.library.opcheck(short.attend_backward, (clip.detach(), torch.ones_like(clip.detach()[..., 0, :, :])))


@pytest.mark.parametrize("operation, shapes", [(way[0], way[1:]) for way in WAYS.values()], ids=WAYS)
def test_compiled_in_one_graph_with_its_gradients(operation, shapes, monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    given = [packed(*shape) for shape in shapes]
    compiled = torch.compile(operation, backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(f(*given).square().sum(), given) for f in (compiled, operation)]
    torch.testing.assert_close(*gradients)


def test_autocast_computes_in_its_dtype(monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    given = qkv, q, kv = packed(1, 20, 3, 1, 8), *inputs(1, 20, 5, 1, 8, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = kernels.self_attention(qkv), kernels.temporal_attention(qkv, 1), kernels.cross_attention(q, kv)
        gradients = torch.autograd.grad(sum(o.sum() for o in found), given)
    assert {o.dtype for o in found} == {torch.bfloat16} and {x.dtype for x in gradients} == {torch.float32}


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_captured_in_a_cuda_graph():
    q, kv = inputs(2, 128, 257, 2, 40, torch.bfloat16)
    wanted = attention_triton.cross_attention(q, kv)                     # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o = attention_triton.cross_attention(q, kv)
    o.zero_()
    graph.replay()
    assert torch.equal(o, wanted)


# ---- Which version runs --------------------------------------------------------------------------

@pytest.fixture
def versions(monkeypatch):
    """-> a function: mode, input's dtype and width -> "kernel" or "plain", for all three operations"""
    monkeypatch.setattr(attention_triton, "self_attention", lambda qkv: "kernel")
    monkeypatch.setattr(attention_triton, "cross_attention", lambda q, kv: "kernel")
    monkeypatch.setattr(attention_triton, "temporal_attention", lambda qkv, frames: "kernel")
    monkeypatch.setattr(dispatch, "attention_reference", lambda q, k, v: "plain")
    monkeypatch.setattr(dispatch, "temporal_attention_reference", lambda q, k, v, frames: "plain")
    monkeypatch.setattr(backend, "said", set())
    backend._reason.cache_clear()

    def run(mode: str, width: int = 8, dtype=torch.float32, device=DEVICE, rows: int = 1) -> str:
        monkeypatch.setattr(backend, "MODE", mode)
        qkv = torch.empty(rows, 2, 3, 1, width, dtype=dtype, device=device)
        answer, = {kernels.self_attention(qkv), kernels.temporal_attention(qkv, 1),
                   kernels.cross_attention(qkv[:, :, 0], qkv[:, :, 1:])}
        return answer

    yield run
    backend._reason.cache_clear()


def test_the_mode_chooses_the_version(versions, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    by_itself = "kernel" if DEVICE == "cuda" else "plain"
    assert [versions(mode) for mode in ("auto", "torch", "triton")] == [by_itself, "plain", "kernel"]
    with pytest.raises(RuntimeError, match="'trition'; expected one of auto, triton, torch"):
        versions("trition")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [8, 40, 80, 160, 256])
def test_kernels_take_what_they_say(versions, monkeypatch, width, dtype):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert versions("triton", width, dtype) == "kernel"


def test_a_demanded_kernel_that_cannot_run_is_an_error(versions, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="NANODISCO_KERNELS=triton, but .* multiple of 8, not 12"):
        versions("triton", 12)
    with pytest.raises(RuntimeError, match="float16, not float64"):
        versions("triton", dtype=torch.float64)
    backend._reason.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="Triton has no cpu backend; TRITON_INTERPRET=1"):
        versions("triton", device="cpu")


def test_wide_heads_need_a_gpu_with_the_memory_for_their_tiles(versions, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "shared_memory", lambda device: 101_376)      # a GeForce's
    assert versions("triton", 160) == "kernel"
    with pytest.raises(RuntimeError, match="heads of 168 needs 196,608 bytes"):
        versions("triton", 168)


def test_the_one_wide_head_and_empty_inputs_are_plain_in_every_mode(versions):
    assert {versions(mode, 512) for mode in backend.MODES} == {"plain"}
    assert {versions(mode, rows=0) for mode in backend.MODES} == {"plain"}


def test_auto_falls_back_and_says_so_once(versions, monkeypatch, capsys):
    monkeypatch.setattr(backend, "MODE", "auto")
    on_gpu = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "triton", None)                     # what makes an import fail
    assert not backend.use_triton(on_gpu) and not backend.use_triton(on_gpu)
    said, = capsys.readouterr().err.splitlines()
    assert said.startswith("kernels: plain PyTorch runs, Triton cannot be imported (") and "pip install triton" in said
    assert not backend.use_triton(on_gpu, "not for this") and capsys.readouterr().err.endswith("runs, not for this\n")
