"""Sampling against the official program: whole runs to the picture, and each sampler by itself."""
import copy
import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from formula import RUN, assert_all_close, assert_close, given, golden, model

from kernels import backend
from nanodisco import diffusion
from nanodisco.config import DiffusionConfig
from nanodisco.guidance import Guided
from nanodisco.loading import for_inference
from nanodisco.sampling import sample, timesteps
from nanodisco.temporal import fold, unfold

RUNS = golden("image/end_to_end.safetensors")
STAGE1 = golden("stage1/stage1.safetensors")
TEMPORAL = golden("temporal/temporal.safetensors")
SAMPLERS = golden("samplers/samplers.safetensors")
SAMPLER_RUNS = [name for name in SAMPLERS if name.startswith(("ddim", "ddpm", "pndm"))]
TIMESTEPS = golden("samplers/samplers.json")["timesteps"]
EXACT = 1e-5                           # samplers are a few multiplications a step
ON_GPU = {torch.float32: RUN, torch.bfloat16: 4e-2}


# ---- Whole runs ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    variant: str = "image"
    guidance: float = 1.0
    uncond: str = "zeros"
    tokens: str = "local"
    scheduler: str = "ddim"
    steps: int = 10
    scales: tuple[float, float] = (1.0, 1.0)
    posterior: bool = True             # sample the background's posterior; else take its mean


IMAGE_RUNS = {
    "a_mean": Run(posterior=False),
    "a_noise": Run(),
    "b_cfg_zero": Run(guidance=3.0),
    "c_cfg_clipzero": Run(guidance=1.5, uncond="clip-zero", scales=(0.7, 1.3)),
    "d_pndm": Run(guidance=1.5, uncond="clip-zero", scheduler="pndm"),
    "e_ddpm": Run(scheduler="ddpm"),
    "f_global": Run(guidance=3.0, tokens="global"),
    "g_pretrained_proj": Run(guidance=3.0, tokens="local-clip")}

STAGE1_RUNS = {
    "sample_nocfg": Run("stage1"),
    "sample_cfg_zero": Run("stage1", guidance=3.0)}

TEMPORAL_RUNS = {
    "sample_nocfg": Run("temporal", steps=5),
    "sample_cfg_clipzero": Run("temporal", steps=5, guidance=1.5, uncond="clip-zero"),
    "sample_cfg_zero_scaled": Run("temporal", steps=5, guidance=1.5, scales=(0.7, 1.3))}


@cache
@torch.no_grad()
def walk(run: Run, caching: bool = True, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """-> its steps, and the picture (B*F, 3, H, W) before clamping and after. The networks compute in `dtype`."""
    def shown(name: str, dtype: torch.dtype = dtype) -> torch.Tensor:
        return given(name).to(device, dtype)

    net = model(run.variant, uncond=run.uncond, tokens=run.tokens)
    if (device, dtype) != ("cpu", torch.float32):
        net = for_inference(copy.deepcopy(net).to(dtype), device)
    video = "t_" if run.variant == "temporal" else ""
    conditions = net.conditions(shown("clip_image"), shown("background"),
                                None if run.variant == "stage1" else shown(f"{video}pose"),
                                shown("posterior_noise_background") if run.posterior else None)
    uncond = net.unconditional_tokens(conditions.tokens)
    guided = Guided(net, conditions.tokens, conditions.background, uncond, run.guidance, *run.scales, cache=caching)
    predict = guided(conditions.pose)
    steps = list(sample(predict, shown(f"{video}init_latents", torch.float32), net.alpha_bars(), run.scheduler,
                        run.steps, noise=lambda i: shown("ddpm_noise", torch.float32)[i]))
    assert device == "cpu" or guided.step.graphs, "a step that was not captured"
    z = fold(steps[-1].z)[0].to(dtype)
    return steps, net.vae.decode(z / net.vae.scaling), net.vae.to_picture(z)


CACHING = pytest.mark.parametrize("caching", [True, False], ids=["cache", "no-cache"])


@CACHING
@pytest.mark.parametrize("name", IMAGE_RUNS)
def test_image_run_takes_the_official_path_to_the_official_picture(name, caching):
    steps, decoded, picture = walk(IMAGE_RUNS[name], caching)
    wanted = {key.partition(".")[2]: x for key, x in RUNS.items() if key.startswith(name + ".")}
    assert [step.t for step in steps] == wanted.pop("timesteps").tolist()
    got = {"trajectory": torch.stack([step.z for step in steps]), "decoded_unclamped": decoded, "image": picture}
    assert_all_close({key: got[key] for key in wanted}, wanted, RUN)


def test_every_golden_image_run_is_walked():
    assert {key.partition(".")[0] for key in RUNS} == IMAGE_RUNS.keys()


@CACHING
@pytest.mark.parametrize("name", STAGE1_RUNS)
def test_stage1_run_ends_at_the_official_picture(name, caching):
    steps, decoded, _ = walk(STAGE1_RUNS[name], caching)
    assert_all_close({f"{name}.final_latents": steps[-1].z, f"{name}.decoded_unclamped": decoded}, STAGE1, RUN)


@CACHING
@pytest.mark.parametrize("name", TEMPORAL_RUNS)
def test_temporal_run_takes_the_official_path_to_the_official_clip(name, caching):
    steps, decoded, clip = (x if isinstance(x, list) else unfold(x, frames=4)
                            for x in walk(TEMPORAL_RUNS[name], caching))
    assert_all_close({f"{name}.trajectory": torch.stack([step.z for step in steps]),
                      f"{name}.decoded_unclamped_batch0": decoded[:1],
                      f"{name}.clip_batch1_stride4": clip[1:, :, :, ::4, ::4]}, TEMPORAL, RUN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ON_GPU, ids=str)
@pytest.mark.parametrize("name", IMAGE_RUNS | TEMPORAL_RUNS)
def test_a_run_on_a_gpu_takes_the_official_path_too(monkeypatch, name, dtype):
    """On our kernels, each step a CUDA graph."""
    monkeypatch.setattr(backend, "MODE", "triton")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    run, wanted = (IMAGE_RUNS | TEMPORAL_RUNS)[name], RUNS if name in IMAGE_RUNS else TEMPORAL
    steps, _, _ = walk(run, True, "cuda", dtype)
    assert_close(torch.stack([step.z for step in steps]).float().cpu(), wanted[f"{name}.trajectory"], ON_GPU[dtype])


# ---- Samplers alone, with a network that is a formula -----------------------------------------------------

def fake(zt, t):
    return 0.1 * zt + math.sin(t[0].item() / 100)


def alpha_bars():
    return diffusion.alpha_bars(DiffusionConfig(1000, "scaled_linear", 0.00085, 0.012))


@pytest.mark.parametrize("name", SAMPLER_RUNS)
def test_sampler_takes_every_official_step(name):
    scheduler, *variant, n = name.split("_")                             # ddim_eta0.5_20, ddim_vpred_10, pndm_50
    variant = "".join(variant)
    eta = float(variant.removeprefix("eta")) if variant.startswith("eta") else 0.0
    steps = list(sample(fake, given("sampler_x"), alpha_bars(), scheduler, int(n), eta,
                        "v" if variant == "vpred" else "epsilon", noise=lambda i: given("sampler_noise")[i]))
    assert_close(torch.stack([step.z for step in steps]), SAMPLERS[name], EXACT)
    assert [step.t for step in steps] == TIMESTEPS[f"{scheduler}_{n}"]


@pytest.mark.parametrize("name", TIMESTEPS)
def test_timesteps_are_the_official_ones(name):
    scheduler, n, *other_offset = name.split("_")                        # pndm_50, ddim_20_offset0
    offset = 0 if scheduler == "ddpm" or other_offset else 1
    once = sorted(set(TIMESTEPS[name]), reverse=True)                    # PNDM has its second step twice
    assert timesteps("ddim" if offset else "ddpm", int(n), 1000) == once
    if not other_offset:
        assert timesteps(scheduler, int(n), 1000) == TIMESTEPS[name]


# ---- The schedule and its formulas ---------------------------------------------------------------------

def bars():
    """a at the recorded timesteps, for sampler_a (clean) and sampler_b (noise)."""
    return diffusion.at(alpha_bars(), torch.tensor(golden("samplers/samplers.json")["add_noise_timesteps"]),
                        given("sampler_a"))


def test_alpha_bars_are_the_official_ones():
    assert_close(alpha_bars(), SAMPLERS["alphas_cumprod"], EXACT)


def test_add_noise_is_the_official_one():
    assert_close(diffusion.add_noise(given("sampler_a"), given("sampler_b"), bars()), SAMPLERS["add_noise"], EXACT)


def test_velocity_is_the_official_one():
    assert_close(diffusion.velocity(given("sampler_a"), given("sampler_b"), bars()), SAMPLERS["get_velocity"], EXACT)


def test_add_noise_in_float16_is_the_official_one():
    # official: casts alpha-bar itself to half, which loses most of 1 - alpha-bar at the first steps
    a = alpha_bars().half()
    assert_close(a.float(), SAMPLERS["alphas_cumprod_after_float16_cast"], EXACT)
    got = diffusion.add_noise(given("sampler_a").half(), given("sampler_b").half(), bars().half())
    assert got.dtype == torch.float16
    assert_close(got.float(), SAMPLERS["add_noise_float16"], EXACT)


def test_every_golden_sampler_tensor_is_compared():
    formulas = {"alphas_cumprod", "alphas_cumprod_after_float16_cast", "add_noise", "add_noise_float16", "get_velocity"}
    assert SAMPLERS.keys() == formulas | set(SAMPLER_RUNS)
