"""The composition: who sees which condition, what the loss is of, and what a step draws."""
from dataclasses import replace

import pytest
import torch
from formula import build, given, model, training_data
from torch.testing import assert_close

from nanodisco import diffusion
from nanodisco.disco import Batch, Conditions, DisCo, hide_pose
from nanodisco.guidance import Guided


def shown(**changes):
    return replace(Conditions(given("tokens"), given("pose"), given("bg_latents")), **changes)


def answer(net: DisCo, conditions=None, z="latents", **scales):
    with torch.no_grad():
        return net(given(z), given("timesteps"), conditions or shown(), **scales)


@pytest.mark.parametrize("door", ["tokens", "pose", "background"])
def test_each_condition_has_a_door_of_its_own(door):
    other = shown(**{door: getattr(shown(), door).roll(1, dims=-1)})
    assert not torch.allclose(answer(model("image"), other), answer(model("image")))


@pytest.mark.parametrize("door, scale", [("pose", "pose_scale"), ("background", "background_scale")])
def test_a_net_at_scale_zero_is_not_heard(door, scale):
    other = shown(**{door: getattr(shown(), door).roll(1, dims=-1)})
    assert torch.equal(answer(model("image"), other, **{scale: 0.0}), answer(model("image"), **{scale: 0.0}))


@pytest.mark.parametrize("dtype, close", [(torch.bfloat16, 0.05), (torch.float16, 0.005), (torch.float64, 1e-5)])
def test_the_networks_compute_in_their_own_dtype_and_answer_in_that_of_the_latent(dtype, close):
    out = answer(build("image").to(dtype))
    wanted = answer(model("image"))
    assert out.dtype == torch.float32
    assert (out - wanted).abs().max() <= close * wanted.abs().max()


def test_clip_in_float32_feeds_networks_in_half_as_officially():
    half = build("image").to(torch.bfloat16)
    half.clip.vision.float()
    with torch.no_grad():
        conditions = half.conditions(given("clip_image"), given("background"), given("pose"))
    assert answer(half, conditions).isfinite().all()


def test_all_of_a_step_runs_under_autocast_and_its_loss_is_float32():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model("image").loss(*training_data())
    assert loss.dtype == torch.float32
    assert_close(loss, model("image").loss(*training_data()), rtol=0.02, atol=0)


def test_guidance_of_one_is_the_plain_network_and_of_zero_the_unconditional_one():
    net, t = model("image"), given("timesteps")
    uncond = torch.zeros_like(given("tokens"))
    one, two = (Guided(net, given("tokens"), given("bg_latents"), uncond, guidance, cache=False)(given("pose"))
                for guidance in (1.0, 2.0))
    with torch.no_grad():
        assert torch.equal(one(given("latents"), t), answer(net))
        wanted = 2 * answer(net) - answer(net, shown(tokens=uncond))
        assert_close(two(given("latents"), t), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_with_a_pose_net_says_so_when_there_is_no_pose():
    with pytest.raises(AssertionError, match="needs a pose"):
        answer(model("image"), shown(pose=None))


# ---- The loss --------------------------------------------------------------------------------------

@pytest.mark.parametrize("sample, heard", [(0, False), (1, True)])
def test_only_the_reference_of_a_dropped_sample_goes_unheard(sample, heard):
    batch, draws = training_data()
    draws = replace(draws, drop_reference=torch.tensor([True, False]))
    other = replace(batch, reference=batch.reference.clone())
    other.reference[sample] *= 0.5
    with torch.no_grad():
        assert torch.equal(model("image").loss(batch, draws), model("image").loss(other, draws)) != heard


def test_a_hidden_pose_is_a_plain_picture_of_its_first_pixel_and_others_stay():
    pose, hidden = given("t_pose"), torch.tensor([[True, False, False, True], [False] * 4])
    seen = hide_pose(pose, hidden)
    assert torch.equal(seen[0, :, 0], pose[0, :, 0, :1, :1].expand_as(pose[0, :, 0]))
    assert torch.equal(seen[0, :, 1:3], pose[0, :, 1:3]) and torch.equal(seen[1], pose[1])


def test_the_loss_of_a_v_model_is_on_the_velocity():
    net = build("image")
    net.config = replace(net.config, diffusion=replace(net.config.diffusion, prediction="v"))
    batch, draws = training_data()
    with torch.no_grad():
        z0 = net.vae.to_latent(batch.target, draws.target)
        a = diffusion.at(net.alpha_bars(), draws.timesteps, z0)
        conditions = net.conditions(batch.reference, batch.background, batch.pose, draws.background)
        out = net(diffusion.add_noise(z0, draws.noise, a), draws.timesteps, conditions)
        assert_close(net.loss(batch, draws), (out - diffusion.velocity(z0, draws.noise, a)).square().mean())


def test_min_snr_weights_each_sample_by_its_own_step():
    net, (batch, draws) = model("image"), training_data()
    with torch.no_grad():
        a = net.alpha_bars()[draws.timesteps]
        single = [net.loss(Batch(*(x[i:i + 1] for x in (batch.target, batch.reference, batch.background, batch.pose))),
                           replace(draws, **{k: v[i:i + 1] for k, v in vars(draws).items()})) for i in range(2)]
        wanted = (diffusion.min_snr_weight(a, 5.0, "epsilon") * torch.stack(single)).mean()
        assert_close(net.loss(batch, draws, min_snr=5.0), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("variant, prefix", [("image", ""), ("temporal", "t_")])
def test_the_loss_of_samples_noised_twice_is_the_mean_of_two_losses(variant, prefix):
    net, (batch, draws) = model(variant), training_data(prefix)
    twice = net.draw(batch.target.shape, torch.Generator().manual_seed(5), 0.5, 0.5, noises=2)
    assert twice.drop_reference.any() and twice.drop_pose.any()
    times = ("timesteps", "noise", "drop_reference", "drop_pose")
    halves = [replace(twice, **{name: getattr(twice, name)[k::2] for name in times}) for k in range(2)]
    weight = torch.rand(len(batch.target), 1, *draws.noise.shape[2:])
    with torch.no_grad():
        wanted = sum(net.loss(batch, half, weight=weight) for half in halves) / 2
        assert_close(net.loss(batch, twice, weight=weight), wanted, rtol=1e-5, atol=0)


# ---- What a step draws -------------------------------------------------------------------------------

@pytest.mark.parametrize("variant, prefix", [("image", ""), ("temporal", "t_")])
def test_draws_have_the_shapes_that_the_loss_needs_and_follow_from_the_seed(variant, prefix):
    net, (batch, draws) = model(variant), training_data(prefix)
    one, same, other = (net.draw(batch.target.shape, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    for name, wanted in vars(draws).items():
        assert getattr(one, name).shape == wanted.shape and getattr(one, name).dtype == wanted.dtype, name
        assert torch.equal(getattr(one, name), getattr(same, name)), name
    assert not torch.equal(one.noise, other.noise)


def test_references_and_poses_are_dropped_with_their_own_probabilities():
    generator = torch.Generator().manual_seed(0)
    draws = model("temporal").draw((400, 3, 2, 8, 8), generator, drop_reference=0.1, drop_pose=0.4)
    assert 0.05 < draws.drop_reference.float().mean() < 0.15
    assert 0.35 < draws.drop_pose.float().mean() < 0.45
    assert not torch.equal(draws.drop_pose[:, 0], draws.drop_pose[:, 1])


def test_one_coin_drops_all_references_of_a_batch_or_none():
    net, dropped = model("image"), []
    for seed in range(200):
        draws = net.draw((6, 3, 16, 16), torch.Generator().manual_seed(seed), drop_reference=0.3, drop_whole_batch=True)
        assert draws.drop_reference.all() or not draws.drop_reference.any()
        dropped.append(bool(draws.drop_reference[0]))
    assert 0.2 < sum(dropped) / len(dropped) < 0.4


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("on", ["epsilon", "v", "x0"])
def test_the_loss_on_something_else_is_the_loss_weighted(prediction, on):
    net, (batch, draws) = build("image"), training_data()
    net.config = replace(net.config, diffusion=replace(net.config.diffusion, prediction=prediction))
    draws = replace(draws, timesteps=torch.tensor([400, 400]))
    a = net.alpha_bars()[400].item()
    scale = {"epsilon": a / (1 - a), "v": 1 / (1 - a), "x0": 1.0}         # squared error of each over that of x0
    with torch.no_grad():
        wanted = net.loss(batch, draws) / scale[prediction] * scale[on]
        assert_close(net.loss(batch, draws, on=on), wanted, rtol=1e-4, atol=0)


def test_the_hole_is_a_channel_of_its_own():
    net = build("image")
    net.config = replace(net.config, background=replace(net.config.background, hole=True))
    factor, channels = net.config.vae.factor, net.config.vae.channels
    scene = torch.rand(1, 3, 8 * factor, 8 * factor) + 0.1
    scene[:, :, :2 * factor, :factor] = 0
    scene[:, :, 4 * factor:4 * factor + factor // 2, 4 * factor:5 * factor] = 0      # half of a place of the latent
    with torch.no_grad():
        seen = net.conditions(torch.zeros(1, 3, *[net.config.clip.image_size] * 2), scene, None)
    wanted = torch.zeros(8, 8)
    wanted[:2, 0], wanted[4, 4] = 1, 0.5
    assert seen.background.shape == (1, channels + 1, 8, 8) and torch.equal(seen.background[0, -1], wanted)

