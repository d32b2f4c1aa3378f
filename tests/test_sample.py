"""sample.py: golden runs through the command line, the same answer however it is asked for, and bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from formula import given, golden, model, uniform
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors.torch import save_file
from test_golden_sampling import IMAGE_RUNS

import prepare_data
import sample
from kernels.cpu import PackedLinear
from nanodisco import dance, tsv, video, weights
from nanodisco.errors import InputError
from nanodisco.layers import TimeEmbedding

ROOT = Path(__file__).parent.parent
RUNS = golden("image/end_to_end.safetensors")
SMALL = "-W 64 -H 64 --steps 3".split()


def png(path, pixels):
    """(3, H, W) in [0, 1] -> path"""
    Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)
    return str(path)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Official weights of the tiny model and pictures, as a user would have them."""
    place = tmp_path_factory.mktemp("place")
    net = model("image")
    weights.write_diffusers(place / "sd", net.state_dict(), net.config)
    weights.write_disco(place / "disco.pt", net.state_dict(), net.config)
    video_net = model("temporal")
    weights.write_folder(place / "video", video_net.state_dict(), video_net.config)
    weights.write_folder(place / "image", net.state_dict(), net.config)
    rng = np.random.default_rng(0)
    photo = rng.integers(0, 256, (80, 60, 4), dtype=np.uint8)
    photo[..., 3] = 0
    photo[20:70, 10:50, 3] = 255
    Image.fromarray(photo).save(place / "ref.png")
    (place / "poses").mkdir()
    for i in range(6):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(place / "poses" / f"{i}.png")
    return place


def run(place, tmp_path, *more, weights="image", ref="ref.png", poses="poses", out="out"):
    """-> the frames (F, H, W, 3) of one run of the command line"""
    out = tmp_path / out
    arguments = ["--weights", place / weights, "--ref", place / ref, "--poses", place / poses, "--out", out, *SMALL]
    sample.main([str(argument) for argument in (*arguments, *more)])
    return np.stack(list(video.read(out / "frames")))


def refusal(*arguments, **kwargs):
    with pytest.raises(InputError) as error:
        run(*arguments, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- Equal to the official program ---------------------------------------------------------------------

def golden_arguments(place, tmp_path, name, i):
    """Sample i of a golden run as files and flags."""
    case = IMAGE_RUNS[name]
    (tmp_path / "poses").mkdir()
    png(tmp_path / "poses" / "0.png", given("pose")[i])
    photo = torch.from_numpy((uniform("input:clip_image", (2, 3, 56, 56))[i] + 1) / 2)
    Image.new("L", (56, 56), 255).save(tmp_path / "mask.png")
    noise = {"latents": given("init_latents")[i:i + 1], "step_noise": given("ddpm_noise")[:, i:i + 1].contiguous()}
    if case.posterior:
        noise["background_noise"] = given("posterior_noise_background")[i:i + 1]
    save_file({key: tensor.clone() for key, tensor in noise.items()}, tmp_path / "noise.safetensors")
    return ["--sd", place / "sd", "--weights", place / "disco.pt", "--ref", png(tmp_path / "ref.png", photo),
            "--ref-mask", tmp_path / "mask.png", "--poses", tmp_path / "poses", "-W", 64, "-H", 64,
            "--background", png(tmp_path / "background.png", (given("background")[i] + 1) / 2), "--steps", case.steps,
            "--cfg", case.guidance, "--uncond", case.uncond, "--tokens", case.tokens, "--scheduler", case.scheduler,
            "--pose-scale", case.scales[0], "--background-scale", case.scales[1],
            "--latents", tmp_path / "noise.safetensors", "--out", tmp_path / "out"]


@pytest.mark.parametrize("i", [0, 1])
@pytest.mark.parametrize("name", IMAGE_RUNS)
def test_command_line_makes_the_official_frame_of_official_files(place, tmp_path, name, i):
    sample.main([str(argument) for argument in golden_arguments(place, tmp_path, name, i)])
    frame = next(video.read(tmp_path / "out" / "frames")).astype(float)
    wanted = ((RUNS[f"{name}.decoded_unclamped"][i] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy() * 255).round()
    assert np.abs(frame - wanted).max() <= 1


# ---- The same answer however it is asked for ----------------------------------------------------------------

def same(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_same_command_gives_the_same_bytes(place, tmp_path):
    for out in ("a", "b"):
        run(place, tmp_path, out=out)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")
                   if path.name != "settings.yaml")
    assert {path.name for path in files} >= {"video.mp4", "result.mp4", "000000.png", "000005.png"}
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_networks_in_two_threads_give_the_same_bytes(place, tmp_path, monkeypatch):
    monkeypatch.setattr("nanodisco.together.WIDE", 0)
    torch.set_num_threads(2)
    try:
        one, two = (run(place, tmp_path, out=out) for out in ("a", "b"))
    finally:
        torch.set_num_threads(1)
    assert np.array_equal(one, two)


def test_the_last_line_says_what_was_made_and_where(place, tmp_path, capsys):
    run(place, tmp_path, "-L", 2)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("2 frames of 64x64 in ") and line.endswith(f" s: {tmp_path / 'out'}")


@pytest.mark.parametrize("more", [["--batch", 1], ["--batch", 5], ["--no-cache"],
                                  ["--scheduler", "ddpm", "--batch", 1]])
def test_batch_size_and_cache_change_no_frame(place, tmp_path, more):
    scheduler = more[:2] if more[0] == "--scheduler" else []
    assert same(run(place, tmp_path, *scheduler, out="a"), run(place, tmp_path, *more, out="b"))


def test_another_batch_or_length_or_no_cache_changes_nothing_beyond_rounding(place, tmp_path, monkeypatch):
    made, pictures = {}, dance._pictures

    def noted(model, z):
        for piece in pictures(model, z):
            made[name].append(piece)
            yield piece
    monkeypatch.setattr(dance, "_pictures", noted)
    for name, more in ("all", ["--batch", "6"]), ("ones", ["--batch", "1"]), ("fewer", ["--batch", "4", "-L", "5"]), (
            "uncached", ["--batch", "6", "--no-cache"]):
        made[name] = []
        run(place, tmp_path, *more, "--dtype", "fp32", out=name)
        made[name] = torch.cat(made[name])
    assert (made["ones"] - made["all"]).abs().max() <= 1e-5 and len(made["fewer"]) == 5
    assert (made["fewer"] - made["all"][:5]).abs().max() <= 1e-5
    assert (made["uncached"] - made["all"]).abs().max() <= 1e-5


@pytest.mark.skipif(torch.cuda.is_available(), reason="in a CUDA graph the time is embedded anew")
@pytest.mark.parametrize("scheduler, rows", [("ddim", 3), ("pndm", 4), ("ddpm", 3), ("dpm++", 3)])
def test_the_steps_of_a_run_are_embedded_at_once(place, tmp_path, monkeypatch, scheduler, rows):
    embedded, forward = [], TimeEmbedding.forward

    def noted(self, t):
        embedded.append(len(t))
        return forward(self, t)
    monkeypatch.setattr(TimeEmbedding, "forward", noted)
    run(place, tmp_path, "--scheduler", scheduler, "--batch", 2)
    assert embedded == [rows] * 3                                        # of the UNet and of both ControlNets


def test_memory_that_is_too_small_is_one_line(place, tmp_path, monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    monkeypatch.setattr(dance, "_run", full)
    assert "a smaller --batch" in refusal(place, tmp_path)


def test_compiled_networks_make_the_same_frames(place, tmp_path, monkeypatch):
    """By torch.compile's front end alone: its back end takes minutes, and refuses packed layers."""
    compiler, ran = torch.compile, []

    def compile(function, dynamic):
        ran.append(function)
        return compiler(function, dynamic=dynamic, backend="eager")
    monkeypatch.setattr(torch, "compile", compile)
    usual, compiled = run(place, tmp_path), run(place, tmp_path, "--compile", out="compiled")
    assert np.abs(usual.astype(int) - compiled).max() <= 1
    assert ran and not [part for part in ran[0].__self__.model.modules() if isinstance(part, PackedLinear)]


def test_fewer_frames_are_the_first_of_more(place, tmp_path):
    few = run(place, tmp_path, "-L", 3, out="a")
    assert len(few) == 3 and same(few, run(place, tmp_path, out="b")[:3])


def test_another_seed_gives_other_frames_and_each_frame_its_own_noise(place, tmp_path):
    one = run(place, tmp_path, out="a")
    assert not same(one, run(place, tmp_path, "--seed", 7, out="b"))
    for file in (place / "poses").iterdir():                             # all poses alike: only the noise differs
        (tmp_path / "poses").mkdir(exist_ok=True)
        (tmp_path / "poses" / file.name).write_bytes((place / "poses" / "0.png").read_bytes())
    frames = run(place, tmp_path, poses=tmp_path / "poses", out="c")
    assert not same(frames[0], frames[1])
    frames = run(place, tmp_path, "--noise", "shared", poses=tmp_path / "poses", out="d")
    assert same(frames[0], frames[1])


def test_a_portrait_keeps_its_aspect(place, tmp_path):
    assert run(place, tmp_path, "-W", 48, "-H", 80, "-L", 1).shape == (1, 80, 48, 3)


def test_settings_make_the_run_again(place, tmp_path):
    frames = run(place, tmp_path, out="a")
    settings = yaml.safe_load((tmp_path / "a" / "settings.yaml").read_text())
    assert settings["threads"] == torch.get_num_threads()                # on which the last bits of a frame depend
    again = [f"--{name.replace('_', '-')}={settings[name]}" for name in ("ref", "poses", "weights", "width", "height",
             "steps", "cfg", "scheduler", "seed", "dtype", "device", "batch")]
    sample.main([*again, f"--out={tmp_path / 'b'}"])
    assert np.array_equal(frames, np.stack(list(video.read(tmp_path / "b" / "frames"))))


def test_the_size_is_that_of_the_training_if_none_is_asked_for_and_others_are_doubted(place, tmp_path, capsys):
    net = model("image")
    weights.write_folder(tmp_path / "portrait", net.state_dict(), replace(net.config, size=(32, 48)))
    sample.main(["--weights", str(tmp_path / "portrait"), "--ref", str(place / "ref.png"), "--poses",
                 str(place / "poses"), "-L", "1", "--steps", "2", "--out", str(tmp_path / "out")])
    assert video.picture(tmp_path / "out" / "frames" / "000000.png").size == (32, 48)
    assert "may look worse" not in capsys.readouterr().err
    run(tmp_path, tmp_path, "-L", 1, weights="portrait", ref=place / "ref.png", poses=place / "poses", out="other")
    assert "trained on pictures of 32x48; other sizes may look worse" in capsys.readouterr().err


def test_without_arguments_the_example_dances(place, tmp_path, monkeypatch):
    prepare_data.main(["dancers", "--out", str(tmp_path / "example"), "--format", "example", "--clips", "3", "--frames",
                       "2", "--size", "64"])
    monkeypatch.setattr(sample, "EXAMPLE", {name: tmp_path / "example" / path.name
                                            for name, path in sample.EXAMPLE.items()})
    monkeypatch.setattr(sample, "NANO", place / "image")
    sample.main(["--out", str(tmp_path / "out"), *SMALL])
    settings = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert len(list((tmp_path / "out" / "frames").iterdir())) == 2
    assert settings["background"] == str(tmp_path / "example" / "background.png")
    assert settings["weights"] == str(place / "image")


def test_video_shows_reference_pose_and_result(place, tmp_path):
    frames = run(place, tmp_path, "--format", "webp,gif,gif,png")
    shown = list(video.read(tmp_path / "out" / "video.gif"))
    assert shown[0].shape == (4 * 64, 4 * 3 * 64, 3) and len(shown) == 6             # small ones are enlarged
    wanted = video.enlarged(frames[0], 256).astype(int)
    assert np.abs(shown[0][:, 4 * 128:] - wanted).mean() < 16                        # a GIF has 256 colours
    assert next(video.read(tmp_path / "out" / "result.gif")).shape == (64, 64, 3)
    assert not (tmp_path / "out" / "video.mp4").exists()


# ---- The video model ------------------------------------------------------------------------------------------

def test_video_model_makes_one_clip_with_and_without_cache(place, tmp_path):
    kept = run(place, tmp_path, weights="video", out="a")
    assert same(kept, run(place, tmp_path, "--no-cache", weights="video", out="b"))


def test_video_model_walks_a_long_track_in_windows(place, tmp_path):
    frames = run(place, tmp_path, "--window", 4, "--overlap", 2, weights="video", out="a")
    assert len(frames) == 6 and not same(frames, run(place, tmp_path, weights="video", out="b"))


# ---- Bad input ----------------------------------------------------------------------------------------------

def test_reference_that_cannot_be_used_is_refused(place, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "half.png").write_bytes((place / "ref.png").read_bytes()[:3000])
    Image.new("RGB", (60, 80)).save(tmp_path / "opaque.png")
    Image.new("RGBA", (60, 80), (0, 0, 0, 255)).save(tmp_path / "all.png")
    Image.new("RGBA", (60, 80)).save(tmp_path / "nobody.png")
    for name, words in (("none.png", "is not there"), ("empty.png", "is empty"), ("text.png", "is not a picture"),
                        ("half.png", "is damaged"), ("opaque.png", "--ref-mask"), ("all.png", "--ref-mask"),
                        ("nobody.png", "no person")):
        assert words in refusal(place, tmp_path, ref=tmp_path / name)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--ref-mask", "--background", "--background-mask", "--poses"])
def test_pictures_of_each_kind_that_are_damaged_are_refused(place, tmp_path, flag):
    (tmp_path / "damaged.png").write_bytes((place / "ref.png").read_bytes()[:100])
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "0.png").write_bytes(b"no picture")
    more = ("--background", place / "ref.png") if flag == "--background-mask" else ()
    damaged = tmp_path / ("damaged" if flag == "--poses" else "damaged.png")
    assert "damaged" in refusal(place, tmp_path, *more, flag, damaged)
    assert not (tmp_path / "out").exists()


def test_a_mask_with_nobody_in_it_is_refused(place, tmp_path):
    Image.new("L", (60, 80), 0).save(tmp_path / "mask.png")
    assert "mask.png" in refusal(place, tmp_path, "--ref-mask", tmp_path / "mask.png")


def test_mask_of_another_size_is_resized_and_that_is_said(place, tmp_path, capsys):
    Image.new("L", (30, 40), 255).save(tmp_path / "mask.png")
    run(place, tmp_path, "--ref-mask", tmp_path / "mask.png", "-L", 1)
    assert "30x40" in capsys.readouterr().err


def test_poses_that_cannot_be_used_are_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr("nanodisco.estimate.installed", lambda: False)
    for name in ("empty", "mixed", "broken"):
        (tmp_path / name).mkdir()
    for i in (1, 2):
        Image.new("RGB", (64, 64 * i)).save(tmp_path / "mixed" / f"{i}.png")
    (tmp_path / "broken" / "0.json").write_text('[{"keypoints": [')
    (tmp_path / "README.md").write_text("not a video")
    with video.writer(tmp_path / "dance.mp4") as write:
        write(np.zeros((64, 64, 3), np.uint8))
    for name, words in (("empty", "neither pictures nor JSON"), ("mixed", "different sizes"),
                        ("broken", "not whole JSON"), ("README.md", "cannot be read as a video"),
                        ("dance.mp4", "found first"), ("none", "is not there")):
        assert words in refusal(place, tmp_path, poses=tmp_path / name)
        assert not (tmp_path / "out").exists()
    (tmp_path / "own.json").write_text('{"images": [], "annotations": []}')
    (tmp_path / "track.json").write_text(json.dumps([{"keypoints": [[9, 9, 1]] * 17}]))
    assert "nobody in it" in refusal(place, tmp_path, "--align", tmp_path / "own.json", poses=tmp_path / "track.json")


def test_a_single_pose_picture_is_a_track_of_one_frame(place, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(place / "poses" / "1.png", tmp_path / "one")
    assert np.array_equal(run(place, tmp_path, poses=place / "poses" / "1.png", out="a"),
                          run(place, tmp_path, poses=tmp_path / "one", out="b"))


def test_photos_given_as_poses_are_doubted(place, tmp_path, capsys):
    for colour, doubted in ((0, False), (200, True)):
        Image.new("RGB", (64, 64), (colour,) * 3).save(tmp_path / f"{colour}.png")
        run(place, tmp_path, poses=tmp_path / f"{colour}.png", out=str(colour))
        assert ("does not look like a pose picture" in capsys.readouterr().err) == doubted


def test_kernels_that_cannot_run_are_refused_before_anything_is_written(place, tmp_path, monkeypatch):
    monkeypatch.setattr("kernels.backend.MODE", "trition")
    assert "expected one of auto, triton, torch" in refusal(place, tmp_path)
    assert not (tmp_path / "out").exists()


def test_nobody_in_a_pose_is_drawn_black_and_said(place, tmp_path, capsys):
    (tmp_path / "poses").mkdir()
    (tmp_path / "poses" / "0.json").write_text("[]")
    assert "nobody in any of its 1 frames" in refusal(place, tmp_path, poses=tmp_path / "poses")
    (tmp_path / "poses" / "1.json").write_text(json.dumps([{"keypoints": [[9, 9, 1]] * 17}]))
    run(place, tmp_path, poses=tmp_path / "poses")
    said = capsys.readouterr().err
    assert "nobody in 1 of 2 frames" in said and "scale it up" in said
    shown = next(video.read(tmp_path / "out" / "video.mp4"))
    assert shown[:, 4 * 70:4 * 122].max() < 20


@pytest.mark.parametrize("more, words", [
    (["-W", 250], "as 256"), (["-W", 68], "multiple of 8"), (["--steps", 0], "1 to 1000"),
    (["--steps", 2000], "1 to 1000"), (["--batch", 0], "--batch"), (["--cfg", "nan"], "--cfg"), (["-L", 0], "--length"),
    (["--compile", "--no-cache"], "do not go together"),
    (["--device", "cuda:9"], "cuda:9 is not there"), (["--device", "tpu"], "tpu is not there"),
    (["--device", "meta"], "meta is not there"), (["--format", "mp4,gif", "--fps", 120], "can have 100"),
    (["--format", "avi"], "avi"), (["--pose-size", "10"], "WxH"), (["--pose-size", "²x5"], "WxH"),
    (["--overlap", 16], "--overlap"), (["--fps", 0], "--fps"), (["--pose-scale", 1e38], "finite numbers"),
    (["--latents", __file__], "not a safetensors file"), (["--out", __file__], "already there"),
    (["--out", __file__ + "/x"], "cannot write"),
    (["--out", "/proc/nanodisco"], "cannot write")], ids=str)
def test_flags_that_make_no_sense_are_refused(place, tmp_path, more, words):
    assert words in refusal(place, tmp_path, *more)
    assert not (tmp_path / "out").exists()                               # so that the same command can be mended


def test_help_and_wrong_arguments_do_not_import_torch(place):
    code = ("import sys, sample\ntry: sample.main(sys.argv[1:])\nexcept BaseException: pass\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    for arguments in (["--help"], ["--ref", "x"], ["--ref", "none.png", "--poses", "none", "--steps", "0"]):
        subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True, capture_output=True)


def command(place, out, *more):
    return [sys.executable, "sample.py", "--weights", place / "image", "--ref", place / "ref.png", "--poses",
            place / "poses", "--out", out, *"-W 64 -H 64 --batch 1 --device cpu".split(), *more]


def whole(folder):
    """Every file under the folder can be read, and none is a temporary one."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".png":
            video.picture(path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "terminated"])
def test_interrupted_run_leaves_whole_frames_and_no_video(place, tmp_path, number):
    started = subprocess.Popen(command(place, tmp_path / "out", "--steps", "200"), cwd=ROOT, text=True,
                               stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not (tmp_path / "out" / "frames" / "000001.png").exists():
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.05)
    started.send_signal(number)
    errors = started.communicate()[1]
    assert started.returncode == 130 and errors.rstrip().endswith("interrupted") and "Traceback" not in errors
    assert not (tmp_path / "out" / "video.mp4").exists()
    whole(tmp_path / "out")


def test_full_disk_ends_the_run_in_one_line_with_whole_files(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=48k tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        ran = subprocess.run(command(place, small / "out", "--steps", "2"), cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 2 and "Traceback" not in ran.stderr and "No space left" in ran.stderr.splitlines()[-1]
        whole(small)
    finally:
        os.system(f"umount {small}")


def test_ten_thousand_poses_are_read_one_batch_at_a_time(place, tmp_path):
    from nanodisco import inputs
    frames = [{"people": [], "canvas_width": 64, "canvas_height": 64}] * 10_000
    frames.append(frames[0] | {"people": [{"pose_keypoints_2d": [9, 9, 1] * 18}]})
    (tmp_path / "dance.json").write_text(json.dumps(frames))
    track = inputs.poses(str(tmp_path / "dance.json"), (64, 64), None, lambda text: None)
    assert len(track) == 10_001 and track[9_999].size == (64, 64)
    assert len(run(place, tmp_path, "-L", 2, poses=tmp_path / "dance.json")) == 2


def test_of_ten_thousand_poses_the_first_and_those_that_are_asked_for_are_decoded(place, tmp_path, monkeypatch):
    from nanodisco import inputs
    (tmp_path / "poses").mkdir()
    for i in range(10_000):
        os.link(place / "poses" / f"{i % 6}.png", tmp_path / "poses" / f"{i:05}.png")
    decoded, load = [], PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda self: decoded.append(self.filename) or load(self))
    track = inputs.poses(str(tmp_path / "poses"), (64, 64), None, lambda text: None)
    assert len(track) == 10_000
    assert np.array_equal(track[9_999], Image.open(place / "poses" / "3.png"))
    assert {Path(name).name for name in decoded} == {"00000.png", "09999.png", "3.png"}


# ---- Other ways in ----------------------------------------------------------------------------------------------

def test_the_lines_of_python_in_the_readme_make_a_picture(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = (ROOT / "README.md").read_text().split("## In Python")[1].split("```python\n")[1].split("```")[0]
    names = {name: torch.rand(1, 3, 64, 64) for name in ("reference", "background", "pose")}
    exec(code, names)
    assert names["picture"].shape == (1, 3, 64, 64) and names["picture"].isfinite().all()


def test_poses_of_a_tsv_file_are_those_of_its_pictures(place, tmp_path):
    with tsv.writer(tmp_path / "poses.tsv") as write:
        for i in range(6):
            write(f"key{i}", tsv.encoded(Image.open(place / "poses" / f"{i}.png")))
    assert np.array_equal(run(place, tmp_path, out="a"), run(place, tmp_path, poses=tmp_path / "poses.tsv", out="b"))


def test_poses_are_one_json_file_or_one_a_frame_and_are_moved_to_the_reference(place, tmp_path, monkeypatch):
    people = 2 * np.random.default_rng(3).integers(3, 30, (3, 17, 2)) + 1          # halves are cut to whole pixels
    drawn = []
    monkeypatch.setattr(dance.video, "side_by_side", lambda photo, pose, made: drawn.append(pose) or made)

    def write(name, people):
        (tmp_path / name).write_text(json.dumps([{"image_id": i, "keypoints": [[x, y, 1] for x, y in person]}
                                                 for i, person in enumerate(people.tolist())]))

    def poses(name, *more):
        drawn.clear()
        run(place, tmp_path, *more, "--format", "mp4,png", poses=tmp_path / name, out=f"of {name} {len(more)}")
        return np.stack(drawn)
    (tmp_path / "folder").mkdir()
    for i in range(3):
        write(f"folder/{i}.json", people[i:i + 1])
    write("track.json", people)
    write("small.json", people // 2)
    write("own.json", people[:1] / 2)
    track, small = poses("track.json"), poses("small.json")
    assert track.shape == (3, 64, 64, 3) and np.array_equal(poses("folder"), track)
    assert np.array_equal(poses("track.json", "--align", tmp_path / "own.json"), small) and (small != track).any()


def test_official_noise_is_one_draw_of_the_seed_for_a_batch(place, tmp_path):
    noise = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    save_file({"latents": noise}, tmp_path / "noise.safetensors")
    one = run(place, tmp_path, "--noise", "official", "--seed", 5, "--batch", 6, out="a")
    assert np.array_equal(one, run(place, tmp_path, "--latents", tmp_path / "noise.safetensors", "--batch", 6, out="b"))


def test_bfloat16_gives_nearly_the_same_frames(place, tmp_path):
    exact, half = (run(place, tmp_path, "--dtype", dtype, out=dtype).astype(float) for dtype in ("fp32", "bf16"))
    assert 0 < np.abs(exact - half).max() and np.abs(exact - half).mean() < 2        # grey levels


def test_the_background_can_be_a_sample_of_its_posterior(place, tmp_path):
    mean, drawn, again = (run(place, tmp_path, "--posterior", what, out=out) for what, out in (
        ("mean", "a"), ("sample", "b"), ("sample", "c")))
    assert np.array_equal(drawn, again) and not np.array_equal(mean, drawn)


def test_the_run_of_a_vae_and_the_folder_around_a_checkpoint_are_told_from_weights(place, tmp_path):
    last = tmp_path / "run" / "last"
    shutil.copytree(place / "image", last)
    (last / "training.yaml").write_text("recipe: {stage: vae}\n")
    with pytest.raises(InputError, match="is of stage vae, so its UNet is not trained"):
        run(place, tmp_path, weights=last)
    with pytest.raises(InputError, match=f"is a run of train.py; its weights are in {last}"):
        run(place, tmp_path, weights=last.parent)
