"""nanodisco: human dance generation by disentangled control (DisCo, arXiv:2307.00040), to be read.

Reading order: diffusion, layers, transformer, unet, controlnet, disco, sampling; then as you wish.
"""
import importlib.util
from pathlib import Path

_kernels = importlib.util.find_spec("kernels")
if _kernels is None or not (Path(_kernels.origin).parent / "group_norm_silu.py").exists():
    raise ImportError(f"the package 'kernels' found here ({_kernels and _kernels.origin}) is not nanodisco's: another "
                      "project of that name hides it; run 'pip uninstall kernels', then 'pip install -e .' again")
