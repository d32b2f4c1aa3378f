"""The GroupNorm + SiLU kernels against plain PyTorch in float64; on a CPU by Triton's interpreter.

All memory is NaN until it is written, so that an element that no program writes shows.
"""
from functools import partial

import pytest
import torch
from torch.library import opcheck

from kernels import backend, group_norm_silu
from kernels.group_norm_silu import group_norm_silu_reference

pytest.importorskip("triton")
from kernels import group_norm_silu_triton as kernels, tiles_triton  # noqa: E402  Triton need not be installed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}    # relative L2
FEW_SUMS = 4                           # so few, gradients of so few channels, can all come out small
LAYOUTS = {"NHWC": torch.channels_last, "NCHW": torch.contiguous_format}

pytestmark = [pytest.mark.usefixtures("fresh"),
              pytest.mark.filterwarnings("ignore:overflow encountered in exp")]   # in lanes that are not stored

# pictures, channels, height, width, groups, frames, rows of shift
SHAPES = {"63 channels, 21 groups, 63 pixels": (2, 63, 7, 9, 21, 1, 0),
          "1 pixel": (3, 20, 1, 1, 2, 1, 3),
          "1 channel": (2, 1, 4, 5, 1, 1, 0),
          "a tail of 13 pixels in the third chunk": (2, 16, 7, 11, 2, 1, 1),
          "a tail of 1 pixel in the second": (1, 16, 3, 11, 4, 1, 0),
          "groups of 10 channels, one across two tiles": (2, 80, 3, 5, 8, 1, 2),
          "one group": (1, 24, 5, 4, 1, 1, 0),
          "nothing odd": (2, 64, 8, 8, 4, 1, 1),
          "2 frames, one shift for all": (4, 12, 5, 7, 2, 2, 1),
          "2 frames, a shift for each clip": (4, 20, 6, 6, 2, 2, 2),
          "2 frames, a shift for each frame": (4, 20, 3, 3, 2, 2, 4),
          "5 frames, a shift for each clip": (10, 12, 7, 5, 3, 5, 2),
          "6 frames, a shift for each 2": (6, 6, 5, 8, 3, 6, 3)}
WAYS = [(name, way) for name, shape in SHAPES.items() for way in ("small", "tiles") if way == "tiles" or shape[5] == 1]
FEW = ["63 channels, 21 groups, 63 pixels", "groups of 10 channels, one across two tiles",
       "2 frames, a shift for each frame"]


@pytest.fixture(autouse=True)
def memory_is_nan_until_written():
    torch.use_deterministic_algorithms(True, warn_only=True)             # what fills; not all that PyTorch runs has one
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(9).isnan().all() and torch.ones(9).new_empty(3, 3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["small", "tiles"])
def way(request, monkeypatch):
    """Of a small picture: one launch for all, or three. Clips always go by tiles."""
    monkeypatch.setattr(kernels, "SMALL", 2**15 if request.param == "small" else 0)


def inputs(shape, dtype=torch.float32, layout="NHWC", mean=0.5, std=2.0):
    """x, weight, bias, shift or None, gradient of y; of the dtype, on the device."""
    N, C, H, W, _, _, rows = shape
    normal = partial(torch.randn, dtype=torch.float64)
    drawn = [std * normal(N, C, H, W) + mean, 1 + 0.5 * normal(C), normal(C), 2 * normal(rows, C) if rows else None,
             normal(N, C, H, W)]
    x, *others = [None if t is None else t.to(DEVICE, dtype) for t in drawn]
    return x.contiguous(memory_format=LAYOUTS[layout]), *others


def with_gradients(function, x, weight, bias, shift, dy, shape, silu=True):
    """y and the gradients of x, weight, bias and shift, by name."""
    of = {"x": x, "weight": weight, "bias": bias} | ({} if shift is None else {"shift": shift})
    of = {name: tensor.detach().clone().requires_grad_() for name, tensor in of.items()}
    y = function(of["x"], of["weight"], of["bias"], shape[4], 1e-5, shape[5], silu, of.get("shift"))
    y.backward(dy)
    return {"y": y.detach()} | {f"d{name}": tensor.grad for name, tensor in of.items()}


def error(got, wanted):
    """Relative L2; of a few sums that have come out small, by chance, relative to 1."""
    size = wanted.norm().clamp(min=1 if wanted.numel() <= FEW_SUMS else 0)
    return ((got.double() - wanted).norm() / size).item()


def check(shape, dtype=torch.float32, layout="NHWC", limit=None, silu=True, **values):
    given = inputs(shape, dtype, layout, **values)
    got = with_gradients(kernels.group_norm_silu_triton, *given, shape, silu)
    wanted = with_gradients(group_norm_silu_reference, *(t if t is None else t.double() for t in given), shape, silu)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].shape == wanted[name].shape and got[name].dtype == dtype, name
        assert error(got[name], wanted[name]) <= (limit or LIMITS[dtype]), name
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, way", WAYS, indirect=["way"])
def test_result_and_gradients_are_those_of_float64(name, way, layout):
    check(SHAPES[name], layout=layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[name] for name in FEW], ids=FEW)
def test_other_types_are_rounded_only_where_they_are_stored(shape, dtype, way):
    check(shape, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_picture_of_many_chunks(monkeypatch, layout):
    monkeypatch.setattr(kernels, "SMALL", 0)
    check((2, 20, 17, 19, 2, 1, 1), layout=layout)


def test_a_first_pixel_far_from_all_others_costs_little_precision(way):
    """Sums of squares are of differences from it: at worst a unit of the last place for each pixel."""
    x, weight, bias, _, _ = inputs(shape := (1, 4, 9, 9, 2, 1, 0))
    x[:, :, 0, 0] += 1e4
    got = kernels.group_norm_silu_triton(x, weight, bias, shape[4], 1e-5)
    wanted = group_norm_silu_reference(x.double(), weight.double(), bias.double(), shape[4], 1e-5)
    assert error(got, wanted) <= 1e-4                                    # seen in 250 tries: 3e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frames", [1, 2])
def test_large_means_do_not_cost_precision(layout, frames, way):
    check((2, 20, 16, 16, 2, frames, 2), layout=layout, limit=1e-5, mean=100, std=3)


def test_a_large_shift_does_not_cost_precision(way):
    shape = (2, 20, 9, 9, 2, 1, 2)
    x, weight, bias, shift, dy = inputs(shape)
    given = x - 100, weight, bias, shift + 100, dy
    got = with_gradients(kernels.group_norm_silu_triton, *given, shape)
    wanted = with_gradients(group_norm_silu_reference, *(t.double() for t in given), shape)
    assert all(error(got[name], wanted[name]) <= 1e-5 for name in wanted)


def test_a_channel_that_is_constant_and_far_off_is_exact(way):
    x, weight, bias, _, _ = inputs(shape := (1, 4, 9, 9, 2, 1, 0))
    x[:, 1], x[:, 2:] = 1000.0, 3.0                                      # the second group does not vary at all
    got = kernels.group_norm_silu_triton(x, weight, bias, shape[4], 1e-5)
    wanted = group_norm_silu_reference(x.double(), weight.double(), bias.double(), shape[4], 1e-5)
    assert error(got, wanted) <= LIMITS[torch.float32] and error(got[:, 2:], wanted[:, 2:]) <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("launch", [kernels.launch_small, kernels.launch_tiles])
def test_nothing_is_written_outside_of_the_result(launch, layout):
    x, weight, bias, _, _ = inputs((2, 20, 7, 9, 2, 1, 0), layout=layout)
    around = torch.empty_like(x.repeat(2, 1, 1, 1))
    launch(x, around[1:3], weight, bias, None, x.new_empty(2, 2, 20), 2, 1e-5, 1, True)
    assert around[0].isnan().all() and around[3].isnan().all() and not around[1:3].isnan().any()


@pytest.mark.parametrize("name", FEW)
def test_silu_can_be_left_out(name, way):
    check(SHAPES[name], silu=False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_result_and_gradient_have_the_layout_of_the_input(layout, way):
    got = check((2, 20, 3, 5, 2, 1, 0), layout=layout)
    for name in "y", "dx":
        assert got[name].is_contiguous(memory_format=LAYOUTS[layout])
        assert not got[name].is_contiguous(memory_format=LAYOUTS["NCHW" if layout == "NHWC" else "NHWC"])


def test_strided_inputs_and_gradients_are_read_right(way):
    x, weight, bias, shift, dy = inputs((2, 40, 3, 10, 2, 1, 2))
    for part in x[:, :20], x[:, ::2], x[..., ::2], x.transpose(2, 3):    # also a gradient in another layout than x
        C = part.shape[1]
        given = [part, weight[::40 // C], bias[:C], shift[:, ::40 // C], dy[:1, :C, :1, :1].expand(part.shape)]
        got = kernels.group_norm_silu_triton(*given[:3], 2, 1e-5, shift=given[3])
        wanted = group_norm_silu_reference(*(t.double() for t in given[:3]), 2, 1e-5, shift=given[3].double())
        assert error(got, wanted) <= LIMITS[torch.float32]
        got = with_gradients(kernels.group_norm_silu_triton, *given, (0, 0, 0, 0, 2, 1))
        wanted = with_gradients(group_norm_silu_reference, *(t.double() for t in given), (0, 0, 0, 0, 2, 1))
        assert all(error(got[name], wanted[name]) <= LIMITS[torch.float32] for name in wanted)


def test_the_same_twice_is_the_same_bit_for_bit():
    given = inputs(shape := SHAPES["groups of 10 channels, one across two tiles"])
    first, second = (with_gradients(kernels.group_norm_silu_triton, *given, shape) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_needs_no_gradient_gets_none():
    x, weight, bias, shift, dy = inputs((2, 20, 3, 5, 2, 1, 2))
    x.requires_grad_()
    kernels.group_norm_silu_triton(x, weight, bias, 2, 1e-5, shift=shift).backward(dy)
    assert x.grad is not None and weight.grad is bias.grad is shift.grad is None


def test_the_switch_chooses_the_kernel(monkeypatch):
    x, weight, bias, _, _ = inputs((2, 20, 3, 5, 2, 1, 0))
    for mode, wanted in ("torch", group_norm_silu_reference), ("triton", kernels.group_norm_silu_triton):
        monkeypatch.setattr(backend, "MODE", mode)
        assert torch.equal(group_norm_silu(x, weight, bias, 2, 1e-5), wanted(x, weight, bias, 2, 1e-5))


def test_where_triton_cannot_launch_plain_pytorch_runs_and_that_is_said(monkeypatch, capsys):
    def launch_one(device):
        raise RuntimeError("Failed to find C compiler.\nmore")
    monkeypatch.setattr(tiles_triton, "launch_one", launch_one)
    monkeypatch.setattr(backend, "said", set())
    monkeypatch.setattr(backend, "_reason", backend._reason.__wrapped__)
    assert backend.why_not("cuda", "").endswith("(RuntimeError: Failed to find C compiler.)")
    assert "plain PyTorch runs" in capsys.readouterr().err


def test_the_smallest_kernel_runs():
    tiles_triton.launch_one(DEVICE)


def test_impossible_clips_and_shifts_are_refused():
    x, weight, bias, shift, _ = inputs((4, 20, 3, 5, 2, 1, 3))
    for wrong in {"frames": 3}, {"shift": shift}, {"groups": 3}:
        with pytest.raises(AssertionError, match="4 pictures|20 channels"):
            kernels.group_norm_silu_triton(x, weight, bias, **{"groups": 2, "eps": 1e-5} | wrong)


@pytest.mark.parametrize("shape", [(65536, 8, 1, 1), (1, 1, 2048, 2049), (1, 1024, 2048, 1024)])
def test_more_than_can_be_launched_is_refused_before_it_is_tried(shape, monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    x, ones = torch.empty(1, 1, 1, 1).expand(shape), torch.ones(shape[1])
    with pytest.raises(RuntimeError, match="at most, not"):
        group_norm_silu(x, ones, ones, 1, 1e-5)


# ---- As an operation of PyTorch ---------------------------------------------------------------------------

@pytest.mark.parametrize("layout, rows", [("NHWC", 2), ("NCHW", 0)])
def test_the_operations_are_registered_as_they_behave(layout, rows):
    x, weight, bias, shift, dy = inputs((4, 6, 3, 5, 3, 2, rows), layout=layout)
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, shift)]
    opcheck(kernels.forward, (*leaves, 3, 1e-5, 2, True, torch.float32))
    stats = kernels.forward(x, weight, bias, shift, 3, 1e-5, 2, True, torch.float32)[1]
    opcheck(kernels.backward, (dy, x, weight, bias, stats, 3, 2, True, bool(rows)))


def test_torch_compile_keeps_it_in_one_graph(monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    x, weight, bias, shift, dy = inputs(shape := (4, 6, 3, 5, 3, 2, 2))

    def around(x, weight, bias, groups, eps, frames, silu, shift):
        return group_norm_silu(2 * x, weight, bias, groups, eps, frames, silu, shift) + 1

    plain = with_gradients(around, x, weight, bias, shift, dy, shape)
    compiled = with_gradients(torch.compile(around, backend="aot_eager", fullgraph=True), x, weight, bias, shift, dy,
                              shape)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


def test_under_autocast_the_result_is_float32_whatever_is_read():
    """PyTorch's own is float32 there, on a GPU; a convolution that follows rounds it as it would round that."""
    x, weight, bias, shift, _ = inputs((2, 20, 3, 5, 2, 1, 2))
    x = x.bfloat16().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = kernels.group_norm_silu_triton(x, weight, bias, 2, 1e-5, shift=shift.bfloat16())
    wanted = group_norm_silu_reference(x.double(), weight.double(), bias.double(), 2, 1e-5,
                                       shift=shift.bfloat16().double())
    assert y.dtype == torch.float32 and error(y, wanted) <= LIMITS[torch.float32]
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
