"""The kernels of the 3 x 3 convolution against plain PyTorch in float64; on a CPU by Triton's interpreter.

All memory is NaN until it is written, so that an element that no program writes shows.
"""
import pytest
import torch
from test_kernels_group_norm import error, memory_is_nan_until_written       # noqa: F401  for each test here too
from torch.library import opcheck

from kernels import backend, conv as operation
from kernels.conv import conv3x3, conv3x3_reference

pytest.importorskip("triton")
from kernels import conv_triton as convs  # noqa: E402  Triton need not be installed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}    # relative L2

pytestmark = pytest.mark.usefixtures("fresh")

# pictures, channels in and out, height, width
SHAPES = {"35 pixels, channels that fill no step, outputs that fill no tile": (2, 24, 20, 5, 7),
          "nothing odd": (1, 16, 16, 8, 8),
          "40 channels, 4 outputs": (1, 40, 4, 8, 8),
          "one row": (2, 16, 17, 1, 9),
          "one column": (1, 8, 16, 6, 1),
          "one pixel": (2, 8, 3, 1, 1)}
ODD, EVEN = list(SHAPES.values())[:2]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
splits = pytest.mark.parametrize("S", [1, 3])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch, 1)


def use_tiles(monkeypatch, S):
    monkeypatch.setattr(convs, "tiles", lambda *shape: (32, 16, 16, S, 4, 2))


def normal(*shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


def inputs(shape, dtype=torch.float32, bias=True, more=True):
    """x, weight, bias or None, what is added or None."""
    B, C, N, H, W = shape
    return (normal(B, C, H, W, dtype=dtype), normal(N, C, 3, 3, dtype=dtype), normal(N, dtype=dtype) if bias else None,
            normal(B, N, H, W, dtype=dtype) if more else None)


def check(given):
    got = convs.conv3x3_triton(*given)
    wanted = conv3x3_reference(*(t if t is None else t.double() for t in given))
    assert got.shape == wanted.shape and got.dtype == given[0].dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert error(got, wanted) <= LIMITS[got.dtype]
    return got


@shapes
@splits
def test_it_is_the_convolution_of_float64(shape, S, monkeypatch):
    use_tiles(monkeypatch, S)
    check(inputs(shape))


@splits
@pytest.mark.parametrize("bias, more", [(False, False), (True, False), (False, True), (True, True)],
                         ids=["nothing", "bias", "more", "bias and more"])
def test_what_is_added_is_added(S, bias, more, monkeypatch):
    use_tiles(monkeypatch, S)
    check(inputs(ODD, bias=bias, more=more))


@splits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_other_types_are_rounded_only_where_they_are_stored(dtype, S, monkeypatch):
    use_tiles(monkeypatch, S)
    check(inputs(ODD, dtype))


def test_each_tap_looks_where_pytorch_looks():
    for tap in range(9):
        weight = torch.zeros(1, 8, 3, 3, device=DEVICE)
        weight[0, 0, tap // 3, tap % 3] = 1
        x = normal(1, 8, 3, 4)
        assert torch.equal(convs.conv3x3_triton(x, weight), conv3x3_reference(x, weight))


def test_more_shares_than_there_are_whole_steps_in_each(monkeypatch):
    use_tiles(monkeypatch, 7)                                            # of 9 steps
    check(inputs((1, 16, 16, 3, 3)))


@splits
def test_the_same_twice_is_the_same_bit_for_bit(S, monkeypatch):
    use_tiles(monkeypatch, S)
    given = inputs(ODD)
    assert torch.equal(convs.conv3x3_triton(*given), convs.conv3x3_triton(*given))


@splits
def test_nothing_is_written_outside_of_the_result(S):
    x, weight, bias, more = inputs(ODD)
    around = torch.empty(5, 5, 7, 20, device=DEVICE)
    y = around[1:3].permute(0, 3, 1, 2)
    convs.launch(x, weight, bias, more, y, 32, 16, 16, S, 4, 2)
    assert around[[0, 3, 4]].isnan().all() and not y.isnan().any()


def test_other_layouts_are_copied():
    x, weight, bias, more = inputs((2, 8, 12, 4, 6))
    wanted = convs.conv3x3_triton(x, weight, bias, more)
    assert torch.equal(wanted, convs.conv3x3_triton(*(t.contiguous() for t in (x, weight, bias, more))))
    wide, apart = normal(2, 16, 4, 6), normal(24)
    wide[:, 8:], apart[::2] = x, bias
    assert torch.equal(wanted, convs.conv3x3_triton(wide[:, 8:], weight, apart[::2], more))


def test_no_pictures_are_no_result():
    assert convs.conv3x3_triton(normal(0, 8, 4, 4), normal(3, 8, 3, 3)).shape == (0, 3, 4, 4)


def test_what_does_not_fit_together_is_refused():
    x, weight, bias, more = inputs((2, 8, 12, 4, 6))
    for wrong in (x[:, :4], weight, None, None), (x, weight, bias[:4], None), (x, weight, bias, more[..., :1]):
        with pytest.raises(AssertionError, match="weights|bias|added"):
            convs.conv3x3_triton(*wrong)


@pytest.fixture
def always_triton(monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    monkeypatch.setattr(operation, "OUTPUTS", 1)


def test_the_switch_chooses_the_kernel(monkeypatch, always_triton):
    given = inputs((1, 16, 4, 3, 3), torch.float16)
    for mode, version in ("torch", conv3x3_reference), ("triton", convs.conv3x3_triton):
        monkeypatch.setattr(backend, "MODE", mode)
        assert torch.equal(conv3x3(*given), version(*given))


UNSUITED = {"large": {"shape": (1, 16, 4, 104, 104)}, "float32": {"dtype": torch.float32}, "24 channels": {
    "shape": (1, 24, 4, 3, 3)}, "few outputs": {"outputs": 5}, "little shared memory": {"shared": 101_376}}


@pytest.mark.parametrize("what", UNSUITED.values(), ids=UNSUITED)
def test_what_the_kernel_is_not_for_is_left_to_pytorch(monkeypatch, always_triton, what):
    monkeypatch.setattr(convs, "conv3x3_triton", lambda *given: pytest.fail("the kernel ran"))
    monkeypatch.setattr(operation, "OUTPUTS", what.get("outputs", 1))
    monkeypatch.setattr(operation, "shared_memory", lambda device: what.get("shared", 2**18))
    given = inputs(what.get("shape", (1, 16, 4, 3, 3)), what.get("dtype", torch.float16))
    assert torch.equal(conv3x3(*given), conv3x3_reference(*given))


def test_gradients_and_mixed_types_under_autocast_are_left_to_pytorch_too(monkeypatch, always_triton):
    x, weight, bias, more = inputs((1, 16, 4, 3, 3), torch.bfloat16)
    weight.requires_grad_()
    conv3x3(x, weight, bias, more).sum().backward()
    assert weight.grad is not None
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert conv3x3(x, weight.float(), bias.float(), more).dtype == torch.bfloat16


@torch.no_grad()
def test_it_can_be_compiled(always_triton):
    given = inputs((1, 16, 4, 3, 3), torch.float16)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(conv3x3, fullgraph=True, backend="aot_eager")(*given), conv3x3(*given))


@pytest.mark.parametrize("more", [False, True])
def test_the_operation_is_registered_as_it_behaves(more):
    opcheck(convs.conv3x3_triton, inputs((2, 8, 4, 3, 3), bias=more, more=more))


def test_tiles_are_powers_of_two_and_shares_have_steps_enough(monkeypatch):
    monkeypatch.undo()
    for B, side, C, N in (1, 32, 320, 320), (2, 8, 2560, 1280), (2, 4, 1280, 1280), (4, 64, 320, 4), (1, 3, 8, 1):
        BM, BN, BK, S, warps, stages = convs.tiles(B, side, side, C, N)
        assert all(size & (size - 1) == 0 and size >= 16 for size in (BM, BN, BK)), (B, side, C, N)
        assert S == 1 or 9 * C // BK // S >= convs.FEWEST
