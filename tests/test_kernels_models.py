"""Whole networks made of kernels, in the interpreter, against the official numbers."""
import pytest
import test_golden_image as image
import test_golden_temporal as temporal
import torch
from formula import MODULE, assert_all_close, build, given

from kernels import add_layer_norm_triton, attention_triton, backend, geglu_triton, group_norm_silu_triton
from nanodisco.memo import Memo
from nanodisco.transformer import Context, TransformerBlock

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.skipif(torch.cuda.is_available(), reason="these networks are on the CPU, for Triton's interpreter")
@pytest.mark.parametrize("of, wanted", [(image, image.MODULES), (temporal, temporal.TENSORS)], ids=["picture", "video"])
def test_a_unet_of_kernels_gives_the_official_numbers(monkeypatch, of, wanted):
    ran = set()
    monkeypatch.setattr(backend, "MODE", "triton")
    for module, name in ((attention_triton, "self_attention"), (attention_triton, "cross_attention"),
                         (attention_triton, "temporal_attention"),
                         (group_norm_silu_triton, "group_norm_silu_triton"), (geglu_triton, "geglu_triton"),
                         (add_layer_norm_triton, "add_layer_norm_triton")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *xs, kernel=kernel, name=name: ran.add(name) or kernel(*xs))
    with torch.no_grad():
        assert_all_close(of.unet(), wanted, MODULE)
    always = {"self_attention", "cross_attention", "group_norm_silu_triton", "geglu_triton", "add_layer_norm_triton"}
    assert ran == always | ({"temporal_attention"} if of is temporal else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this network is on the CPU, for Triton's interpreter")
def test_a_unet_of_kernels_is_trained_by_the_gradients_of_plain_operations(monkeypatch):
    net, gradients = build("image").unet.requires_grad_(True), {}
    for mode in ("torch", "triton"):
        monkeypatch.setattr(backend, "MODE", mode)
        net.zero_grad()
        net(given("latents")[:1], given("timesteps")[:1], given("tokens")[:1]).square().mean().backward()
        gradients[mode] = {name: parameter.grad for name, parameter in net.named_parameters()}
    for name, wanted in gradients["torch"].items():
        assert (gradients["triton"][name] - wanted).norm() <= 1e-4 * wanted.norm() + 1e-9, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="this block is on the CPU, for Triton's interpreter")
@pytest.mark.parametrize("pictures", [2, 4], ids=["one half", "both halves"])
def test_a_block_of_kernels_gives_rows_that_see_no_tokens_what_plain_operations_give(monkeypatch, pictures):
    block, tokens = TransformerBlock(16, 2, 12, temporal=False), torch.randn(1, 3, 12)
    context, h, found = Context(Memo(tokens), rows=4, blind=2), torch.randn(pictures, 5, 16), {}
    for mode in ("torch", "triton"):
        monkeypatch.setattr(backend, "MODE", mode)
        with torch.no_grad():
            found[mode] = block(h, context, frames=2)
    assert found["torch"].shape == (4, 5, 16)
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-5, atol=1e-5)
