"""The dancers: everything that is said about a picture is true of it, and the same seeds draw the same picture."""
import hashlib

import numpy as np
import pytest
from PIL import Image

import prepare_data
from nanodisco import dancers, data, pose, shapes
from nanodisco.errors import InputError

SOME = [(identity, identity + 50, identity + 90, 5 * identity % 24) for identity in range(40)]


def same(a: dancers.Sample, b: dancers.Sample, *fields: str) -> bool:
    return all(np.array_equal(getattr(a, field), getattr(b, field)) for field in fields)


@pytest.mark.parametrize("size, digest", [(64, "afbe2c0946fa2611"), (96, "5dae373bddad20a3")])
def test_pictures_are_pinned(size, digest):
    seen = hashlib.sha256()
    for seeds in SOME:
        made = dancers.sample(*seeds, size)
        for array in (made.picture, made.mask, made.labels, made.background, np.rint(made.keypoints).astype(np.int16)):
            seen.update(array.tobytes())
    assert seen.hexdigest()[:16] == digest


def test_a_picture_is_its_background_where_there_is_nobody():
    for seeds in SOME:
        made = dancers.sample(*seeds, 64)
        assert np.array_equal(made.picture[made.mask == 0], made.background[made.mask == 0])
        assert (made.picture != made.background)[made.mask > 250].any(-1).mean() > 0.99


def test_labels_cover_the_mask():
    for seeds in SOME:
        made = dancers.sample(*seeds, 64)
        assert np.array_equal(made.labels > 0, made.mask > 127)
        assert made.labels.max() < len(dancers.REGIONS)


def test_person_room_and_dance_are_independent():
    here = dancers.sample(1, 2, 3, 4, 64)
    elsewhere, other, moved = (dancers.sample(*seeds, 64) for seeds in ((1, 9, 3, 4), (9, 2, 3, 4), (1, 2, 9, 4)))
    assert same(here, elsewhere, "keypoints", "mask", "labels") and not same(here, elsewhere, "background")
    assert same(here, other, "background") and not same(here, other, "picture")
    assert same(here, moved, "background") and not same(here, moved, "keypoints")


def test_joints_lie_on_the_person():
    for seeds in SOME:
        made = dancers.sample(*seeds, 128)
        for x, y, seen in made.keypoints:
            assert seen == -1 or made.mask[int(y), int(x)] > 0


def test_joints_grow_with_the_picture():
    small, large = (dancers.sample(1, 2, 3, 4, size).keypoints for size in (64, 256))
    np.testing.assert_allclose(large[:, :2][small[:, 2] > 0], 4 * small[:, :2][small[:, 2] > 0])


def test_a_face_that_is_turned_away_has_no_joints():
    turning = next(seed for seed in range(100) if dancers.Dance.of(seed).spins)
    for frame in range(dancers.LOOP):
        _, facing = dancers.Dance.of(turning).joints(dancers.Person.of(0), frame)
        nose = dancers.sample(0, 0, turning, frame, 64).keypoints[0, 2]
        if abs(np.cos(facing)) > 0.2:
            assert (nose > 0) == (np.cos(facing) > 0)


def test_a_dance_repeats():
    assert same(dancers.sample(1, 2, 3, 4, 64), dancers.sample(1, 2, 3, 4 + dancers.LOOP, 64), "picture", "keypoints")
    assert not same(dancers.sample(1, 2, 3, 4, 64), dancers.sample(1, 2, 3, 10, 64), "picture")


def test_a_quarter_of_the_dances_is_seen_from_the_hips_up():
    near = [dancers.Dance.of(seed).zoom > 1.2 for seed in range(400)]
    assert 0.2 <= np.mean(near) <= 0.3
    hidden = [(dancers.sample(0, 0, seed, 0, 32).keypoints[list(dancers.ANKLES), 2] < 0).all() for seed in range(100)]
    assert all(hidden[i] for i in range(100) if near[i])


def test_the_lower_foot_stands_on_the_floor_or_hops():
    for moves in filter(lambda moves: moves.zoom < 1.2, map(dancers.Dance.of, range(60))):
        for frame in range(0, dancers.LOOP, 5):
            joints, _ = moves.joints(dancers.Person.of(0), frame)
            sole = joints[list(dancers.ANKLES), 1].max() + 0.05 * 0.82 * dancers.Person.of(0).height
            assert 0.95 - moves.bounce - 1e-9 <= sole <= 0.95 + 1e-9


def test_patterns_garments_and_hairstyles_all_occur():
    people = [dancers.Person.of(seed) for seed in range(200)]
    every = {"pattern": dancers.PATTERNS, "garment": dancers.GARMENTS, "hairstyle": dancers.HAIRSTYLES}
    for field, kinds in every.items():
        assert {getattr(person, field) for person in people} == set(kinds)


@pytest.mark.parametrize("shape, area", [
    (shapes.box(0.2, 0.3, 0.6, 0.9), 0.4 * 0.6), (shapes.ellipse((0.5, 0.5), 0.3, 0.2), np.pi * 0.3 * 0.2),
    (shapes.capsule((0.3, 0.5), (0.7, 0.5), 0.1, 0.1), 0.4 * 0.2 + np.pi * 0.01),
    (shapes.polygon((0.1, 0.1), (0.9, 0.1), (0.1, 0.9)), 0.8 * 0.8 / 2)], ids=["box", "ellipse", "capsule", "polygon"])
def test_a_shape_covers_its_area(shape, area):
    canvas = shapes.Canvas(np.zeros((200, 200, 3), np.float32))
    canvas.paint(shape, np.ones(3, np.float32), label=1)
    assert canvas.pixels[..., 0].mean() == pytest.approx(area, rel=5e-3)
    assert np.array_equal(canvas.pixels[..., 0], canvas.covered)


def test_a_shape_beyond_the_picture_is_cut_off():
    canvas = shapes.Canvas(np.zeros((20, 20, 3), np.float32))
    canvas.paint(shapes.ellipse((1.5, 0.5), 0.2, 0.2), np.ones(3, np.float32))
    canvas.paint(shapes.ellipse((-0.5, -2), 0.2, 0.2), np.ones(3, np.float32))
    assert not canvas.pixels.any()
    canvas.paint(shapes.ellipse((1.0, 0.5), 0.2, 0.2), np.ones(3, np.float32))
    assert canvas.pixels[10, -1, 0] == 1 and not canvas.pixels[:, :15].any()


# ---- As files ------------------------------------------------------------------------------------------------

def prepare(out, *more) -> None:
    prepare_data.main(["dancers", "--out", str(out), "--clips", "3", "--frames", "2", "--size", "48", *more])


def test_folders_hold_what_was_drawn(tmp_path):
    prepare(tmp_path / "out", "--seed", "2")
    clips = sorted((tmp_path / "out").iterdir())
    assert [clip.name for clip in clips] == ["0002000000", "0002000001", "0002000002"]
    wanted = dancers.sample(2000001, 2000001, 2000001, 1, 48)
    assert np.array_equal(np.asarray(Image.open(clips[1] / "000002.png")), wanted.picture)
    assert np.array_equal(np.asarray(Image.open(clips[1] / "groundsam" / "000002.png.mask.png")), wanted.mask)
    assert np.array_equal(np.asarray(Image.open(clips[1] / "background" / "empty.png")), wanted.background)
    frame, = pose.read(clips[1] / "openpose_json" / "000002.png.json")
    np.testing.assert_array_equal(frame.people[0], wanted.keypoints)


def test_tsv_files_are_a_validation_set(tmp_path):
    prepare(tmp_path / "out", "--format", "tsv", "--split", "held-out")
    rows = data.TsvDataset(tmp_path / "out" / "held-out.yaml")
    first = dancers.HELD_OUT
    assert len(rows) == 6 and [rows.video(i) for i in (0, 1, 2)] == [range(0, 2), range(0, 2), range(2, 4)]
    shown, wanted, reference = rows[3], *(dancers.sample(first + 1, first + 1, first + 1, i, 48) for i in (1, 0))
    assert np.array_equal(np.asarray(shown.target), wanted.picture)
    assert np.array_equal(np.asarray(shown.pose), dancers.pose_picture(wanted.keypoints, 48))
    assert np.array_equal(np.asarray(shown.reference), reference.picture)
    assert np.array_equal(np.asarray(shown.mask.convert("L")), reference.mask)


def test_written_again_the_files_are_the_same(tmp_path):
    prepare(tmp_path / "a", "--format", "tsv")
    prepare(tmp_path / "b", "--format", "tsv")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names and all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_an_example_is_of_three_clips(tmp_path):
    prepare_data.main(["dancers", "--out", str(tmp_path / "out"), "--format", "example", "--frames", "2"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"reference.png", "background.png", "dance.json"}


@pytest.mark.parametrize("more, words", [(["--clips", "0"], "--clips 0"), (["--size", "7"], "--size 7"),
                                         (["--seed", "900"], "--seed 900"), (["--frames", "0"], "--frames 0")])
def test_numbers_out_of_range_are_refused(tmp_path, more, words):
    with pytest.raises(InputError, match=words):
        prepare_data.main(["dancers", "--out", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="already there"):
        prepare(tmp_path / "out")


def test_training_and_held_out_seeds_are_disjoint(tmp_path):
    prepare(tmp_path / "last", "--seed", "899")
    prepare(tmp_path / "first", "--split", "held-out")
    last, first = (sorted(int(clip.name) for clip in (tmp_path / name).iterdir()) for name in ("last", "first"))
    assert last[-1] + 10**6 < dancers.HELD_OUT == first[0]
