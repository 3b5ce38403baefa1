"""One of two processes that load a checkpoint and save it again, in two layouts."""

import pathlib
import sys

import dsv4_jax
from dsv4_jax.checkpoint.names import official_tensors
from dsv4_jax.checkpoint.save import flattened
from dsv4_jax.checkpoint.shares import shares
from sharding.processes import join

MESH = "tensor=2,context=4"
"""Each process has half of what is split over tensor, and four copies of it."""


def saved(model, folder: pathlib.Path) -> None:
    model.save(folder / "official")
    model.save(folder / "transformers", layout="transformers")


def main(port: int, number: int, checkpoint: str, folder: pathlib.Path) -> None:
    join(f"127.0.0.1:{port}", 2, number)
    model = dsv4_jax.load(checkpoint, mesh=MESH)
    saved(model, folder)
    torn = shares(flattened(model.parameters), official_tensors(model.config)).torn
    (folder / f"torn{number}").write_text("\n".join(sorted(torn)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], pathlib.Path(sys.argv[4]))
