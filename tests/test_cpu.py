"""Prepacked layers for the CPU: the same numbers."""
import copy
import sys
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
from formula import build, given, golden
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kernels import GEGLU, UpConv2d, cpu
from nanodisco.loading import for_inference

RUNS = golden("image/modules.safetensors")
available = pytest.mark.skipif(bool(cpu.unavailable(torch.float32)), reason="this PyTorch has no prepacked layers")


def memory_of_files() -> int:
    """Bytes of files that this process has in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * PAGESIZE


@available
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layer, shape", [
    (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 9, 7)),
    (nn.Conv2d(8, 16, 3, padding=1), (1, 8, 40, 30)), (nn.Conv2d(8, 8, 3, stride=2), (1, 8, 33, 33)),
    (nn.Conv2d(4, 40, 1), (3, 4, 5, 6)), (nn.Conv2d(8, 8, 1, stride=2), (3, 8, 5, 6)), (nn.Linear(24, 40), (2, 5, 24)),
    (nn.Linear(24, 40, bias=False), (7, 24)), (GEGLU(24, 40), (2, 5, 24)),
    (nn.Conv2d(256, 264, 3, padding=1), (1, 256, 11, 13)),
    (nn.Conv2d(256, 256, 3, padding=1, bias=False), (2, 256, 12, 6))], ids=str)
def test_packed_layer_gives_the_plain_answer(layer, shape, dtype, close):
    torch.manual_seed(0)
    net, x = nn.Sequential(copy.deepcopy(layer)).to(dtype).requires_grad_(False), torch.randn(shape).to(dtype)
    wanted = net(x)
    cpu.prepack(net)
    assert type(net[0]) not in (nn.Conv2d, nn.Linear, GEGLU)
    net(x)
    got = net(x)
    assert got.shape == wanted.shape and (got - wanted).abs().max() <= close * wanted.abs().max()


@available
def test_a_layer_packed_for_few_pixels_is_right_for_many():
    net, few, many = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).requires_grad_(False), *(
        torch.randn(1, 8, 4, width) for width in (4, 400))
    wanted = net(many)
    cpu.prepack(net)
    net(few)
    assert net[0].convolve is cpu.PackedConv2d._as_product
    assert (net(many) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@available
@pytest.mark.parametrize("channels, dtype, way", [
    ((256, 256), torch.float32, "_by_winograd"), ((256, 128), torch.float32, "_directly"),
    ((256, 256), torch.bfloat16, "_directly")])
def test_winograd_is_for_wide_layers_in_float32(channels, dtype, way):
    net = nn.Sequential(nn.Conv2d(*channels, 3, padding=1)).to(dtype).requires_grad_(False)
    cpu.prepack(net)
    net(torch.randn(1, channels[0], 12, 12).to(dtype))
    assert net[0].convolve is getattr(cpu.PackedConv2d, way)


@available
def test_packed_model_gives_the_official_residuals_and_output():
    net = for_inference(build("image"), "cpu")
    with torch.no_grad():
        out = net.unet(given("latents"), given("timesteps"), given("tokens"))
    wanted = RUNS["unet_no_residuals"]
    assert (out - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@available
def test_every_convolution_and_linear_of_the_networks_is_packed():
    net = for_inference(build("image"), "cpu")
    for part in (net.unet, net.pose, net.background, net.vae):
        packed = {layer.plain for layer in part.modules() if isinstance(layer, cpu.PackedUpConv2d)}
        assert not {layer for layer in part.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))} - packed


@available
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [(10, 14), (9, 14), (5, 7)])
def test_packed_enlargement_gives_the_plain_answer(size, dtype, close):
    torch.manual_seed(0)
    layer, x = UpConv2d(8, 16, 3, padding=1).to(dtype).requires_grad_(False), torch.randn(2, 8, 5, 7).to(dtype)
    net, wanted = nn.Sequential(layer), layer(x, size)
    cpu.prepack(net)
    for _ in range(2):
        got = net[0](x, size)
        assert got.shape == wanted.shape and (got - wanted).abs().max() <= close * wanted.abs().max()


@available
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which memory is of a file")
def test_weights_of_a_file_leave_memory_once_they_are_packed_and_can_still_be_read(tmp_path):
    save_file({"weight": torch.randn(2**11, 2**11)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        weight = file.get_tensor("weight")

    net = nn.Sequential(nn.Linear(2**11, 2**11, bias=False)).requires_grad_(False)
    net[0].weight.data = weight
    cpu.prepack(net)
    total, before = weight.sum(), memory_of_files()
    net(torch.ones(1, 2**11))
    assert net[0].of_a_file and memory_of_files() < before - 0.9 * weight.nbytes
    assert weight.sum() == total


@available
def test_weights_without_a_file_stay_in_memory():
    net = nn.Sequential(nn.Linear(2**11, 2**11, bias=False)).requires_grad_(False)
    weight, total = net[0].weight.data, net[0].weight.sum()
    cpu.prepack(net)
    net(torch.ones(1, 2**11))
    assert not isinstance(net[0].weight, nn.Parameter) and weight.sum() == total


def test_without_the_operations_the_model_stays_and_that_is_said(monkeypatch):
    monkeypatch.setattr(cpu, "PackedLinear", lambda layer, files=(): torch.ops.mkldnn.no_such_operation)
    said = []
    net = for_inference(build("image"), "cpu", said.append)
    assert "no_such_operation" in said[0] and isinstance(net.unet.conv_out, nn.Conv2d)


def test_half_precision_is_not_packed():
    assert "float16" in cpu.unavailable(torch.float16)
