"""TSV files and the validation sets made of them: official bytes, and refusals."""
import base64
import io
import json

import pytest
from PIL import Image

from nanodisco.config import ClipConfig
from nanodisco.data import Training, TsvDataset
from nanodisco.errors import InputError
from nanodisco.recipe import DataConfig
from nanodisco.tsv import Table
from test_transforms import PHOTOS, needs_photos


def jpeg(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (shade,) * 3).save(buffer, format="JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture
def folder(tmp_path):
    for name in ("images", "poses", "masks"):
        (tmp_path / f"val_{name}.tsv").write_text("".join(f"key{i}\t{jpeg(100 * i)}\n" for i in range(2)))
    (tmp_path / "val_vid2line.tsv").write_text("key0\t[0, 1]\nkey1\t[-1, 0]\n")
    (tmp_path / "val.yaml").write_text("".join(f"{field}: val_{name}.tsv\n" for field, name in (
        ("img", "images"), ("poses", "poses"), ("masks", "masks"), ("vid2line", "vid2line"))))
    return tmp_path


def test_rows_are_found_without_a_line_index(folder):
    table = Table(folder / "val_images.tsv")
    assert len(table) == 2 and table[1][0] == "key1" and table.picture(1).getpixel((0, 0)) == (100, 100, 100)


def test_line_index_says_where_the_rows_are(folder):
    second = len("key0\t[0, 1]\n")
    (folder / "val_vid2line.lineidx").write_text(f"0\n{second}\n")
    assert Table(folder / "val_vid2line.tsv")[1] == ["key1", "[-1, 0]"]


def test_reference_is_the_first_frame_of_the_video(folder):
    row = TsvDataset(folder / "val.yaml")[1]
    assert row.key == "key1" and row.target.getpixel((0, 0))[0] == 100 and row.reference.getpixel((0, 0))[0] == 0


@pytest.mark.parametrize("frames, every, wanted", [(2, 2, [(0, 2)]), (1, 1, [(0, 1), (1, 2)]), (3, 3, [(0, 2)]),
                                                   (2, 1, [(0, 2)])])
def test_clips_stay_within_their_video(folder, frames, every, wanted):
    assert TsvDataset(folder / "val.yaml").clips(frames, every) == [range(*rows) for rows in wanted]


def test_last_clip_begins_earlier_so_that_it_is_whole(folder):
    for name in ("images", "poses", "masks"):
        (folder / f"val_{name}.tsv").write_text("".join(f"key{i}\t{jpeg(10 * i)}\n" for i in range(7)))
    (folder / "val_vid2line.tsv").write_text("".join(f"key{i}\t[{-i}, {4 - i}]\n" for i in range(5))
                                             + "key5\t[0, 1]\nkey6\t[-1, 0]\n")
    rows = TsvDataset(folder / "val.yaml")
    assert rows.clips(2, 2) == [range(0, 2), range(2, 4), range(3, 5), range(5, 7)]
    assert rows.clips(2, 1) == [range(0, 2), range(1, 3), range(2, 4), range(3, 5), range(5, 7)]


@pytest.mark.parametrize("name, content, words", [
    ("val.yaml", "img: none.tsv", "no `poses`"),
    ("val.yaml", "composite: true\nimg: a.tsv", "no `img`; expected a list"),
    ("val_poses.tsv", "key0\tx\n", "different length"),
    ("val_images.lineidx", "0\n9999999\n", "no base64 of a picture"),
    ("val_images.lineidx", "zero", "cannot be read"),
    ("val_vid2line.tsv", "key0\tfirst\nkey1\tsecond\n", "expected \\[first"),
    ("val_vid2line.tsv", "key0\t[0, 1]\nkey1\t[1, 2]\n", "given as offsets"),
    ("val_images.tsv", "key0\tAAAA\nkey1\tAAAA\n", "no base64 of a picture")], ids=str)
def test_a_set_that_does_not_fit_is_refused(folder, name, content, words):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=words):
        TsvDataset(folder / "val.yaml")[1]


def test_a_set_of_nothing_is_refused(folder):
    for name in ("images", "poses", "masks", "vid2line"):
        (folder / f"val_{name}.tsv").write_text("")
    with pytest.raises(InputError, match="or of none; rows: img 0, poses 0, masks 0, vid2line 0"):
        TsvDataset(folder / "val.yaml")


def test_tables_of_one_name_and_different_length_are_refused(folder):
    (folder / "more").mkdir()
    (folder / "more" / "val_images.tsv").write_text(f"key0\t{jpeg(0)}\n")
    text = (folder / "val.yaml").read_text()
    (folder / "val.yaml").write_text(text.replace("val_poses.tsv", "more/val_images.tsv"))
    with pytest.raises(InputError, match="img 2, poses 1"):
        TsvDataset(folder / "val.yaml")


def test_a_missing_file_is_named(folder):
    (folder / "val_masks.tsv").unlink()
    with pytest.raises(InputError, match="val_masks.tsv is not there"):
        TsvDataset(folder / "val.yaml")


# ---- Composite sets ------------------------------------------------------------------------------

@pytest.fixture
def composite(folder):
    """Two sources: a, two videos of one and two frames, of which the list takes the second; b, a video of two."""
    for source, shades, videos in (("a", (10, 20, 30), ("[0, 0]", "[0, 1]", "[-1, 0]")),
                                   ("b", (40, 50), ("[0, 1]", "[-1, 0]"))):
        (folder / source).mkdir()
        for k, name in enumerate(("images", "poses", "masks")):
            rows = [f"key{i}\t{jpeg(shade + 60 * k)}\n" for i, shade in enumerate(shades)]
            (folder / source / f"{name}.tsv").write_text("".join(rows))
        (folder / source / "vid2line.tsv").write_text("".join(f"key{i}\t{v}\n" for i, v in enumerate(videos)))
    (folder / "lines.tsv").write_text("1\t0\t0\n1\t1\t0\n0\t1\t0\n0\t2\t0\n")
    fields = {"img": "images", "poses": "poses", "masks": "masks", "vid2line": "vid2line", "caption": "captions"}
    (folder / "composite.yaml").write_text("composite: true\ncaption_linelist: lines.tsv\n" + "".join(
        f"{field}: [a/{name}.tsv, b/{name}.tsv]\n" for field, name in fields.items()))
    return folder / "composite.yaml"


def test_a_composite_set_has_the_rows_of_its_list(composite):
    rows = TsvDataset(composite)
    found = [rows[i] for i in range(len(rows))]
    assert [row.key for row in found] == ["b/captions.tsv_key0", "b/captions.tsv_key1", "a/captions.tsv_key1",
                                          "a/captions.tsv_key2"]
    shades = [[getattr(row, what).getpixel((0, 0))[0] for what in ("target", "pose", "reference", "mask")]
              for row in found]
    assert shades == [[40, 100, 40, 160], [50, 110, 40, 160], [20, 80, 20, 140], [30, 90, 20, 140]]
    assert rows.clips(2, 2) == [range(0, 2), range(2, 4)]


def test_a_composite_set_can_be_trained_on(composite):
    data = DataConfig("tsv", str(composite), width=8, height=8, reference="first")
    clip = ClipConfig(image_size=8, patch=8, width=8, layers=1, heads=1, mlp=8, projection=8)
    training = Training(data, clip, True, seed=0)
    shown = training[0, 3]
    assert len(training) == 4 and abs(shown["target"].mean() - (30 / 127.5 - 1)) < 1e-5
    assert "4 rows" in training.source.fingerprint()


@pytest.mark.parametrize("name, content, words", [
    ("lines.tsv", "0\t3\t0\n", "row 0: file 0, row 3; there are, with their rows: .*a.images.tsv 3"),
    ("lines.tsv", "2\t0\t0\n", "row 0: file 2, row 0"), ("lines.tsv", "one\t0\t0\n", "expected three numbers a row"),
    ("lines.tsv", "0\n", "expected three numbers a row"), ("lines.tsv", None, "lines.tsv is not there"),
    ("composite.yaml", "caption: [a/captions.tsv]", "lists of different length"),
    ("composite.yaml", "caption: [a, b]\ncaption_linelist:", "no `caption_linelist`")], ids=str)
def test_a_composite_set_that_does_not_fit_is_refused(composite, name, content, words):
    path = composite.parent / name
    if content is None:
        path.unlink()
    elif name == "lines.tsv":
        path.write_text(content)
    else:
        path.write_text(path.read_text().rpartition("caption:")[0] + content)
    with pytest.raises(InputError, match=words):
        TsvDataset(composite)


@needs_photos
def test_the_official_composite_set_has_the_official_keys_and_references():
    folder = PHOTOS / "video_fixture"
    rows, wanted = TsvDataset(folder / "composite.yaml"), json.loads((folder / "expected_composite.json").read_text())
    assert len(rows) == wanted["len"]
    for row in wanted["rows"]:
        i = row["row"]
        assert rows[i].key == row["img_key"] and rows.images[rows.video(i).start][0] == row["ref_img_key"]
