"""Frames to and from files."""
import os

import numpy as np
import pytest
from PIL import Image

from nanodisco import video
from nanodisco.errors import InputError

FLAT = [np.tile(np.array(colour, np.uint8), (48, 64, 1))
        for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255), (0, 0, 0))]


def write(path, frames=FLAT, fps=8):
    with video.writer(path, fps) as take:
        for frame in frames:
            take(frame)
    return path


@pytest.mark.parametrize("name, error", [("a.mp4", 4), ("a.gif", 0), ("a.webp", 3), ("folder", 0)])
def test_flat_colours_come_back(tmp_path, name, error):
    frames = list(video.read(write(tmp_path / name)))
    assert len(frames) == len(FLAT)
    for got, wanted in zip(frames, FLAT):
        assert np.abs(got.astype(int) - wanted).max() <= error


def test_same_frames_give_the_same_bytes(tmp_path):
    for suffix in ("mp4", "gif", "webp"):
        assert write(tmp_path / f"a.{suffix}").read_bytes() == write(tmp_path / f"b.{suffix}").read_bytes()


def test_odd_sizes_are_padded_for_mp4(tmp_path):
    frame = next(video.read(write(tmp_path / "a.mp4", [FLAT[0][:47, :63]])))
    assert frame.shape == (48, 64, 3)


def test_mp4_keeps_its_rate(tmp_path):
    import av
    with av.open(str(write(tmp_path / "a.mp4", fps=12.5))) as container:
        assert float(container.streams.video[0].average_rate) == 12.5


def test_a_gif_of_equal_frames_is_as_long_as_they_are(tmp_path):
    with Image.open(write(tmp_path / "a.gif", [FLAT[0]] * 4 + [FLAT[1]], fps=8)) as gif:
        total = 0
        for i in range(gif.n_frames):
            gif.seek(i)
            total += gif.info["duration"]
    assert total == pytest.approx(5000 / 8, abs=10)


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "folder"])
def test_a_video_that_is_broken_off_leaves_nothing(tmp_path, name):
    with pytest.raises(KeyboardInterrupt):
        with video.writer(tmp_path / name) as take:
            take(FLAT[0])
            raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.gif", "a.webp"])
def test_an_animation_that_was_not_copied_whole_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
    path = write(tmp_path / name, noise)
    path.write_bytes(path.read_bytes()[:-len(path.read_bytes()) // 3])
    with pytest.raises(InputError, match="is damaged"):
        list(video.read(path))


def test_a_video_without_frames_is_refused(tmp_path):
    with pytest.raises(InputError, match="no frame to write"):
        write(tmp_path / "a.mp4", [])
    assert not list(tmp_path.iterdir())


def test_files_are_in_natural_order_without_hidden_ones(tmp_path):
    for name in ("f10.png", "f2.PNG", "f1.jpg", ".f0.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in video.files(tmp_path)] == ["f1.jpg", "f2.PNG", "f10.png"]


def test_pictures_of_every_kind_are_rgb_and_keep_their_transparency(tmp_path):
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for mode, wanted in (("L", "RGB"), ("P", "RGB"), ("CMYK", "RGB"), ("RGBA", "RGBA"), ("LA", "RGBA"), ("1", "RGB")):
        grey.convert(mode).save(tmp_path / "a.tif")
        assert video.picture(tmp_path / "a.tif").mode == wanted
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "a.png")
    assert video.picture(tmp_path / "a.png").getpixel((0, 0)) == (128, 128, 128)


def test_a_turned_photo_is_set_upright(tmp_path):
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6                                                     # orientation: turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert video.picture(tmp_path / "a.jpg").size == (20, 30)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_text("not a video")
    with pytest.raises(InputError, match="cannot be read as a video"):
        list(video.read(tmp_path / "a.mp4"))


def test_saving_replaces_a_picture_and_leaves_no_other_file(tmp_path):
    for frame in FLAT[:2]:
        video.save(tmp_path / "a.png", frame)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), FLAT[1]) and len(list(tmp_path.iterdir())) == 1


def test_a_picture_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        video.save(tmp_path / "a.png", FLAT[0])
    assert not list(tmp_path.iterdir())


def test_small_frames_are_enlarged_by_a_whole_number_of_times():
    assert video.enlarged(FLAT[0][:20, :30], 64).shape == (60, 90, 3)
    assert video.enlarged(FLAT[0], 64) is FLAT[0]


def test_pictures_side_by_side_have_the_height_of_the_last():
    assert video.side_by_side(FLAT[0], FLAT[1][:24], FLAT[2]).shape == (48, 64 + 128 + 64, 3)


def test_contact_sheet_shows_each_frame_in_its_place():
    sheet = video.contact_sheet(FLAT, columns=3, gap=2)
    assert sheet.shape == (2 * 50 + 2, 3 * 66 + 2, 3)
    assert np.array_equal(sheet[52:100, 68:132], FLAT[4]) and (sheet[:2] == 255).all()
