"""Formulations of the routed experts against each other on this machine, and torch's loop beside them.

    python experiments/bench_grouped_matmul.py                                  # about 15 minutes on 2 cores
    python experiments/bench_grouped_matmul.py --tokens 1 64 --dtypes float32 --rounds 5 --no-backward

Every round runs all candidates, forwards and backwards in turn, and every call takes another layer of a
stack, so that weights come from memory as they do in a model. A candidate's figure is its median time; its
ratio is the median over rounds of its time over that of the default choice, which survives a noisy
machine better than the times do. Prints a table a case and writes JSON. `pallas_kernels/grouped_matmul/
tuning.py` holds the choice made from such a table. Torch's rows need the `test` extra.
"""

import dataclasses
import datetime
import functools
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from pallas_kernels.formats.blocks import Blocks, Fp8Blocks, Mxfp4
from pallas_kernels.formats.on_host import fp4_scale_shape, fp8_scale_shape
from pallas_kernels.grouped_matmul import expert_ffn
from pallas_kernels.grouped_matmul.tuning import ExpertBlocks, choose_blocks

LIMIT = 10.0
LAYERS = 6  # 6 x 48 MiB of float32 experts at the default sizes: more than any cache holds


@dataclasses.dataclass
class Options:
    """What to measure."""

    tokens: tuple[int, ...] = (1, 4, 8, 16, 64, 256, 512, 4096)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    experts: int = 32
    top_k: int = 6
    hidden: int = 512
    width: int = 256
    rounds: int = 15
    backward: bool = True
    out: Path = Path("bench_grouped_matmul.json")


@dataclasses.dataclass(frozen=True)
class Operands:
    """One call: tokens, their routing, and which layer of the stack they meet."""

    x: jax.Array
    expert_ids: jax.Array
    weights: jax.Array
    layer: int


def draw_stack(o: Options, dtype: str) -> tuple[jax.Array, jax.Array]:
    """gate_up [LAYERS * E, 2, F, D] and down [LAYERS * E, D, F]."""
    up, down = jax.random.split(jax.random.key(0))
    stack = LAYERS * o.experts
    return (
        jax.random.normal(up, (stack, 2, o.width, o.hidden), dtype) * o.hidden**-0.5,
        jax.random.normal(down, (stack, o.hidden, o.width), dtype) * o.width**-0.5,
    )


def draw_quantised_stack(o: Options, form: str) -> list[Blocks]:
    """The same matrices in "fp8" or "mxfp4", with any bits."""
    rng, stack = np.random.default_rng(0), LAYERS * o.experts
    shapes = (stack, 2, o.width, o.hidden), (stack, o.hidden, o.width)

    def draw(low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(low, high, shape, np.uint8))

    if form == "mxfp4":
        values = tuple(draw(0, 255, *shape[:-1], shape[-1] // 2) for shape in shapes)
        scales = [draw(118, 122, *fp4_scale_shape(shape)) for shape in shapes]
    else:
        bits = (draw(0, 126, *shape) for shape in shapes)
        values = tuple(jax.lax.bitcast_convert_type(b, jnp.float8_e4m3fn) for b in bits)
        scales = [draw(110, 114, *fp8_scale_shape(shape)) for shape in shapes]
    made = Mxfp4 if form == "mxfp4" else Fp8Blocks
    return [made(*pair) for pair in zip(values, scales, strict=True)]


def draw_calls(o: Options, num_tokens: int, dtype: str) -> list[Operands]:
    """Two calls a layer, with uniformly random distinct experts a token."""
    rng = np.random.default_rng(0)
    calls = []
    for call in range(2 * LAYERS):
        ids = rng.random((num_tokens, o.experts)).argsort(axis=1)[:, : o.top_k]
        x = rng.standard_normal((num_tokens, o.hidden), np.float32)
        weights = rng.random((num_tokens, o.top_k), np.float32)
        calls.append(
            Operands(jnp.asarray(x, dtype), jnp.asarray(ids, jnp.int32), jnp.asarray(weights), call % LAYERS)
        )
    return calls


def gated(both: jax.Array) -> jax.Array:
    """[..., 2F] -> [..., F]."""
    gate, up = jnp.split(both, 2, axis=-1)
    return jax.nn.silu(jnp.minimum(gate, LIMIT)) * jnp.clip(up, -LIMIT, LIMIT)


def gathered_weights(x, gate_up, down, ids, weights, first):
    """Every pair's own copy of its expert: two batched products."""
    flat = first + ids.reshape(-1)
    w13 = gate_up.at[flat].get(mode="promise_in_bounds").reshape(*ids.shape, -1, x.shape[1])
    w2 = down.at[flat].get(mode="promise_in_bounds").reshape(*ids.shape, x.shape[1], -1)
    both = jnp.einsum("td,tkfd->tkf", x, w13, preferred_element_type=jnp.float32)
    out = jnp.einsum("tkf,tkdf->tkd", gated(both).astype(x.dtype), w2, preferred_element_type=jnp.float32)
    return (out * weights[..., None]).sum(axis=1)


def ragged_dot(x, gate_up, down, ids, weights, first, *, num_experts):
    """Sort, two `lax.ragged_dot`, unsort."""
    top_k = ids.shape[1]
    order = jnp.argsort(ids.reshape(-1))
    sizes = jnp.bincount(ids.reshape(-1), length=num_experts)
    w13 = jax.lax.dynamic_slice_in_dim(gate_up, first, num_experts).reshape(num_experts, -1, x.shape[1])
    w2 = jax.lax.dynamic_slice_in_dim(down, first, num_experts)
    product = functools.partial(jax.lax.ragged_dot, group_sizes=sizes, preferred_element_type=jnp.float32)
    both = product(x[order // top_k], w13.swapaxes(1, 2))
    out = product(gated(both).astype(x.dtype), w2.swapaxes(1, 2))
    out = out * weights.reshape(-1)[order, None]
    return jnp.zeros(x.shape, jnp.float32).at[order // top_k].add(out)


def jax_candidates(o: Options, num_tokens: int, dtype: str, stack) -> dict[str, Callable]:
    """Name -> function of one call. The first is what `expert_ffn` chooses."""
    mean = num_tokens * o.top_k / o.experts
    default = choose_blocks(num_tokens * o.top_k, o.experts, streamable=True)
    plans = {f"default: {describe(default)}": {}}
    nearby = [ExpertBlocks(1, streamed=True)] if mean <= 6 else []
    nearby += [ExpertBlocks(r) for r in (1, 4, 8, 16, 32, 64, 128, 256) if mean / 8 <= r <= 12 * mean]
    plans |= {describe(b): {"blocks": b} for b in nearby if b != default}
    weights = {}
    if dtype == "bfloat16":
        for form in ("fp8", "mxfp4"):
            plans[f"{form} weights"] = {}
            weights[f"{form} weights"] = draw_quantised_stack(o, form)
    options = dict(swiglu_limit=LIMIT)
    found = {name: functools.partial(expert_ffn, **options, **plan) for name, plan in plans.items()}
    if num_tokens <= 8:
        found["gathered weights"] = gathered_weights
    if num_tokens <= 64:
        found["all experts on all tokens"] = functools.partial(expert_ffn, impl="reference", **options)
        found["lax.ragged_dot"] = functools.partial(ragged_dot, num_experts=o.experts)

    def call(function, matrices):
        @jax.jit
        def compiled(x, gate_up, down, ids, weights, layer):
            if getattr(function, "func", None) is not expert_ffn:
                return function(x, gate_up, down, ids, weights, layer * o.experts)
            gate_up, down = jax.tree.map(lambda a: a.reshape(LAYERS, -1, *a.shape[1:]), (gate_up, down))
            return function(x, gate_up, down, ids, weights, repeat=layer)

        return lambda c: jax.block_until_ready(
            compiled(c.x, *matrices, c.expert_ids, c.weights, jnp.int32(c.layer))
        )

    return {name: call(function, weights.get(name, stack)) for name, function in found.items()}


def backward_candidates(o: Options, num_tokens: int, stack) -> dict[str, Callable]:
    """Value and all gradients of one layer; the stack is sliced, as training does."""
    default = choose_blocks(num_tokens * o.top_k, o.experts, backward=True)
    plans = {f"default: {describe(default)}": None}
    mean = num_tokens * o.top_k / o.experts
    for rows in (16, 32, 64, 128, 256):
        if mean / 8 <= rows <= 4 * mean and rows != default.rows:
            plans[describe(ExpertBlocks(rows))] = ExpertBlocks(rows)
    layers = [[w[i * o.experts : (i + 1) * o.experts] for w in stack] for i in range(LAYERS)]

    def call(blocks):
        @jax.jit
        def compiled(x, gate_up, down, weights, ids):
            run = lambda x, g, d, w: expert_ffn(x, g, d, ids, w, swiglu_limit=LIMIT, blocks=blocks)  # noqa: E731
            y, pull = jax.vjp(run, x, gate_up, down, weights)
            return y, pull(jnp.ones_like(y))

        return lambda c: jax.block_until_ready(compiled(c.x, *layers[c.layer], c.weights, c.expert_ids))

    return {name: call(blocks) for name, blocks in plans.items()}


def torch_loop(o: Options, calls: list[Operands], dtype: str, stack) -> Callable[[Operands], object]:
    """The eager experts of transformers' DeepSeek-V4, one module a layer."""
    import torch
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
        DeepseekV4Config,
        DeepseekV4Experts,
    )

    torch.set_grad_enabled(False)

    def tensor(a: jax.Array) -> torch.Tensor:
        return torch.from_numpy(np.array(a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a))

    config = DeepseekV4Config(
        hidden_size=o.hidden,
        moe_intermediate_size=o.width,
        n_routed_experts=o.experts,
        swiglu_limit=LIMIT,
    )
    config._experts_implementation = "eager"
    modules = []
    for layer in range(LAYERS):
        own = slice(layer * o.experts, (layer + 1) * o.experts)
        module = DeepseekV4Experts(config).to(getattr(torch, dtype))
        module.gate_up_proj.copy_(tensor(stack[0][own]).reshape(module.gate_up_proj.shape))
        module.down_proj.copy_(tensor(stack[1][own]))
        modules.append(module)
    inputs = {
        id(c): (
            tensor(c.x).to(getattr(torch, dtype)),
            tensor(c.expert_ids).long(),
            tensor(c.weights).to(getattr(torch, dtype)),
        )
        for c in calls
    }
    return lambda c: modules[c.layer](*inputs[id(c)])


def describe(blocks: ExpertBlocks) -> str:
    return "rows 1, streamed" if blocks.streamed else f"rows {blocks.rows}"


def compare(candidates: dict[str, Callable], calls: list[Operands], rounds: int) -> list[dict]:
    """Medians in milliseconds and paired ratios to the first candidate."""
    for run in candidates.values():
        run(calls[0])
    names, taken = list(candidates), {name: [] for name in candidates}
    count = 0
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            count += 1
            start = time.perf_counter()
            candidates[name](calls[count % len(calls)])
            taken[name].append(1e3 * (time.perf_counter() - start))
    return [
        {
            "candidate": name,
            "median_ms": statistics.median(taken[name]),
            "least_ms": min(taken[name]),
            "ratio": statistics.median(
                t / base for t, base in zip(taken[name], taken[names[0]], strict=True)
            ),
        }
        for name in names
    ]


def main(options: Options) -> None:
    """Measures, prints and writes."""
    console, rows = Console(), []
    has_torch = importlib.util.find_spec("transformers") and importlib.util.find_spec("torch")
    for dtype in options.dtypes:
        stack = draw_stack(options, dtype)
        for num_tokens in options.tokens:
            calls = draw_calls(options, num_tokens, dtype)
            flops = 6 * num_tokens * options.top_k * options.hidden * options.width
            works = {"forward": jax_candidates(options, num_tokens, dtype, stack)}
            if has_torch:
                works["forward"]["torch loop"] = torch_loop(options, calls, dtype, stack)
            if options.backward and num_tokens >= 64:
                works["forward + backward"] = backward_candidates(options, num_tokens, stack)
            for work, candidates in works.items():
                rounds = max(3, options.rounds // (1 + num_tokens // 512))
                found = compare(candidates, calls, rounds)
                case = {"work": work, "dtype": dtype, "tokens": num_tokens}
                rows += [case | row for row in found]
                factor = 1 if work == "forward" else 11 / 3
                table = Table(
                    "candidate",
                    "median ms",
                    "least ms",
                    "ratio",
                    "GFLOP/s",
                    title=f"{work}, {dtype}, {num_tokens} tokens",
                )
                for row in found:
                    rate = factor * flops / row["median_ms"] / 1e6
                    table.add_row(
                        row["candidate"],
                        f"{row['median_ms']:.3f}",
                        f"{row['least_ms']:.3f}",
                        f"{row['ratio']:.2f}",
                        f"{rate:.0f}",
                    )
                console.print(table)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "options": {k: v for k, v in dataclasses.asdict(options).items() if k != "out"},
        "rows": rows,
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    console.print(f"written: {options.out}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
