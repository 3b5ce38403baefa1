"""Training steps of ours against transformers' model under torch autograd and AdamW, on this CPU.

    python -m experiments.bench_train                        # three sizes; minutes on 2 idle cores
    python -m experiments.bench_train --sizes quickstart --repeats 3

Both sides train the same weights on the same random tokens in float32: cross entropy of the next token plus
the balance loss of layers that learn their routing, clipping by global norm, AdamW with the report's numbers,
and the balance rule. (transformers has no MTP block, so neither side has one.) Before anything is timed, the
losses of both are compared, with indexers that choose every entry: a benchmark of different arithmetic is
refused. (At random weights many index scores are equal, and which of them are chosen is each side's affair.)

One process, turns that alternate: matmul, ours, theirs, then the next repeat. The ratio is the median of the
repeats' ratios, and its spread is beside it. CPU seconds of the process are beside wall seconds: on a shared
machine they are what a step costs, and wall time is also what others left of the cores. Parts of torch's step
are timed inside of it. Parts of ours are differences between three programs (the loss alone; loss and
gradients; the whole step), because a step is one compiled call; small ones are uncertain.

torch gets what is fastest here: fused AdamW, and the quicker of transformers' ways to run experts (`eager`
and `grouped_mm`), chosen by a short run before. Needs the `test` extra (torch, transformers).
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.config import ModelConfig, tiny
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import Parameters
from dsv4_jax.training.batch_losses import forward_losses
from dsv4_jax.training.data import Batch
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW, merge_params, split_trainable
from dsv4_jax.training.recipe import QUICKSTART
from dsv4_jax.training.step import Optimizer, Rates, StepSettings, initial_state, train_step
from experiments.bench_cpu import active_parameters, bench_config
from experiments.study_record import stamp, table, write

RATE = 1e-4
PARTS = ("forward", "backward", "optimizer")


@dataclasses.dataclass(frozen=True)
class Size:
    """A model without an MTP block, and the rows of a batch."""

    config: ModelConfig
    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.seq_len


SIZES = {
    "tiny": Size(tiny(4, num_nextn_predict_layers=0), 2, 32),
    "quickstart": Size(dataclasses.replace(QUICKSTART.config, num_nextn_predict_layers=0), 4, 256),
    "medium": Size(
        dataclasses.replace(
            bench_config(), vocab_size=4096, hidden_size=256, num_attention_heads=8, head_dim=64,
            qk_rope_head_dim=16, o_lora_rank=128, n_routed_experts=16, num_experts_per_tok=4,
            index_topk=64, index_n_heads=8, index_head_dim=32,
        ),
        2,
        512,
    ),
    "large": Size(bench_config(), 1, 1024),
}  # fmt: skip
"""`quickstart` is its model; `large` is that of `bench_cpu`: hidden size 512, 8 layers, 32 experts."""


@dataclasses.dataclass
class Options:
    """What to measure."""

    sizes: tuple[str, ...] = ("quickstart", "medium", "large")
    repeats: int = 7
    threads: int = 2
    """Of torch; JAX takes the cores that the process may use."""
    muon: bool = True
    """Time our step with Muon too (torch's is AdamW in either row)."""
    out: Path = Path("experiments/results/bench_train.json")
    """Also names the table (`.md`)."""


class Clock:
    """Wall and CPU seconds (of all threads of this process) since it was made or last read."""

    def __init__(self) -> None:
        self._last = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """(wall, CPU) seconds since the last reading."""
        now = time.perf_counter(), time.process_time()
        found = now[0] - self._last[0], now[1] - self._last[1]
        self._last = now
        return found


class Ours:
    """The public training step, and the programs that it is taken apart with."""

    def __init__(self, size: Size, params: Parameters, optimizer: Optimizer) -> None:
        self.network = Network(size.config, Policy.of("float32"))
        self.settings, self.rates = StepSettings(optimizer), Rates(np.float32(RATE))
        self.state = initial_state(jax.tree.map(jnp.copy, params), optimizer)

        def loss(trained: Parameters, fixed: Parameters, batch: Batch) -> jax.Array:
            model = self.network.holding(merge_params(trained, fixed))
            return forward_losses(model, batch, self.settings.mode)[0].total(self.rates)

        self._trained, self._fixed = split_trainable(params)
        self._forward, self._both = jax.jit(loss), jax.jit(jax.value_and_grad(loss))

    def step(self, batch: Batch) -> float:
        """One step; the loss before it."""
        self.state, report = train_step(self.network, self.settings, self.state, batch, self.rates)
        jax.block_until_ready((self.state, report))
        return float(report.main)

    def parts(self, batch: Batch) -> dict[str, tuple[float, float]]:
        """(wall, CPU) seconds of the loss, and of the loss with its gradients."""
        clock, found = Clock(), {}
        for name, program in (("forward", self._forward), ("forward and backward", self._both)):
            clock.read()
            jax.block_until_ready(program(self._trained, self._fixed, batch))
            found[name] = clock.read()
        return found


class Theirs:
    """transformers' model, torch autograd, torch's AdamW with the report's numbers."""

    def __init__(self, folder: Path, experts: str) -> None:
        torch, transformers = import_torch()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation=experts
        ).train()
        named = list(self.model.named_parameters())
        decayed = [p for name, p in named if p.ndim >= 2 and not name.endswith("position_bias")]
        others = [p for name, p in named if p.ndim < 2 or name.endswith("position_bias")]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-20, fused=True)
        self.taken: dict[str, tuple[float, float]] = {}

    def step(self, batch: Batch) -> float:
        """One step; the loss before it. Leaves what its parts took in `taken`."""
        torch, _ = import_torch()
        clock = Clock()
        routed: list[tuple[Any, Any, Any]] = []

        def note(module: Any, args: Any, out: Any) -> None:
            if hasattr(module, "e_score_correction_bias"):
                routed.append((module, module.score_fn(out[0]), out[2]))

        hooks = [layer.mlp.gate.register_forward_hook(note) for layer in self.model.model.layers]
        tokens = torch.as_tensor(batch.tokens).long()
        logits = self.model(tokens, use_cache=False).logits[:, :-1]
        for hook in hooks:
            hook.remove()
        main = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        total, loads = main, []
        for module, scores, chosen in routed:
            count, top_k, rows = module.num_experts, module.top_k, len(tokens)
            picked = torch.nn.functional.one_hot(chosen, count).sum(1).float()
            loads.append(picked.sum(0))
            share = (scores / scores.sum(-1, keepdim=True)).view(rows, -1, count).mean(1)
            frequency = picked.view(rows, -1, count).mean(1) * count / top_k
            total = total + 1e-4 * (frequency * share).sum(-1).mean()
        self.taken["forward"] = clock.read()
        self.optimizer.zero_grad()
        total.backward()
        self.taken["backward"] = clock.read()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for (module, _, _), load in zip(routed, loads, strict=True):
                module.e_score_correction_bias += 1e-3 * torch.sign(load.mean() - load)
        self.taken["optimizer"] = clock.read()
        return main.item()


def import_torch() -> tuple[Any, Any]:
    """torch and transformers.

    Raises:
        SystemExit: without them: what to install.
    """
    # Idle OpenMP threads would otherwise spin on a core while the other side runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SystemExit(f"{error}: this benchmark needs the test extra, pip install '.[test]'") from error
    return torch, transformers


def peak(dimension: int = 1536) -> Callable[[], tuple[float, float]]:
    """A function that gives the FLOP a wall second, and a CPU second, of a float32 matrix product by XLA."""
    a = jnp.ones((dimension, dimension), jnp.float32)
    product = jax.jit(jnp.dot)
    jax.block_until_ready(product(a, a))

    def measured() -> tuple[float, float]:
        clock = Clock()
        jax.block_until_ready(product(a, a))
        wall, cpu = clock.read()
        return 2 * dimension**3 / wall, 2 * dimension**3 / cpu

    return measured


def check_same(ours: float, theirs: float) -> None:
    """Refuses to compare sides whose losses differ.

    Args:
        ours, theirs: losses of the same batch, in nats a token.

    Raises:
        RuntimeError: where they differ by more than 1e-5 of their size.
    """
    if not np.isclose(ours, theirs, rtol=1e-5, atol=0):
        raise RuntimeError(f"the sides compute different losses: ours {ours}, transformers {theirs}")


def losses_without_choices(size: Size, batch: Batch) -> tuple[float, float]:
    """Main loss of ours and of theirs, of random weights with indexers that choose every entry."""
    torch, _ = import_torch()
    config = dataclasses.replace(size.config, index_topk=max(1, size.seq_len // size.config.csa_ratio))
    lm = LanguageModel.random(config, Policy.of("float32"))
    with tempfile.TemporaryDirectory() as temporary:
        lm.save(Path(temporary) / "model", layout="transformers")
        theirs = Theirs(Path(temporary) / "model", "eager")
    network = Network(config, Policy.of("float32"))
    loss = jax.jit(lambda params: forward_losses(network.holding(params), batch)[0].main)
    tokens = torch.as_tensor(batch.tokens).long()
    with torch.no_grad():
        logits = theirs.model(tokens, use_cache=False).logits[:, :-1]
        other = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return float(loss(lm.parameters)), other.item()


def quicker_experts(folder: Path, batch: Batch) -> tuple[Theirs, dict[str, float]]:
    """The quicker way of transformers to run experts, warm, and CPU seconds a step of each way."""
    sides, seconds = {}, {}
    for name in ("eager", "grouped_mm"):
        side = Theirs(folder, name)
        side.step(batch)
        clock = Clock()
        side.step(batch)
        seconds[name] = clock.read()[1]
        sides[name] = side
    best = min(seconds, key=lambda name: seconds[name])
    return Theirs(folder, best), seconds


def measure(name: str, options: Options) -> dict[str, Any]:
    """One size: every repeat, and medians over them."""
    size, rng = SIZES[name], np.random.default_rng(0)
    torch, _ = import_torch()
    torch.set_num_threads(options.threads)
    lm = LanguageModel.random(size.config, Policy.of("float32"))

    def draw() -> Batch:
        tokens = rng.integers(0, size.config.vocab_size, (size.batch_size, size.seq_len)).astype(np.int32)
        return Batch(tokens, np.ones_like(tokens))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        lm.save(folder, layout="transformers")
        theirs, ways = quicker_experts(folder, draw())
    ours = Ours(size, lm.parameters, AdamW())
    muon = Ours(size, lm.parameters, Muon()) if options.muon else None
    first = draw()
    check_same(*losses_without_choices(size, first))
    for warmed in (ours, theirs, *([] if muon is None else [muon])):
        warmed.step(first)
    ours.parts(first)
    matmul, repeats = peak(), []
    for _ in range(options.repeats):
        batch, clock = draw(), Clock()
        row: dict[str, Any] = {"peak": matmul()}
        clock.read()
        ours.step(batch)
        row["ours"] = clock.read()
        theirs.step(batch)
        row["theirs"] = clock.read()
        row["their_parts"] = dict(theirs.taken)
        row["our_parts"] = ours.parts(batch)
        clock.read()
        if muon is not None:
            muon.step(batch)
            row["muon"] = clock.read()
        repeats.append(row)
    flops = 6 * active_parameters(size.config, lm) * size.tokens
    return summary(name, size, repeats, flops) | {"their_experts_cpu_seconds": ways, "repeats": repeats}


def summary(name: str, size: Size, repeats: list[dict[str, Any]], flops: float) -> dict[str, Any]:
    """Medians of one size.

    Args:
        name, size: the size.
        repeats: seconds (wall, CPU) as `measure` collects them.
        flops: of the linear layers in a step, forward and backward.
    """

    def median(value: Callable[[dict[str, Any]], float]) -> float:
        return statistics.median(value(row) for row in repeats)

    found: dict[str, Any] = {"size": name, "batch": [size.batch_size, size.seq_len]}
    found |= {kind: _seconds(repeats, index) for index, kind in enumerate(("wall", "cpu"))}
    found["peak"] = [median(lambda row, index=index: row["peak"][index]) for index in (0, 1)]
    found["tokens_per_second"] = {
        side: size.tokens / seconds for side, seconds in found["wall"]["seconds"].items()
    }
    # By CPU time: what others leave of the cores differs between a product and a step.
    found["share_of_peak"] = {
        side: median(lambda row, side=side: flops / row[side][1] / row["peak"][1])
        for side in ("ours", "theirs")
    }
    return found


def _seconds(repeats: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """Medians of wall (index 0) or CPU (index 1) seconds."""

    def median(value: Callable[[dict[str, Any]], tuple[float, float]]) -> float:
        return statistics.median(value(row)[index] for row in repeats)

    ratios = sorted(row["theirs"][index] / row["ours"][index] for row in repeats)
    sides = {
        side: median(lambda row, side=side: row[side])
        for side in ("ours", "theirs", "muon")
        if side in repeats[0]
    }
    forward = median(lambda row: row["our_parts"]["forward"])
    both = median(lambda row: row["our_parts"]["forward and backward"])
    return {
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "seconds": sides,
        "our_parts": {"forward": forward, "backward": both - forward, "optimizer": sides["ours"] - both},
        "their_parts": {part: median(lambda row, part=part: row["their_parts"][part]) for part in PARTS},
    }


def markdown(record: dict[str, Any]) -> str:
    """Both tables so far."""
    rows, parts = [], []
    for row in record["rows"]:
        rate = row["tokens_per_second"]
        rows.append(
            [
                row["size"],
                "{} x {}".format(*row["batch"]),
                *(f"{rate[side]:.0f}" if side in rate else "" for side in ("ours", "muon", "theirs")),
                *(
                    "{:.2f} ({:.2f} to {:.2f})".format(row[kind]["ratio"], *row[kind]["ratio_range"])
                    for kind in ("wall", "cpu")
                ),
                " / ".join(f"{rate / 1e9:.0f}" for rate in row["peak"]),
                *(f"{row['share_of_peak'][side]:.0%}" for side in ("ours", "theirs")),
            ]
        )
        for kind in ("wall", "cpu"):
            mine, other = row[kind]["our_parts"], row[kind]["their_parts"]
            cells = [f"{1e3 * mine[part]:.0f} / {1e3 * other[part]:.0f}" for part in PARTS]
            parts.append([row["size"], kind, *cells])
    header = [
        "model",
        "batch",
        "ours, tokens/s",
        "ours with Muon",
        "torch, tokens/s",
        "ours / torch by wall time",
    ]
    header += ["by CPU time", "matmul, GFLOP a wall / CPU s", "ours of it", "torch of it"]
    options = record["options"]
    return (
        "# Training steps against transformers under torch\n\n"
        f"{record['date']}, {record['machine']}, jax {record['jax']}, torch {record['torch']}, transformers "
        f"{record['transformers']}, `{record['command']}`\n\n"
        f"float32, AdamW on both sides, {options['threads']} threads; medians over {options['repeats']} "
        "alternating repeats, in brackets the lowest and highest. Shares of the matmul rate are by CPU "
        "time and count linear layers alone (6 FLOPs a used parameter and token), not attention's products. "
        "Load average before and after: "
        f"{record['load'][0]:.1f} and {record['load'][-1]:.1f}.\n\n"
        f"{table(header, rows)}\nMilliseconds of the parts, ours / torch:\n\n"
        f"{table(['model', 'time', *PARTS], parts)}"
    )


def main(options: Options) -> None:
    """Measures every size; everything is written after each."""
    if unknown := sorted(set(options.sizes) - SIZES.keys()):
        raise SystemExit(f"sizes={unknown} must be among {', '.join(SIZES)}")
    torch, transformers = import_torch()
    console = Console()
    shown = {key: value for key, value in dataclasses.asdict(options).items() if key != "out"}
    record = stamp("bench_train") | {"torch": torch.__version__, "transformers": transformers.__version__}
    record |= {"options": shown, "load": [os.getloadavg()[0]], "rows": []}
    for name in options.sizes:
        record["rows"].append(measure(name, options))
        record["load"].append(os.getloadavg()[0])
        write(options.out, record, markdown(record))
        console.print(f"{name}: {record['rows'][-1]['wall']['ratio']:.2f} by wall time, "
                      f"{record['rows'][-1]['cpu']['ratio']:.2f} by CPU time")  # fmt: skip
    console.print(markdown(record))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
