"""What trains, the learning rate and the running average, against the official program's lists and numbers."""
import hashlib
from functools import cache

import numpy as np
import pytest
import torch
from formula import build, golden
from test_walkthrough import full_size

from nanodisco import optim
from nanodisco.disco import DisCo
from nanodisco.distributed import World
from nanodisco.errors import InputError
from nanodisco.names import official

COUNTS, LISTS, RATES = (golden(f"training/{name}.json")
                        for name in ("trainable_counts", "trainable_lists", "lr_schedule"))
FLAGS = {"freeze_pose": {"freeze_pose": True}, "freeze_background": {"freeze_background": True},
         "freeze_both": {"freeze_pose": True, "freeze_background": True}, "stage2_only_pose": {"only_pose": True},
         "freeze_unet=False": {"unet": "all"}}
NOT_OURS = ("refer_clip_proj=True", "refer_sdvae=False")                 # another model, see the two tests below
MODES = [(size, mode) for size in COUNTS for mode in COUNTS[size] if not mode.endswith(NOT_OURS)]


@cache
def shapes(size: str, kind: str, *more: str) -> dict[str, torch.Size]:
    """Of every tensor of our model."""
    if size == "tiny":
        net = build("image" if kind == "imgspecific" else kind)
        return {name: p.shape for name, p in net.named_parameters()}
    extra = {"temporal": ("--unet.temporal=true",), "stage1": ("--pose=null",)}.get(kind, ())
    with torch.device("meta"):
        return {name: p.shape for name, p in DisCo(full_size(*extra, *more)).named_parameters()}


def chosen(size: str, mode: str, *more: str) -> tuple[dict[str, torch.Size], list[str]]:
    kind, flags = mode.split(":")
    options = {"substring_fault": True}
    for flag in flags.split(","):
        options |= FLAGS.get(flag, {"unet": "null" if flag == "None" else flag} if flag not in NOT_OURS else {})
    if kind != "temporal" and options.get("unet") == "tem":
        options["unet"] = "null"                                         # official: an unknown word is none
    named = shapes(size, kind, *more)
    return named, optim.trainable(named, **options)


def check(size: str, mode: str, *more: str) -> None:
    named, names = chosen(size, mode, *more)
    wanted = COUNTS[size][mode]
    theirs = sorted(name for ours in names for name in official(ours, stage1=mode.startswith("stage1")).theirs)
    assert len(theirs) == wanted["trainable_tensors"]
    assert sum(named[name].numel() for name in names) == wanted["trainable_numel"]
    assert hashlib.sha256("\n".join(theirs).encode()).hexdigest() == wanted["sha256_of_sorted_names"]


@pytest.mark.parametrize("size, mode", MODES)
def test_what_trains_is_what_trains_in_the_official_program(size, mode):
    check(size, mode)


@pytest.mark.parametrize("more, mode", [("--tokens=local-clip", "image:all,refer_clip_proj=True"),
                                        ("--background={hint: pixels, channels: 3, widths: [16, 32, 96, 256]}",
                                         "image:all,refer_sdvae=False")])
def test_what_trains_in_models_with_other_tokens_and_hints(more, mode):
    check("full_size", mode, more)


@pytest.mark.parametrize("flag, key, net", [
    ("only_pose", "stage2_only_pose__background_tensors_left_trainable", "background"),
    ("freeze_pose", "freeze_pose__background_tensors_also_frozen", "background"),
    ("freeze_background", "freeze_background__pose_tensors_also_frozen", "pose")])
def test_without_the_fault_a_net_trains_or_does_not_as_a_whole(flag, key, net):
    names = list(shapes("tiny", "image"))
    right, fault = (set(optim.trainable(names, **{flag: True, "substring_fault": fault})) for fault in (False, True))
    differs = {name for ours in right ^ fault for name in official(ours).theirs}
    assert differs == set(LISTS[key]) and all(name.startswith(net) for name in right ^ fault)
    of_net = {name for name in names if name.startswith(net + ".")}
    assert right & of_net in (set(), of_net)


def test_the_unet_s_lists_are_the_official_ones():
    for ours, theirs in (("crossattn-kv", "crossattn_kv"), ("crossattn", "crossattn"), ("transblocks", "transblocks")):
        names = [name for name in optim.trainable(shapes("tiny", "image"), ours) if name.startswith("unet.")]
        assert sorted(name for ours in names for name in official(ours).theirs) == sorted(LISTS[f"unet_{theirs}"])


def test_a_pattern_of_ones_own_selects_by_prefix():
    names = optim.trainable(shapes("tiny", "image"), "unet.conv_out.*,unet.up.0.*", freeze_pose=True,
                            freeze_background=True)
    others = {name.rsplit(".", 1)[0] for name in names if not name.startswith("unet.up.0.")}
    assert others == {"unet.conv_out", "clip.proj"} and len(names) > 10


@pytest.mark.parametrize("unet", ["tem", "unet.nothing.*", "unet.*,unets.*", "crosattn"])
def test_a_pattern_that_matches_nothing_is_refused(unet):
    with pytest.raises(InputError, match="matches no tensor"):
        optim.trainable(shapes("tiny", "image"), unet)


def test_an_unused_norm_is_named_but_does_not_train():
    net = build("temporal")
    names = optim.trainable([name for name, _ in net.named_parameters()], "tem")
    assert any(".unused_norm." in name for name in names)
    optim.select(net, names)
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        name for name in names if ".unused_norm." not in name}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_what_is_said_to_be_remembered_is_what_a_step_leaves_behind(kind):
    net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3), torch.nn.Flatten(), torch.nn.Linear(16, 4))
    optimizer = optim.optimizer(net, kind, World(0, 1, "cpu").each, lr=0.1)
    net(torch.randn(2, 16, 3, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4
    for p, kept in optimizer.state.items():
        said = optim.remembered(optimizer, p)
        assert said.keys() == kept.keys()
        assert all((said[key].shape, said[key].dtype) == (kept[key].shape, kept[key].dtype) for key in kept)


@pytest.mark.parametrize("kind", ["linear", "constant"])
def test_the_learning_rate_is_the_official_one(kind):
    golden = RATES[kind]
    rates = [optim.learning_rate(step, golden["max_iter"], RATES["base_lr"], golden["warmup_ratio"], kind == "constant")
             for step in range(len(golden["values"]))]
    assert rates == pytest.approx(golden["values"], rel=1e-6)


def test_the_average_is_its_formula():
    net = torch.nn.Linear(3, 2).double()
    average, history = optim.Average(net.named_parameters()), [net.weight.detach().clone()]
    for _ in range(5):
        with torch.no_grad():
            net.weight += torch.randn_like(net.weight)
        history.append(net.weight.detach().clone())
        average.update(net, 0.9)
    wanted = 0.9 ** 5 * history[0] + sum(0.1 * 0.9 ** (5 - i) * history[i] for i in range(1, 6))
    torch.testing.assert_close(average.tensors["weight"].double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_average_forgets_its_beginning_as_fast_as_it_ages():
    assert [optim.decay(step, 0.999) for step in (0, 10, 90)] == pytest.approx([1 / 10, 11 / 20, 91 / 100])
    assert optim.decay(10**6, 0.999) == 0.999
    left = np.prod([optim.decay(step, 0.998) for step in range(1400)])
    assert left < 1e-6 < 0.998 ** 1400                                   # of the weights before the first step


def test_what_does_not_train_has_no_average():
    net = torch.nn.Linear(3, 2)
    net.bias.requires_grad_(False)
    assert list(optim.Average(net.named_parameters()).tensors) == ["weight"]
