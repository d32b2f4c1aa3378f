"""Twice the size and a convolution are four convolutions of the small picture."""
import pytest
import torch
from torch.nn.functional import conv2d, interpolate

from kernels import UpConv2d
from kernels.up_conv import part_weights, up_conv


@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 3, 5, 1), (3, 2, 1, 1)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_conv2d_of_the_enlarged_picture(shape, biased):
    torch.manual_seed(0)
    layer, x = UpConv2d(shape[1], 7, 3, padding=1, bias=biased).double(), torch.randn(shape).double()
    wanted = conv2d(interpolate(x, scale_factor=2, mode="nearest"), layer.weight, layer.bias, padding=1)
    assert torch.equal(layer(x, wanted.shape[2:]), wanted)
    got = up_conv(x, part_weights(layer.weight), layer.bias)
    assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-13


def test_it_multiplies_four_numbers_where_nine_were_needed():
    rows = []
    up_conv(torch.randn(2, 5, 4, 6), part_weights(torch.randn(7, 5, 3, 3)), None,
            lambda x, part, bias: rows.append(x.shape) or torch.nn.functional.linear(x, part))
    assert rows == [(2, 4, 6, 4 * 5)] * 4 and sum(map(torch.Size.numel, rows)) * 9 == 4 * (2 * 8 * 12 * 9 * 5)


def test_in_bfloat16_its_error_is_at_most_twice_that_of_conv2d():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 320, 8, 8).bfloat16(), torch.randn(64, 320, 3, 3).bfloat16()
    large = interpolate(x, scale_factor=2, mode="nearest")
    exact = conv2d(large.double(), weight.double(), padding=1)
    error = (up_conv(x, part_weights(weight), None) - exact).norm()
    assert error <= 2 * (conv2d(large, weight, padding=1) - exact).norm()
