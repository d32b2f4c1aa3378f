"""The diffusion formulas and every sampler loop, against diffusers and against what must hold in mathematics."""
import math
from dataclasses import replace

import pytest
import torch
from reference import SAME, normal
from torch.testing import assert_close

from nanodisco import diffusion
from nanodisco.config import DiffusionConfig
from nanodisco.errors import InputError
from nanodisco.sampling import SCHEDULERS, sample, timesteps

CLOSE = {"rtol": 2e-5, "atol": 2e-6}   # where theirs keeps its schedule in float32

SHAPE = (2, 4, 3, 5)
STEPS = [1, 2, 3, 10, 37, 50]
SPACED = [1, 2, 4, 10, 50]             # divisors of 1000
STABLE = DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012)
ZERO_SNR = replace(STABLE, prediction="v", zero_snr=True)


def bars(config=STABLE):
    return diffusion.alpha_bars(config).double()


# ---- The noise schedule --------------------------------------------------------------------------

THEIR_SCHEDULE = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("steps, start, end", [(1000, 0.00085, 0.012), (100, 0.001, 0.2)])
@pytest.mark.parametrize("schedule", THEIR_SCHEDULE)
def test_alpha_bars_are_those_of_diffusers(schedule, steps, start, end, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(steps, start, end, THEIR_SCHEDULE[schedule], rescale_betas_zero_snr=zero_snr)
    ours = diffusion.alpha_bars(DiffusionConfig(steps, schedule, start, end, "v", zero_snr))
    assert ours.dtype == torch.float32
    assert_close(ours, theirs.alphas_cumprod, rtol=1e-5, atol=1e-9)      # they multiply up 1000 ratios again


@pytest.mark.parametrize("schedule", THEIR_SCHEDULE)
def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_pure_noise(schedule):
    a = diffusion.alpha_bars(replace(STABLE, schedule=schedule))
    rescaled = diffusion.zero_terminal_snr(a)
    assert rescaled[-1].item() == 0.0
    assert_close(rescaled[0], a[0])
    assert (rescaled.diff() < 0).all()


# ---- Going up ------------------------------------------------------------------------------------

def test_add_noise_and_velocity_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs, a = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear"), diffusion.alpha_bars(STABLE)
    z0, eps, t = normal(5, 4, 3, 3).float(), normal(5, 4, 3, 3, seed=1).float(), torch.tensor([0, 1, 17, 801, 999])
    at = diffusion.at(a, t, z0)
    assert_close(diffusion.add_noise(z0, eps, at), theirs.add_noise(z0, eps, t))
    assert_close(diffusion.velocity(z0, eps, at), theirs.get_velocity(z0, eps, t))


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 4, 2, 5, 6)], ids=["pictures", "clips"])
def test_each_sample_is_noised_by_its_own_step(shape):
    a, t = bars(), torch.tensor([3, 500, 999])
    z0, eps = normal(*shape), normal(*shape, seed=1)
    together = diffusion.add_noise(z0, eps, diffusion.at(a, t, z0))
    for i in range(3):
        assert_close(together[i], a[t[i]].sqrt() * z0[i] + (1 - a[t[i]]).sqrt() * eps[i])


@pytest.mark.parametrize("prediction, a", [("epsilon", 0.9), ("epsilon", 1e-3), ("v", 0.9), ("v", 1e-3), ("v", 0.0)])
def test_split_gives_back_what_was_mixed(prediction, a):
    z0, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    out = eps if prediction == "epsilon" else diffusion.velocity(z0, eps, a)
    assert_close(diffusion.split(out, diffusion.add_noise(z0, eps, a), a, prediction), (z0, eps), **SAME)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_min_snr_weight_makes_any_error_count_as_that_on_z0_times_the_capped_snr(prediction):
    a, gamma = torch.tensor([1e-4, 0.1, 0.5, 0.8, 0.9, 0.999], dtype=torch.float64).view(-1, 1, 1, 1), 5.0
    z0, eps, guess = (normal(6, 4, 3, 3, seed=i) for i in range(3))
    zt = diffusion.add_noise(z0, eps, a)
    truth = {"epsilon": eps, "v": diffusion.velocity(z0, eps, a), "x0": z0}[prediction]
    z0_guess = guess if prediction == "x0" else diffusion.split(guess, zt, a, prediction)[0]
    capped_snr = (a / (1 - a)).clamp(max=gamma)
    assert_close(diffusion.min_snr_weight(a, gamma, prediction) * (guess - truth) ** 2,
                 capped_snr * (z0_guess - z0) ** 2, **SAME)


@pytest.mark.parametrize("prediction, at_noise, at_signal", [("epsilon", 1, 0), ("v", 0, 0), ("x0", 0, 5)])
def test_min_snr_weight_is_finite_where_there_is_no_signal_or_no_noise(prediction, at_noise, at_signal):
    weight = diffusion.min_snr_weight(torch.tensor([0.0, 1.0]), 5.0, prediction)
    assert_close(weight, torch.tensor([at_noise, at_signal]).float())


def test_guidance_at_zero_is_unconditional_and_at_one_conditional():
    uncond, cond = normal(*SHAPE), normal(*SHAPE, seed=1)
    for scale, wanted in [(0.0, uncond), (1.0, cond), (3.0, 3 * cond - 2 * uncond)]:
        assert_close(diffusion.guide(uncond, cond, scale), wanted, **SAME)


# ---- Coming down: one step -----------------------------------------------------------------------

def test_ddim_given_the_true_noise_lands_on_the_same_noising_of_the_same_latent():
    z0, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    for a, a_prev in [(0.3, 0.7), (0.0, 0.2), (0.99, 1.0)]:
        assert_close(diffusion.ddim_step(z0, eps, a, a_prev), diffusion.add_noise(z0, eps, a_prev), **SAME)


@pytest.mark.parametrize("a, a_prev", [(0.3, 0.7), (1e-3, 2e-3), (0.9, 1.0), (0.0, 0.2)])
def test_ddim_with_eta_one_is_ddpm(a, a_prev):
    z0, eps, noise = (normal(*SHAPE, seed=i) for i in range(3))
    ddpm = diffusion.ddpm_step(z0, diffusion.add_noise(z0, eps, a), a, a_prev, noise)
    # DDIM takes 1 - a_prev from its own equal, and a root of that: 1e-16 becomes 1e-8
    assert_close(diffusion.ddim_step(z0, eps, a, a_prev, eta=1.0, noise=noise), ddpm, rtol=0, atol=1e-7)


def test_ddpm_posterior_keeps_the_marginal():
    """If zt is z0 noised to a, then z_prev is z0 noised to a_prev: in mean and in variance (DDPM eq. 7 and 4)."""
    a, a_prev, zero, one = 0.3, 0.7, torch.zeros(1).double(), torch.ones(1).double()
    of_z0 = diffusion.ddpm_step(one, a ** 0.5 * one, a, a_prev)
    of_eps = diffusion.ddpm_step(zero, (1 - a) ** 0.5 * one, a, a_prev)
    of_noise = diffusion.ddpm_step(zero, zero, a, a_prev, one)
    assert_close(of_z0, a_prev ** 0.5 * one, **SAME)
    assert_close(of_eps ** 2 + of_noise ** 2, (1 - a_prev) * one, **SAME)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_integrates_polynomials_up_to_its_order(order):
    """From x = 0 to 1, given f at 0, -1, -2, …: exact for x^(order - 1), and no longer for x^order."""
    points = torch.arange(1 - order, 1).double()                         # oldest first
    for power in range(order):
        assert_close(diffusion.adams_bashforth(list(points ** power)).item(), 1 / (power + 1))
    assert abs(diffusion.adams_bashforth(list(points ** order)).item() - 1 / (order + 1)) > 0.1


@pytest.mark.parametrize("a, a_prev", [(0.0, 0.2), (0.3, 0.7), (0.9, 1.0)])
def test_the_first_step_of_dpm_solver_is_ddim(a, a_prev):
    z0, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    assert_close(diffusion.dpm_step(z0, diffusion.add_noise(z0, eps, a), a, a_prev),
                 diffusion.ddim_step(z0, eps, a, a_prev), **SAME)


def dpm_error(steps):
    """DPM-Solver++ on data N(3, 0.2^2), where the network and the end of its walk are known exactly."""
    mean, deviation, start = 3.0, 0.2, normal(8)
    bounds = torch.linspace(-4, 4, steps + 1).double()                   # lambda, log of signal over noise
    a = torch.sigmoid(2 * bounds).tolist()
    z, z0_last, a_last = start, None, None
    for now, then in zip(a, a[1:]):
        variance = now * deviation ** 2 + 1 - now                        # of zt
        z0 = mean + now ** 0.5 * deviation ** 2 / variance * (z - now ** 0.5 * mean)
        z, z0_last, a_last = diffusion.dpm_step(z0, z, now, then, z0_last, a_last), z0, now
    spread = [x * deviation ** 2 + 1 - x for x in (a[0], a[-1])]         # the flow keeps (zt - mean) / deviation
    exact = a[-1] ** 0.5 * mean + (spread[1] / spread[0]) ** 0.5 * (start - a[0] ** 0.5 * mean)
    return (z - exact).abs().max().item()


def test_dpm_solver_is_of_second_order():
    errors = [dpm_error(steps) for steps in (80, 160, 320)]
    assert errors[-1] < 1e-3
    assert [a / b for a, b in zip(errors, errors[1:])] == pytest.approx([4, 4], abs=0.4)


# ---- Coming down: whole walks --------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")        # of diffusers

def network(zt, t):
    """Says something different at every place and step."""
    return torch.tanh(zt.roll(1, -1)) * math.cos(t[0].item() / 300) + 0.2 * zt


def noises(steps, seed=7):
    """What a scheduler of diffusers draws from a generator with that seed, one after another."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(steps)]


def our_walk(scheduler, steps, config=STABLE, prediction="epsilon", eta=0.0, predict=network):
    return list(sample(predict, normal(*SHAPE), diffusion.alpha_bars(config), scheduler, steps, eta, prediction,
                       noise=noises(steps).__getitem__))


def their_walk(name, steps, predict=network, step_arguments=None, **arguments):
    """-> the timesteps and the latent after each, of that scheduler class of diffusers"""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(1000, 0.00085, 0.012, "scaled_linear", **arguments)
    for field in ("alphas_cumprod", "final_alpha_cumprod"):              # else their float32 is what we measure
        if hasattr(scheduler, field):
            setattr(scheduler, field, getattr(scheduler, field).double())
    scheduler.set_timesteps(steps)
    z, trajectory = normal(*SHAPE), []
    for i, t in enumerate(scheduler.timesteps):
        out = predict(z, t.expand(len(z)))
        z = scheduler.step(out, t, z, **(step_arguments(i) if step_arguments else {})).prev_sample
        trajectory.append(z)
    return scheduler.timesteps.tolist(), trajectory


def assert_same_walk(ours, theirs, tolerance):
    calls, trajectory = theirs
    assert [step.t for step in ours] == calls
    assert_close([step.z for step in ours], trajectory, **tolerance)


THEIR_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction"}
both_predictions = pytest.mark.parametrize("prediction", THEIR_PREDICTION)
every_count = pytest.mark.parametrize("steps", STEPS)


@both_predictions
@every_count
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_walks_as_that_of_diffusers(steps, prediction, eta):
    theirs = their_walk("DDIMScheduler", steps, prediction_type=THEIR_PREDICTION[prediction], clip_sample=False,
                        steps_offset=1, set_alpha_to_one=False,
                        step_arguments=lambda i: {"eta": eta, "variance_noise": noises(steps)[i] if eta > 0 else None})
    assert_same_walk(our_walk("ddim", steps, prediction=prediction, eta=eta), theirs, SAME)


@both_predictions
@every_count
def test_ddpm_walks_as_that_of_diffusers(steps, prediction):
    generator = torch.Generator().manual_seed(7)
    theirs = their_walk("DDPMScheduler", steps, prediction_type=THEIR_PREDICTION[prediction], clip_sample=False,
                        variance_type="fixed_small", step_arguments=lambda i: {"generator": generator})
    assert_same_walk(our_walk("ddpm", steps, prediction=prediction), theirs, SAME)


@every_count
def test_pndm_walks_as_that_of_diffusers(steps):
    theirs = their_walk("PNDMScheduler", steps, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    assert_same_walk(our_walk("pndm", steps), theirs, SAME)


@every_count
def test_pndm_with_v_walks_along_the_noise_that_v_implies(steps):
    # Theirs averages the v of several steps and only then takes it for noise, by the last step's a. PNDM's
    # formulas are for noise, so ours asks each v for its noise first: theirs does that if its network does.
    def implied(zt, t):
        return diffusion.split(network(zt, t), zt, bars()[t[0]], "v")[1]
    theirs = their_walk("PNDMScheduler", steps, implied, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    assert_same_walk(our_walk("pndm", steps, prediction="v"), theirs, SAME)


@both_predictions
@every_count
def test_dpm_solver_walks_as_that_of_diffusers(steps, prediction):
    # Below 15 steps theirs may take its last step by the first order (lower_order_final): so it does anyway when that
    # step ends without noise, at lambda = infinity, where the second order has no meaning. Ours does just that.
    theirs = their_walk("DPMSolverMultistepScheduler", steps, prediction_type=THEIR_PREDICTION[prediction],
                        algorithm_type="dpmsolver++", solver_order=2, final_sigmas_type="zero")
    assert_same_walk(our_walk("dpm++", steps, prediction=prediction), theirs, CLOSE)


def test_ddim_of_eta_one_leaves_nothing_of_the_noise_when_it_begins_without_signal():
    """All of it is drawn anew, though rounding may make 1 - a - sigma^2 a little less than nothing."""
    z0, eps, fresh = (normal(*SHAPE) + i for i in range(3))
    for a_prev in (0.1, 0.3, 0.7, 1e-4):
        assert_close(diffusion.ddim_step(z0, eps, 0.0, a_prev, 1.0, fresh),
                     a_prev ** 0.5 * z0 + (1 - a_prev) ** 0.5 * fresh, rtol=0, atol=1e-7)


# With zero terminal SNR the steps are "trailing", 1000/n apart. DDIM of diffusers takes that for a whole number when
# it looks for the next a, so for other n than the divisors of 1000 it does not land where it is called next.

@pytest.mark.parametrize("steps", SPACED)
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.95])      # 1.0 is the root of -1e-17 in diffusers on some processors
def test_ddim_with_zero_terminal_snr_walks_as_that_of_diffusers(steps, eta):
    theirs = their_walk("DDIMScheduler", steps, prediction_type="v_prediction", clip_sample=False,
                        set_alpha_to_one=False, rescale_betas_zero_snr=True, timestep_spacing="trailing",
                        step_arguments=lambda i: {"eta": eta, "variance_noise": noises(steps)[i] if eta > 0 else None})
    assert_same_walk(our_walk("ddim", steps, ZERO_SNR, "v", eta), theirs, CLOSE)


@pytest.mark.parametrize("steps", SPACED)
def test_ddpm_with_zero_terminal_snr_walks_as_that_of_diffusers(steps):
    generator = torch.Generator().manual_seed(7)
    theirs = their_walk("DDPMScheduler", steps, prediction_type="v_prediction", clip_sample=False,
                        rescale_betas_zero_snr=True, timestep_spacing="trailing",
                        step_arguments=lambda i: {"generator": generator})
    assert_same_walk(our_walk("ddpm", steps, ZERO_SNR, "v"), theirs, CLOSE)


@every_count
@pytest.mark.parametrize("scheduler, config", [(name, config) for name in SCHEDULERS for config in (STABLE, ZERO_SNR)
                                               if (name, config) != ("pndm", ZERO_SNR)],       # refused, see below
                         ids=lambda x: x if isinstance(x, str) else f"zero_snr={x.zero_snr}")
def test_a_network_that_knows_the_latent_is_led_to_it(scheduler, config, steps):
    z0, a, noise = normal(*SHAPE, seed=3), bars(config), []

    def knowing(zt, t):
        noise.append((zt - a[t[0]].sqrt() * z0) / (1 - a[t[0]]).sqrt())
        return noise[-1] if config.prediction == "epsilon" else diffusion.velocity(z0, noise[-1], a[t[0]])
    end = our_walk(scheduler, steps, config, config.prediction, predict=knowing)[-1].z
    # official: DDIM and PNDM stop at the training step 0, which keeps a little of the noise they started from
    wanted = diffusion.add_noise(z0, noise[0], a[0]) if scheduler in ("ddim", "pndm") else z0
    assert_close(end, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_each_step_is_yielded_when_it_is_made(scheduler):
    calls = []

    def counting(zt, t):
        calls.append(t[0].item())
        return network(zt, t)
    walk = sample(counting, normal(*SHAPE), diffusion.alpha_bars(STABLE), scheduler, 10, noise=noises(20).__getitem__)
    for i, step in enumerate(walk):
        assert (step.index, len(calls), step.t) == (i, i + 1, calls[-1])
    assert calls == timesteps(scheduler, 10, 1000)


def test_zero_terminal_snr_starts_at_the_very_last_step():
    for n in range(1, 1000):
        calls = timesteps("ddim", n, 1000, zero_snr=True)
        assert calls[0] == 999 and calls[-1] >= 0 and len(calls) == n and sorted(set(calls), reverse=True) == calls


@pytest.mark.parametrize("scheduler, steps, config, message", [
    ("euler", 10, STABLE, "expected one of ddim, ddpm, pndm, dpm\\+\\+"),
    ("ddim", 0, STABLE, "expected 1 to 1000"), ("ddim", 1001, STABLE, "expected 1 to 1000"),
    ("pndm", 10, ZERO_SNR, "use ddim, ddpm or dpm\\+\\+"),
    ("ddim", 10, ZERO_SNR, "epsilon says nothing at zero signal")])
def test_a_walk_that_cannot_be_made_is_refused(scheduler, steps, config, message):
    with pytest.raises(InputError, match=message):
        our_walk(scheduler, steps, config)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_as_many_steps_as_the_schedule_has_can_be_taken(scheduler):
    steps = list(sample(lambda zt, t: zt, torch.ones(1, 1, 1, 1), bars(replace(STABLE, steps=100)), scheduler, 100,
                        noise=lambda i: torch.zeros(1)))
    assert steps[0].t == 99 and steps[-1].z.isfinite().all()
