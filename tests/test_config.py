"""Configuration: a file says all of it, and a wrong file is refused in one line that helps."""
from pathlib import Path

import pytest
import yaml

from nanodisco.config import ClipConfig, DiffusionConfig, ModelConfig, from_dict, load, override, read_yaml, to_dict
from nanodisco.errors import InputError

FILES = sorted((Path(__file__).parent.parent / "config" / "model").glob("*.yaml"))

TINY = yaml.safe_load("""
unet: {channels: 4, widths: [8, 16], attention: [true, false], layers: 1, heads: 2, context: 12, groups: 4}
vae: {channels: 4, widths: [8, 8, 16], layers: 1, groups: 4, scaling: 0.5}
clip: {image_size: 24, patch: 8, width: 32, layers: 2, heads: 4, mlp: 96, projection: 20}
diffusion: {steps: 1000, schedule: scaled_linear, beta_start: 0.00085, beta_end: 0.012}
pose: {hint: pixels, channels: 3, widths: [4, 6, 8]}
background: {hint: latents, channels: 4}
""")


def tiny(*arguments) -> ModelConfig:
    return from_dict(ModelConfig, override(TINY, list(arguments)))


def assert_refused(message, call, *arguments):
    """By an InputError of one line with all of these words in it."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    for words in [message] if isinstance(message, str) else message:
        assert words in str(caught.value)


# ---- In and out ----------------------------------------------------------------------------------

CHANGES = [[], ["--pose=null", "--unet.temporal=true"],
           ["--background=null", "--tokens=local-clip", "--clip.projection=12"],
           ["--diffusion.prediction=v", "--diffusion.zero_snr=true", "--diffusion.beta_start=1e-4"]]


@pytest.mark.parametrize("changes", CHANGES, ids=" ".join)
def test_written_as_yaml_and_read_again_a_config_is_the_same(changes, tmp_path):
    config, file = tiny(*changes), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert load(file) == config
    assert to_dict(load(file)) == read_yaml(file)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_of_this_repository_is_read_and_written_unchanged(file):
    config = load(file)
    assert from_dict(ModelConfig, to_dict(config)) == config
    written, given = to_dict(config), read_yaml(file)
    assert {group: {key: written[group][key] for key in values} if isinstance(values, dict) else written[group]
            for group, values in given.items()} == given


def test_there_is_a_file_to_read():
    assert FILES


@pytest.mark.parametrize("value", ["0.0001", "1e-4", "'1e-4'", "1.0e-4"])
def test_a_small_float_may_be_written_in_any_way(value):
    assert tiny(f"--diffusion.beta_start={value}").diffusion.beta_start == 1e-4


def test_an_integer_will_do_for_a_float():
    scaling = tiny("--vae.scaling=1").vae.scaling
    assert scaling == 1 and isinstance(scaling, float)


def test_lists_become_tuples_so_that_a_config_can_be_hashed():
    assert tiny().unet.widths == (8, 16)
    assert hash(tiny()) == hash(tiny())


def test_what_is_left_out_has_its_default():
    config = tiny("--diffusion={steps: 1000, schedule: cosine}")
    assert (config.diffusion, config.clip.activation, config.tokens, config.unet.temporal) == (
        DiffusionConfig(1000, "cosine", None, None, "epsilon", False), "quick_gelu", "local", False)
    unhinted = from_dict(ModelConfig, {key: TINY[key] for key in TINY if key not in ("pose", "background")})
    assert unhinted.pose is None and unhinted.background is None


def test_derived_sizes():
    assert tiny().vae.factor == 4
    assert ClipConfig(224, 14, 1024, 24, 16, 4096, 768).tokens == 257


# ---- Overrides -----------------------------------------------------------------------------------

def test_override_sets_one_value_and_leaves_the_given_dict_alone():
    before = yaml.safe_dump(TINY)
    changed = override(TINY, ["--unet.heads=4", "--unet.widths=[4, 8]"])
    assert (changed["unet"]["heads"], changed["unet"]["widths"]) == (4, [4, 8])
    assert changed["unet"] | {"heads": 2, "widths": [8, 16]} == TINY["unet"]
    assert yaml.safe_dump(TINY) == before


def test_the_last_override_wins():
    assert override({}, ["--a.b=1", "--a.b=2"]) == {"a": {"b": 2}}


def test_override_may_hold_an_equals_sign():
    assert override({}, ["--name=a=b"]) == {"name": "a=b"}


@pytest.mark.parametrize("argument, message", [
    ("unet.heads=4", "expected --group.key=value"), ("--unet.heads", "expected --group.key=value"),
    ("--unet.heads=[1", "as YAML"), ("--unet.heads.left=1", "'heads' is a value, not a group of keys")])
def test_an_override_that_cannot_be_read_is_refused(argument, message):
    assert_refused(message, override, TINY, [argument])


# ---- Refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("argument, message", [
    ("--unet.width=[8]", ["unknown key unet.width", "did you mean 'widths'?"]),
    ("--unett=1", ["unknown key unett", "did you mean 'unet'?"]),
    ("--pose.hnit=pixels", ["unknown key pose.hnit", "did you mean 'hint'?"]),
    ("--vae.zzz=1", ["unknown key vae.zzz", "expected one of channels, widths, layers, groups, scaling"])])
def test_unknown_key_is_refused_with_the_nearest_name(argument, message):
    assert_refused(message, tiny, argument)


@pytest.mark.parametrize("argument, message", [
    ("--unet.heads=two", "unet.heads is 'two'; expected int"),
    ("--unet.heads=2.0", "unet.heads is 2.0; expected int"),
    ("--unet.heads=true", "unet.heads is True; expected int"),
    ("--unet.heads=null", "unet.heads is None; expected int"),
    ("--unet.temporal=1", "unet.temporal is 1; expected bool"),
    ("--unet.widths=8", "unet.widths is 8; expected a list of int"),
    ("--unet.widths=[8, x]", "unet.widths is 'x'; expected int"),
    ("--vae.scaling=big", "vae.scaling is 'big'; expected float"),
    ("--tokens=3", "tokens is 3; expected str"),
    ("--unet=4", "unet is 4; expected keys and values")])
def test_wrong_type_is_refused_with_the_expected_one(argument, message):
    assert_refused(message, tiny, argument)


@pytest.mark.parametrize("group, key", [("unet", "heads"), ("vae", "widths"), ("clip", "projection"), ("pose", "hint")])
def test_missing_key_is_refused_by_name(group, key):
    values = TINY | {group: {name: value for name, value in TINY[group].items() if name != key}}
    assert_refused(f"missing key {group}.{key}", from_dict, ModelConfig, values)


@pytest.mark.parametrize("arguments, message", [
    (["--unet.attention=[true]"], "unet.attention has 1 entries, unet.widths 2"),
    (["--unet.widths=[8, 18]"], "unet.widths 18 is not divisible by unet.groups 4"),
    (["--unet.heads=3"], "unet.widths 8 is not divisible by unet.heads 3"),
    (["--vae.widths=[8, 8, 18]"], "vae.widths 18 is not divisible by vae.groups 4"),
    (["--vae.channels=8"], "unet.channels is 4, but the VAE's latent has 8"),
    (["--clip.heads=5"], "clip.width 32 is not divisible by clip.heads 5"),
    (["--clip.patch=7"], "clip.image_size 24 is not divisible by clip.patch 7"),
    (["--clip.activation=relu"], "clip.activation is 'relu'; expected one of quick_gelu, gelu"),
    (["--tokens=all"], "tokens is 'all'; expected one of local, local-clip, global"),
    (["--uncond=none"], "uncond is 'none'; expected one of zeros, clip-zero"),
    (["--diffusion.schedule=sine"], "diffusion.schedule is 'sine'; expected one of scaled_linear, linear, cosine"),
    (["--diffusion.prediction=x0"], "diffusion.prediction is 'x0'; expected one of epsilon, v"),
    (["--diffusion.zero_snr=true"], "diffusion.zero_snr needs diffusion.prediction: v"),
    (["--tokens=global"], "unet.context is 12, but tokens=global have CLIP's width 20"),
    (["--tokens=local-clip"], "unet.context is 12, but tokens=local-clip have CLIP's width 20"),
    (["--pose.hint=depth"], "pose.hint is 'depth'; expected one of pixels, latents"),
    (["--background.hint=pixel"], "background.hint is 'pixel'; expected one of pixels, latents"),
    (["--pose.widths=[4, 6]"], "pose.widths has 2 entries, the first at full size"),
    (["--pose.hint=latents", "--pose.widths=[]"], "pose.hint is 'latents'; expected 'pixels'"),
    (["--background.channels=5"], "background.channels is 5, but the VAE's latent has 4"),
    (["--unet.groups=0"], "unet.groups holds 0; expected more than 0"),
    (["--unet.widths=[8, -8]"], "unet.widths holds -8; expected more than 0"),
    (["--unet.widths=[]", "--unet.attention=[]"], "unet.widths is empty"),
    (["--unet.widths=[9, 16]", "--unet.groups=1", "--unet.heads=1"], "unet.widths begins with 9"),
    (["--clip.patch=0"], "clip.patch holds 0; expected more than 0"),
    (["--vae.scaling=.nan"], "vae.scaling holds nan; expected more than 0"),
    (["--diffusion.steps=0"], "diffusion.steps holds 0; expected more than 0"),
    (["--diffusion.beta_end=2"], "diffusion.beta_start to beta_end is 0.00085 to 2.0; expected 0 <"),
    (["--background.hint=pixels"], "background.widths has 0 entries, the first at full size")])
def test_sizes_that_do_not_fit_together_are_refused(arguments, message):
    assert_refused(message, tiny, *arguments)


@pytest.mark.parametrize("content, message", [
    (None, "is not there"), (b"", "holds no keys"), (b"- 1\n- 2\n", "holds no keys"),
    (b"unet: [1\nvae: 2\n", "is not YAML (line 2)"), (b"\xff\xfe\x00", "cannot be read"),
    (b"unett: 1\n", "did you mean 'unet'?")], ids=["absent", "empty", "list", "broken", "binary", "unknown key"])
def test_a_file_that_cannot_be_used_is_refused_by_name(content, message, tmp_path):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    assert_refused([str(file), message], load, file)


def test_a_folder_is_not_taken_for_a_file(tmp_path):
    assert_refused([str(tmp_path), "is a folder"], load, tmp_path)
