"""Runs that are stopped, killed or refused: they go on as if nothing had happened, or say why they do not."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from test_train import MODEL, RECIPE, ROOT, SCALER, command, difference, environment, same, tensors, trained

import prepare_data
from nanodisco import checkpoint
from nanodisco.config import to_dict
from nanodisco.errors import InputError
from nanodisco.loading import load

# ---- Stopped and gone on with ------------------------------------------------------------------------------------

@pytest.mark.parametrize("more", [(), ("--train.precision=fp16",), ("--train.precision=bf16", "--data.workers=1"),
                                  ("--train.lora_rank=2", "--train.unet=crossattn"), ("--train.optimizer=muon",)],
                         ids=str)
def test_a_run_in_two_pieces_is_the_whole_run(place, more):
    whole = trained(place, "whole", *more)
    run = place / "pieces"
    trained(place, "pieces", "--train.keep=0", *more)
    for step in (4, 6):
        shutil.rmtree(run / f"step-{step:07}")
    assert same(whole, trained(place, "pieces", "--train.keep=0", "--resume=auto", *more))


def test_the_scale_of_an_fp16_loss_goes_on(place, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: SCALER(device, init_scale=1024.0, growth_interval=2))
    scales = []
    for _ in range(2):
        trained(place, "a", "--train.precision=fp16", "--train.keep=0", "--resume=auto")
        scales.append(checkpoint.newest(place / "a", print)[1]["scaler"])
        for step in (4, 6):
            shutil.rmtree(place / "a" / f"step-{step:07}")
    assert scales[0] == scales[1] and scales[0]["scale"] == 1024 * 2 ** 3        # doubled every other step


@pytest.mark.parametrize("more", [(), ("--train.optimizer=muon", "--train.noises=2", "--train.precision=bf16")],
                         ids=str)
def test_three_processes_that_go_on_end_with_the_bits_of_those_that_were_not_stopped(place, more):
    """Three add in an order, so it must not depend on when a process began."""
    more += ("--train.batch=3", "--train.keep=0", "--resume=force")
    for out in ("whole", "pieces"):
        subprocess.run(command(place, out, *more, ranks=3), env=environment(), check=True, capture_output=True)
    for step in (4, 6):
        shutil.rmtree(place / "pieces" / f"step-{step:07}")
    subprocess.run(command(place, "pieces", *more, ranks=3), env=environment(), check=True, capture_output=True)
    assert same(tensors(place / "whole"), tensors(place / "pieces"))


def test_a_run_may_move(place):
    whole = trained(place, "whole")
    trained(place, "a", "--train.keep=0")
    shutil.rmtree(place / "a" / "step-0000006")
    (place / "elsewhere").mkdir()
    shutil.move(place / "a", place / "elsewhere" / "b")
    assert same(whole, trained(place, "elsewhere/b", "--train.keep=0", "--resume=auto"))


def test_last_is_the_checkpoint_that_a_run_goes_on_from(place):
    """Killed between its renaming and the link's; or damaged since."""
    trained(place, "a", "--train.keep=0")
    checkpoint.point(place / "a", place / "a" / "step-0000002")
    trained(place, "a", "--train.keep=0", "--resume=auto")
    assert os.readlink(place / "a" / "last") == "step-0000006"


def test_steps_that_are_made_again_are_logged_once(place):
    trained(place, "a", "--train.keep=0")
    shutil.rmtree(place / "a" / "step-0000006")
    with open(place / "a" / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')                                    # a killed process's last words
    trained(place, "a", "--train.keep=0", "--resume=auto")
    lines = [json.loads(line) for line in (place / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_steps_before_the_first_checkpoint_are_logged_once(place):
    (place / "a").mkdir()
    (place / "a" / "log.jsonl").write_text('{"step": 1, "loss": 7.0}\n')  # killed then
    trained(place, "a", "--resume=auto")
    lines = [json.loads(line) for line in (place / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[0]["loss"] != 7


# ---- Killed ------------------------------------------------------------------------------------------------------

def killed_and_resumed(place: Path, ranks: int, kills: int, seed: int) -> bool:
    """Are the last bits of a run that was killed so often those of one that was not?

    SIGKILL to all of its processes, at a random moment after the first step that it makes. A checkpoint is
    saved after every step, so these moments lie within steps, between their parts, in saves and renames, and in
    validation.
    """
    more = ("--train.steps=60", "--train.save_every=1", "--train.accumulate=2", "--train.validate_every=9",
            "--train.validate_count=1", "--resume=auto")
    subprocess.run(command(place, "whole", *more, ranks=ranks), env=environment(), check=True, capture_output=True)
    run, moment = place / "killed", random.Random(seed)
    for _ in range(kills):
        newest = checkpoint.found(run)[-1:]
        process = subprocess.Popen(command(place, "killed", *more, ranks=ranks), env=environment(),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while checkpoint.found(run)[-1:] == newest and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.15))
        assert process.poll() is None, "it ended before it was killed: --train.steps is too small for so many kills"
        subprocess.run(["pkill", "-KILL", "-f", str(run)])
        process.wait()
    subprocess.run(command(place, "killed", *more, ranks=ranks), env=environment(), check=True, capture_output=True)
    assert not list(run.glob(".step-*"))
    return same(tensors(place / "whole"), tensors(run))


@pytest.mark.parametrize("ranks, kills", [(1, 3), (2, 2)])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(place, ranks, kills):
    assert killed_and_resumed(place, ranks, kills, seed=ranks)


KILLER = """
import importlib, os, signal, sys
import train

module, name, call = sys.argv[1].split(":")
*inside, name = name.split(".")
owner = importlib.import_module(module)
for part in inside:
    owner = getattr(owner, part)
original, calls = getattr(owner, name), []

def watched(*args, **more):
    calls.append(1)
    if len(calls) == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **more)

setattr(owner, name, watched)
train.main(sys.argv[2:])
"""


EACH_STEP = ("--train.save_every=1", "--train.accumulate=2", "--train.validate_every=3", "--train.validate_count=1",
             "--resume=auto")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What one and two processes make that are not killed."""
    place = tmp_path_factory.mktemp("unbroken")
    (place / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    subprocess.run(command(place, "two", *EACH_STEP, ranks=2), env=environment(), check=True, capture_output=True)
    return {1: trained(place, "one", *EACH_STEP), 2: tensors(place / "two")}


@pytest.mark.parametrize("moment, folders, ranks", [
    ("nanodisco.start:Loss.forward:5", 2, 1),                            # in step 3
    ("nanodisco.start:Loss.forward:6", 2, 1), ("nanodisco.start:Loss.forward:6", 2, 2),      # between its parts
    ("nanodisco.judge:imagined:1", 2, 1),                                # in the validation of step 3
    ("nanodisco.judge:write_sheet:1", 2, 1), ("nanodisco.judge:write_sheet:1", 2, 2),
    ("nanodisco.checkpoint:_write_tensors:2", 1, 1),                     # while the second checkpoint is written
    ("nanodisco.checkpoint:checksum:6", 1, 1),
    ("os:rename:4", 1, 1), ("os:rename:4", 1, 2),                        # before it is renamed
    ("nanodisco.checkpoint:point:2", 2, 1),                              # before `last` is moved, and half-way
    ("os:replace:2", 2, 1),
    ("nanodisco.checkpoint:found:6", 3, 1)])                             # before the first one is removed
def test_killed_at_this_moment_a_run_ends_with_the_same_bits(place, unbroken, moment, folders, ranks):
    (place / "killer.py").write_text(KILLER)
    python, *launch = command(place, "killed", *EACH_STEP, ranks=ranks)
    launch[launch.index(str(ROOT / "train.py"))] = str(place / "killer.py")
    launch.insert(launch.index(str(place / "killer.py")) + 1, moment)
    ended = subprocess.run([python, *launch], env=environment(), capture_output=True).returncode
    assert ended == -signal.SIGKILL if ranks == 1 else ended != 0
    assert len(checkpoint.found(place / "killed")) == folders
    if ranks == 1:
        trained(place, "killed", *EACH_STEP)
    else:
        subprocess.run(command(place, "killed", *EACH_STEP, ranks=ranks), env=environment(), check=True,
                       capture_output=True)
    assert same(unbroken[ranks], tensors(place / "killed")) and not list((place / "killed").glob(".step-*"))


def test_a_lost_process_is_started_again_and_the_run_goes_on(place):
    more = ("--train.steps=60", "--train.save_every=1", "--resume=auto")
    subprocess.run(command(place, "whole", *more, ranks=2), env=environment(), check=True, capture_output=True)
    port = random.randrange(20000, 40000)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2",
              "--master-addr=127.0.0.1", f"--master-port={port}", *command(place, "lost", *more)[1:]]
    agent = subprocess.Popen(launch, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not checkpoint.found(place / "lost") and agent.poll() is None:
        time.sleep(0.01)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert agent.wait(timeout=300) == 0
    assert same(tensors(place / "whole"), tensors(place / "lost"))


# ---- Damaged, or not written -------------------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_passed_over_and_named(place, capsys):
    whole = trained(place, "a", "--train.keep=0")
    newest = place / "a" / "step-0000006" / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    capsys.readouterr()
    found, about = checkpoint.newest(place / "a", print)
    assert found.name == "step-0000004" and about["step"] == 4
    assert "step-0000006 is damaged (training.safetensors)" in capsys.readouterr().out
    assert same(whole, trained(place, "a", "--train.keep=0", "--resume=auto"))


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe", b"step: [", b"step: 6"])
def test_a_damaged_description_is_passed_over(place, damage, capsys):
    trained(place, "a", "--train.keep=0")
    (place / "a" / "step-0000006" / "training.yaml").write_bytes(damage)
    assert checkpoint.newest(place / "a", print)[0].name == "step-0000004"
    assert "step-0000006 is damaged (training.yaml" in capsys.readouterr().out


def test_a_run_without_one_whole_checkpoint_is_not_begun_anew(place):
    trained(place, "a", "--train.keep=0")
    for folder in checkpoint.found(place / "a"):
        (folder / "config.yaml").write_text("")
    with pytest.raises(InputError, match="no checkpoint of 3 is whole"):
        trained(place, "a", "--resume=auto")


def test_damaged_checkpoints_to_come_do_not_push_out_whole_ones(place, monkeypatch):
    trained(place, "a", "--train.keep=0")
    for name in ("step-0000004", "step-0000006"):
        (place / "a" / name / "config.yaml").write_text("")

    def save_once(*given):
        SAVE(*given)
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        trained(place, "a", "--train.keep=1", "--resume=auto")
    assert checkpoint.newest(place / "a", print)[0].name == "step-0000004"


SAVE = checkpoint.save


def test_a_full_disk_leaves_the_old_checkpoint_whole(place):
    small = place / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=6M tmpfs {small} 2>/dev/null"):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        ran = subprocess.run(command(place, "small/run", "--train.keep=0", "--train.save_every=1"), env=environment(),
                             capture_output=True, text=True)
        assert ran.returncode == 2 and "Traceback" not in ran.stderr and "No space left" in ran.stderr.splitlines()[-1]
        newest, about = checkpoint.newest(small / "run", print)
        assert newest == checkpoint.found(small / "run")[-1] and about["step"] >= 1
        assert os.readlink(small / "run" / "last") == newest.name and not list((small / "run").glob(".step-*"))
    finally:
        os.system(f"umount {small}")


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one_whole(place, monkeypatch):
    saves, save_file = [], checkpoint.save_file

    def full(*given):
        saves.append(1)
        if len(saves) == 2:
            raise SafetensorError("I/O error: No space left on device")
        save_file(*given)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match="No space left on device; nothing was written"):
        trained(place, "a")
    assert [path.name for path in checkpoint.found(place / "a")] == ["step-0000002"]
    assert os.readlink(place / "a" / "last") == "step-0000002" and not list((place / "a").glob(".step-*"))


# ---- What may change when a run goes on --------------------------------------------------------------------------

def test_how_a_run_is_watched_and_saved_may_change_when_it_goes_on(place):
    whole = trained(place, "whole")
    trained(place, "a", "--train.keep=0")
    shutil.rmtree(place / "a" / "step-0000006")
    assert same(whole, trained(place, "a", "--resume=auto", "--train.save_every=1", "--train.log_every=3"))


@pytest.mark.parametrize("first, then", [("adamw", "muon"), ("muon", "adamw")])
def test_by_force_a_run_goes_on_with_another_optimizer(place, first, then, capsys):
    trained(place, "a", f"--train.optimizer={first}", "--train.steps=4")
    capsys.readouterr()
    trained(place, "a", f"--train.optimizer={then}", "--resume=force")
    assert f"it goes on by force: recipe.train.optimizer: {first} -> {then}" in capsys.readouterr().out
    new = tensors(place / "a")
    trained(place, "b", f"--train.optimizer={then}")
    assert new.keys() == tensors(place / "b").keys()


def test_by_force_another_number_of_processes_is_dealt_the_same_batches(place):
    trained(place, "one", "--train.keep=0")
    trained(place, "two", "--train.keep=0")
    for step in (4, 6):
        shutil.rmtree(place / "two" / f"step-{step:07}")
    subprocess.run(command(place, "two", "--train.keep=0", "--resume=force", ranks=2), env=environment(), check=True,
                   capture_output=True)
    assert difference(place / "one", place / "two") < 1e-5


def test_another_recipe_is_refused_with_what_changed(place):
    trained(place, "a")
    with pytest.raises(InputError, match=r"recipe\.train\.batch: 4 -> 2; recipe\.train\.lr: 0\.001 -> 0\.5"):
        trained(place, "a", "--resume=auto", "--train.lr=0.5", "--train.batch=2")
    with pytest.raises(InputError, match=r"recipe\.model\.unet\.heads: 2 -> 4"):
        trained(place, "a", "--resume=auto", "--model.unet.heads=4")
    with pytest.raises(InputError, match=r"data: 11 clips.* -> 12 clips"):
        trained(place, "a", "--resume=auto", "--data.clips=12")
    trained(place, "a", "--resume=force", "--train.lr=0.5", "--train.steps=7")


def test_another_number_of_processes_is_refused(place):
    trained(place, "a")
    done = subprocess.run(command(place, "a", "--resume=auto", ranks=2), env=environment(), capture_output=True,
                          text=True)
    assert done.returncode and "processes: 1 -> 2" in done.stderr


def test_other_files_are_refused_when_a_run_goes_on(place):
    for seed in "01":
        prepare_data.main(["dancers", "--out", str(place / seed), "--clips", "3", "--frames", "2", "--size", "16",
                           "--format", "tsv", "--seed", seed])
    flags = [f"--data={{kind: tsv, path: {place / seed / 'train.yaml'}, width: 16, height: 16}}" for seed in "01"]
    trained(place, "a", flags[0])
    with pytest.raises(InputError, match="data: 6 rows, .* -> 6 rows"):
        trained(place, "a", flags[1], "--resume=auto")


def test_another_network_is_refused_even_by_force(place):
    trained(place, "a")
    with pytest.raises(InputError, match="another network"):
        trained(place, "a", "--resume=force", "--model.unet.widths=[32, 32]", "--train.steps=8")


def test_a_folder_that_another_process_trains_in_is_refused(place):
    code = ("import sys; from pathlib import Path; from nanodisco import checkpoint; "
            "claim = checkpoint.lock(Path(sys.argv[1])); print(1, flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", code, str(place / "a")], env=environment(),
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(InputError, match="another process trains there"):
        trained(place, "a")
    other.communicate(b"\n")
    trained(place, "a")


def test_a_run_is_never_begun_over_another(place):
    trained(place, "a")
    with pytest.raises(InputError, match="holds a run already"):
        trained(place, "a")


# ---- What a checkpoint holds -------------------------------------------------------------------------------------

def test_the_last_checkpoint_is_a_model_to_use(place):
    trained(place, "a")
    net = load(place / "a" / "last", say=lambda text: None)
    assert to_dict(net.config)["unet"]["widths"] == MODEL["unet"]["widths"]


def test_the_model_of_a_checkpoint_is_the_average(place):
    end = trained(place, "a")
    name = "unet.conv_out.weight"
    assert not torch.equal(end[name], end[f"training.weight.{name}"])
    without = trained(place, "b", "--train.ema=0")
    assert torch.equal(without[name], end[f"training.weight.{name}"])


def test_only_the_newest_checkpoints_stay(place):
    trained(place, "a")
    assert [path.name for path in checkpoint.found(place / "a")] == ["step-0000004", "step-0000006"]
    assert os.readlink(place / "a" / "last") == "step-0000006"
