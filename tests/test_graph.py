"""Captured functions, with a recorder that runs on a CPU: the buffers are real, only CUDA's graph is not."""
import pytest
import torch
from formula import build, given, model
from test_guidance import answers

from nanodisco import graph
from nanodisco.graph import KEPT, Captured
from nanodisco.guidance import Guided

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def recorder(made: list):
    """As record_cuda: what is replayed reads and writes the memory of the first call."""
    def record(function):
        made.append(function)
        out = function()
        return lambda: out.copy_(function()), out
    return record


def test_a_captured_function_answers_as_it_did_before():
    made = []
    captured = Captured(lambda x, t: torch.sin(x) * t, recorder(made))
    inputs = [(torch.randn(3, 4), torch.tensor([i])) for i in range(5)]
    kept = [captured(x, t) for x, t in inputs]
    for (x, t), y in zip(inputs, kept):                                  # earlier answers are not written over
        assert torch.equal(y, torch.sin(x) * t)
    assert len(made) == 1


def test_another_shape_or_layout_is_captured_anew_and_few_are_kept():
    made = []
    captured = Captured(lambda x: x + 1, recorder(made))
    for x in (torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3).T, torch.zeros(2, 3)):
        assert torch.equal(captured(x), x + 1)
    assert len(made) == 4 and len(captured.graphs) == KEPT


@pytest.mark.parametrize("message", ["operation not permitted when stream is capturing\nmore", ""])
def test_what_cannot_be_captured_runs_as_it_is_and_that_is_said(capsys, message):
    def record(function):
        raise RuntimeError(message)
    captured = Captured(lambda x: x * 2, record)
    assert all(torch.equal(captured(torch.ones(i)), torch.full((i,), 2.0)) for i in (1, 2))
    said = capsys.readouterr().err
    assert said.count("not captured as a CUDA graph") == 1 and "more" not in said


def test_out_of_memory_is_not_taken_for_a_step_without_a_graph():
    def record(function):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        Captured(lambda x: x * 2, record)(torch.ones(1))


@pytest.mark.parametrize("variant", ["image", "temporal"])
@pytest.mark.parametrize("uncond", [None, "other"])
def test_a_step_as_a_graph_gives_the_same_answers(monkeypatch, variant, uncond):
    made = []
    monkeypatch.setattr(graph, "record_cuda", recorder(made))
    tokens, background = given("tokens")[:1], given("bg_latents")[:1]
    uncond = torch.zeros_like(tokens) if uncond is None else given("tokens")[1:]
    z, pose = (given("latents"), given("pose")) if variant == "image" else (given("t_latents")[:1], given("t_pose")[:1])
    net = Guided(model(variant), tokens, background, uncond, 3.0, graph=True)
    plain = Guided(model(variant), tokens, background, uncond, 3.0, cache=False)
    for shown in (pose, pose.flip(0).flip(-1)):                          # the second batch of frames: the same graph
        wanted = answers(plain, z, shown)
        assert (answers(net, z, shown) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert len(made) == 1


@pytest.mark.parametrize("variant", ["image", "temporal"])
@pytest.mark.parametrize("captured", [False, True])
def test_a_compiled_step_gives_the_same_answers_without_a_break(monkeypatch, variant, captured):
    """Traced whole by torch.compile's front end, once; its back end, which takes minutes, is PyTorch's own."""
    monkeypatch.setattr(graph, "record_cuda", recorder([]))
    traced = []

    def backend(module, inputs):
        traced.append(module)
        return module.forward
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiler(function, dynamic=dynamic, backend=backend,
                                                                             fullgraph=True))
    torch._dynamo.reset()
    tokens, background = given("tokens")[:1], given("bg_latents")[:1]
    z, pose = (given("latents"), given("pose")) if variant == "image" else (given("t_latents")[:1], given("t_pose")[:1])
    shown = (model(variant), tokens, background, torch.zeros_like(tokens), 3.0)
    net, plain = Guided(*shown, graph=captured, compiled=True), Guided(*shown, cache=False)
    for seen in (pose, pose.flip(0).flip(-1)):
        wanted = answers(plain, z, seen)
        assert (answers(net, z, seen) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert len(traced) == 1


@needs_gpu
def test_a_step_on_a_gpu_is_one_graph():
    net = build("image").cuda()                                          # not the one that other tests share
    tokens, background, z, pose = (given(name).cuda() for name in ("tokens", "bg_latents", "latents", "pose"))
    on, off = (Guided(net, tokens[:1], background[:1], torch.zeros_like(tokens[:1]), 3.0, graph=graph) for graph in
               (True, False))
    wanted = answers(off, z, pose)
    assert (answers(on, z, pose) - wanted).abs().max() <= 1e-3 * wanted.abs().max() and on.step.graphs
