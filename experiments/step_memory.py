"""Memory of a training step at the widths of V4-Flash, as the compiler plans it. Nothing is run or allocated.

    python -m experiments.step_memory --label after                    # for a described TPU v6e
    python -m experiments.step_memory --label after --chip cpu         # for this machine, without kernels

Three layers, one of each attention kind, the MTP block, and, as a second model, four repeats of (CSA, HCA),
which are scanned. Every width of V4-Flash but two: an expert's hidden width and the vocabulary are smaller,
because the gradients of 256 whole experts would hide what is kept of the activations, and fit no chip.

Two figures a program, at two lengths:

* kept: bytes that the forward pass hands to the backward pass, by the shapes of what `jax.vjp` returns. The
  figure a token is the slope between the two lengths, so that copies of weights do not count.
* temporaries: bytes beside arguments and results in the compiled step, at the peak, by the compiler.

Rows of other labels that are in the file already stay: run it on two commits and compare. Needs libtpu (extra
`test` or `tpu`), except with `--chip cpu`.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu reads these when it is loaded; without them it looks for a cloud machine's metadata.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies

from dsv4_jax.config import ModelConfig, v4_flash
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.data import Batch
from dsv4_jax.training.optimizer import AdamW, merge_params, split_trainable
from dsv4_jax.training.step import Rates, StepSettings, forward_losses, initial_state, train_step
from experiments import study_record

EXPERT_WIDTH, VOCABULARY = 128, 16384
LAYERS = {
    "3 layers": (("window", "csa", "hca"), ("hash", "learned", "learned")),
    "4 x (CSA, HCA)": (("csa", "hca") * 4, ("learned",) * 8),
}
HEAD = [
    "label", "model", "remat", "tokens", "kept, bytes a token", "temporaries, MiB", "arguments, MiB",
]  # fmt: skip


@dataclasses.dataclass
class Options:
    """What to compile."""

    label: str
    """Names the rows, for instance the commit."""
    chip: Literal["v6e", "cpu"] = "v6e"
    models: tuple[str, ...] = ("3 layers",)
    """Of LAYERS."""
    remat: tuple[Literal["none", "unit"], ...] = ("unit", "none")
    tokens: int = 4096
    """Of the one row that is compiled; `kept` also looks at half as many."""
    out: Path = Path("experiments/results/step_memory.json")
    """Also names the table (`.md`)."""


def flash(layers: str) -> ModelConfig:
    """V4-Flash with these layers, narrow experts and a smaller vocabulary."""
    attention, routers = LAYERS[layers]
    return dataclasses.replace(
        v4_flash(),
        attention_kinds=attention,
        router_kinds=routers,
        moe_intermediate_size=EXPERT_WIDTH,
        vocab_size=VOCABULARY,
    )


def batch_shapes(tokens: int) -> Batch:
    """One packed row."""
    return Batch(*[jax.ShapeDtypeStruct((1, tokens), jnp.int32)] * 2)


def kept_bytes(network: Network, tokens: int) -> int:
    """Bytes of what the forward pass computes and the backward pass reads."""
    trained, fixed = split_trainable(network.shapes())

    def forward(trained: dict, fixed: dict, batch: Batch) -> Any:
        def loss(trained: dict) -> jax.Array:
            return forward_losses(network.holding(merge_params(trained, fixed)), batch)[0].total()

        return jax.vjp(loss, trained)[1]

    program = jax.make_jaxpr(forward)(trained, fixed, batch_shapes(tokens)).jaxpr
    given = set(program.invars)
    made = {var for var in program.outvars if not isinstance(var, jax.extend.core.Literal)} - given
    return sum(var.aval.size * var.aval.dtype.itemsize for var in made)


def compiled_memory(network: Network, tokens: int, chip: str) -> Any:
    """The compiler's account of one training step."""
    optimizer = AdamW()
    state = jax.eval_shape(lambda params: initial_state(params, optimizer), network.shapes())
    rates = Rates(*[jax.ShapeDtypeStruct((), jnp.float32)] * len(Rates._fields))
    arguments = (state, batch_shapes(tokens), rates)
    if chip != "cpu":
        device = topologies.get_topology_desc(platform="tpu", topology_name=f"{chip}:2x2").devices[0]
        here = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array([device]), ("x",)), jax.P())
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), arguments
        )
    return train_step.lower(network, StepSettings(optimizer), *arguments).compile().memory_analysis()


def measure(layers: str, remat: str, tokens: int, chip: str) -> dict[str, Any]:
    """The row of one model and policy."""
    kernels = "xla" if chip == "cpu" else "pallas"
    network = Network(flash(layers), Policy.of("bfloat16", remat=remat, kernels=kernels))
    kept = kept_bytes(network, tokens) - kept_bytes(network, tokens // 2)
    memory = compiled_memory(network, tokens, chip)
    return {
        "model": layers,
        "remat": remat,
        "chip": chip,
        "tokens": tokens,
        "kept_bytes_per_token": kept / (tokens - tokens // 2),
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
    }


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows, those of one program under each other."""
    order = sorted(rows, key=lambda row: (row["chip"], row["model"], row["remat"], row["tokens"]))
    return study_record.table(
        ["chip", *HEAD],
        [
            [
                row["chip"], row["label"], row["model"], row["remat"], row["tokens"],
                f"{row['kept_bytes_per_token']:,.0f}", f"{row['temporary_bytes'] / 2**20:,.1f}",
                f"{row['argument_bytes'] / 2**20:,.1f}",
            ]
            for row in order
        ],
    )  # fmt: skip


def main(options: Options) -> None:
    stamp = study_record.stamp("step_memory")
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    for layers in options.models:
        for remat in options.remat:
            row = {"label": options.label} | measure(layers, remat, options.tokens, options.chip) | stamp
            same = ("label", "model", "remat", "chip", "tokens")
            rows = [old for old in rows if any(old[key] != row[key] for key in same)] + [row]
            text = "# Memory of a training step at V4-Flash's widths\n\n" + as_table(rows)
            study_record.write(options.out, {"rows": rows}, text)
            print(as_table([row]), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
