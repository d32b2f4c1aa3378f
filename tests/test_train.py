"""train.py: the official numbers, the same however the work is divided; and what cannot be trained is refused."""
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from formula import LOSS, build, golden, training_data
from PIL import Image
from safetensors.torch import load_file

import prepare_data
import train
from nanodisco import checkpoint, dancers, data, optim, recipe, start, transforms, weights
from nanodisco.config import ClipConfig, ModelConfig, from_dict, to_dict
from nanodisco.disco import Batch, DisCo
from nanodisco.errors import InputError

ROOT = Path(__file__).parent.parent
MODEL = {"unet": {"channels": 4, "widths": [16, 16], "attention": [True, False], "layers": 1, "heads": 2, "context": 16,
                  "groups": 4},
         "vae": {"channels": 4, "widths": [8, 8], "layers": 1, "groups": 4, "scaling": 0.5},
         "clip": {"image_size": 16, "patch": 8, "width": 16, "layers": 1, "heads": 2, "mlp": 32, "projection": 16},
         "diffusion": {"steps": 100, "schedule": "linear", "beta_start": 0.001, "beta_end": 0.02},
         "pose": {"hint": "pixels", "channels": 3, "widths": [8, 8]}, "background": {"hint": "latents", "channels": 4}}
RECIPE = {"model": MODEL, "data": {"kind": "dancers", "clips": 11, "width": 16, "height": 16, "reference": "random"},
          "train": {"steps": 6, "batch": 4, "lr": 1e-3, "ema": 0.9, "drop_reference": 0.2, "save_every": 2,
                    "log_every": 1}}


CLIP = ClipConfig(**MODEL["clip"])


def trained(place: Path, out: str, *more: str) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    train.main([str(place / "tiny.yaml"), f"--out={place / out}", "--device=cpu", *more])
    return tensors(place / out)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    found = {prefix + name: tensor for file, prefix in (("model", ""), ("training", "training."))
             for name, tensor in load_file(run / "last" / f"{file}.safetensors").items()}
    return {name: tensor.clone() for name, tensor in found.items()}      # what was loaded is a map of the file


def difference(one: Path, other: Path) -> float:
    """Of two runs: of the losses and gradient norms of all steps, and of the weights, as shares of their size.

    Of the weights together: Adam makes a whole step of a gradient that is nothing but rounding.
    """
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    steps = [abs(a[key] / b[key] - 1) for a, b in zip(*logs, strict=True) for key in ("loss", "norm")]
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    names = [name for name in a if not name.startswith("training.exp")]
    squares = [sum(float(x.double().square().sum()) for x in xs)
               for xs in ([a[name] - b[name] for name in names], [b[name] for name in names])]
    return max(*steps, (squares[0] / squares[1]) ** 0.5)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(place: Path, out: str, *more: str, ranks: int = 1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launch, str(ROOT / "train.py"), str(place / "tiny.yaml"), f"--out={place / out}",
            "--device=cpu", *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# ---- One step ------------------------------------------------------------------------------------------------

def test_three_steps_have_the_official_losses(monkeypatch):
    """The pieces of train.py's loop in its order: rate, loss, gradient, AdamW."""
    results = golden("image/results.json")["train"]
    wanted = results["losses_over_3_adamw_steps_lr2e-4_wd1e-3_betas0.9_0.98"]
    net = build("image")
    parameters = optim.select(net, optim.trainable([name for name, _ in net.named_parameters()]))
    settings = recipe.TrainConfig(steps=10, batch=1, lr=2e-4, constant_lr=True, warmup=0)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    loss, losses = start.Loss(net, settings), []
    batch, draws = training_data()
    for _ in wanted:
        optimizer.zero_grad()
        error = loss({name: x for name, x in vars(batch).items() if x is not None}, draws)
        error.backward()
        optimizer.step()
        losses.append(error.item())
    assert losses == pytest.approx(wanted, rel=LOSS)


def test_gradients_with_and_without_kept_activations_are_equal():
    def gradients(forgetful: bool) -> list[torch.Tensor]:
        net = build("image")
        optim.select(net, optim.trainable([name for name, _ in net.named_parameters()]))
        if forgetful:
            optim.checkpoint_activations(net)
        net.loss(*training_data()).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]
    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(a, b)


def test_activations_that_are_not_kept_are_computed_again():
    net, calls = build("image"), []
    optim.checkpoint_activations(net)
    net.unet.encoder.mid.res[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    loss = net.loss(*training_data())
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_overflows_changes_nothing(place, monkeypatch, optimizer):
    before = start.model(recipe.load(place / "tiny.yaml"), print).state_dict()
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: SCALER(device, init_scale=2.0 ** 100))
    after = trained(place, "b", "--train.steps=1", "--train.precision=fp16", "--train.lr=1.0", "--train.warmup=0",
                    f"--train.optimizer={optimizer}")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(torch.equal(before[name.removeprefix("training.weight.")], tensor) for name, tensor in after.items()
               if name.startswith("training.weight."))
    assert not any(tensor.any() for name, tensor in after.items() if name.startswith(("training.exp", "training.mom")))


def test_a_loss_that_overflows_in_float16_is_passed_over_but_not_for_ever(place, monkeypatch):
    calls, bad = [], {2}

    def loss(self, *given):
        calls.append(1)
        return ORIGINAL(self, *given) * (float("inf") if len(calls) in bad else 1.0)
    monkeypatch.setattr(start.Loss, "forward", loss)
    trained(place, "a", "--train.precision=fp16")
    lines = [json.loads(line) for line in (place / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [False, True, False, False, False, False]
    bad |= set(range(100))
    with pytest.raises(InputError, match="the loss of step 1[78] is"):   # the scale begins at 2^16 and is halved
        trained(place, "b", "--train.precision=fp16", "--train.steps=30")


SCALER = torch.amp.GradScaler


def test_a_recipe_s_loss_is_the_model_s_with_what_it_says(place):
    r = recipe.load(place / "tiny.yaml", ["--train.person=3", "--train.min_snr=0.5", "--train.loss=x0"])
    net = start.model(r, print)
    samples = next(data.loader(data.Training(r.data, net.config.clip, True, 1), 4, 0, 1, 0, 1, 0))
    draws = start.draws(net, samples["target"].shape, 4, r.train, 0)
    batch = Batch(samples["target"], samples["reference"], samples["background"], samples["pose"])
    weight = 1 + 2 * torch.nn.functional.interpolate(samples["person"], draws.noise.shape[2:], mode="area")
    with torch.no_grad():
        assert torch.equal(start.Loss(net, r.train)(samples, draws), net.loss(batch, draws, 0.5, "x0", weight))


def test_a_gradient_that_is_clipped_to_nothing_moves_nothing(place):
    before = start.model(recipe.load(place / "tiny.yaml"), print).state_dict()
    after = trained(place, "a", "--train.clip_norm=1e-30", "--train.weight_decay=0")
    assert all(torch.allclose(tensor, after[name], rtol=0, atol=1e-20) for name, tensor in before.items())


def test_frozen_encoders_keep_nothing_for_a_backward_pass(place):
    r = recipe.load(place / "tiny.yaml")
    net, seen = start.model(r, print), []
    optim.select(net, optim.trainable([name for name, _ in net.named_parameters()]))
    for part in (net.vae.encoder, net.clip.vision):
        part.register_forward_hook(lambda module, given, made: seen.append(made))
    samples = next(data.loader(data.Training(r.data, net.config.clip, True, 1), 4, 0, 1, 0, 1, 0))
    start.Loss(net, r.train)(samples, start.draws(net, samples["target"].shape, 4, r.train, 0)).backward()
    assert len(seen) >= 3                                                # two pictures and a reference, or none too
    assert not any(x.requires_grad for made in seen for x in (made if isinstance(made, tuple) else (made,)))


def test_what_is_frozen_stays(place):
    net = start.model(recipe.load(place / "tiny.yaml"), print)
    after = trained(place, "a", "--train.unet=crossattn", "--train.freeze_pose=true", "--train.ema=0")
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.startswith(("background.", "clip.proj.")) or ".cross_attn." in name for name in changed)


# ---- However the work is divided -------------------------------------------------------------------------------

def test_parts_of_a_batch_add_up(place):
    trained(place, "a")
    trained(place, "b", "--train.accumulate=4")
    assert difference(place / "a", place / "b") < 1e-5


@pytest.mark.parametrize("more", [(), ("--train.accumulate=2",), ("--train.checkpointing=true",),
                                  ("--train.clip=true",), ("--train.noises=3", "--train.accumulate=2"),
                                  ("--train.lora_rank=2", "--train.unet=crossattn")], ids=str)
def test_two_processes_are_as_one(place, more):
    """11 clips in batches of 4: the last batch of an epoch has 3, and leaves one part empty."""
    trained(place, "one", *more)
    subprocess.run(command(place, "two", *more, ranks=2), env=environment(), check=True, capture_output=True)
    assert difference(place / "one", place / "two") < 1e-5


def test_two_processes_with_muon_are_nearly_as_one(place):
    """It makes whole directions, in bfloat16, of what differs in the last bits."""
    trained(place, "one", "--train.optimizer=muon")
    subprocess.run(command(place, "two", "--train.optimizer=muon", ranks=2), env=environment(), check=True,
                   capture_output=True)
    assert difference(place / "one", place / "two") < 1e-3


def test_two_agents_are_as_one(place):
    """As on two machines: each starts a process, and they find each other at an address."""
    trained(place, "one")
    port = random.randrange(20000, 40000)
    agents = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={rank}",
                                "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}",
                                *command(place, "two")[1:]], env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL) for rank in (0, 1)]
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0]
    assert difference(place / "one", place / "two") < 1e-5


def test_epochs_are_counted_in_whole_batches(place):
    """official: (rows // batch) x epochs steps."""
    trained(place, "a", "--train.steps=0", "--train.epochs=3")
    assert checkpoint.newest(place / "a", print)[1]["step"] == 3 * (11 // 4)


def test_workers_do_not_change_what_is_seen(place):
    assert same(trained(place, "a"), trained(place, "b", "--data.workers=2"))


def test_shares_deal_every_sample_once():
    for count in range(9):
        for parts in range(1, 6):
            dealt = data.shares(count, parts)
            assert [i for share in dealt for i in share] == list(range(count)) and len(dealt) == parts
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_an_epoch_shows_every_sample_once_in_an_order_of_its_own():
    epochs = [[place for step in range(3) for place in data.indices(11, 4, 7, 3 * epoch + step)] for epoch in (0, 1)]
    for number, epoch in enumerate(epochs):
        assert {place[0] for place in epoch} == {number} and sorted(place[1] for place in epoch) == list(range(11))
    assert [place[1] for place in epochs[0]] != [place[1] for place in epochs[1]]


# ---- What is trained on, and what comes of it --------------------------------------------------------------------

def test_a_set_of_files_is_trained_on_as_the_dancers_are(place):
    prepare_data.main(["dancers", "--out", str(place / "set"), "--clips", "3", "--frames", "2", "--size", "16",
                       "--format", "tsv"])
    made = trained(place, "a", f"--data={{kind: tsv, path: {place / 'set' / 'train.yaml'}, width: 16, height: 16}}")
    assert made and checkpoint.newest(place / "a", print)[1]["data"].startswith("6 rows")
    config = recipe.DataConfig("tsv", str(place / "set" / "train.yaml"), width=16, height=16)
    rows = data.Training(config, CLIP, True, 0)
    shown, wanted = rows[0, 3], dancers.sample(1, 1, 1, 1, 16)
    assert torch.equal(shown["target"], transforms.target(Image.fromarray(wanted.picture), (16, 16)))
    reference = dancers.sample(1, 1, 1, 0, 16)
    assert torch.equal(shown["reference"], transforms.reference(Image.fromarray(reference.picture),
                                                                Image.fromarray(reference.mask), 16))


def test_clips_are_neighbouring_frames_of_one_video(place):
    config = recipe.DataConfig("dancers", clips=5, width=16, height=16, frames=3, every=2, reference="same")
    shown = data.Training(config, CLIP, True, 0)[0, 4]
    first = int(np.random.default_rng([0, 0, 4]).integers(dancers.LOOP))
    wanted = [dancers.sample(4, 4, 4, first + 2 * k, 16) for k in range(3)]
    for k, frame in enumerate(wanted):
        assert torch.equal(shown["target"][:, k], transforms.target(Image.fromarray(frame.picture), (16, 16)))
        pose = Image.fromarray(dancers.pose_picture(frame.keypoints, 16))
        assert torch.equal(shown["pose"][:, k], transforms.pose(pose, (16, 16)))


def test_the_video_model_trains(place):
    made = trained(place, "a", "--model.unet.temporal=true", "--data.frames=3", "--train.unet=tem",
                   "--train.drop_pose=0.3", "--train.checkpointing=true")
    assert made["unet.up.0.res.0.temporal.conv.weight"].any()


def test_pre_training_has_no_pose_and_its_weights_go_into_the_next_stage(place, capsys):
    made = trained(place, "one", "--pose=false", "--data.reference=same")
    assert not any(name.startswith("pose.") for name in made)
    values = RECIPE | {"start": ["one/last"], "variant": "image"}
    (place / "two.yaml").write_text(yaml.safe_dump(values))
    capsys.readouterr()
    net = start.model(recipe.load(place / "two.yaml"), print)
    said = capsys.readouterr().out
    assert "pose net; started as a copy of the UNet's encoder" in said
    assert "one/last: of attribute pre-training; its UNet, image encoder and background net go on" in said
    assert torch.equal(net.background.hint.conv_in.weight, made["background.hint.conv_in.weight"])
    assert torch.equal(net.pose.encoder.conv_in.weight, net.unet.encoder.conv_in.weight)


def test_the_average_of_a_run_follows_its_formula(place):
    trained(place, "a", "--train.keep=0", "--train.save_every=1")
    begin = start.model(recipe.load(place / "tiny.yaml"), print).state_dict()["unet.conv_out.weight"]
    average = begin.double()
    for step in range(6):
        folder, share = place / "a" / f"step-000000{step + 1}", min(0.9, (1 + step) / (10 + step))
        weight = load_file(folder / "training.safetensors")["weight.unet.conv_out.weight"]
        average = share * average + (1 - share) * weight.double()
        assert torch.allclose(load_file(folder / "model.safetensors")["unet.conv_out.weight"].double(), average,
                              rtol=0, atol=1e-7)


def test_the_rate_that_is_logged_is_the_schedule(place):
    trained(place, "a", "--train.warmup=0.5")
    rates = [json.loads(line)["lr"] for line in (place / "a" / "log.jsonl").read_text().splitlines()]
    assert rates == [optim.learning_rate(step, 6, 1e-3, 0.5) for step in range(6)]
    assert rates[1] == pytest.approx(1e-3 / 3)


def test_a_vae_and_its_average_begin_at_principal_components(place):
    """Neither the weights nor their average remember what they were before."""
    linear = {**MODEL, "vae": MODEL["vae"] | {"linear": True}}
    made = trained(place, "a", "--stage=vae", "--pose=false", f"--model={json.dumps(linear)}", "--train.lr=1e-9",
                   "--train.ema=0.999")
    net = start.model(recipe.load(place / "tiny.yaml", [f"--model={json.dumps(linear)}", "--pose=false"]), print)
    begin = net.vae.linear_in.weight.clone()
    config = replace(recipe.load(place / "tiny.yaml").data)
    start.principal_components(net, data.Training(config, CLIP, False, 42))
    for prefix in ("", "training.weight."):
        torch.testing.assert_close(made[f"{prefix}vae.linear_in.weight"], net.vae.linear_in.weight, atol=1e-6, rtol=0)
    assert (begin - net.vae.linear_in.weight).abs().max() > 0.1


def test_a_decoder_trains_on_latents_as_they_are(place):
    """Of a VAE its way back alone, with noise up to what the recipe says."""
    trained(place, "vae", "--stage=vae", "--pose=false")
    flags = ("--stage=decoder", "--pose=false", f"--start=[{place / 'vae/last'}]", "--train.ema=0")
    quiet, loud = trained(place, "quiet", *flags), trained(place, "loud", *flags, "--train.latent_noise=0.5")
    begin = load_file(place / "vae" / "last" / "model.safetensors")
    moved = {name for name in begin if not torch.equal(begin[name], loud[name])}
    assert moved == {name for name in begin if name.startswith(("vae.decoder.", "vae.from_latent."))}
    assert any(not torch.equal(quiet[name], loud[name]) for name in moved)


def test_a_line_is_logged_for_every_step(place):
    trained(place, "a")
    lines = [json.loads(line) for line in (place / "a" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(line["loss"] > 0 for line in lines)


# ---- What cannot be trained --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, more", [("none.yaml", []), ("tiny.yaml", ["--data={kind: tsv, path: none.yaml}"])])
def test_files_that_are_missing_are_named(place, name, more):
    with pytest.raises(InputError, match="none.yaml is not there"):
        train.main([str(place / name), f"--out={place / 'a'}", "--device=cpu", *more])


@pytest.mark.parametrize("argument, words", [
    ("--train.stepz=3", "did you mean 'steps'"), ("--lr=3", "unknown key lr; did you mean train.lr?"),
    ("--train.lr=fast", "expected float"), ("--train.batch=0", "1 or more"),
    ("--train.accumulate=3", "expected a multiple"), ("--train.unet=unet.nothing", "matches no tensor"),
    ("--data.kind=dancer", "expected one of dancers, tsv"), ("--data.path=a.yaml", "expected data.kind tsv"),
    ("--start=[pretrained/last]", "it is what this stage goes on"),
    ("--train.precision=fp8", "expected one of fp32"), ("--train.optimizer=sgd", "expected one of adamw, muon"),
    ("--model=null", "neither model nor start"),
    ("--stage=decoder", "goes on from the weights of a VAE"), ("--train.latent_noise=0.1", "or stage decoder"),
    (("--stage=vae", "--train.noises=2"), "only stage diffusion noises"),
    (f"--data.first={dancers.HELD_OUT - 5}", "reach into the held-out dancers"),
    ("--train.keep=-1", "0 or more"), ("--data.workers=-1", "0 or more"), ("--train.betas=[0.9, 1.5]", "below 1"),
    ("--device=foo", "is not there"), ("--data.width=17", "multiple of 2"), ("--data.frames=3", "a picture model"),
    (("--train.only_pose=true", "--pose=false"), "nothing is left to train"),
    ("--train.steps=0", "expected one of them"), ("--train.lr=.inf", "more than 0"),
    ("--train.weight_decay=.nan", "0 or more"), (("--stage=vae", "--data.frames=2"), "sees single pictures"),
    ("--data={kind: tsv}", "data.path is missing"), ("--train.ema=2", "expected 0 to 1")])
def test_bad_recipes_are_refused(place, argument, words):
    with pytest.raises(InputError, match=words):
        trained(place, "a", *(argument if isinstance(argument, tuple) else (argument,)))
    assert not (place / "a").exists()


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_checkpoint(place, monkeypatch):
    calls = []

    def loss(self, *_):
        calls.append(1)
        return torch.tensor(float("nan"), requires_grad=True) if len(calls) == 5 else ORIGINAL(self, *_)
    monkeypatch.setattr(start.Loss, "forward", loss)
    with pytest.raises(InputError, match="loss of step 5 is nan; the last checkpoint is kept"):
        trained(place, "a")
    assert [path.name for path in checkpoint.found(place / "a")] == ["step-0000002", "step-0000004"]
    assert checkpoint.newest(place / "a", print)[1]["step"] == 4


ORIGINAL = start.Loss.forward


def test_weights_that_are_not_numbers_are_not_saved(place):
    with pytest.raises(InputError, match="weights of step 1 are not finite; there is no checkpoint yet"):
        trained(place, "a", "--train.save_every=1", "--train.lr=1e39", "--train.warmup=0")
    assert not checkpoint.found(place / "a")


def test_a_reference_is_dropped_as_in_the_official_program():
    made = recipe.load(ROOT / "config" / "finetune_cfg.yaml", ["--start=[]"])
    assert made.uncond == "clip-zero"


def test_what_stands_for_no_reference_can_be_chosen_for_a_stage(place):
    net = start.model(recipe.load(place / "tiny.yaml", ["--uncond=clip-zero"]), print)
    assert net.config.uncond == "clip-zero"


def test_a_folder_that_cannot_be_written_is_refused(place):
    (place / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        trained(place, "file/a")


def test_what_files_do_not_say_the_recipe_says(place):
    trained(place, "a")
    begun = f"--start=[{place / 'a' / 'last'}]"
    net = start.model(recipe.load(place / "tiny.yaml", [begun, "--model.clip.crop=true", "--pose=false"]), print)
    assert net.config.clip.crop and net.pose is None and net.config.pose is None
    assert start.model(recipe.load(place / "tiny.yaml", [begun, "--model=null", "--pose=false"]), print).pose is None


def test_steps_that_are_asked_for_take_the_place_of_epochs():
    made = recipe.load(ROOT / "config" / "finetune.yaml", ["--start=[]", "--train.steps=7"])
    assert (made.train.steps, made.train.epochs) == (7, 0)
    made = recipe.load(ROOT / "config" / "human_specific.yaml", ["--start=[.]", "--train.epochs=3"])
    assert (made.train.steps, made.train.epochs) == (0, 3)


def test_another_model_file_can_be_named(place):
    model = recipe.load(place / "tiny.yaml").model
    (place / "other.yaml").write_text(json.dumps(to_dict(model) | {"uncond": "clip-zero"}))
    assert recipe.load(place / "tiny.yaml", ["--model=other.yaml"]).model == replace(model, uncond="clip-zero")


def test_fields_of_a_recipe_survive_the_file(place):
    made = recipe.load(place / "tiny.yaml", ["--train.lr=3e-4"])
    assert made.train == replace(recipe.load(place / "tiny.yaml").train, lr=3e-4)


RECIPES = sorted(path for path in (ROOT / "config").rglob("*.yaml") if "model" not in str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_recipes_of_the_repository_can_be_read(path):
    made = recipe.load(path, ["--start=[.]", f"--model={json.dumps(MODEL)}"])    # the files to start from are not here
    assert made.train.lr > 0
    for name in yaml.safe_load(path.read_text()).get("start", ()):
        assert name == "sd-image-variations-diffusers" or (path.parent / f"{Path(name).parts[-2]}.yaml").exists()


@pytest.mark.parametrize("name, official", [
    ("pretrain", {"lr": 1e-3, "epochs": 40, "unet": "transblocks"}),
    ("finetune", {"lr": 2e-4, "epochs": 20, "unet": "all"}),
    ("finetune_cfg", {"lr": 2e-4, "epochs": 20, "unet": "all", "drop_reference": 0.05, "drop_whole_batch": True}),
    ("temporal", {"lr": 1e-4, "epochs": 20}),
    ("human_specific", {"lr": 1e-3, "steps": 500, "unet": "crossattn", "freeze_pose": True})])
def test_the_official_stages_have_the_official_values(name, official):
    values = yaml.safe_load((ROOT / "config" / f"{name}.yaml").read_text())["train"]
    read = recipe.from_dict(recipe.TrainConfig, values)
    everywhere = {"weight_decay": 1e-3, "betas": (0.9, 0.98), "warmup": 0.1, "clip_norm": 0.0}
    for key, value in (official | everywhere).items():
        assert getattr(read, key) == value


def test_the_official_stages_run_one_after_the_other(place):
    """As their YAML files say, but for size: float16, crops, activations computed again, what trains."""
    prepare_data.main(["dancers", "--out", str(place / "set"), "--clips", "3", "--frames", "3", "--size", "20",
                       "--format", "tsv"])
    config = from_dict(ModelConfig, MODEL | {"pose": None})
    torch.manual_seed(0)
    weights.write_folder(place / "base", DisCo(config).state_dict(), config)
    small = [f"--data.path={place / 'set' / 'train.yaml'}", "--data.workers=0", "--data.width=16", "--data.height=16",
             "--train.batch=2", "--train.steps=2", "--train.log_every=1", "--device=cpu"]
    for name, before in (("pretrain", "base"), ("finetune", "pretrain/last"), ("finetune_cfg", "pretrain/last"),
                         ("temporal", "finetune/last"), ("human_specific", "finetune/last")):
        more = ["--data.frames=3"] if name == "temporal" else []
        more += [f"--model={json.dumps(MODEL)}"] if name in ("pretrain", "finetune", "finetune_cfg") else []
        train.main([str(ROOT / "config" / f"{name}.yaml"), f"--start=[{place / before}]", f"--out={place / name}",
                    *small, *more])
        lines = [json.loads(line) for line in (place / name / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and all(line["loss"] > 0 for line in lines)
    assert any(".temporal." in name for name in load_file(place / "temporal" / "last" / "model.safetensors"))
