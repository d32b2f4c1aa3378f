"""The operations that are worth a kernel of our own, each beside the plain PyTorch that defines it.

A model imports an operation from here and never asks what hardware it is on. Shapes and layouts
are final: the Triton versions take the same arguments.
"""
from kernels.add_layer_norm import add_layer_norm
from kernels.attention import cross_attention, self_attention, temporal_attention
from kernels.conv import Conv2d
from kernels.geglu import GEGLU, geglu
from kernels.group_norm_silu import group_norm_silu
from kernels.up_conv import UpConv2d

__all__ = ["Conv2d", "GEGLU", "UpConv2d", "add_layer_norm", "cross_attention", "geglu", "group_norm_silu",
           "self_attention", "temporal_attention"]
