"""What inference on a GPU makes of layers, on whatever device there is: the same answers."""
import copy

import pytest
import torch
from formula import MODULE, assert_close, given, model

from kernels import Conv2d, UpConv2d, gpu
from nanodisco.layers import ResBlock
from nanodisco.loading import for_inference
from nanodisco.memo import Memo

DEVICE = "cuda" if torch.cuda.is_available() else "meta"
AT = "cuda" if torch.cuda.is_available() else "cpu"                      # where there are numbers
pytestmark = pytest.mark.usefixtures("fresh")


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_convolution_of_one_pixel_is_a_product(channels_last):
    conv, x = torch.nn.Conv2d(5, 7, 1), torch.randn(2, 5, 3, 4)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gpu.Pointwise(conv)(x), conv(x))


@torch.no_grad()
def test_a_convolution_of_3x3_pixels_adds_what_is_added():
    net = torch.nn.ModuleList([Conv2d(16, 6, 3, padding=1), torch.nn.Conv2d(16, 6, 3, padding=1),
                               UpConv2d(16, 6, 3, padding=1)])
    conv, plain, up = net
    gpu.prepare(net)
    x, more = torch.randn(2, 16, 5, 4), torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(net[0](x, more), conv(x, more))
    torch.testing.assert_close(net[1](x), plain(x))
    torch.testing.assert_close(net[2](x, (9, 8)), up(x, (9, 8)))
    assert [type(layer) for layer in net] == [gpu.Conv3x3, gpu.Conv3x3, gpu.UpConv3x3]


@torch.no_grad()
@pytest.mark.parametrize("c_in", [32, 48])
def test_both_convolutions_of_a_resblock_and_its_residual_are_two_kernels(monkeypatch, c_in):
    convs = pytest.importorskip("kernels.conv_triton")
    ran, kernel = [], convs.conv3x3_triton
    block = ResBlock(c_in, 48, 8, 1e-5, time_width=16).to(AT)
    x, emb = torch.randn(2, c_in, 8, 8, device=AT), torch.randn(1, 16, device=AT)
    wanted = block(x, Memo(emb))
    block.fold_biases()
    gpu.prepare(block)
    monkeypatch.setattr(convs, "conv3x3_triton", lambda *given: ran.append(given) or kernel(*given))
    monkeypatch.setattr("kernels.conv.OUTPUTS", 1)
    monkeypatch.setattr("kernels.backend.MODE", "triton")
    got = block.half()(x.half().contiguous(memory_format=torch.channels_last), Memo(emb.half()))
    assert (got.float() - wanted).norm() <= 2e-3 * wanted.norm()
    assert [more is None for *_, more in ran] == [True, False]


def test_other_convolutions_stay():
    others = [torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(4, 4, 1, stride=2),
              torch.nn.Conv2d(4, 4, 1, groups=2), torch.nn.Conv2d(4, 4, 1, padding=1), torch.nn.Conv2d(16, 8, 3),
              torch.nn.Conv2d(16, 8, 3, padding=1, stride=2), torch.nn.Conv2d(16, 8, 3, padding=2, dilation=2)]
    net = torch.nn.Sequential(*others, torch.nn.Conv2d(4, 4, 1))
    gpu.prepare(net)
    assert list(net)[:-1] == others and isinstance(net[-1], gpu.Pointwise)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["image", "temporal"])
def test_folded_biases_give_the_same_answer(variant):
    net = copy.deepcopy(model(variant))
    z, t, tokens = given("latents"), given("timesteps"), given("tokens")
    wanted = net.unet(z, t, tokens)
    blocks = [block for block in net.unet.modules() if isinstance(block, ResBlock)]
    for block in blocks * 2:                                             # the second time finds nothing to do
        block.fold_biases()
    assert all(block.conv1.bias is None for block in blocks)
    assert any(block.conv2.bias is None for block in blocks) == (variant == "image")
    assert_close(net.unet(z, t, tokens), wanted, MODULE)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["image", "temporal"])
def test_joined_time_layers_give_the_same_answer(variant):
    net = copy.deepcopy(model(variant))
    z, t, tokens = given("latents"), given("timesteps"), given("tokens")
    wanted = net.unet(z, t, tokens)
    blocks = [block for block in net.unet.modules() if isinstance(block, ResBlock)]
    for _ in range(2):                                                   # the second time finds nothing to do
        net.unet.encoder.join_time_layers(blocks)
    assert not any(isinstance(block.time, torch.nn.Linear) for block in blocks)
    assert_close(net.unet(z, t, tokens), wanted, MODULE)


@pytest.mark.parametrize("device", sorted({DEVICE, "cpu"}))
def test_all_weights_lie_in_one_piece_of_memory_and_are_the_same(device):
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.BatchNorm2d(6),
                              torch.nn.Linear(3, 5, dtype=torch.float16), torch.nn.Conv1d(4, 6, 3))
    before = copy.deepcopy(net.state_dict())
    weights = gpu.move(net, device).state_dict()
    assert len({x.untyped_storage()._cdata for x in weights.values()}) == 1
    for weight in weights["0.weight"], weights["3.weight"][..., None]:   # along frames it is a convolution of 3 x 1
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert all(x.device.type == device and x.data_ptr() % 16 == 0 for x in weights.values())
    if device != "meta":
        assert all(torch.equal(weights[name].cpu(), before[name]) for name in before)


def test_a_model_for_another_device_has_none_of_the_slow_layers():
    net = for_inference(copy.deepcopy(model("image")), DEVICE)
    one_pixel = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert not one_pixel and net.unet.up[0].res[0].conv1.bias is None
