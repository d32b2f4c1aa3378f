"""For every test."""
import torch

torch.set_num_threads(1)               # tiny tensors gain nothing from a second, and wait for it on a busy machine
