"""One of two processes that hold a model together: what each of them did, for `test_several_processes.py`.

The command joins them; everything after it runs in the processes as it left them.
"""

import json
import pathlib
import sys

import jax
import numpy as np
import optax

import dsv4_jax
from dsv4_jax.checkpoint import read
from dsv4_jax.checkpoint.convert import convert_checkpoint
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.checkpoint.staging import StagedFiles, StagedOutput
from dsv4_jax.checkpoint.verify import verify_checkpoint
from dsv4_jax.command_line import main as command_line
from dsv4_jax.errors import ProblemsError
from dsv4_jax.placing import placement_of
from dsv4_jax.refusing import refused_together
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from sharding.host_values import fetched

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10], [11], [12, 13], [14, 15, 16], [17, 18], [19, 20, 21, 22]]
COMMAND = ["--ids", "5", "6", "7", "--max-new-tokens", "4", "--dtype", "float32", "--json"]
MESH = "expert=8"
TRAIN_MESH = "fsdp=4,expert=2"
SHARD_BYTES = 40_000
RATE = 1e-3


def batch():
    tokens = np.random.default_rng(3).integers(0, 64, (8, 16)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[:, 9:] = 2
    return Batch(tokens, segments)


def generated(lm):
    return lm.generate(PROMPTS, 3, temperature=1.0, seed=7)


def trained(lm):
    """What a step measures, its gradients, and the parameters after it, by name; takes over those of `lm`."""
    optimizer = AdamW()
    state = initial_state(lm.parameters, optimizer)
    state, report = train_step(lm.network, StepSettings(optimizer), state, batch(), Rates(np.float32(RATE)))
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
    found["refused"] = [
        problems_of(lambda: refused_together(lambda: refusing(number))),
        problems_of(lambda: dsv4_jax.load(f"{checkpoint}/nowhere" if number else checkpoint, mesh=MESH)),
        problems_of(lambda: lm.save(folder / "taken")),
        problems_of(lambda: lm.save(folder / "full") if number else failing_save(lm, folder / "full")),
    ]
    created = []
    create = StagedFiles.create
    StagedFiles.create = lambda self, name: created.append(name) or create(self, name)
    save_checkpoint(folder / "saved", lm.config, lm.parameters, stored=lm.stored, max_shard_bytes=SHARD_BYTES)
    StagedFiles.create, found["created"] = create, created
    placement = placement_of(MESH, None)
    found["verified"] = [
        verify_checkpoint(each, placement=placement).problems for each in (checkpoint, folder / "bad")
    ]
    convert_checkpoint(checkpoint, folder / "converted", to="float32", placement=placement)
    lm = dsv4_jax.load(checkpoint, dtype="float32", mesh=TRAIN_MESH, rules="train")
    np.savez(folder / f"trained{number}.npz", **trained(lm))
    (folder / f"found{number}.json").write_text(json.dumps(found))


def problems_of(work) -> list[str]:
    try:
        work()
    except ProblemsError as refused:
        return [type(refused).__name__, *refused.problems]
    return []


def failing_save(lm, folder: pathlib.Path) -> None:
    """The disk of process 0 takes nothing after the first bytes of a file."""
    write, calls = StagedOutput.write, []

    def full(self, data):
        calls.append(data)
        if len(calls) > 2:
            raise self._files.refused(f"{self._name}: no space left")
        write(self, data)

    StagedOutput.write = full
    try:
        lm.save(folder)
    finally:
        StagedOutput.write = write


def refusing(number: int) -> None:
    if number == 1:
        raise ProblemsError("cannot read", ["no such file"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4]))
