"""What inference on a GPU makes of layers, on whatever device there is: the same answers."""
import copy

import pytest
import torch
from formula import MODULE, assert_close, given, model

from kernels import gpu
from nanodisco.layers import ResBlock
from nanodisco.loading import for_inference

DEVICE = "cuda" if torch.cuda.is_available() else "meta"


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_convolution_of_one_pixel_is_a_product(channels_last):
    conv, x = torch.nn.Conv2d(5, 7, 1), torch.randn(2, 5, 3, 4)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(gpu.Pointwise(conv)(x), conv(x))


def test_other_convolutions_stay():
    inside = [torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 1, stride=2), torch.nn.Conv2d(4, 4, 1, groups=2),
              torch.nn.Conv2d(4, 4, 1)]
    net = torch.nn.Sequential(*inside)
    gpu.prepare(net)
    assert list(net)[:3] == inside[:3] and isinstance(net[3], gpu.Pointwise)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["image", "temporal"])
def test_folded_biases_give_the_same_answer(variant):
    net = copy.deepcopy(model(variant))
    z, t, tokens = given("latents"), given("timesteps"), given("tokens")
    wanted = net.unet(z, t, tokens)
    gone = 0
    for block in net.unet.modules():
        if isinstance(block, ResBlock):
            block.fold_biases()
            gone += (block.conv1.bias is None) + (block.conv2.bias is None)
    assert gone > len([block for block in net.unet.modules() if isinstance(block, ResBlock)]) - (variant == "temporal")
    assert_close(net.unet(z, t, tokens), wanted, MODULE)


def test_a_model_for_another_device_has_none_of_the_slow_layers():
    net = for_inference(copy.deepcopy(model("image")), DEVICE)
    one_pixel = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert not one_pixel and net.unet.up[0].res[0].conv1.bias is None
