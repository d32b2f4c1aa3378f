"""python -m nanodisco.convert: what a user types, sees, and gets for bad input."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from formula import model
from nanodisco import convert, loading, weights
from nanodisco.config import to_dict
from nanodisco.errors import run
from test_weights import (assert_same_tensors, assert_same_weights, quiet, write_checkpoint, write_compvis,
                          write_sd_folder)

NANO = Path(__file__).parent.parent / "weights" / "nano"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return write_sd_folder(tmp_path_factory.mktemp("base") / "sd")


@pytest.fixture
def refused(capsys, tmp_path):
    """Run the command line in this process; it must end with 2 and one line, and leave nothing behind."""
    def call(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as ended:
            run(lambda: convert.main([str(argument) for argument in arguments]))
        assert ended.value.code == 2
        assert sorted(tmp_path.rglob("*")) == before
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error
    return call


def test_import_and_export_by_command_line_lose_nothing(sd, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "mp_rank_00_model_states.pt")
    convert.main(["import", str(sd), str(checkpoint), "--out", str(tmp_path / "ours")])
    assert_same_weights(quiet(tmp_path / "ours"), model("image"))
    convert.main(["export", str(tmp_path / "ours"), "--to", "disco", "--out", str(tmp_path / "back.pt")])
    assert_same_tensors(*(torch.load(path, weights_only=True)["module"] for path in (tmp_path / "back.pt", checkpoint)))


def test_import_takes_any_field_of_the_configuration(sd, tmp_path):
    convert.main(["import", str(sd), "--out", str(tmp_path / "ours"), "--uncond=clip-zero", "--dtype", "fp16"])
    loaded = quiet(tmp_path / "ours", dtype=None)
    assert loaded.config.uncond == "clip-zero" and loaded.unet.conv_out.weight.dtype == torch.float16


def test_a_deepspeed_log_folder_is_opened_at_its_newest_tag(sd, tmp_path):
    (tmp_path / "log" / "1999.pth").mkdir(parents=True)
    write_checkpoint(tmp_path / "log" / "1999.pth" / "mp_rank_00_model_states.pt")
    (tmp_path / "log" / "latest").write_text("1999.pth\n")
    assert_same_weights(quiet(sd, tmp_path / "log"), model("image"))


def test_inspect_says_what_it_is_its_sizes_and_what_is_missing(tmp_path, capsys):
    convert.main(["inspect", str(write_checkpoint(tmp_path / "x.pt", "stage1", torch.float16))])
    said = capsys.readouterr().out
    assert "DisCo, attribute pre-training (stage 1) (under 'module', step 1999)" in said
    assert "684 tensors     3,222,692 values, float16" in said and "widths 32 64 64 64" in said
    assert "not used" in said and "position_ids (1)" in said
    assert "for sampling pictures" in said and "lacks pose ControlNet" in said


def test_inspect_says_which_model_the_tensors_fit(sd, tmp_path, capsys):
    convert.main(["inspect", str(sd)])
    said = capsys.readouterr().out
    assert "picture model, tokens local; to be started afresh: pose net, background net, token projection" in said
    weights.write_folder(tmp_path / "ours", model("temporal").state_dict(), model("temporal").config)
    convert.main(["inspect", str(tmp_path / "ours")])
    assert "fits                       video model (temporal layers), tokens local\n" in capsys.readouterr().out


def test_inspect_names_what_keeps_tensors_from_fitting(tmp_path, capsys):
    folder = write_sd_folder(tmp_path / "sd")
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    tensors["conv_in.odd"] = tensors.pop("conv_in.bias")
    save_file(tensors, folder / "unet" / "diffusion_pytorch_model.safetensors")
    convert.main(["inspect", str(folder)])
    said = capsys.readouterr().out
    assert "no model: " in said and "missing (unet.conv_in.bias" in said and "unexpected (unet.conv_in.odd" in said
    assert "complete" not in said


def test_whoever_may_read_new_files_may_read_written_weights(tmp_path):
    (tmp_path / "usual").touch()
    weights.write_folder(tmp_path / "ours", model("image").state_dict(), model("image").config)
    modes = {path.stat().st_mode for path in (tmp_path / "usual", *(tmp_path / "ours").iterdir())}
    assert len(modes) == 1


@pytest.mark.parametrize("write, kind", [
    (write_compvis, "CompVis, Stable Diffusion"), (write_sd_folder, "diffusers, Stable Diffusion"),
    (write_checkpoint, "DisCo, picture model")])
def test_inspect_tells_the_formats_apart(tmp_path, capsys, write, kind):
    convert.main(["inspect", str(write(tmp_path / "weights.ckpt"))])
    assert kind in capsys.readouterr().out


def test_what_started_afresh_and_what_was_assumed_is_said(sd, tmp_path, capsys):
    loading.load(sd)
    assert "pose net; started as a copy of the UNet's encoder" in capsys.readouterr().out
    settings = ["--unet.groups=8", "--vae.groups=8", "--clip.heads=4"]
    loading.load(write_checkpoint(tmp_path / "alone.pt"), overrides=settings)
    assert "taken from sd-image-variations.yaml: unet.heads 8, vae.scaling 0.18215" in capsys.readouterr().out


def test_help_answers_before_torch_is_imported():
    code = ("import sys; sys.argv = ['convert', '--help']\n"
            "from nanodisco import convert\n"
            "try: convert.main()\nexcept SystemExit: assert 'torch' not in sys.modules, 'torch was imported'")
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_reader_that_leaves_early_ends_it_quietly():
    inspect = subprocess.Popen([sys.executable, "-m", "nanodisco.convert", "inspect", str(NANO)],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=NANO.parent.parent)
    inspect.stdout.close()
    assert (inspect.communicate()[1], inspect.returncode) == (b"", 141)


def test_a_configuration_file_fills_in_what_the_files_do_not_say(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(to_dict(model("image").config)))
    loaded = quiet(write_checkpoint(tmp_path / "alone.pt"), config=tmp_path / "tiny.yaml")
    assert loaded.config == model("image").config


# ---- Bad input -----------------------------------------------------------------------------------------

def test_a_file_that_is_not_there(refused, tmp_path):
    assert "is not there" in refused("inspect", tmp_path / "nothing.pt")


def test_an_empty_file(refused, tmp_path):
    (tmp_path / "empty.pt").touch()
    assert "is empty" in refused("inspect", tmp_path / "empty.pt")


def test_an_empty_folder(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no weights; expected" in refused("inspect", tmp_path / "empty")


@pytest.mark.parametrize("name", ["x.pt", "x.ckpt", "x.bin", "x.safetensors"])
def test_a_text_file_named_like_weights(refused, tmp_path, name):
    (tmp_path / name).write_text("these are not weights, " * 9)
    assert "is not a whole" in refused("inspect", tmp_path / name)


def test_a_truncated_checkpoint(refused, tmp_path, sd):
    path = write_checkpoint(tmp_path / "x.pt")
    path.write_bytes(path.read_bytes()[:-5000])
    assert "download or copy it again" in refused("import", sd, path, "--out", tmp_path / "ours")


def test_a_truncated_safetensors_file(refused, tmp_path):
    folder = write_sd_folder(tmp_path / "sd")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])
    assert "is not a whole safetensors file" in refused("import", folder, "--out", tmp_path / "ours")


def test_a_checkpoint_of_the_wrong_variant(refused, tmp_path, sd):
    path = write_checkpoint(tmp_path / "x.pt", "temporal")
    assert "holds the model temporal" in refused("import", sd, path, "--as", "image", "--out", tmp_path / "ours")


def test_a_base_folder_without_weights(refused, tmp_path):
    folder = write_sd_folder(tmp_path / "sd")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no weights; expected diffusion_pytorch_model.safetensors" in refused("inspect", folder)


def test_a_config_json_that_is_not_json(refused, tmp_path):
    folder = write_sd_folder(tmp_path / "sd")
    (folder / "unet" / "config.json").write_text("{")
    assert "is not readable JSON" in refused("inspect", folder)


def test_an_output_that_is_already_there(refused, tmp_path, sd):
    (tmp_path / "ours").mkdir()
    assert "is already there" in refused("import", sd, "--out", tmp_path / "ours")


def test_a_field_that_does_not_exist(refused, tmp_path, sd):
    assert "did you mean 'heads'" in refused("import", sd, "--out", tmp_path / "ours", "--unet.head=4")


def test_a_video_model_for_diffusers(refused, tmp_path):
    weights.write_folder(tmp_path / "video", model("temporal").state_dict(), model("temporal").config)
    assert "which diffusers has no layout for" in refused("export", tmp_path / "video", "--to", "diffusers", "--out",
                                                          tmp_path / "out")


def test_a_vae_of_ours_for_diffusers(refused, tmp_path):
    assert "diffusers has no layout for" in refused("export", NANO, "--to", "diffusers", "--out", tmp_path / "out")


def test_a_size_of_files_that_makes_no_sense(refused, tmp_path, sd):
    assert "--at-most -1" in refused("import", sd, "--out", tmp_path / "ours", "--at-most", "-1")


def test_a_place_where_nothing_can_be_written(refused, tmp_path, sd):
    (tmp_path / "file").touch()
    assert "cannot write" in refused("import", sd, "--out", tmp_path / "file" / "ours")


def test_an_interrupted_export_leaves_nothing_behind_and_ends_with_130(monkeypatch, tmp_path, capsys):
    weights.write_folder(tmp_path / "in", model("image").state_dict(), model("image").config)

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(weights, "save_file", interrupted)
    command = ["export", str(tmp_path / "in"), "--to", "disco", "--out", str(tmp_path / "x.safetensors")]
    with pytest.raises(SystemExit) as ended:
        run(lambda: convert.main(command))
    assert ended.value.code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("out", ["ours", "out.pt", "out.safetensors", "sd"])
def test_a_full_disk_leaves_nothing_behind(monkeypatch, tmp_path, out):
    # A limit on the size of files makes writing fail as a full disk does; the limit holds in the child only.
    weights.write_folder(tmp_path / "in", model("image").state_dict(), model("image").config)
    verb = {"ours": ["import"], "sd": ["export", "--to", "diffusers"]}.get(out, ["export", "--to", "disco"])
    arguments = [verb[0], str(tmp_path / "in"), *verb[1:], "--out", str(tmp_path / out)]
    limit = "import resource, signal, sys, runpy; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.argv = sys.argv[1:]; " \
            "runpy.run_module('nanodisco.convert', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", limit, "convert", *arguments], capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "cannot write" in ended.stderr and ended.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
