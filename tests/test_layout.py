"""Layout: imports only go down, so that a file can be read knowing only the rows above it."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ROWS = [                               # a file imports only from rows above its own; the order to read them in, too
    ["kernels"],
    ["errors"],
    ["config", "distributed", "files", "graph", "lora", "memo", "metrics", "muon", "names", "shapes", "temporal",
     "together", "transforms", "tsv", "unpickle"],
    ["pose"],
    ["crops", "diffusion", "estimate", "layers", "recipe", "rooms", "sizes", "transformer", "video"],
    ["clip", "dancers", "inputs", "optim", "sampling", "vae", "weights"],
    ["checkpoint", "data", "datasets", "unet"],
    ["controlnet"],
    ["disco"],
    ["guidance", "loading"],
    ["convert", "dance", "judge", "start"],
    ["validation"]]

ROW = {name: i for i, row in enumerate(ROWS) for name in row}
FILES = sorted(path for package in ("nanodisco", "kernels") for path in (ROOT / package).rglob("*.py"))
NOT_FOR_ALL = {"av", "diffusers", "lpips", "mediapipe", "open_clip", "scipy", "torchvision",
               "transformers"}         # slow, or not for all


def imported(source: str) -> set[str]:
    """What the file uses of this project, imports inside of functions too: {"kernels", "config", …}"""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the package's name"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in modules]
    return {part[0] if part[0] == "kernels" else part[1] for part in parts
            if part[0] == "kernels" or (part[0] == "nanodisco" and len(part) > 1)}


def name_of(path: Path) -> str:
    return "kernels" if "kernels" in path.relative_to(ROOT).parts else path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    if path == ROOT / "nanodisco" / "__init__.py":
        assert not imported(path.read_text()), "importing one file of the package must not import others"
        return
    name = name_of(path)
    assert name in ROW, f"{name}.py has no row: put it into ROWS of tests/test_layout.py, as high as its imports allow"
    for used in imported(path.read_text()):
        assert used in ROW, f"{name} imports {used}, which has no row in tests/test_layout.py"
        assert ROW[used] < ROW[name] or name == used == "kernels", f"{name} imports {used}, which is not above it"


def test_imports_are_found_however_they_are_written():
    source = """
import torch, nanodisco.config
from nanodisco import diffusion, names as n
from nanodisco.unet import UNet
def later():
    from kernels.attention import self_attention
"""
    assert imported(source) == {"config", "diffusion", "names", "unet", "kernels"}


def test_no_file_is_a_drawer():
    assert not [path for path in FILES if path.stem in ("utils", "util", "common", "misc", "helpers")]


def test_importing_the_model_and_the_converter_imports_nothing_slow_or_test_only():
    code = "import sys, nanodisco.disco, nanodisco.convert; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in ran.stdout.split()}
    assert "nanodisco" in loaded and not NOT_FOR_ALL & loaded
