"""One of two processes that hold a model together: what each of them did, for `test_several_processes.py`.

The command joins them; everything after it runs in the processes as it left them.
"""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dsv4_jax
from dsv4_jax.checkpoint import read
from dsv4_jax.command_line import main as command_line
from dsv4_jax.errors import ProblemsError
from dsv4_jax.refusing import refused_together
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import initial_state, train_step
from sharding.host_values import fetched

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11], [12, 13], [14, 15, 16], [17, 18], [19, 20, 21, 22]]
COMMAND = ["--ids", "5", "6", "7", "--max-new-tokens", "4", "--dtype", "float32", "--json"]
MESH = "expert=8"
TRAIN_MESH = "fsdp=4,expert=2"
RATE = 1e-3


def batch():
    tokens = np.random.default_rng(3).integers(0, 64, (8, 16)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 9:] = 2
    return Batch(tokens, segments)


def generated(lm):
    return lm.generate(PROMPTS, 3, temperature=1.0, seed=7)


def trained(lm):
    """What one step measures, its gradients, and the parameters after it, by name."""
    optimizer = AdamW()
    state = initial_state(jax.tree.map(jnp.copy, lm.parameters), optimizer)
    state, report = train_step(lm.network, optimizer, state, batch(), jnp.float32(RATE))
    moments = next(each for each in jax.tree.leaves(state.moments, is_leaf=is_adam) if is_adam(each)).mu
    report, moments, parameters = fetched((report._asdict(), moments, state.params))
    gradients = {f"gradient{name}": leaf / (1 - optimizer.beta1) for name, leaf in named(moments).items()}
    return report | gradients | named(parameters)


def is_adam(node):
    return isinstance(node, optax.ScaleByAdamState)


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def main(port: int, number: int, checkpoint: str, folder: pathlib.Path) -> None:
    hosts = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id", str(number)]
    code = command_line.run(
        ["generate", checkpoint, *COMMAND, "--mesh", MESH, *hosts, "--no-compilation-cache"]
    )
    found: dict[str, object] = {"code": code}
    boxes: list[tuple] = []

    def recorded(tensor, read_stored, part, *rest, **more):
        boxes.append((tensor.info.name, tensor.spec.dims, [(each.start, each.stop) for each in part]))
        return read_part(tensor, read_stored, part, *rest, **more)

    read_part, read.read_part = read.read_part, recorded
    lm = dsv4_jax.load(checkpoint, dtype="float32", mesh=MESH)
    found["boxes"], read.read_part = boxes, read_part
    found["tokens"] = generated(lm).tolist()
    try:
        refused_together(lambda: refusing(number))
    except ProblemsError as refused:
        found["refused"] = [type(refused).__name__, *refused.problems]
    lm = dsv4_jax.load(checkpoint, dtype="float32", mesh=TRAIN_MESH, rules="train")
    np.savez(folder / f"trained{number}.npz", **trained(lm))
    (folder / f"found{number}.json").write_text(json.dumps(found))


def refusing(number: int) -> None:
    if number == 1:
        raise ProblemsError("cannot read", ["no such file"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4]))
