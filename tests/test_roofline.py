"""The roofline of made-up measurements."""
import json

import numpy as np
import pytest
import roofline
from PIL import Image

CEILINGS = {"flops": 800e12, "bytes": 4e12, "exps": 4e12}
FOUND = {"ceilings": CEILINGS, "machine": {"gpu": "made up"}, "tables": {
    "attention": [{"name": "self", "TFLOP/s": 400.0, "GB/s": 1000.0},
                  {"name": "short", "TFLOP/s": 40.0, "GB/s": 2000.0}],
    "group norm": [{"name": "320@32", "TFLOP/s": 0, "GB/s": 3000.0}]}}


def test_a_kernel_lies_at_its_operations_a_byte():
    assert roofline.points(FOUND) == [("attention", "self", 400.0, 400e12), ("attention", "short", 20.0, 40e12)]


@pytest.mark.parametrize("intensity, rate", [(20, 80e12), (200, 800e12), (2000, 800e12)])
def test_the_roof_rises_with_the_bandwidth_and_ends_at_the_peak(intensity, rate):
    assert roofline.roof(intensity, CEILINGS) == pytest.approx(rate)


def test_points_are_drawn_where_they_are_below_the_roof(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(FOUND))
    roofline.main([str(tmp_path / "bench.json"), str(tmp_path / "roofline.png")])
    picture = np.asarray(Image.open(tmp_path / "roofline.png")).astype(int)
    axes = roofline.Axes(roofline.points(FOUND), CEILINGS)
    for _, _, intensity, rate in roofline.points(FOUND):
        x, y = (round(pixels / roofline.FINE) for pixels in axes.at(intensity, rate))
        assert np.abs(picture[y, x] - (0x1f, 0x4e, 0x8c)).max() < 8
        above = axes.at(intensity, roofline.roof(intensity, CEILINGS))[1] / roofline.FINE
        assert above < y and picture[round(above), x].max() < 60         # the roof is black


def test_a_file_without_times_of_a_gpu_is_refused(tmp_path):
    (tmp_path / "bench.json").write_text('{"tables": {}}')
    with pytest.raises(SystemExit, match="no times of a GPU"):
        roofline.main([str(tmp_path / "bench.json"), str(tmp_path / "roofline.png")])
