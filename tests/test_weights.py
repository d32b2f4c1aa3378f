"""Official files: every tensor of every format is accounted for, in and out."""
import json
import sys
from dataclasses import replace
from functools import cache

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from formula import build, given, golden, model, weight
from test_cpu import memory_of_files
from nanodisco import diffusion, loading, names, sizes, unpickle, weights
from nanodisco.config import load as load_config, to_dict
from nanodisco.disco import Conditions, DisCo
from nanodisco.errors import InputError

IMAGE = golden("manifests/disco_image_module.json")
STAGE1 = golden("manifests/disco_stage1_module.json")
BASE = golden("manifests/sd_image_variations_state_dicts.json")
COMPVIS = golden("manifests/compvis_sd1_mapping.json")
TEMPORAL = IMAGE | golden("manifests/disco_temporal_module.json")["extra"]


# ---- Full-size key lists -------------------------------------------------------------------------

@cache
def full_size_shapes(variant: str) -> dict[str, torch.Size]:
    """Our names and shapes at the true sizes, without memory for the values."""
    full = load_config(loading.ASSUMED, [f"--unet.temporal={'true' if variant == 'temporal' else 'false'}"]
                       + ["--pose=null"] * (variant == "stage1"))
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in DisCo(full).state_dict().items()}


@pytest.mark.parametrize("variant, manifest", [("image", IMAGE), ("stage1", STAGE1), ("temporal", TEMPORAL)])
def test_every_key_and_shape_of_a_full_size_disco_checkpoint_is_accounted_for(variant, manifest):
    ours = weights.official_shapes(full_size_shapes(variant))
    if variant == "stage1":
        ours = {name.replace("controlnet.nets.1.", "controlnet."): shape for name, shape in ours.items()}
    theirs = {name: tuple(shape) for name, shape in manifest.items() if name != names.POSITION_IDS}
    assert ours == theirs


@pytest.mark.parametrize("spelling", ["old", "new"])
def test_every_key_and_shape_of_the_base_model_is_accounted_for_in_both_spellings(spelling):
    theirs = {"unet." + name: shape for name, shape in BASE["unet"].items()}
    theirs |= {"clip_image_encoder." + name: shape for name, shape in BASE["image_encoder"].items()}
    renamed = BASE["vae_new_names_differences"] if spelling == "new" else {}
    theirs |= {"vae." + renamed.get(name, name): shape for name, shape in BASE["vae_old_names"].items()}
    read = {names.vae_spelling(name, new=False): tuple(shape) for name, shape in theirs.items()}
    ours = weights.official_shapes({name: shape for name, shape in full_size_shapes("image").items()
                                    if name.startswith(("unet.", "vae.", "clip.vision."))})
    assert ours == {name: shape for name, shape in read.items() if name != names.POSITION_IDS}


def test_both_vae_spellings_turn_into_each_other():
    for old, new in BASE["vae_new_names_differences"].items():
        assert names.vae_spelling("vae." + old, new=True) == "vae." + new
        assert names.vae_spelling("vae." + new, new=False) == "vae." + old


def test_every_compvis_key_gets_the_name_that_the_official_converter_gives_it():
    theirs = {"model.diffusion_model." + name: "unet." + entry[0] for name, entry in COMPVIS["unet"].items()}
    theirs |= {"first_stage_model." + name: "vae." + entry[0] for name, entry in COMPVIS["vae"].items()}
    assert names.compvis_names(theirs) == theirs


def test_no_two_tensors_of_ours_have_the_same_official_name():
    for variant in ("image", "temporal"):
        listed = [part for name in full_size_shapes(variant) for part in names.official(name).theirs]
        assert len(listed) == len(set(listed))


# ---- Files of every format, at tiny size ---------------------------------------------------------

@cache
def module_dict(variant: str) -> dict[str, torch.Tensor]:
    """What an official checkpoint holds: formula weights under the official names, position_ids among them."""
    keys = {name: entry["shape"] for name, entry in golden("weights_check.json").items()}
    if variant == "temporal":
        keys |= {name: entry["shape"] for name, entry in golden("temporal/extra_weights_check.json").items()}
    if variant == "stage1":
        keys = {name.replace("controlnet.nets.1.", "controlnet."): shape for name, shape in keys.items()
                if not name.startswith("controlnet.nets.0.")}
    return {name: torch.arange(shape[1])[None] if name == names.POSITION_IDS else weight(name, shape)
            for name, shape in keys.items()}


def write_sd_folder(folder, spelling="old", file="safetensors", position_ids=True):
    """The official base folder at tiny size: config.json files and weights in either spelling and container."""
    official = module_dict("image")
    for component, prefix in names.DIFFUSERS_FOLDERS.items():
        (folder / component).mkdir(parents=True)
        settings = golden("config.json")[component]
        (folder / component / "config.json").write_text(json.dumps(settings))
        tensors = {names.vae_spelling(name, new=spelling == "new").removeprefix(prefix): tensor
                   for name, tensor in official.items()
                   if name.startswith(prefix) and (position_ids or name != names.POSITION_IDS)}
        stem = {"image_encoder": {"safetensors": "model", "bin": "pytorch_model"}}.get(component, {}).get(
            file, "diffusion_pytorch_model")
        path = folder / component / f"{stem}.{file}"
        save_file(tensors, path) if file == "safetensors" else torch.save(tensors, path)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(golden("config.json")["scheduler"]))
    return folder


def write_checkpoint(path, variant="image", dtype=torch.float32):
    """As DeepSpeed writes it: everything in `dtype` but CLIP, beside things that are no weights."""
    module = {name: tensor.to(dtype) if tensor.is_floating_point() and not name.startswith("clip_") else tensor
              for name, tensor in module_dict(variant).items()}
    torch.save({"module": module, "global_steps": 1999, "optimizer": None, "ds_version": "0.6.5",
                "ds_config": {"train_batch_size": 8}}, path)
    return path


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_sd_folder(tmp_path_factory.mktemp("base") / "sd")


def quiet(*paths, **options) -> DisCo:
    return loading.load(*paths, say=lambda line: None, **options)


def assert_same_weights(one: DisCo, other: DisCo):
    assert_same_tensors(one.state_dict(), other.state_dict())


def assert_same_tensors(one: dict, other: dict):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("variant", ["stage1", "image", "temporal"])
def test_a_disco_checkpoint_gives_the_model_of_the_goldens(sd, tmp_path, variant):
    loaded = quiet(sd, write_checkpoint(tmp_path / "mp_rank_00_model_states.pt", variant))
    assert loaded.config == model(variant).config
    assert_same_weights(loaded, model(variant))


def test_a_checkpoint_in_half_precision_gives_rounded_weights_and_whole_clip(sd, tmp_path):
    loaded = quiet(sd, write_checkpoint(tmp_path / "half.pt", dtype=torch.float16), dtype=None)
    assert loaded.unet.conv_out.weight.dtype == torch.float16
    assert loaded.clip.vision.conv1.weight.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_out.weight, model("image").unet.conv_out.weight.half())


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("file", ["safetensors", "bin"])
@pytest.mark.parametrize("position_ids", [True, False])
def test_all_ways_to_write_the_base_folder_mean_the_same(tmp_path, spelling, file, position_ids):
    loaded = quiet(write_sd_folder(tmp_path / "sd", spelling, file, position_ids))
    for net in ("unet", "vae", "clip.vision"):
        assert_same_tensors(loaded.get_submodule(net).state_dict(), model("image").get_submodule(net).state_dict())


def write_compvis(path, extra=None):
    """The base model's UNet and VAE as Stable Diffusion's .ckpt has them."""
    official = module_dict("image")
    state = {}
    for prefix, network, table in (("model.diffusion_model.", "unet.", COMPVIS["unet"]),
                                   ("first_stage_model.", "vae.", COMPVIS["vae"])):
        for name, (theirs, *_) in table.items():
            if (tensor := official.get(network + theirs)) is None:
                continue                                                 # the tiny model is narrower: fewer shortcuts
            attention = network == "vae." and ".attn_1." in name and tensor.ndim == 2
            state[prefix + name] = tensor[..., None, None] if attention else tensor
    state |= {"betas": torch.ones(1000), "model_ema.decay": torch.ones(()), "cond_stage_model.x": torch.ones(2)}
    state |= extra or {}
    torch.save({"state_dict": state, "global_step": 470000, "pytorch-lightning_version": "1.4.2"}, path)
    return path


def test_compvis_and_diffusers_files_of_the_same_weights_give_the_same_model(sd, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "image_encoder").symlink_to(sd / "image_encoder")
    settings = [f"--unet.{key}={value}" for key, value in (("heads", 4), ("groups", 8))] + ["--vae.groups=8"]
    loaded = quiet(tmp_path / "clip", write_compvis(tmp_path / "sd.ckpt"), overrides=settings)
    assert_same_weights(loaded, quiet(sd))


def test_compvis_extras_are_dropped_by_name(tmp_path):
    found = weights.open_weights(write_compvis(tmp_path / "sd.ckpt"))
    assert sorted(found.dropped) == ["betas", "cond_stage_model.x", "model_ema.decay"]
    assert found.variant == "base" and found.kind == "CompVis"


# ---- Export ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("variant", ["stage1", "image", "temporal"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_export_after_import_is_the_identity_for_disco_checkpoints(sd, tmp_path, variant, suffix):
    official = module_dict(variant)
    loaded = quiet(sd, write_checkpoint(tmp_path / "in.pt", variant))
    weights.write_disco(tmp_path / f"out{suffix}", loaded.state_dict(), loaded.config)
    out = tmp_path / f"out{suffix}"
    back = unpickle.load(out)["module"] if suffix == ".pt" else load_file(out)
    assert_same_tensors(back, official)


@pytest.mark.parametrize("old_names", [True, False])
def test_export_after_import_is_the_identity_for_the_base_folder(tmp_path, old_names):
    source = write_sd_folder(tmp_path / "in", "old" if old_names else "new", position_ids=old_names)
    loaded = quiet(source)
    weights.write_diffusers(tmp_path / "out", loaded.state_dict(), loaded.config, old_names)
    for component in names.DIFFUSERS_FOLDERS:
        (path,) = (source / component).glob("*.safetensors")
        assert_same_tensors(load_file(tmp_path / "out" / component / path.name), load_file(path))


def test_the_exported_config_json_says_what_the_official_one_says(sd, tmp_path):
    loaded = quiet(sd)
    weights.write_diffusers(tmp_path / "out", loaded.state_dict(), loaded.config)
    for component, wanted in golden("config.json").items():
        if component in names.DIFFUSERS_FOLDERS:
            ours = json.loads((tmp_path / "out" / component / "config.json").read_text())
            assert {key: wanted[key] for key in ours} == ours


def test_zero_snr_survives_a_diffusers_folder_and_is_what_diffusers_makes_of_it():
    config = model("image").config
    config = replace(config, diffusion=replace(config.diffusion, prediction="v", zero_snr=True))
    files = sizes.to_config_json(config)
    assert sizes.from_config_json(files)["diffusion"] == to_dict(config.diffusion)
    theirs = diffusers.DDIMScheduler.from_config(files["scheduler"]).alphas_cumprod
    assert (theirs - diffusion.alpha_bars(config.diffusion)).abs().max() < 1e-6


@pytest.mark.parametrize("variant", ["stage1", "image", "temporal"])
def test_our_folder_comes_back_as_it_was_written(tmp_path, variant):
    weights.write_folder(tmp_path / "ours", model(variant).state_dict(), model(variant).config)
    loaded = quiet(tmp_path / "ours")
    assert loaded.config == model(variant).config
    assert_same_weights(loaded, model(variant))


def test_a_folder_in_parts_is_the_whole_model(tmp_path):
    net, limit = model("image"), weights.HEADER + 1_000_000
    weights.write_folder(tmp_path / "ours", net.state_dict(), net.config, at_most=limit)
    parts = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(parts) > 2 and parts[-1].name == f"model-{len(parts):05}-of-{len(parts):05}.safetensors"
    assert all(part.stat().st_size <= limit for part in parts)
    again = loading.load(tmp_path / "ours", say=print)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())
    parts[1].unlink()
    with pytest.raises(InputError, match="copy the others beside it"):
        loading.load(tmp_path / "ours", say=print)


def test_our_folder_keeps_what_shapes_do_not_tell(tmp_path):
    odd = build("image", tokens="global", uncond="clip-zero")
    weights.write_folder(tmp_path / "ours", odd.state_dict(), odd.config)
    assert quiet(tmp_path / "ours").config == odd.config


def test_diffusers_opens_our_folder_and_computes_the_same(sd, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    loaded = quiet(sd)
    weights.write_diffusers(tmp_path / "out", loaded.state_dict(), loaded.config)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet").eval()
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", subfolder="vae").eval()
    clip = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "out" / "image_encoder").eval()
    scheduler = diffusers.PNDMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    z, t, tokens = given("latents"), given("timesteps"), given("tokens")
    with torch.no_grad():
        close = torch.testing.assert_close
        close(loaded.unet(z, t, tokens), unet(z, t, tokens).sample, rtol=1e-5, atol=1e-5)
        close(loaded.vae.encode(given("background")).mean, vae.encode(given("background")).latent_dist.mean,
              rtol=1e-5, atol=1e-5)
        close(loaded.vae.decode(z), vae.decode(z).sample, rtol=1e-5, atol=1e-5)
        close(loaded.clip.vision(given("clip_image"))[0][:, 0], clip(given("clip_image")).image_embeds,
              rtol=1e-5, atol=1e-5)
    close(loaded.alpha_bars(), scheduler.alphas_cumprod)


# ---- One model started from another --------------------------------------------------------------------

def test_a_base_model_alone_starts_controlnets_as_copies_that_change_nothing(sd):
    fresh = quiet(sd)
    z, t, tokens = given("latents"), given("timesteps"), given("tokens")
    with torch.no_grad():
        shown = fresh(z, t, Conditions(tokens, given("pose"), given("bg_latents")))
        assert torch.equal(shown, fresh.unet(z, t, tokens))
    for net in (fresh.pose, fresh.background):
        assert_same_tensors(net.encoder.state_dict(), fresh.unet.encoder.state_dict())
        assert net.encoder.conv_in.weight.data_ptr() != fresh.unet.encoder.conv_in.weight.data_ptr()


def test_a_fresh_background_hint_and_token_projection_start_as_the_official_ones(sd):
    fresh = quiet(sd)
    assert torch.equal(fresh.background.hint.conv_in.weight, fresh.unet.encoder.conv_in.weight)
    assert torch.equal(fresh.clip.proj.weight, fresh.clip.vision.proj.T)


def test_starting_controlnets_in_place_is_what_loading_a_base_model_does(sd):
    fresh, filled = quiet(sd), build("image")
    filled.start_controlnets()
    for part in ("pose.encoder", "background.encoder", "background.hint"):
        assert_same_tensors(filled.get_submodule(part).state_dict(), fresh.get_submodule(part).state_dict())


def test_stage_one_into_an_image_model_leaves_the_pose_net_a_copy_of_the_base(sd, tmp_path):
    # The official loader: 1310 tensors are taken, and the 338 of the pose net keep the base model's start.
    checkpoint = torch.load(write_checkpoint(tmp_path / "stage1.pt", "stage1"), weights_only=True)
    checkpoint["module"]["unet.conv_in.weight"] += 1                     # stage 1 has trained the UNet
    torch.save(checkpoint, tmp_path / "stage1.pt")
    joined = quiet(sd, tmp_path / "stage1.pt", variant="image")
    base = quiet(sd)
    assert torch.equal(joined.unet.encoder.conv_in.weight, base.unet.encoder.conv_in.weight + 1)
    assert torch.equal(joined.pose.encoder.conv_in.weight, base.unet.encoder.conv_in.weight)
    assert_same_tensors(joined.background.state_dict(), model("stage1").background.state_dict())


def test_an_image_model_into_video_starts_with_temporal_layers_that_add_nothing(sd, tmp_path):
    video = quiet(sd, write_checkpoint(tmp_path / "image.pt"), variant="temporal")
    assert video.config.unet.temporal
    image = model("image").state_dict()
    for name, tensor in video.state_dict().items():
        if name in image:
            assert torch.equal(tensor, image[name]), name
        elif ".temporal.conv." in name or ".temporal.out." in name:
            assert not tensor.any(), name


def test_fresh_parts_are_drawn_from_the_seed(sd):
    one, same, other = (quiet(sd, variant="temporal", seed=seed).state_dict() for seed in (1, 1, 2))
    name = "unet.encoder.mid.attn.0.block.temporal.qkv.weight"
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])


def test_a_base_model_can_be_started_without_a_projection_of_its_own(sd):
    assert quiet(sd, overrides=["--tokens=global"]).clip.proj is None


def test_a_background_net_of_pixels_is_recognised_by_its_tensors(sd, tmp_path):
    pixels = DisCo(replace(model("image").config, background=model("image").config.pose)).eval()
    weights.write_disco(tmp_path / "pixels.pt", pixels.state_dict(), pixels.config)
    loaded = quiet(sd, tmp_path / "pixels.pt")
    assert loaded.config.background.hint == "pixels"
    assert_same_weights(loaded, pixels)


def test_a_checkpoint_without_the_trained_projection_uses_clips_own(sd, tmp_path):
    own = build("image", tokens="local-clip")
    weights.write_disco(tmp_path / "own.pt", own.state_dict(), own.config)
    assert quiet(sd, tmp_path / "own.pt").config.tokens == "local-clip"


# ---- What does not fit -------------------------------------------------------------------------------------

def spoiled(tmp_path, change) -> str:
    checkpoint = torch.load(write_checkpoint(tmp_path / "bad.pt"), weights_only=True)
    change(checkpoint["module"])
    torch.save(checkpoint, tmp_path / "bad.pt")
    return tmp_path / "bad.pt"


def error_of(*paths, **options) -> str:
    with pytest.raises(InputError) as caught:
        quiet(*paths, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_tensor_is_named(sd, tmp_path):
    name = "controlnet.nets.0.mid_block.resnets.0.conv1.weight"
    message = error_of(sd, spoiled(tmp_path, lambda module: module.pop(name)))
    assert "1 missing" in message and name in message


def test_a_surplus_tensor_is_named(sd, tmp_path):
    message = error_of(sd, spoiled(tmp_path, lambda module: module.update({"unet.extra.weight": torch.ones(2)})))
    assert "1 unexpected (unet.extra.weight)" in message


def test_a_misshapen_tensor_is_named_with_both_shapes(sd, tmp_path):
    message = error_of(sd, spoiled(tmp_path, lambda module: module.update(
        {"unet.conv_out.weight": torch.ones(4, 31, 3, 3)})))
    assert "1 misshapen (unet.conv_out.weight [4, 31, 3, 3] instead of [4, 32, 3, 3])" in message


def test_a_compvis_tensor_that_no_rule_names_is_refused(sd, tmp_path):
    path = write_compvis(tmp_path / "sd.ckpt", {"control_model.weight": torch.ones(2)})
    assert "1 unexpected (control_model.weight)" in error_of(sd, path)


def test_at_most_ten_names_of_each_kind_are_listed(sd, tmp_path):
    extra = {f"unet.extra.{i}": torch.ones(1) for i in range(12)}
    message = error_of(sd, spoiled(tmp_path, lambda module: module.update(extra)))
    assert "12 unexpected" in message and message.count("unet.extra.") == 10 and message.rstrip(")").endswith("…")


def test_a_missing_tensor_that_tells_a_size_is_named(sd, tmp_path):
    message = error_of(sd, spoiled(tmp_path, lambda module: module.pop(
        "controlnet.nets.0.controlnet_cond_embedding.blocks.3.weight")))
    assert "controlnet_cond_embedding" in message


def test_a_tensor_with_another_number_of_axes_that_tells_a_size_is_named(sd, tmp_path):
    message = error_of(sd, spoiled(tmp_path, lambda module: module.update({"unet.conv_in.weight": torch.ones(3)})))
    assert "unet.conv_in.weight has the shape [3]; expected 4 axes" in message


def test_something_that_is_no_tensor_among_the_weights_is_named(sd, tmp_path):
    message = error_of(sd, spoiled(tmp_path, lambda module: module.update({"unet.extra": "text"})))
    assert "'unet.extra' holds str instead of a plain tensor" in message


def test_float8_weights_are_refused(sd, tmp_path):
    bad = spoiled(tmp_path, lambda module: module.update(
        {"unet.conv_out.weight": module["unet.conv_out.weight"].to(torch.float8_e4m3fn)}))
    assert "float8_e4m3fn; expected float32, float16 or bfloat16" in error_of(sd, bad)


def test_a_folder_without_config_json_is_refused(tmp_path):
    folder = write_sd_folder(tmp_path / "sd")
    (folder / "vae" / "config.json").unlink()
    assert "vae/config.json is not there" in error_of(folder)


def test_a_config_json_that_contradicts_the_tensors_is_refused(tmp_path):
    folder = write_sd_folder(tmp_path / "sd")
    settings = golden("config.json")["unet"] | {"use_linear_projection": True}
    (folder / "unet" / "config.json").write_text(json.dumps(settings))
    assert "use_linear_projection is True; the weights and this code have False" in error_of(folder)


@pytest.mark.parametrize("held, wanted", [("image", "stage1"), ("temporal", "image")])
def test_a_file_that_holds_more_than_the_wanted_model_is_refused(sd, tmp_path, held, wanted):
    message = error_of(sd, write_checkpoint(tmp_path / "x.pt", held), variant=wanted)
    assert f"holds the model {held}; it cannot be read as {wanted}" in message


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    torch.save({"layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "resnet.pt")
    assert "is of another network" in error_of(tmp_path / "resnet.pt")


def test_a_base_model_without_an_image_encoder_is_refused(tmp_path):
    assert "no weights of clip_image_encoder" in error_of(write_compvis(tmp_path / "sd.ckpt"))


def test_packed_matrices_of_our_own_files_are_not_copied():
    ours = model("image").state_dict()
    back = weights.to_ours(weights.to_official(ours), {key: tensor.shape for key, tensor in ours.items()})
    for key, tensor in ours.items():
        assert torch.equal(back[key], tensor)
        assert back[key].data_ptr() == tensor.data_ptr() or not key.endswith(("qkv.weight", "kv.weight"))


# ---- Files seen as memory ------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells which memory is of a file")
def test_opening_a_file_reads_none_of_its_tensors(tmp_path):
    wanted = {f"unet.{i}": torch.randn(2**19) for i in range(32)}
    save_file(wanted, tmp_path / "a.safetensors")
    weights.read_tensors(tmp_path / "a.safetensors")                     # what opening itself needs is in memory now
    before = memory_of_files()
    tensors = weights.read_tensors(tmp_path / "a.safetensors")
    assert memory_of_files() - before < 2**17                            # each that is looked at brings 2^16 and more
    assert_same_tensors(tensors, wanted)
    assert memory_of_files() - before > 2**24


def test_tensors_that_do_not_lie_at_a_multiple_of_their_size_are_read_too(tmp_path):
    path, wanted = tmp_path / "a.safetensors", {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(),
                                                "c": torch.arange(4), "d": torch.empty(0, 4), "e": torch.tensor(2.5)}
    save_file(wanted, path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header, numbers = path.read_bytes()[8:8 + length].rstrip(), path.read_bytes()[8 + length:]
    for spaces in range(9):
        path.write_bytes((len(header) + spaces).to_bytes(8, "little") + header + b" " * spaces + numbers)
        assert_same_tensors(weights.read_tensors(path), wanted)


def test_what_is_done_to_a_tensor_of_a_file_leaves_the_file_alone(tmp_path):
    save_file({"a": torch.zeros(5)}, tmp_path / "a.safetensors")
    weights.read_tensors(tmp_path / "a.safetensors")["a"].add_(1)
    assert load_file(tmp_path / "a.safetensors")["a"].sum() == 0
