"""Every axis of a mesh larger than 1 at once, for the whole model: 32 devices, so a process of its own."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_no_axis_of_size_one():
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=32",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as other tests
    }
    ran = subprocess.run(
        [sys.executable, "-m", "tests.model.all_axes_process"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines() == ["gradients agree", "tokens agree"]
