"""Every kernel compiles for an H100 and its machine code is as good as it was. No GPU is needed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.attention import SHARED as OF_WIDE_HEADS
from kernels.conv import SHARED as OF_CONVOLUTIONS

triton = pytest.importorskip("triton")

TESTS = Path(__file__).parent
GOLDEN = json.loads((TESTS / "golden" / "kernels" / "sm90.json").read_text())
SHARED = 227 * 1024                    # bytes that an H100 gives to one program; the compiler does not check it
VECTORS = 8                            # loads of 2 bytes: a thread's weights, biases and shifts


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Compiled anew, in a process without the interpreter."""
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, TESTS / "compile_kernels.py", "--json"]
    ran = subprocess.run(command, env=given, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout)["kernels"]


def test_nothing_is_spilled_and_all_fits(table):
    assert not {name for name, row in table.items() if row["stack"] or row["spills"] or row["shared"] > SHARED}


def test_the_largest_tiles_are_what_wide_heads_and_convolutions_are_said_to_need(table):
    assert max(row["shared"] for row in table.values()) == OF_WIDE_HEADS
    assert max(row["shared"] for name, row in table.items() if name.startswith("conv")) == OF_CONVOLUTIONS


def test_matrix_kernels_use_the_matrix_units_except_in_float32_and_for_dkeys_of_the_widest_heads(table):
    matrix = {name for name in table if name.startswith(("self", "cross", "temporal")) or name.endswith("products")}
    without = {name for name in matrix if "float32" in name or "d256" in name and name.endswith("d_keys")}
    assert {name for name in matrix if table[name]["HGMMA"]} == matrix - without


def test_all_but_pictures_of_a_norm_is_read_and_written_16_bytes_at_a_time(table):
    assert not {name for name, row in table.items() if not name.startswith("norm")
                and (row["narrow loads"] or not row["16-byte loads"] or not row["16-byte stores"])}


def test_pictures_of_a_norm_are_read_16_bytes_at_a_time(table):
    """Its vectors, one number a channel, may be read in pieces, and what is folded is small."""
    norms = {name: row for name, row in table.items() if name.startswith("norm")}
    pictures = {name: row for name, row in norms.items() if not name.split(": ")[1].startswith("fold")}
    assert not {name for name, row in norms.items() if row["narrow loads"] > VECTORS}
    assert not {name for name, row in pictures.items() if not row["16-byte loads"]}
    written = {name for name in pictures if name.endswith(("apply", "gradient_of_x"))}
    assert written and not {name for name in written if not norms[name]["16-byte stores"]}


def test_the_table_is_the_golden_one(table):
    """After a change that is meant: python tests/compile_kernels.py --write, and look at the difference."""
    assert table.keys() == GOLDEN["kernels"].keys()
    if triton.__version__ != GOLDEN["triton"]:
        pytest.skip(f"recorded with triton {GOLDEN['triton']}, this is {triton.__version__}")
    assert table == GOLDEN["kernels"]
