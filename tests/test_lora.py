"""LoRA: what trains is a small difference, and what comes out is a plain model."""
import pytest
import torch
from formula import build, training_data
from test_train import same, tensors, trained

from nanodisco import checkpoint, lora, muon, optim
from nanodisco.errors import InputError
from nanodisco.loading import load

NAME = "unet.encoder.mid.attn.0.block.cross_attn.kv.weight"


def lowered(rank=3, unet="crossattn"):
    net = build("image")
    names = optim.trainable([name for name, _ in net.named_parameters()], unet)
    return net, lora.add(net, names, rank, seed=0)


def moved(net):
    """Factors as training might leave them."""
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if name.endswith(".up"):
                tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    return net


@torch.no_grad()
def test_a_model_begins_as_it_was():
    assert torch.equal(lowered()[0].loss(*training_data()), build("image").loss(*training_data()))


def test_factors_are_left_to_adamw():
    net = lowered(rank=16)[0]
    matrices = {id(p) for p in muon.matrices(net.named_parameters())}
    factors = [p for name, p in net.named_parameters() if lora.belongs(name)]
    assert factors and matrices and not matrices & set(map(id, factors))


@torch.no_grad()
def test_merged_is_the_model_with_factors_applied():
    net, plain = moved(lowered()[0]), build("image")
    before = plain.loss(*training_data())
    plain.load_state_dict(lora.merged(net.state_dict()))
    wanted = net.loss(*training_data())
    assert abs(wanted - before) > 0.01 * before
    torch.testing.assert_close(plain.loss(*training_data()), wanted, rtol=1e-6, atol=0)


def test_the_difference_is_of_the_rank_and_a_sum_of_outer_products():
    net = moved(lowered(rank=3)[0])
    difference = (lora.merged(net.state_dict())[NAME] - build("image").state_dict()[NAME]).double()
    assert torch.linalg.matrix_rank(difference, rtol=1e-5) == 3


def test_weights_of_the_unet_stay_and_the_other_nets_train_as_ever():
    net, names = lowered()
    chosen = {name for name, p in net.named_parameters() if any(p is q for q in optim.select(net, names))}
    assert {name for name in chosen if name.startswith("unet.")} == {name for name in names if lora.belongs(name)}
    assert any(name.startswith("background.") for name in chosen)
    net.loss(*training_data()).backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if name.endswith(".up"))


def test_nothing_linear_to_lower_is_refused():
    with pytest.raises(InputError, match="names no weight of a linear layer"):
        lowered(unet="unet.conv_out.*")


def test_a_run_with_lora_resumes_exactly_and_its_weights_are_those_of_a_plain_model(place):
    more = "--train.lora_rank=2", "--train.unet=crossattn"
    whole = trained(place, "whole", *more)
    trained(place, "broken", *more)
    for step in (6, 4):
        checkpoint.shutil.rmtree(place / "broken" / f"step-{step:07}")
    (place / "broken" / "last").unlink()
    assert same(trained(place, "broken", *more, "--resume=auto"), whole)
    assert not any(".parametrizations." in name for name in load(place / "whole" / "last").state_dict())
    assert any(name.startswith("training.weight.unet") for name in tensors(place / "whole"))
