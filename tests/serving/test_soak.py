"""Ten thousand steps of an engine to which everything happens: no memory is kept that was not kept before."""

import dataclasses
import gc
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv4_jax.serving.core import EngineCore
from dsv4_jax.serving.requests import Sampling
from tests.serving.test_core import nothing_compiled
from tests.serving.test_machine import SIZES, model, prompt

STEPS, WARM, EVERY = 10_000, 2_000, 1_000


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def measured(core) -> dict[str, int]:
    """Of an engine that serves nobody and knows no prefix."""
    while core.has_work:
        core.step()
    core._lanes.forget()
    jax.block_until_ready(core._slots)
    gc.collect()
    live = jax.live_arrays()
    return {
        "arrays": len(live),
        "array_bytes": sum(array.nbytes for array in live),
        "python": tracemalloc.get_traced_memory()[0],
        "resident": resident(),
    }


def soak(core, rng) -> list[dict[str, int]]:
    """Serves, aborts and interrupts by chance until STEPS steps are done; what was measured on the way."""
    found, number = [], 0
    while core.steps < STEPS:
        if core.steps >= WARM + EVERY * len(found):
            found.append(measured(core) | {"steps": core.steps})
        if len(core._sequences) < 8:
            ids = prompt(int(rng.integers(0, 60)), int(rng.integers(0, 31)), int(rng.integers(1, 10)))
            rules = {"logit_bias": {7: 100.0}} if rng.random() < 0.3 else {}
            sampling = Sampling(
                max_tokens=int(rng.integers(1, 25)), temperature=float(rng.integers(0, 2)), seed=number,
                logprobs=2 if rng.random() < 0.2 else None, **rules,
            )  # fmt: skip
            core.add(ids, sampling, salt=bytes([number % 3]), priority=int(rng.integers(0, 2)))
            number += 1
        if core._sequences and rng.random() < 0.05:
            core.abort(int(rng.choice(list(core._sequences))))
        if core._sequences and rng.random() < 0.05:
            core.preempt(int(rng.choice(list(core._sequences))))
        core.step()
        core.prefixes.check()
    found.append(measured(core) | {"steps": core.steps, "requests": number})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("draft", [None, "lookup"])
def test_memory_is_flat(draft, tmp_path):
    sizes = dataclasses.replace(SIZES, draft=draft, disk=tmp_path, disk_bytes=1 << 20)
    core = EngineCore(model(draft), sizes)
    core.warm_up()
    tracemalloc.start()
    try:
        with nothing_compiled():
            found = soak(core, np.random.default_rng(0))
    finally:
        tracemalloc.stop()
        core.close()
    print(*found, sep="\n")
    first, last = found[0], found[-1]
    assert last["steps"] >= STEPS and last["requests"] > 500 and core.scheduler.num_preemptions > 50
    # Not one array more, after any thousand steps; 64 bytes a step would be 512 KiB of Python's.
    assert {one["arrays"] for one in found} == {first["arrays"]}
    assert {one["array_bytes"] for one in found} == {first["array_bytes"]}
    assert last["python"] - first["python"] < 128 << 10
    assert last["resident"] - first["resident"] < 32 << 20
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1 << 20
