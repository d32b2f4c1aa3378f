"""The VAE is diffusers' AutoencoderKL, for any factor and latent; scaling and ranges of the two ways through."""
import math
from functools import cache

import pytest
import torch
from reference import SAME, copy_weights, normal, randomised
from torch.testing import assert_close

from nanodisco import dancers
from nanodisco.config import VAEConfig
from nanodisco.vae import KL_WEIGHT, LITTLE, VAE, Posterior

TINY = VAEConfig(4, (8, 16), layers=1, groups=4, scaling=0.5)

SIZES = {                              # config, (H, W) of the picture
    "a half, 4 channels": (TINY, (18, 10)),
    "a quarter, 8 channels": (VAEConfig(8, (12, 12, 24), 2, 3, 0.3), (24, 40)),
    "an eighth, 16 channels": (VAEConfig(16, (8, 16, 16, 32), 2, 8, 0.18215), (32, 48)),
    "an eighth, 4 channels": (VAEConfig(4, (16, 8, 24, 8), 1, 2, 0.18215), (40, 24)),
    "an eighth of odd sizes": (VAEConfig(4, (8, 8, 8, 8), 1, 4, 0.18215), (37, 27))}


@cache
def twins(name):
    """diffusers' VAE and ours, with the same weights"""
    diffusers, (config, _) = pytest.importorskip("diffusers"), SIZES[name]
    levels = len(config.widths)
    theirs = randomised(diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=config.widths, layers_per_block=config.layers, latent_channels=config.channels,
        norm_num_groups=config.groups))
    return theirs, copy_weights(theirs, VAE(config), "vae.")


def picture(size=(18, 10)):
    return normal(2, 3, *size).clamp(-1, 1)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_encoder_is_that_of_diffusers(name):
    theirs, ours = twins(name)
    config, size = SIZES[name]
    got, wanted = ours.encode(picture(size)), theirs.encode(picture(size)).latent_dist
    assert got.mean.shape == (2, config.channels, *(n // config.factor for n in size))
    assert_close((got.mean, got.logvar), (wanted.mean, wanted.logvar), **SAME)


@pytest.mark.parametrize("name", SIZES)
@torch.no_grad()
def test_decoder_is_that_of_diffusers(name):
    theirs, ours = twins(name)
    config, (height, width) = SIZES[name]
    z = normal(2, config.channels, height // config.factor, width // config.factor)
    got = ours.decode(z)
    assert got.shape == (2, 3, *(n * config.factor for n in z.shape[2:]))
    assert_close(got, theirs.decode(z).sample, **SAME)


@torch.no_grad()
def test_posterior_is_clamped_as_that_of_diffusers():
    theirs, ours = twins("a half, 4 channels")
    both = (theirs.quant_conv, ours.to_moments)
    try:
        for conv in both:
            conv.weight.mul_(1e3)
        got, wanted = ours.encode(picture()), theirs.encode(picture()).latent_dist
    finally:
        for conv in both:
            conv.weight.div_(1e3)      # the twins are shared
    assert (got.logvar.min().item(), got.logvar.max().item()) == (-30, 20)
    assert_close(got.logvar, wanted.logvar, **SAME)


def test_posterior_sample_is_the_mean_plus_the_deviation_times_noise():
    mean, deviation, noise = normal(1, 4, 3, 3), normal(1, 4, 3, 3, seed=1).exp(), normal(1, 4, 3, 3, seed=2)
    posterior = Posterior(mean, 2 * deviation.log())
    assert_close(posterior.sample(noise), mean + deviation * noise, **SAME)
    assert torch.equal(posterior.sample(), mean)


@torch.no_grad()
def test_to_latent_is_the_scaled_posterior():
    net, noise = randomised(VAE(TINY)), normal(2, 4, 9, 5, seed=3)
    assert_close(net.to_latent(picture(), noise), 0.5 * net.encode(picture()).sample(noise), **SAME)
    assert_close(net.to_latent(picture()), 0.5 * net.encode(picture()).mean, **SAME)


@torch.no_grad()
def test_to_picture_takes_the_scaling_back_and_maps_minus_one_to_one_onto_zero_to_one():
    net, z = randomised(VAE(TINY)), normal(2, 4, 9, 5)
    got, decoded = net.to_picture(0.5 * z), net.decode(z)
    inside = decoded.abs() < 1
    assert_close(got[inside], (decoded[inside] + 1) / 2, **SAME)
    assert got[decoded < -1].eq(0).all() and got[decoded > 1].eq(1).all()
    assert inside.any() and not inside.all()


@torch.no_grad()
def test_pictures_of_a_batch_do_not_see_each_other():
    net, x = randomised(VAE(TINY)), picture()
    assert_close(net.encode(x).mean, torch.cat([net.encode(x[:1]).mean, net.encode(x[1:]).mean]), **SAME)


# ---- The nano model's additions -------------------------------------------------------------------------

def nano(pictures: torch.Tensor, channels: int = 8) -> VAE:
    torch.manual_seed(0)
    net = VAE(VAEConfig(channels=channels, widths=(16, 32), layers=1, groups=4, scaling=1.0, stem=2, linear=True))
    net.start_linear(pictures)
    return net.requires_grad_(False)


def room_pictures(count: int = 40) -> torch.Tensor:
    frames = [dancers.sample(i, i, i, i, 32).picture for i in range(count)]
    return torch.stack([torch.from_numpy(frame.copy()).permute(2, 0, 1).float() / 127.5 - 1 for frame in frames])


def test_principal_components_lose_what_the_left_out_ones_hold():
    """The mean squared error is the sum of the smallest eigenvalues of the squares' covariance, over their number."""
    pictures = room_pictures()
    net = nano(pictures)
    squares = pictures.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(squares.T, correction=0))
    mean_of_colours = squares.mean(0).view(3, 16).mean(1, keepdim=True)
    uneven = (squares.mean(0).view(3, 16) - mean_of_colours).square().sum()     # one bias a colour cannot say more
    error = (net.decode(net.encode(pictures).mean) - pictures).square().mean()
    assert error.item() == pytest.approx((eigenvalues[:-8].sum() + uneven).item() / 48, rel=1e-3)


def test_the_latent_of_principal_components_has_the_variance_one_and_little_noise():
    pictures = room_pictures()
    posterior = nano(pictures).encode(pictures)
    assert posterior.mean.var(dim=(0, 2, 3), correction=0).mean().item() == pytest.approx(1, rel=1e-3)
    assert (posterior.logvar == LITTLE).all() and posterior.mean.shape == (40, 8, 8, 8)


def test_a_loss_of_nothing_is_the_price_of_the_latent_alone():
    net, x = nano(room_pictures(4), channels=48), room_pictures(4)
    posterior = net.encode(x)                                            # 48 components of 48 lose only the uneven mean
    price = KL_WEIGHT * 0.5 * (posterior.mean ** 2 + posterior.logvar.exp() - 1 - posterior.logvar).mean()
    wrong = net.decode(posterior.mean) - x
    error = wrong.abs().mean() + wrong.square().mean() + sum(0.5 * wrong.diff(dim=d).abs().mean() for d in (2, 3))
    got = net.loss(x, torch.zeros_like(posterior.mean), torch.ones(4, 1, 32, 32), torch.zeros(4))
    assert got.item() == pytest.approx((error + price).item(), rel=1e-4)


def test_pixels_count_by_their_weight():
    net, x = nano(room_pictures(4)), room_pictures(4)
    noise, ones, still = torch.zeros(4, 8, 8, 8), torch.ones(4, 1, 32, 32), torch.zeros(4)
    price = net.loss(x, noise, 0 * ones, still)
    torch.testing.assert_close(net.loss(x, noise, 3 * ones, still) - price,
                               3 * (net.loss(x, noise, ones, still) - price))


def test_the_decoder_sees_latents_disturbed_by_the_posterior_and_by_as_much_as_was_said():
    net, x = nano(room_pictures(2)), room_pictures(2)
    noise, seen = torch.randn(2, 8, 8, 8), []
    net.from_latent.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    net.loss(x, noise, torch.ones(2, 1, 32, 32), torch.tensor([0.0, 0.3]))
    by = (seen[0] - net.encode(x).mean) / noise
    assert by[0].detach().mean().item() == pytest.approx(math.exp(LITTLE / 2), rel=1e-3)
    assert by[1].detach().mean().item() == pytest.approx(math.exp(LITTLE / 2) + 0.3, rel=1e-3)

