"""For every test."""
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")                       # kernels run on a CPU; before Triton comes

torch.set_num_threads(1)               # tiny tensors gain nothing from a second, and wait for it on a busy machine
