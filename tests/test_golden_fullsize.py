"""Stable Diffusion's true sizes against the official program: one network at a time, each dropped before the next.

    pytest -m slow tests/test_golden_fullsize.py        about a minute and 4.2 GB on two cores
"""
import os
from functools import cache

import pytest
import torch
from formula import MODULE, assert_all_close, config, fill, given, golden

from nanodisco.clip import ImageEncoder
from nanodisco.controlnet import ControlNet
from nanodisco.unet import UNet
from nanodisco.vae import VAE

pytestmark = pytest.mark.slow

CONFIG = config(golden("manifests/sd_image_variations_configs.json"))
STATISTICS = golden("fullsize/results.json")
T = torch.tensor([500])


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(1)


def full(prefix, kind, *arguments):
    """A network without the time that its random start would take, then with formula weights."""
    with torch.device("meta"):
        net = kind(*arguments)
    return fill(net.to_empty(device="cpu"), prefix)


def assert_statistics(x, wanted):
    """Mean, spread and largest value of a tensor that is too large to store."""
    x, tol = x.double(), MODULE * wanted["absmax"]
    assert list(x.shape) == wanted["shape"]
    assert x.mean().item() == pytest.approx(wanted["mean"], abs=tol)
    assert x.std().item() == pytest.approx(wanted["std"], abs=tol)
    assert x.abs().max().item() == pytest.approx(wanted["absmax"], abs=tol)


def assert_residuals(residuals, wanted):
    names = [f"down_{i:02}" for i in range(len(residuals) - 1)] + ["mid"]
    assert set(names) == wanted.keys()
    for name, x in zip(names, residuals):
        assert_statistics(x, wanted[name])


@cache
@torch.no_grad()
def residuals(net):
    """Only they outlive the network."""
    controlnet = full(f"{net}.", ControlNet, getattr(CONFIG, net), CONFIG.unet)
    hint = given({"pose": "full_pose", "background": "full_bg_latents"}[net])
    return controlnet(given("full_latents"), T, given("full_tokens"), hint)


def merged():
    return [a + b for a, b in zip(residuals("pose"), residuals("background"))]


@pytest.mark.parametrize("net, name", [("pose", "cn0"), ("background", "cn1")])
def test_controlnet_gives_residuals_like_the_official_ones(net, name):
    assert_residuals(residuals(net), STATISTICS[name]["residuals"])


def test_merged_residuals_are_like_the_official_ones():
    assert_residuals(merged(), STATISTICS["unet"]["merged"])


@torch.no_grad()
def test_unet_gives_the_official_output_with_residuals_and_without():
    added = merged()                                                     # before the UNet takes its 3.4 GB
    net, seen = full("unet.", UNet, CONFIG.unet), (given("full_latents"), T, given("full_tokens"))
    got = {"unet_with_residuals": net(*seen, added), "unet_no_residuals": net(*seen)}
    stored = golden("fullsize/unet.safetensors")
    assert got.keys() == stored.keys()
    assert_all_close(got, stored, MODULE)
    for name, x in got.items():
        assert_statistics(x, STATISTICS["unet"][name])


@torch.no_grad()
def test_clip_gives_the_official_tokens_in_both_modes():
    net = full("clip.", ImageEncoder, CONFIG.clip, CONFIG.unet.context, "local")
    photo = given("full_clip_image")
    local, of_all = net(photo), net.vision(photo)[0][:, :1]
    got = {"local_token_mean": local[0].mean(1), "local_token_std": local[0].std(1),
           "local_first8": local[0, :, :8], "global": of_all[0, 0]}
    stored = golden("fullsize/clip.safetensors")
    assert got.keys() == stored.keys()
    assert_all_close(got, stored, MODULE)
    assert_statistics(local, STATISTICS["clip"]["local"])
    assert_statistics(of_all, STATISTICS["clip"]["global"])


@torch.no_grad()
def test_vae_gives_the_official_posterior_and_picture():
    net = full("vae.", VAE, CONFIG.vae)
    posterior = net.encode(given("full_image"))
    picture = net.decode(given("full_latents") / net.scaling)
    got = {"encode_mean": posterior.mean, "encode_logvar": posterior.logvar, "decode_stride4": picture[:, :, ::4, ::4]}
    stored = golden("fullsize/vae.safetensors")
    assert got.keys() == stored.keys()
    assert_all_close(got, stored, MODULE)
    for name, x in {**got, "decode": picture}.items():
        if name != "decode_stride4":
            assert_statistics(x, STATISTICS["vae"][name])
    tol = MODULE * STATISTICS["vae"]["decode"]["absmax"]
    for kind, values in (("mean", picture[0].mean((1, 2))), ("std", picture[0].std((1, 2)))):
        assert values.tolist() == pytest.approx(STATISTICS["vae"][f"decode_channel_{kind}"], abs=tol)
