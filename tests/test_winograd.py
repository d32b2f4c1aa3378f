"""Winograd's convolution is a convolution."""
import pytest
import torch
from torch.nn.functional import conv2d

from kernels import winograd
from kernels.winograd import transform_weight, winograd_conv3x3


@pytest.mark.parametrize("shape", [(2, 5, 8, 6), (1, 3, 9, 8), (1, 3, 8, 7), (3, 2, 1, 1), (1, 4, 2, 5)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_conv2d(shape, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).double(), torch.randn(7, shape[1], 3, 3).double()
    bias = torch.randn(7).double() if biased else None
    wanted = conv2d(x, weight, bias, padding=1)
    got = winograd_conv3x3(x, transform_weight(weight), bias)
    assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-13


def test_many_strips_are_one(monkeypatch):
    torch.manual_seed(0)
    x, u = torch.randn(2, 5, 11, 8), transform_weight(torch.randn(7, 5, 3, 3))
    whole = winograd_conv3x3(x, u, None)
    monkeypatch.setattr(winograd, "STRIP", 1)
    assert (winograd_conv3x3(x, u, None) - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_in_float32_its_error_is_at_most_twice_that_of_conv2d():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 320, 16, 16), torch.randn(256, 320, 3, 3)
    exact = conv2d(x.double(), weight.double(), padding=1)
    error = (winograd_conv3x3(x, transform_weight(weight), None) - exact).norm()
    assert error <= 2 * (conv2d(x, weight, padding=1) - exact).norm()


def test_it_needs_sixteen_products_for_four_outputs():
    calls = []
    winograd_conv3x3(torch.randn(1, 5, 6, 8), transform_weight(torch.randn(7, 5, 3, 3)), None,
                     lambda x, u: calls.append(x[..., 0].numel()) or torch.nn.functional.linear(x, u))
    assert calls == [3 * 4] * 16
