"""The kernels of GEGLU and of a residual with its LayerNorm against plain PyTorch in float64; on a CPU by Triton's
interpreter.

All memory is NaN until it is written, so that an element that no program writes shows.
"""
import pytest
import torch
from test_kernels_group_norm import error, memory_is_nan_until_written       # noqa: F401  for each test here too
from torch.library import opcheck

from kernels import add_layer_norm, backend, geglu
from kernels.add_layer_norm import WIDEST, add_layer_norm_reference, filled
from kernels.geglu import geglu_reference

pytest.importorskip("triton")
from kernels import add_layer_norm_triton as norms, geglu_triton as gates  # noqa: E402  Triton need not be installed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}    # relative L2
OF_WEIGHTS = {torch.float32: 5e-6}     # sums over all rows
TYPES = [torch.float16, torch.bfloat16, torch.float64]

pytestmark = pytest.mark.usefixtures("fresh")

# (..., D)
SHAPES = {"8 wide, rows that fill no tile": (3, 43, 8),
          "40 wide": (2, 7, 40),
          "63 wide": (2, 19, 63),
          "320 wide, a tail of one row": (5, 5, 320),
          "1280 wide": (3, 1280),
          "one row": (1, 320),
          "one number": (1, 1),
          "nothing odd": (2, 16, 256)}
FEW = ["63 wide", "320 wide, a tail of one row"]
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
few = pytest.mark.parametrize("shape", [SHAPES[name] for name in FEW], ids=FEW)


def normal(*shape, dtype=torch.float32, mean=0.0, std=1.0):
    return (std * torch.randn(shape, dtype=torch.float64) + mean).to(DEVICE, dtype)


def of_geglu(shape, dtype=torch.float32):
    """Inputs by name, gradients of the results."""
    return {"x": normal(*shape[:-1], 2 * shape[-1], dtype=dtype, std=2)}, [normal(*shape, dtype=dtype)]


def of_norm(shape, dtype=torch.float32, more=True, mean=0.5, std=2.0):
    added = normal(*shape, dtype=dtype) if more else None
    return {"x": normal(*shape, dtype=dtype, mean=mean, std=std), "more": added,
            "weight": normal(shape[-1], dtype=dtype, mean=1, std=0.5), "bias": normal(shape[-1], dtype=dtype)
            }, [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)]


def with_gradients(function, inputs, dys):
    """Results and gradients by name; None for an input that there is not, for the gradient of a result not used."""
    of = {name: t if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    found = function(*of.values())
    found = found if isinstance(found, tuple) else (found,)
    used = [(y, dy) for y, dy in zip(found, dys) if dy is not None]
    torch.autograd.backward([y for y, _ in used], [dy for _, dy in used])
    return {f"y{i}": y.detach() for i, y in enumerate(found)} | {
        f"d{name}": t.grad for name, t in of.items() if t is not None}


def check(kernel, reference, given, limit=None):
    inputs, dys = given
    got = with_gradients(kernel, inputs, dys)
    wanted = with_gradients(reference, *({k: t if t is None else t.double() for k, t in inputs.items()},
                                         [t if t is None else t.double() for t in dys]))
    assert got.keys() == wanted.keys()
    for name in wanted:
        dtype = got[name].dtype
        allowed = limit or (OF_WEIGHTS if name in ("dweight", "dbias") else LIMITS).get(dtype, LIMITS[dtype])
        assert got[name].shape == wanted[name].shape and dtype == inputs["x"].dtype, name
        assert error(got[name], wanted[name]) <= allowed, name
    return got


def check_geglu(given, limit=None):
    return check(gates.geglu_triton, geglu_reference, given, limit)


def check_norm(given, limit=None):
    return check(norms.add_layer_norm_triton, add_layer_norm_reference, given, limit)


# ---- GEGLU ------------------------------------------------------------------------------------------------

@shapes
def test_geglu_and_its_gradient_are_those_of_float64(shape):
    check_geglu(of_geglu(shape))


@few
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_other_types_of_geglu_are_rounded_only_where_they_are_stored(shape, dtype):
    check_geglu(of_geglu(shape, dtype))


def test_geglu_is_exact_far_from_zero():
    inputs = {"x": torch.tensor([[2.0, 3, 4, 5, 6, 7, -30, -9, -5, 5, 9, 30]], device=DEVICE)}
    got = check_geglu((inputs, [torch.ones(1, 6, device=DEVICE)]))
    assert got["y0"][0, 0] == 0 and got["y0"][0, 5] == 7 * 30


def test_strided_inputs_and_gradients_of_geglu_are_read_right():
    x, dy = normal(4, 9, 80), normal(4, 9, 40)
    for part in x[..., 40:], x[:, ::2], x[..., ::2], x[:, 3], x.transpose(0, 1), x.transpose(1, 2)[..., :8]:
        shape = *part.shape[:-1], part.shape[-1] // 2
        wide = normal(*shape[:-1], 2 * shape[-1])
        for gradient in dy.flatten()[:1].expand(shape), wide[..., ::2], wide[..., shape[-1]:]:
            check_geglu(({"x": part}, [gradient]))


def test_rows_one_common_stride_apart_are_not_copied():
    x = normal(4, 9, 80)
    assert gates.as_rows(x[..., 40:]).data_ptr() == x[..., 40:].data_ptr()
    assert gates.as_rows(x[:, 3]).data_ptr() == x[:, 3].data_ptr()
    assert gates.as_rows(x.transpose(1, 2)).data_ptr() != x.data_ptr()


def test_nothing_is_written_outside_of_the_result_of_geglu():
    x, around = normal(8, 126), torch.empty(2, 9, 126, device=DEVICE)
    of_type = dict(TYPE=gates.arithmetic(x), ROWS=4, BD=64)
    gates._geglu[(2,)](x, around[0].view(18, 63)[2:], 5, 63, 126, **of_type)
    gates._gradient_of_x[(2,)](x, x, around[1, 1:], 5, 63, 126, 126, **of_type)
    for whole, first, after in (around[0].view(18, 63), 2, 7), (around[1], 1, 6):
        assert whole[:first].isnan().all() and whole[after:].isnan().all() and not whole[first:after].isnan().any()


def test_an_odd_number_of_channels_cannot_be_halved():
    with pytest.raises(AssertionError, match="63 channels"):
        gates.geglu_triton(normal(2, 63))


# ---- Residual and LayerNorm -------------------------------------------------------------------------------

@shapes
@pytest.mark.parametrize("more", [True, False], ids=["sum", "no sum"])
def test_norm_and_its_gradients_are_those_of_float64(shape, more):
    of_nothing = shape[-1] == 1                                          # no variance: rstd, and rounding, times 316
    check_norm(of_norm(shape, more=more), limit=1e-4 if of_nothing else None)


@few
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_other_types_of_the_norm_are_rounded_only_where_they_are_stored(shape, dtype):
    check_norm(of_norm(shape, dtype))


def test_without_more_the_sum_is_x_itself():
    x, vector = normal(3, 40), normal(40)
    assert norms.add_layer_norm_triton(x, None, vector, vector)[0] is x
    assert add_layer_norm_reference(x, None, vector, vector)[0] is x


@pytest.mark.parametrize("unused", [0, 1], ids=["sum", "normed"])
@pytest.mark.parametrize("more", [True, False], ids=["sum", "no sum"])
def test_either_result_may_go_unused(more, unused):
    inputs, dys = of_norm((5, 40), more=more)
    dys[unused] = None
    exactly = {name: t if t is None else t.double() for name, t in inputs.items()}
    got = with_gradients(norms.add_layer_norm_triton, inputs, dys)
    wanted = with_gradients(add_layer_norm_reference, exactly, [t if t is None else t.double() for t in dys])
    for name in wanted:
        if wanted[name] is None:                                         # the kernel's may be zeros instead
            assert got[name] is None or not got[name].any(), name
        else:
            assert error(got[name], wanted[name]) <= LIMITS[torch.float32], name


def test_the_norm_is_of_the_sum_as_it_is_rounded():
    given, _ = of_norm((4, 320), torch.float16)
    sums, normed, _ = norms.forward(*given.values(), 1e-5, torch.float32)
    wanted = add_layer_norm_reference(sums.double(), None, given["weight"].double(), given["bias"].double())[1]
    assert torch.equal(sums, given["x"] + given["more"]) and error(normed, wanted) <= LIMITS[torch.float32]


def test_large_means_do_not_cost_precision():
    check_norm(of_norm((6, 320), mean=100, std=3), limit=1e-5)


def test_a_row_that_is_constant_and_far_off_is_exact():
    given, _ = of_norm((3, 63), more=False)
    given["x"][1] = 1000.0
    normed = norms.add_layer_norm_triton(*given.values())[1]
    assert error(normed[1], given["bias"].double()) <= 1e-6


def test_a_program_of_many_rows_adds_up_all_of_them(monkeypatch):
    monkeypatch.setattr(norms, "WARPS", 3)
    for shape in (41, 320), (130, 40):
        check_norm(of_norm(shape))


def test_a_row_wider_than_the_models_have():
    check_norm(of_norm((2, 2500)))


def test_strided_inputs_and_gradients_of_the_norm_are_read_right():
    x, more, vector, wide = normal(4, 9, 80), normal(4, 9, 80), normal(160), normal(4, 80, 9)
    for part in (lambda t: t[..., 40:]), (lambda t: t[:, ::2]), (lambda t: t[..., ::2]), (lambda t: t.transpose(0, 1)):
        shape, D = part(x).shape, part(x).shape[-1]
        inputs = {"x": part(x), "more": part(more), "weight": vector[::160 // D], "bias": vector[:D]}
        check_norm((inputs, [vector[:1].expand(shape), part(wide.transpose(1, 2))]))
        check_norm((inputs | {"x": x.new_ones(1).expand(shape)}, [part(more), vector[:D].expand(shape)]))


def test_nothing_is_written_outside_of_the_result():
    given, dys = of_norm((8, 63))                                        # of which there are 5 rows; others are not NaN
    around, stats, R, D = torch.empty(3, 9, 63, device=DEVICE), torch.empty(24, device=DEVICE), 5, 63
    sums, normed, dx = (each[2:7] for each in around)
    norms._add_normalise[(2,)](*given.values(), None, sums, normed, stats, R, D, 0, D, D, 1e-5, MORE=True, FILL=False,
                               ROWS=4, BD=64)
    assert stats[2 * R:].isnan().all() and not stats[:2 * R].isnan().any()
    stats = torch.ones(24, device=DEVICE)
    norms._gradient_of_sum[(1,)](given["x"], dys[0], dys[1], given["weight"], stats, dx,
                                 torch.empty(2 * D, device=DEVICE), R, D, D, D, D, DSUMS=True, ROWS=4, BD=64)
    assert around[:, :2].isnan().all() and around[:, 7:].isnan().all() and not around[:, 2:7].isnan().any()


def test_types_are_mixed_as_pytorch_mixes_them():
    given, _ = of_norm((4, 40))
    mixed = given | {"more": given["more"].half()}
    sums, normed = norms.add_layer_norm_triton(*mixed.values())
    assert sums.dtype == normed.dtype == torch.float32 and torch.equal(sums, mixed["x"] + mixed["more"])
    got = with_gradients(norms.add_layer_norm_triton, mixed, [torch.ones_like(sums), torch.ones_like(sums)])
    assert got["dx"].dtype == torch.float32 and got["dmore"].dtype == torch.float16


def test_what_does_not_fit_together_is_refused():
    given, _ = of_norm((4, 40))
    for wrong in {"more": given["more"][:1]}, {"weight": given["weight"][:39]}:
        with pytest.raises(AssertionError, match="what is added|rows of 40"):
            norms.add_layer_norm_triton(*(given | wrong).values())


FILLS = {"a border within the second tile": ((5, 7, 40), 2),                 # shape, pictures of `more`
         "a border between tiles": ((2, 32, 40), 1),
         "an odd number of rows, all in one tile": ((5, 3, 63), 2),
         "a border behind the first row": ((7, 1, 320), 6),
         "a row to a tile": ((3, 1, 1280), 2),
         "all have their own": ((3, 5, 40), 3),
         "none has": ((3, 5, 40), 0)}
fills = pytest.mark.parametrize("shape, own", FILLS.values(), ids=FILLS)


def with_fill(shape, own, dtype=torch.float32):
    """Inputs of the kernel with a fill: x, more, weight, bias, eps, fill; of the same without: four of them."""
    given, dys = of_norm(shape, dtype)
    x, more, *vectors = given.values()
    more, fill = more[len(x) - own:], normal(shape[-1], dtype=dtype)
    return (x, more, *vectors, 1e-5, fill), (x, filled(more, fill, len(x)), *vectors), dys


@fills
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fill_is_added_as_if_more_had_those_rows(shape, own, dtype):
    apart, whole, _ = with_fill(shape, own, dtype)
    for function in norms.add_layer_norm_triton, add_layer_norm_reference:
        for got, wanted in zip(function(*apart), function(*whole), strict=True):
            assert got.shape == shape and got.dtype == dtype and torch.equal(got, wanted)


def test_rows_behind_those_with_a_fill_may_be_strided():
    x, wide, (weight, bias, fill) = normal(4, 9, 40), normal(4, 9, 80), normal(3, 80)[:, ::2]
    for more in wide[1:, :, 40:], wide[1:, :, ::2], wide[::2, :, :40], wide[:3].flip(1)[..., 40:]:
        got = norms.add_layer_norm_triton(x, more, weight, bias, 1e-5, fill)
        wanted = norms.add_layer_norm_triton(x, filled(more, fill, 4), weight, bias)
        assert all(map(torch.equal, got, wanted))
    half = x.transpose(0, 1)                                             # read with one stride, or copied
    for got, wanted in zip(norms.add_layer_norm_triton(half, half[4:], weight, bias, 1e-5, fill),
                           norms.add_layer_norm_triton(half, filled(half[4:], fill, 9), weight, bias)):
        assert torch.equal(got, wanted)


def test_a_fill_has_the_type_of_the_rows_that_there_are():
    (x, more, *vectors, eps, fill), _, _ = with_fill((3, 5, 40), 2)
    for dtype in torch.float16, torch.bfloat16:
        got = norms.add_layer_norm_triton(x, more.to(dtype), *vectors, eps, fill)
        wanted = norms.add_layer_norm_triton(x, filled(more.to(dtype), fill, 3), *vectors)
        assert got[0].dtype == torch.float32 and all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("wanted_of", [None, "fill", "bias"])
def test_gradients_pass_a_fill_as_they_pass_a_concatenation(monkeypatch, mode, wanted_of):
    """Of all inputs, or of one."""
    monkeypatch.setattr(backend, "MODE", mode)
    (x, more, weight, bias, eps, fill), _, dys = with_fill((3, 5, 40), 2)

    def gradients(function):
        of = {"x": x, "more": more, "weight": weight, "bias": bias, "fill": fill}
        of = {name: t.clone().requires_grad_(wanted_of in (None, name)) for name, t in of.items()}
        found = function(*of.values())
        used = [(y, dy) for y, dy in zip(found, dys) if y.requires_grad]
        torch.autograd.backward([y for y, _ in used], [dy for _, dy in used])
        return {name: t.grad for name, t in of.items()}

    got = gradients(lambda x, more, weight, bias, fill: add_layer_norm(x, more, weight, bias, eps, fill))
    wanted = gradients(lambda x, more, weight, bias, fill: add_layer_norm(
        x, torch.cat([fill.expand(1, 5, 40), more]), weight, bias))
    for name in wanted:
        assert got[name] is wanted[name] is None or torch.equal(got[name], wanted[name]), name
        assert (got[name] is not None) == (wanted_of in (None, name))


def test_without_gradients_nothing_is_concatenated(monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    apart, whole, _ = with_fill((3, 5, 40), 2)
    wanted = add_layer_norm(*whole)
    monkeypatch.setattr(torch, "cat", None)
    assert all(map(torch.equal, add_layer_norm(*apart), wanted))
    with torch.no_grad():
        assert all(map(torch.equal, add_layer_norm(*apart[:5], apart[5].clone().requires_grad_()), wanted))


def test_the_kernel_itself_has_no_gradient_of_a_fill():
    (x, *others), _, _ = with_fill((3, 5, 40), 2)
    with pytest.raises(AssertionError, match="without `fill`"):
        norms.add_layer_norm_triton(x.requires_grad_(), *others)


def test_a_fill_that_does_not_fit_is_refused():
    (x, more, *others, fill), _, _ = with_fill((3, 5, 40), 2)
    for wrong in (more[:, :4], fill), (torch.cat([x, x]), fill), (more, fill[:39]), (more[:, :, :39], fill):
        with pytest.raises(AssertionError, match="what is added to"):
            norms.add_layer_norm_triton(x, wrong[0], *others, wrong[1])


def test_a_row_too_wide_for_registers_is_refused_before_it_is_tried(monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    x = torch.zeros(1, WIDEST + 1)
    with pytest.raises(RuntimeError, match="at most, not of"):
        add_layer_norm(x, None, x[0], x[0])


# ---- Both, as operations of PyTorch -----------------------------------------------------------------------

def test_the_same_twice_is_the_same_bit_for_bit():
    given = of_norm((21, 320))
    first, second = (with_gradients(norms.add_layer_norm_triton, *given) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_switch_chooses_the_kernel(monkeypatch):
    gate, norm = ([*given[0].values()] for given in (of_geglu((3, 40)), of_norm((3, 40))))
    for mode, of_gate, of_sum in (("torch", geglu_reference, add_layer_norm_reference),
                                  ("triton", gates.geglu_triton, norms.add_layer_norm_triton)):
        monkeypatch.setattr(backend, "MODE", mode)
        assert torch.equal(geglu(*gate), of_gate(*gate))
        assert all(torch.equal(a, b) for a, b in zip(add_layer_norm(*norm), of_sum(*norm)))


@pytest.mark.parametrize("more", [True, False], ids=["sum", "no sum"])
def test_the_operations_of_the_norm_are_registered_as_they_behave(more):
    given, dys = of_norm((2, 3, 40), more=more)
    leaves = [t if t is None else t.clone().requires_grad_() for t in given.values()]
    opcheck(norms.forward, (*leaves, 1e-5, torch.float32))
    stats = norms.forward(*given.values(), 1e-5, torch.float32)[2]
    if more:
        opcheck(norms.forward, (*given.values(), 1e-5, torch.float32, given["bias"]))
    opcheck(norms.backward, (dys[0] if more else None, dys[1], given["x"], given["weight"], stats))


def test_the_operations_of_geglu_are_registered_as_they_behave():
    given, (dy,) = of_geglu((2, 3, 40))
    opcheck(gates.forward, (given["x"].requires_grad_(),))
    opcheck(gates.backward, (dy, given["x"].detach()))


def test_torch_compile_keeps_both_in_one_graph(monkeypatch):
    monkeypatch.setattr(backend, "MODE", "triton")
    inputs, dys = of_norm((2, 3, 40))

    def around(x, more, weight, bias):
        x, normed = add_layer_norm(2 * x, None, weight, bias)
        x, normed = add_layer_norm(x, more * normed, weight, bias)
        return x + 1, geglu(torch.cat([normed, x], dim=-1))

    plain = with_gradients(around, inputs, dys)
    compiled = with_gradients(torch.compile(around, backend="aot_eager", fullgraph=True), inputs, dys)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.mark.parametrize("learning", [True, False], ids=["gradients", "no gradients"])
def test_torch_compile_keeps_a_fill_in_the_graph(monkeypatch, learning):
    monkeypatch.setattr(backend, "MODE", "triton")
    apart, whole, _ = with_fill((3, 5, 40), 2)
    compiled = torch.compile(lambda *inputs: add_layer_norm(*inputs), backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(learning):
        got = compiled(*apart[:5], apart[5].clone().requires_grad_())
    assert all(map(torch.equal, got, add_layer_norm(*whole))) and got[0].requires_grad == learning


def test_under_autocast_a_fill_is_what_its_concatenation_is():
    (x, more, *vectors, eps, fill), _, _ = with_fill((3, 5, 40), 2)
    x, more = x.bfloat16(), more.bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        got = norms.add_layer_norm_triton(x, more, *vectors, eps, fill)
        wanted = norms.add_layer_norm_triton(x, filled(more, fill, 3), *vectors)
    assert [y.dtype for y in got] == [torch.bfloat16, torch.float32] and all(map(torch.equal, got, wanted))


def test_under_autocast_the_norm_is_float32_and_the_sum_what_is_read():
    """As PyTorch's own are there, on a GPU."""
    given, dys = of_norm((3, 40))
    given = {name: t.bfloat16() if name in ("x", "more") else t for name, t in given.items()}
    leaves = [t.detach().requires_grad_() for t in given.values()]
    with torch.autocast(DEVICE, torch.bfloat16):
        sums, normed = norms.add_layer_norm_triton(*leaves)
    wanted = add_layer_norm_reference(sums.detach().double(), None, *(t.double() for t in leaves[2:]))[1]
    assert sums.dtype == torch.bfloat16 and normed.dtype == torch.float32
    assert error(normed, wanted) <= LIMITS[torch.float32]
    torch.autograd.backward([sums, normed], [dys[0].bfloat16(), dys[1]])
    assert [t.grad.dtype for t in leaves] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_under_autocast_geglu_keeps_the_type_of_its_input():
    given, _ = of_geglu((3, 40), torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert gates.geglu_triton(given["x"]).dtype == geglu_reference(given["x"]).dtype == torch.bfloat16
