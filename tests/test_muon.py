"""Muon against its formula, with the exact orthogonal part in float64."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from formula import model
from torch import nn

from nanodisco import muon
from nanodisco.disco import DisCo
from nanodisco.distributed import World
from nanodisco.muon import Muon

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.98), "weight_decay": 0.5}
EACH = World(0, 1, "cpu").each

SHARED = """
import sys
from pathlib import Path
import torch
from nanodisco.distributed import World
from nanodisco.muon import Muon

world = World.join("cpu")
torch.manual_seed(0)
shapes = (16, 40), (9,), (24, 4, 3, 3), (40, 16), (16, 16), (16, 40)
weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
optimizer = Muon(weights, [p for p in weights if p.ndim > 1], world.each, lr=0.1)
for _ in range(3):
    for p in weights[:-1]:
        p.grad = torch.randn_like(p)
    optimizer.step()
world.leave()
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
made = {"weights": [p.detach() for p in weights], "threads": [name for name in threads if "gloo" in name]}
torch.save(made, f"{sys.argv[1]}/{world.size}-{world.rank}.pt")
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What one process makes, and each of two."""
    place = tmp_path_factory.mktemp("shared")
    (place / "shared.py").write_text(SHARED)
    for processes in (1, 2):
        ran = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                              f"--nproc-per-node={processes}", str(place / "shared.py"), str(place)],
                             cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                             env=os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})
        assert ran.returncode == 0, ran.stderr
    return [torch.load(place / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")]


def polar(x):
    """(x x^T)^(-1/2) x, exactly."""
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    return (u @ v).to(x.dtype)


@pytest.mark.parametrize("shape", [(20, 64), (64, 20), (32, 32)])
def test_singular_values_become_about_one_and_directions_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = muon.orthogonal(x)
    values = torch.linalg.svdvals(y.double())
    assert y.shape == x.shape and values.min() > 0.4 and values.max() < 1.3
    assert nn.functional.cosine_similarity(y.flatten(), polar(x).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("shape", [(3, 20, 64), (2, 64, 20)])
def test_several_at_once_are_made_as_each_by_itself(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.stack([muon.orthogonal(each) for each in x])
    torch.testing.assert_close(muon.orthogonal(x), one_by_one, atol=0.01, rtol=0)


def test_those_of_one_shape_are_made_at_once_on_a_gpu(monkeypatch):
    monkeypatch.setattr(nn.Parameter, "is_cuda", True)
    weights = [nn.Parameter(torch.randn(shape)) for shape in ((16, 40), (40, 16), (16, 40), (16, 10, 2, 2))]
    moved, seen, real = [], [], muon.orthogonal
    for alone in (False, True):
        monkeypatch.setattr(muon, "orthogonal", (lambda x: torch.stack([real(each) for each in x]) if x.ndim > 2 else
                                                 real(x)) if alone else lambda x: seen.append(x.shape) or real(x))
        copies = [nn.Parameter(p.detach().clone()) for p in weights]
        for p, of in zip(copies, weights):
            p.grad = of.detach().sin()
        Muon(copies, copies, EACH, lr=0.1).step()
        moved.append(copies)
    assert sorted(seen) == [(3, 16, 40), (40, 16)]
    torch.testing.assert_close(*moved, atol=0.01, rtol=0)


def test_a_matrix_moves_by_the_orthogonal_part_of_its_momentum(monkeypatch):
    monkeypatch.setattr(muon, "orthogonal", polar)
    weight = nn.Parameter(torch.randn(16, 4, 3, 3, dtype=torch.float64))
    wanted, momentum = weight.detach().clone(), torch.zeros(16, 36, dtype=torch.float64)
    optimizer = Muon([weight], [weight], EACH, **OPTIONS)
    for _ in range(3):
        gradient = torch.randn(16, 4, 3, 3, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient.flatten(1)
        ahead = 0.05 * gradient.flatten(1) + 0.95 * momentum
        wanted = (1 - 0.1 * 0.5) * wanted - 0.1 * 0.2 * 6 * polar(ahead).view(16, 4, 3, 3)       # 6: sqrt(36)
    torch.testing.assert_close(weight.detach(), wanted)


def test_everything_else_moves_as_adamw_would_move_it():
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    matrix = nn.Parameter(torch.ones(16, 16))
    optimizers = Muon([matrix, ours], [matrix], EACH, **OPTIONS), torch.optim.AdamW([theirs], **OPTIONS)
    for i in range(3):
        ours.grad, theirs.grad, matrix.grad = torch.full((5,), i + 1.0), torch.full((5,), i + 1.0), torch.ones(16, 16)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs) and optimizers[0].state[matrix].keys() == {"momentum"}


def test_a_matrix_without_a_gradient_stays():
    matrix = nn.Parameter(torch.ones(16, 16))
    Muon([matrix], [matrix], EACH, **OPTIONS).step()
    assert (matrix == 1).all()


def test_hidden_layers_are_matrices_and_the_first_the_last_and_the_zeros_are_not():
    names = {id(p): name for name, p in model("image").named_parameters()}
    chosen = {names[id(p)] for p in muon.matrices(model("image").named_parameters())}
    for name in ("unet.encoder.mid.res.0.conv1.weight", "unet.encoder.mid.attn.0.block.self_attn.qkv.weight",
                 "pose.encoder.mid.res.1.conv2.weight"):
        assert name in chosen
    for name in ("unet.encoder.conv_in.weight", "unet.conv_out.weight", "pose.zero_mid.weight",
                 "pose.hint.conv_in.weight", "clip.vision.conv1.weight", "clip.vision.positional_embedding",
                 "unet.encoder.time.linear1.weight", "unet.encoder.mid.res.0.conv1.bias"):
        assert name in names.values() and name not in chosen


def test_processes_that_share_the_work_have_the_bits_of_one_that_does_it_all(shared):
    one, *two = (made["weights"] for made in shared)
    for weights in two:
        assert all(torch.equal(a, b) for a, b in zip(one, weights, strict=True))


def test_no_thread_outlives_the_group_that_it_worked_for(shared):
    """It would abort its process, now and then, at the very end."""
    assert [made["threads"] for made in shared] == [[], [], []]


def test_what_begins_as_zero_is_left_to_adamw():
    torch.manual_seed(0)
    fresh = DisCo(model("temporal").config)                              # with temporal layers and ControlNets of zeros
    moved = muon.matrices(fresh.named_parameters())
    assert moved and all(p.any() for p in moved)
