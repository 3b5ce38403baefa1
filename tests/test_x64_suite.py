"""The core suite with `jax_enable_x64` on, as users have it who need float64 elsewhere in their process.

The tests of the kernels are left out: Mosaic does not lower programs with 64-bit index arithmetic, and some
of them make float64 arrays of their own. `tests/model/test_x64.py` traces the kernels' programs instead.
"""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("model", "inference", "numerics", "training", "parity")
FILES = ("test_language_model.py", "test_transformations.py")


@pytest.mark.slow
def test_the_core_suite_passes_with_x64_on():
    """About ten minutes on one core."""
    paths = [str(ROOT / "tests" / name) for name in FOLDERS + FILES]
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = {**outside, "JAX_ENABLE_X64": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-2000:])  # the figures, shown with -rP
    assert done.returncode == 0, done.stdout[-4000:]
