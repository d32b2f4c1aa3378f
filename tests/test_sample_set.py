"""sample.py on a validation set: --data, its parts replaced, the official folders."""
import base64
import io
import json

import numpy as np
import pytest
import torch
from formula import golden
from PIL import Image
from test_sample import SMALL, place, run  # noqa: F401  place is a fixture

import sample
from nanodisco import dance, data, transforms, video
from nanodisco.disco import DisCo
from nanodisco.errors import InputError

KEYS = ("TiktokDance_00335_0001.png", "TiktokDance_00335_0002.png", "TiktokDance_00336_0001.png")


def write_set(folder, videos):
    """A row a key, made by the rules of the official script.   videos: a list of keys each -> the YAML file"""
    rng = np.random.default_rng(1)
    rows = {"images": [], "poses": [], "masks": [], "vid2line": []}
    for keys in videos:
        for i, key in enumerate(keys):
            rows["vid2line"].append(f"{key}\t[{-i}, {len(keys) - 1 - i}]\n")
            for name in ("images", "poses", "masks"):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(buffer, format="JPEG")
                rows[name].append(f"{key}\t{base64.b64encode(buffer.getvalue()).decode()}\n")
    for name, lines in rows.items():
        (folder / f"val_{name}.tsv").write_text("".join(lines))
        offsets = np.cumsum([0] + [len(line) for line in lines])[:-1]
        (folder / f"val_{name}.lineidx").write_text("".join(f"{offset}\n" for offset in offsets))
    (folder / "val.yaml").write_text("img: val_images.tsv\nposes: val_poses.tsv\nmasks: val_masks.tsv\n"
                                     "vid2line: val_vid2line.tsv\ncomposite: false\n")
    return folder / "val.yaml"


@pytest.fixture(scope="session")
def validation(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("set"), [KEYS[:2], KEYS[2:]])


def evaluate(place, validation, out, *more, weights="image"):
    sample.main([str(argument) for argument in ("--weights", place / weights, "--data", validation, "--out", out,
                                                *SMALL, *more)])


def test_validation_set_takes_its_reference_from_the_first_frame_of_each_video(validation):
    rows = data.TsvDataset(validation)
    assert [rows.video(i) for i in range(3)] == [range(0, 2), range(0, 2), range(2, 3)]


def test_a_reference_is_encoded_once_for_all_batches_that_show_it(place, validation, tmp_path, monkeypatch):
    encoded, conditions = [], DisCo.conditions
    monkeypatch.setattr(DisCo, "conditions", lambda *given: encoded.append(1) or conditions(*given))
    evaluate(place, validation, tmp_path / "out", "--batch", 1)
    assert len(encoded) == 2                                             # of two videos, the first of two frames


def test_a_reference_is_encoded_once_for_all_rows_of_a_batch_that_show_it(place, tmp_path, monkeypatch):
    rows, encoded, conditions = write_set(tmp_path, [["a_0", "a_1", "a_2"], ["b_0", "b_1"]]), [], DisCo.conditions
    monkeypatch.setattr(DisCo, "conditions", lambda self, reference, *more: encoded.append(len(reference))
                        or conditions(self, reference, *more))
    evaluate(place, rows, tmp_path / "two", "--layout", "disco", "--batch", 2)
    assert encoded == [1, 2, 1]                                          # a a, a b, b
    evaluate(place, rows, tmp_path / "one", "--layout", "disco", "--batch", 1)
    names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("*/*.png")]
    assert len(names) == 5 * 5                                           # five folders of five rows
    one, two = ([np.asarray(Image.open(tmp_path / out / name)).astype(int) for name in names] for out in ("one", "two"))
    assert max(abs(a - b).max() for a, b in zip(one, two)) <= 1
    evaluate(place, rows, tmp_path / "of others", "--ref", place / "ref.png", "--background", place / "ref.png")
    assert encoded[5:] == [1]


def test_official_layout_has_the_official_names(place, validation, tmp_path):
    evaluate(place, validation, tmp_path / "eval_visu", "--layout", "disco", "--cfg", 3)
    names = [dance.official_name(key) for key in KEYS]
    folders = ("gt", "pred_gs3.0_scale-cond1.0-ref1.0", "cond", "ref", "ref_control")
    made = {str(path.relative_to(tmp_path / "eval_visu")) for path in (tmp_path / "eval_visu").rglob("*.*")
            if path.suffix != ".0"}
    pictures = {f"{folder}/{name}" for folder in folders for name in names}
    assert made == pictures | {"Model_Setting.json", "settings.yaml"}


def test_names_and_settings_are_those_of_the_official_listing(place, tmp_path):
    listing = golden("eval_layout.json")
    rows = write_set(tmp_path, [[key] for key in listing["image_keys"]])
    evaluate(place, rows, tmp_path / "eval_visu", "--layout", "disco", "--cfg", 3)
    made = {str(path.relative_to(tmp_path)) for path in (tmp_path / "eval_visu").rglob("*") if path.is_file()}
    wanted = {name for name in listing["image_model_run"] if name.startswith("eval_visu/")}
    assert made == wanted | {"eval_visu/settings.yaml"}
    settings = json.loads((tmp_path / "eval_visu" / "Model_Setting.json").read_text())
    assert settings == listing["model_setting_example"] | {"img_size": [64, 64]}


def test_layout_keeps_ground_truth_and_pose_as_prepared(place, validation, tmp_path):
    evaluate(place, validation, tmp_path / "out", "--layout", "disco", "-L", 1)
    row, name = data.TsvDataset(validation)[0], dance.official_name(KEYS[0])
    for folder, picture in (("gt", row.target), ("cond", row.pose)):
        wanted = np.asarray(transforms.fill(picture, (64, 64)))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / folder / name)), wanted)


@pytest.mark.parametrize("flag, other, changed", [("--ref", "ref.png", "ref"), ("--poses", "poses", "cond"),
                                                  ("--background", "ref.png", "ref_control")])
def test_parts_of_a_set_are_replaced_one_at_a_time(place, validation, tmp_path, flag, other, changed):
    evaluate(place, validation, tmp_path / "a", "--layout", "disco")
    evaluate(place, validation, tmp_path / "b", "--layout", "disco", flag, place / other)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").glob("*/*.png")]
    different = {path.parts[0] for path in files
                 if (tmp_path / "a" / path).read_bytes() != (tmp_path / "b" / path).read_bytes()}
    assert different == {changed, "pred_gs1.5_scale-cond1.0-ref1.0"}


def test_all_parts_of_a_set_can_be_replaced(place, validation, tmp_path):
    flags = ("--ref", place / "ref.png", "--poses", place / "poses", "--background", place / "ref.png",
             "--format", "png")
    evaluate(place, validation, tmp_path / "a", *flags, "--batch", 3)
    track = run(place, tmp_path, *flags[4:], "--batch", 3, "-L", 3, out="b")
    assert np.array_equal(track, np.stack(list(video.read(tmp_path / "a" / "frames"))))


def test_flags_of_poses_and_masks_count_in_a_set_as_well(place, validation, tmp_path):
    (tmp_path / "far.json").write_text(json.dumps([{"keypoints": [[200, 200, 1]] * 17}]))
    poses = ("--poses", tmp_path / "far.json", "-L", 1)
    for name, more in (("a", ()), ("b", ("--pose-size", "256x256"))):
        evaluate(place, validation, tmp_path / name, "--layout", "disco", *poses, *more)
    drawn = [np.asarray(Image.open(next((tmp_path / name / "cond").glob("*.png")))).any() for name in ("a", "b")]
    assert drawn == [False, True]                                        # beyond a canvas of 64 x 64, within one of 256
    half = np.full((128, 128, 3), 250, np.uint8)
    half[:, :63] = 0                                                     # its edge falls within a pixel of the 64
    Image.fromarray(half).save(tmp_path / "half.png")
    evaluate(place, validation, tmp_path / "c", "--layout", "disco", "-L", 1, "--background", tmp_path / "half.png",
             "--background-mask", "black")
    made = np.asarray(Image.open(next((tmp_path / "c" / "ref_control").glob("*.png"))))
    whole = np.asarray(transforms.fill(Image.fromarray(half), (64, 64)))
    assert ((made == 128) | (made == whole)).all() and (made == 128).any()           # removed or not, nothing between


def test_clips_of_the_video_model_have_the_official_names(place, tmp_path):
    listing = golden("eval_layout.json")
    videos = [keys.split(";") for keys in listing["video_keys"]]
    evaluate(place, write_set(tmp_path, videos), tmp_path / "eval_visu", "--layout", "disco", "--cfg", 3, "--window", 3,
             weights="video")
    made = {str(path.relative_to(tmp_path)) for path in (tmp_path / "eval_visu").rglob("*") if path.is_file()}
    assert made == set(listing["video_model_run"]) | {"eval_visu/settings.yaml"}


def test_pieces_of_a_batch_keep_to_their_rows(place, tmp_path, monkeypatch):
    """Decoded and written two at a time: each row's pose and target under its name, its photo beside it."""
    rows = write_set(tmp_path, [["a_0.png", "a_1.png", "a_2.png"], ["b_0.png", "b_1.png"]])
    monkeypatch.setattr(dance, "AT_ONCE", 2)
    shown = []
    monkeypatch.setattr(dance.video, "side_by_side", lambda *parts: shown.append(parts) or parts[-1])
    evaluate(place, rows, tmp_path / "disco", "--layout", "disco", "--batch", 5)
    evaluate(place, rows, tmp_path / "ours", "--batch", 5, "--format", "mp4")
    assert len(shown) == 5
    for i, (photo, pose, _) in enumerate(shown):
        row = data.TsvDataset(rows)[i]
        name = dance.official_name(row.key)
        wanted = {"cond": row.pose, "gt": row.target}
        for folder, picture in wanted.items():
            made = np.asarray(Image.open(tmp_path / "disco" / folder / name))
            assert np.array_equal(made, transforms.frame(picture, (64, 64)))
        assert np.array_equal(photo, transforms.frame(row.reference, (64, 64)))
        assert np.array_equal(pose, transforms.frame(row.pose, (64, 64)))


def test_what_fails_while_decoding_leaves_whole_pictures_and_no_video(place, tmp_path, monkeypatch):
    pictures = dance._pictures

    def failing(model, z):
        yield next(pictures(model, z))
        raise torch.OutOfMemoryError("no room")
    monkeypatch.setattr(dance, "AT_ONCE", 2)
    monkeypatch.setattr(dance, "_pictures", failing)
    with pytest.raises(InputError, match="out of memory"):
        run(place, tmp_path, "--batch", 6, out="a")
    left = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert left == {"settings.yaml", "frames/000000.png", "frames/000001.png"}
    assert all(Image.open(path).load() for path in (tmp_path / "a" / "frames").iterdir())


def test_reference_of_a_clip_is_written_in_its_own_colours(place, tmp_path):
    videos = write_set(tmp_path, [KEYS[:2]])
    evaluate(place, videos, tmp_path / "out", "--layout", "disco", "--window", 2, weights="video")
    row = data.TsvDataset(videos)[0]
    person = transforms.reference(row.reference, Image.new("L", row.mask.size, 255), 56)
    assert transforms.from_clip(person[None]).sub(transforms.to_tensor(transforms.fill(
        row.reference, (56, 56), Image.Resampling.BICUBIC))).abs().mean() < 0.2      # colours of the photo
    mask = transforms.mask_tensor(row.mask, row.reference.size, (56, 56), Image.Resampling.BICUBIC)
    wanted = transforms.to_frames(transforms.from_clip((person * mask)[None]).clamp(0, 1))[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "ref" / dance.official_name(KEYS[0]))), wanted)
