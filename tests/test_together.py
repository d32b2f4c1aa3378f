"""Networks at the same time: the answers, and what surrounds them."""
import threading
import time

import pytest
import torch
from formula import given, model

from kernels import backend
from nanodisco.graph import Captured
from nanodisco.guidance import Guided
from nanodisco.together import FEW, WIDE, together

SHOWN = {"z": torch.zeros(1, 4, 8, 8), "channels": 128}                  # few pictures, wide networks
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def two_cores():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@torch.no_grad()
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_answers_are_in_order(two_cores, count):
    assert together(*[lambda i=i: [i] for i in range(count)], **SHOWN) == [[i] for i in range(count)]


@torch.no_grad()
def test_the_last_two_run_at_the_same_time_on_half_of_the_cores(two_cores):
    both = threading.Barrier(2, timeout=60)                              # none of them returns alone

    def one():
        both.wait()
        return threading.get_ident(), torch.get_num_threads()
    before, (here, mine), (there, its) = together(torch.get_num_threads, one, one, **SHOWN)
    assert before == 2 and mine == its == 1 and here == threading.get_ident() != there
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_both_run_in_the_mode_of_what_is_around_them(two_cores, around):
    with around():
        modes = together(*[lambda: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())] * 2, **SHOWN)
        assert modes == [(False, around is torch.inference_mode)] * 2


def test_where_threads_do_not_know_of_each_other_they_run_in_turn(two_cores, monkeypatch):
    """Gradients and autocast are a thread's own; Triton's interpreter is for one."""
    assert together(*[threading.get_ident] * 3, **SHOWN) == [threading.get_ident()] * 3
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert together(*[threading.get_ident] * 3, **SHOWN) == [threading.get_ident()] * 3
    monkeypatch.setattr(backend, "MODE", "triton")
    with torch.no_grad():
        assert together(*[threading.get_ident] * 3, **SHOWN) == [threading.get_ident()] * 3


@torch.no_grad()
@pytest.mark.parametrize("pictures, channels", [(FEW + 1, WIDE), (1, WIDE - 1)])
def test_many_pictures_and_narrow_networks_run_in_turn(two_cores, pictures, channels):
    ran = together(*[threading.get_ident] * 3, z=torch.zeros(pictures, 4, 8, 8), channels=channels)
    assert ran == [threading.get_ident()] * 3


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1])
def test_an_error_is_raised_when_the_other_has_ended(two_cores, which):
    ended = []

    def fails():
        raise RuntimeError("no")

    def ends():
        time.sleep(0.1)
        ended.append(True)
    with pytest.raises(RuntimeError, match="no"):
        together(*([fails, ends] if which == 0 else [ends, fails]), **SHOWN)
    assert ended and torch.get_num_threads() == 2


@torch.no_grad()
@pytest.mark.parametrize("variant", ["image", "temporal"])
def test_the_networks_answer_as_they_do_in_turn(two_cores, monkeypatch, variant):
    monkeypatch.setattr("nanodisco.together.WIDE", 0)
    image = variant == "image"
    z, pose = (given("latents"), given("pose")) if image else (given("t_latents")[:1], given("t_pose")[:1])
    t, tokens = torch.full((len(z),), 500), given("tokens")[:1]

    def answer():
        return Guided(model(variant), tokens, given("bg_latents")[:1], torch.zeros_like(tokens), 3.0)(pose)(z, t)
    at_once = answer()
    torch.set_num_threads(1)
    torch.testing.assert_close(at_once, answer(), rtol=0, atol=1e-12 if z.dtype == torch.float64 else 1e-5)


@needs_gpu
def test_branches_of_a_graph_begin_and_end_with_what_is_around_them():
    def around(x):
        x = (x @ x).cos()
        return sum(together(lambda: (x @ x).sin(), lambda: x @ x @ x, lambda: x + 1, z=x[:1], channels=128))
    xs = torch.randn(3, 2048, 2048, device="cuda")
    captured = Captured(torch.no_grad()(around))
    for x in xs:
        torch.testing.assert_close(captured(x), around(x))
    assert captured.graphs
