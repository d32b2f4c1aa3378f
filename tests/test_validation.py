"""validation.py: what is seen of a run, and that looking changes nothing."""
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_train import RECIPE, same, trained

import prepare_data
from nanodisco import dancers, judge, optim, recipe, start, validation
from nanodisco.errors import InputError

LOOK = ("--train.validate_every=3", "--train.validate_count=2")


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_that_is_validated_ends_with_the_same_bits(place):
    assert same(trained(place, "plain"), trained(place, "seen", *LOOK))


def test_pictures_and_scores_come_every_so_many_steps(place):
    trained(place, "a", *LOOK)
    assert sorted(path.name for path in (place / "a" / "validation").iterdir()) == ["step-0000003.png",
                                                                                    "step-0000006.png"]
    assert (place / "a" / "loss.png").exists()
    lines = [line for line in log(place / "a") if "val_psnr" in line]
    assert [line["step"] for line in lines] == [3, 6] and all(line["val_ssim"] <= 1 for line in lines)
    size, gap = 2 * RECIPE["data"]["height"], 8
    width, height = Image.open(place / "a" / "validation" / "step-0000006.png").size
    assert (width, height) == (8 * size + 9 * gap, size + 2 * gap)       # two pairs of four pictures in a row


def test_the_scores_are_those_of_the_average_weights(place):
    trained(place, "a", *LOOK)
    from nanodisco.loading import load
    net, of = load(place / "a" / "last", say=print), judge.pairs(2, validation.SEED, 16)
    made = judge.imagined(net, of, validation.STEPS, validation.GUIDANCE, validation.SEED)
    assert log(place / "a")[-1]["val_psnr"] == pytest.approx(judge.scores(made, of)["psnr"], abs=1e-3)


def test_pre_training_is_validated_on_the_reference_itself(place):
    trained(place, "a", "--pose=false", "--data.reference=same", *LOOK)
    sheet = np.asarray(Image.open(place / "a" / "validation" / "step-0000006.png"))
    reference, truth = (sheet[8:40, 8 + 40 * k:40 + 40 * k] for k in (0, 2))
    assert np.array_equal(reference, truth)


def test_one_person_s_model_is_validated_on_that_person(place):
    trained(place, "a", f"--data.first={dancers.HELD_OUT + 5}", "--data.clips=1", "--train.batch=1", *LOOK)
    sheet = np.asarray(Image.open(place / "a" / "validation" / "step-0000006.png"))
    wanted = dancers.sample(*[dancers.HELD_OUT + 5] * 3, 0, 16).picture
    assert np.array_equal(sheet[8:40:2, 8:40:2], wanted)


@pytest.mark.parametrize("more", [(), ("--model.unet.temporal=true", "--data.frames=2")], ids=["picture", "video"])
def test_a_set_of_files_is_validated_on_another(place, more):
    for split in ("train", "held-out"):
        prepare_data.main(["dancers", "--out", str(place / split), "--clips", "2", "--frames", "3", "--size", "16",
                           "--format", "tsv", "--split", split])
    kind = f"--data={{kind: tsv, path: {place}/train/train.yaml, width: 16, height: 16}}"
    trained(place, "a", kind, f"--data.validation={place}/held-out/held-out.yaml", *more, *LOOK)
    assert log(place / "a")[-1].keys() == {"step", "val_psnr", "val_ssim"}
    sheet = np.asarray(Image.open(place / "a" / "validation" / "step-0000006.png"))
    truth = dancers.sample(*[dancers.HELD_OUT] * 3, 0, 16).picture
    assert np.array_equal(sheet[8:40:2, 88:120:2], truth)


def test_files_to_validate_on_must_be_named(place):
    with pytest.raises(InputError, match="data.validation is missing"):
        trained(place, "a", "--data={kind: tsv, path: train.yaml}", *LOOK)


def test_showing_the_average_is_undone(place):
    net = start.model(recipe.load(place / "tiny.yaml"), print)
    average = optim.Average(net.named_parameters())
    with torch.no_grad():
        net.unet.conv_out.bias += 1
    before, after = net.unet.conv_out.bias.clone(), average.tensors["unet.conv_out.bias"].clone()
    with average.shown(net):
        assert torch.equal(net.unet.conv_out.bias, after)
    assert torch.equal(net.unet.conv_out.bias, before) and torch.equal(average.tensors["unet.conv_out.bias"], after)


def test_the_curve_goes_down_where_the_loss_does(place):
    lines = [{"step": step, "loss": 10.0 ** -(step / 50)} for step in range(1, 101)]
    (place / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    validation.curve(place / "log.jsonl", place / "loss.png")
    picture = np.asarray(Image.open(place / "loss.png")).astype(int)
    dark = (picture[..., 2] - picture[..., 0] > 60)[:, validation.LEFT + 60:-25]
    heights = [np.flatnonzero(column).mean() for column in dark.T[::50]]
    assert picture.shape == (validation.HIGH, validation.WIDE, 3)
    assert np.diff(heights).min() > 0 and np.ptp(np.diff(heights)) < 5   # a straight line on a logarithmic axis


def test_a_curve_of_nothing_is_none(place):
    (place / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    validation.curve(place / "log.jsonl", place / "loss.png")
    assert not (place / "loss.png").exists()


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_named_with_its_pip_line(place, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"pip install {name}"):
        trained(place, "a", f"--train.logger={name}")


def test_tensorboard_has_the_numbers_of_the_log_once_also_after_a_resume(place):
    trained(place, "a", "--train.logger=tensorboard", "--train.keep=0")
    shutil.rmtree(place / "a" / "step-0000006")
    trained(place, "a", "--train.logger=tensorboard", "--train.keep=0", "--resume=auto")
    events = EventAccumulator(str(place / "a" / "tensorboard")).Reload()
    for name in ("loss", "lr"):
        seen = [(event.step, event.value) for event in events.Scalars(name)]
        assert np.allclose(seen, [(line["step"], line[name]) for line in log(place / "a")])


def test_wandb_is_given_the_lines_of_the_log(place, monkeypatch):
    runs, lines = [], []

    def init(**about):
        runs.append(about)
        return SimpleNamespace(log=lambda line, step: lines.append(line | {"step": step}))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    trained(place, "a", "--train.logger=wandb")
    assert lines == log(place / "a")
    assert runs == [{"project": "nanodisco", "name": "a", "dir": place / "a"}]


def test_rows_to_validate_on_are_not_cropped(place):
    for split in ("train", "held-out"):
        prepare_data.main(["dancers", "--out", str(place / split), "--clips", "1", "--frames", "2", "--size", "16",
                           "--format", "tsv", "--split", split])
    trained(place, "a", f"--data={{kind: tsv, path: {place}/train/train.yaml, width: 16, height: 16}}",
            "--data.crop=[0.3, 0.4]", f"--data.validation={place}/held-out/held-out.yaml", *LOOK)
    sheet = np.asarray(Image.open(place / "a" / "validation" / "step-0000006.png"))
    assert np.array_equal(sheet[8:40:2, 88:120:2], dancers.sample(*[dancers.HELD_OUT] * 3, 0, 16).picture)


def test_without_a_terminal_each_line_of_the_log_is_printed(place, capsys):
    trained(place, "a")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in printed if line.startswith("step ")] == [f"step {i}" for i in range(1, 7)]
    assert f"loss {log(place / 'a')[2]['loss']:.4g}" in printed[3]


def test_a_step_of_a_long_run_is_printed_whole(place, capsys):
    validation.Log(place, recipe.load(place / "tiny.yaml"), 12344).write({"step": 12345, "loss": 0.123456})
    assert capsys.readouterr().out == "step 12345, loss 0.1235\n"


def test_ticks_are_round_numbers_between_the_ends():
    assert validation._ticks(0.09, 6) == [0.1, 0.2, 0.5, 1, 2, 5]
    assert validation._ticks(0.21, 0.26) == [0.21, 0.22, 0.23, 0.24, 0.25, 0.26]
    assert validation._ticks(0.085, 0.112) == [0.085, 0.09, 0.095, 0.1, 0.105, 0.11]         # equal steps


@pytest.mark.parametrize("first, last, marks", [(50, 6500, [2000, 4000, 6000]), (1, 100, [20, 40, 60, 80, 100]),
                                                (10, 500, [100, 200, 300, 400, 500]), (1, 6, [1, 2, 3, 4, 5, 6])])
def test_steps_are_marked_at_round_numbers(first, last, marks):
    assert validation._marks(first, last) == pytest.approx(marks)
