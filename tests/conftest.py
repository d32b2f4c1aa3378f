"""For every test."""
import os
import secrets

import pytest
import torch
import yaml

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                       # kernels run on a CPU; before Triton comes

torch.set_num_threads(1)               # tiny tensors gain nothing from a second, and wait for it on a busy machine;
os.environ.setdefault("OMP_NUM_THREADS", "1")                            # and so for what tests start


@pytest.fixture
def fresh():
    """Other random numbers each time. A failure prints their seed, and NANODISCO_SEED repeats it."""
    seed = int(os.environ.get("NANODISCO_SEED", secrets.randbelow(2 ** 31)))
    print(f"NANODISCO_SEED={seed}")
    torch.manual_seed(seed)


@pytest.fixture
def place(tmp_path):
    """A folder with the recipe of a tiny run, tiny.yaml."""
    from test_train import RECIPE                                        # slow, and not all tests need it
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path
