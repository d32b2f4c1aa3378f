"""Scores: each formula against another program or a picture whose score is known."""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import MODEL

import evaluate
from nanodisco import dancers, judge, metrics, weights
from nanodisco.config import ModelConfig, from_dict
from nanodisco.disco import DisCo
from nanodisco.errors import InputError
from nanodisco.loading import load

ROOT = Path(__file__).parent.parent
OF = judge.pairs(6, 0, 48)
TRUTH = np.stack([pair.target.picture for pair in OF])


def test_psnr_is_its_formula():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    b = a.copy()
    b[1, 0, 0, 0] = 48                                                   # mean squared error 48
    assert metrics.psnr(a, b) == pytest.approx([100, 10 * np.log10(255 ** 2 / 48)])


def test_ssim_is_computed_window_by_window():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 1, 11, 9, 3), dtype=np.uint8)
    x, y = ((p[0].astype(float) @ (0.299, 0.587, 0.114)) for p in (a, b))
    values = []
    for i in range(11 - 6):
        for j in range(9 - 6):
            u, v = x[i:i + 7, j:j + 7].ravel(), y[i:i + 7, j:j + 7].ravel()
            c = np.cov(u, v)
            values.append((2 * u.mean() * v.mean() + 6.5025) * (2 * c[0, 1] + 58.5225)
                          / ((u.mean() ** 2 + v.mean() ** 2 + 6.5025) * (c[0, 0] + c[1, 1] + 58.5225)))
    assert metrics.ssim(a, b) == pytest.approx([np.mean(values)])
    assert metrics.ssim(a, a) == pytest.approx([1])


def test_the_true_frames_have_perfect_scores():
    found = judge.scores(TRUTH, OF)
    assert found["psnr"] == 100 and not any(found[name] for name in ("colour", "shirt_legs", "background", "hole"))
    assert found["ssim"] == pytest.approx(1) and found["iou"] > 0.85     # outlines are as dark as some walls


def test_an_empty_room_has_no_silhouette_and_no_hole():
    rooms = np.stack([pair.target.background for pair in OF])
    found = judge.scores(rooms, OF)
    assert found["iou"] == 0 and found["colour"] > 20
    assert found["background"] < 1e-2 and found["hole"] < 1e-2           # a trace of an outline is no mask yet


@pytest.mark.parametrize("label, column, others", [(dancers.SHIRT, "shirt_legs", ("background", "hole")),
                                                   (dancers.HAIR, "colour", ("background", "hole", "shirt_legs"))])
def test_a_garment_of_another_colour_is_seen_in_its_own_column(label, column, others):
    made = TRUTH.copy()
    for picture, pair in zip(made, OF):
        there = pair.target.labels == label
        picture[there] = np.where(picture[there] > 127, picture[there] - 30, picture[there] + 30)
    found = judge.scores(made, OF)
    assert found[column] > 5 and all(found[other] == 0 for other in others)


def test_what_is_left_of_the_reference_s_person_is_in_the_hole():
    made = TRUTH.copy()
    for picture, pair in zip(made, OF):
        ghost = (pair.reference.mask > 127) & (pair.target.mask == 0)
        picture[ghost] = pair.reference.picture[ghost]
    found = judge.scores(made, OF)
    assert found["hole"] > 10
    shares = [((pair.reference.mask > 127) & (pair.target.mask == 0)).sum() / (pair.target.mask == 0).sum()
              for pair in OF]
    alone = [judge.scores(made[i:i + 1], OF[i:i + 1]) for i in range(len(OF))]
    assert [one["background"] for one in alone] == pytest.approx(
        [one["hole"] * share for one, share in zip(alone, shares)])      # and nowhere else


def test_pairs_are_held_out_and_follow_from_the_seed():
    again, other = judge.pairs(6, 0, 48), judge.pairs(6, 1, 48)
    assert all(np.array_equal(a.target.picture, b.target.picture) for a, b in zip(OF, again))
    assert not any(np.array_equal(a.target.picture, b.target.picture) for a, b in zip(OF, other))
    assert np.array_equal(OF[2].reference.background, dancers.room(dancers.HELD_OUT + 2, 48))


def test_a_stranger_is_another_person_in_the_same_pose_and_room():
    for one, other in zip(OF, judge.pairs(6, 0, 48, stranger=1)):
        assert np.array_equal(one.target.picture, other.target.picture)
        assert np.array_equal(one.reference.background, other.reference.background)
        assert not np.array_equal(one.reference.picture, other.reference.picture)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("weights") / "tiny"
    config = from_dict(ModelConfig, MODEL)
    torch.manual_seed(0)
    weights.write_folder(place, DisCo(config).state_dict(), config)
    return place


def test_the_command_line_prints_and_writes_every_column(folder, tmp_path, capsys):
    evaluate.main(["--weights", str(folder), "--count", "3", "--size", "16", "--steps", "2", "--device", "cpu",
                   "--json", str(tmp_path / "scores.json"), "--pictures", str(tmp_path / "new" / "sheet.png")])
    found = json.loads((tmp_path / "scores.json").read_text())
    of = judge.pairs(3, 0, 16)
    copied, printed = judge.scores(judge.copied(of), of), capsys.readouterr().out
    for column in ("psnr", "ssim", "iou", "colour", "shirt_legs", "background", "hole"):
        assert found[f"copy.{column}"] == pytest.approx(copied[column])
        assert f"{found[column]:.3f}" in printed
        assert f"ceiling.{column}" in found
    assert (tmp_path / "new" / "sheet.png").exists()


def test_a_model_without_a_pose_net_is_scored_on_the_reference_itself(tmp_path):
    net = DisCo(from_dict(ModelConfig, MODEL | {"pose": None}))
    weights.write_folder(tmp_path / "stage1", net.state_dict(), net.config)
    evaluate.main(["--weights", str(tmp_path / "stage1"), "--count", "2", "--size", "16", "--steps", "1", "--device",
                   "cpu", "--json", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["copy.psnr"] == 100 and found["hole"] is None           # nothing was uncovered


def test_the_shipped_weights_dress_held_out_people_as_their_photos_are():
    """A small part of the model card: 24 pairs; the wrong person's photo gives the wrong clothes."""
    files = sorted((ROOT / "weights" / "nano").glob("*.safetensors"))
    assert files and all(file.stat().st_size <= 15e6 for file in files)
    net = load(ROOT / "weights" / "nano", say=lambda text: None)
    right, wrong = (judge.scores(judge.imagined(net, of, 20, 1.5, 0), of) for of in
                    (judge.pairs(24, 0, 64), judge.pairs(24, 0, 64, stranger=1)))
    assert right["psnr"] > 24.5 and right["iou"] > 0.77 and right["shirt_legs"] < 7
    assert wrong["shirt_legs"] > 2 * right["shirt_legs"]


@pytest.mark.parametrize("stage, refused", [("decoder", True), ("diffusion", False)])
def test_a_vae_by_itself_makes_no_pictures_to_score(folder, tmp_path, stage, refused):
    run = tmp_path / "last"
    shutil.copytree(folder, run)
    (run / "training.yaml").write_text(f"recipe: {{stage: {stage}}}\n")
    with pytest.raises(InputError, match="is of stage decoder, so its UNet" if refused else "size 9; expected"):
        evaluate.main(["--weights", str(run), "--size", "9", "--device", "cpu"])


def test_one_picture_has_no_stranger():
    with pytest.raises(InputError, match="expected 2 or more"):
        evaluate.main(["--stranger", "--count", "1"])


def test_pairs_of_one_person_share_person_and_room_and_differ_in_the_dance():
    of, person = judge.pairs(4, 0, 48, person=7), dancers.HELD_OUT + 7
    for i, pair in enumerate(of):
        assert np.array_equal(pair.reference.picture, dancers.sample(person, person, person, 0, 48).picture)
        assert np.array_equal(pair.target.picture, dancers.sample(person, person, dancers.HELD_OUT + i, pair.frame,
                                                                  48).picture)


def test_a_video_model_is_scored_on_the_middle_of_a_clip(monkeypatch):
    """The pose of the target is at its place among those of its neighbours."""
    net = DisCo(from_dict(ModelConfig, MODEL | {"unet": MODEL["unet"] | {"temporal": True}}))
    of, seen = judge.pairs(2, 0, 16), []

    def generated(model, reference, background, pose, numbers, *rest):
        seen.append(pose)
        return torch.arange(len(pose)).view(-1, 1, 1, 1).expand(-1, 3, 16, 16) / 255
    monkeypatch.setattr(judge, "generated", generated)
    made, middle = judge.imagined(net, of, 1, 1.0, 0), judge.FRAMES // 2
    assert made[:, 0, 0, 0].tolist() == [middle, judge.FRAMES + middle]
    for i, pair in enumerate(of):
        for later in (-1, 0, 2):
            wanted = dancers.sample(*pair.who, pair.frame + later, 16).keypoints
            picture = torch.from_numpy(dancers.pose_picture(wanted, 16).copy()).permute(2, 0, 1) / 255
            assert torch.equal(seen[0][i * judge.FRAMES + middle + later], picture)


def test_pictures_do_not_depend_on_how_many_are_made(folder, monkeypatch):
    from nanodisco.loading import load
    net, of = load(folder, say=lambda text: None), judge.pairs(5, 0, 16)
    whole = judge.imagined(net, of, 2, 1.5, seed=3)
    monkeypatch.setattr(judge, "BATCH", 2)
    parts = judge.imagined(net, of, 2, 1.5, seed=3)
    assert np.abs(whole.astype(int) - parts).max() <= 1


@pytest.mark.parametrize("arguments, words", [(["--weights", "none"], "not there"), (["--steps", "0"], "--steps 0"),
                                              (["--seed", "900"], "--seed 900"),
                                              (["--cfg", "nan"], "--cfg nan"), (["--size", "17"], "multiple of 2")])
def test_bad_arguments_are_refused(folder, arguments, words):
    with pytest.raises(InputError, match=words):
        evaluate.main(["--weights", str(folder), "--device", "cpu", *arguments])
