"""What processes tell one another: a few texts, compared or collected before devices depend on them.

A process that refuses something alone leaves the others waiting for it inside a collective, and a process
that runs another program than the others computes nonsense or waits for ever. So who may refuse tells all.
"""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils


def collected(texts: list[str]) -> list[list[str]]:
    """The lists of all processes, by process; every process must call this, and gets the same.

    Args:
        texts: of this process, any number of any length.
    """
    if jax.process_count() == 1:
        return [texts]
    own = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: own.size] = own
    everyone = multihost_utils.process_allgather(padded)
    return [json.loads(line[:size].tobytes()) for line, size in zip(everyone, sizes, strict=True)]


def differences(values: dict[str, str]) -> list[str]:
    """What processes were given differently, a sentence each; every process must call this.

    Args:
        values: name -> what this process was given, as a text; the same names in every process.
    """
    everyone = collected(list(values.values()))
    return [
        f"{name}: process {other} has {theirs[place]}, process 0 has {everyone[0][place]}"
        for place, name in enumerate(values)
        for other, theirs in enumerate(everyone)
        if theirs[place] != everyone[0][place]
    ]
