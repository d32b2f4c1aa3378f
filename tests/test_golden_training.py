"""Training of the image model against the official program: losses, every gradient, three steps of AdamW.

The VAE and the CLIP tower are frozen; both ControlNets, the UNet and the projection of CLIP's tokens train.
"""
import pytest
import torch
from formula import GRADIENT, LOSS, assert_close, build, golden, gradients, model, norm, training_data

RESULTS = golden("image/results.json")["train"]
WHOLE = golden("image/gradients.safetensors")
ZERO = set(RESULTS["zero_gradient_by_construction"])
STEPS = RESULTS["losses_over_3_adamw_steps_lr2e-4_wd1e-3_betas0.9_0.98"]


def trainable():
    net = build("image")
    net.vae.requires_grad_(False)
    net.clip.vision.requires_grad_(False)
    return net


@pytest.fixture(scope="module")
def trained():
    """-> loss, and official name -> gradient"""
    net = trainable()
    loss = net.loss(*training_data())
    loss.backward()
    return loss.item(), gradients(net)


def test_loss_is_the_official_one(trained):
    assert trained[0] == pytest.approx(RESULTS["loss_all"], rel=LOSS)


def test_every_gradient_norm_is_the_official_one(trained):
    norms, wanted = {key: norm([gradient]) for key, gradient in trained[1].items()}, RESULTS["grad_norms_all"]
    assert norms.keys() == wanted.keys() | ZERO
    assert {key: norms[key] for key in wanted} == pytest.approx(wanted, rel=GRADIENT)


def test_attention_of_a_single_pixel_to_itself_has_no_gradient(trained):
    assert all(norm([trained[1][key]]) < 1e-6 for key in ZERO)           # the middle of an 8x8 latent is 1x1


def test_every_trainable_parameter_has_a_gradient(trained):
    assert [key for key, gradient in trained[1].items() if gradient is None] == RESULTS["params_without_grad_all"]


@pytest.mark.parametrize("key", WHOLE)
def test_whole_gradient_is_the_official_one(trained, key):
    assert_close(trained[1][key], WHOLE[key], GRADIENT)


def test_norm_of_all_gradients_is_the_official_one(trained):
    assert norm(trained[1].values()) == pytest.approx(RESULTS["global_grad_norm"], rel=GRADIENT)


def test_losses_over_three_steps_of_adamw_are_the_official_ones():
    net = trainable()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, betas=(0.9, 0.98), eps=1e-8, weight_decay=1e-3)
    losses = []
    for _ in STEPS:
        loss = net.loss(*training_data())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx(STEPS, rel=LOSS)


@torch.no_grad()
def test_dropped_reference_is_clip_of_an_all_zero_picture():
    loss = model("image", uncond="clip-zero").loss(*training_data(drop_reference=True))
    assert loss.item() == pytest.approx(RESULTS["loss_reference_dropped"], rel=LOSS)


@torch.no_grad()
def test_one_global_token_gives_the_official_loss():
    loss = model("image", tokens="global").loss(*training_data())
    assert loss.item() == pytest.approx(RESULTS["loss_global_embedding"], rel=LOSS)
