"""Cases of `tpu_cycles.py`: the routed experts, every token's experts drawn evenly."""

from typing import NamedTuple

import numpy as np

from dsv4_jax.config import ModelConfig
from experiments.tpu_case import Case, Kernel, Program, array, gradients, us
from pallas_kernels.formats.on_host import fp4_packed_shape, fp4_scale_shape, fp8_scale_shape


class _Routing(NamedTuple):
    """What the kernels' scalar operands are for one even routing decision."""

    expert: np.ndarray
    count: np.ndarray
    total: np.ndarray

    def in_use(self) -> float:
        """Share of the items that have rows."""
        return int((self.count > 0).sum()) / len(self.count)


def _routing(tokens: int, c: ModelConfig, *, every_expert: bool = False) -> _Routing:
    import jax.numpy as jnp

    from pallas_kernels.grouped_matmul.tuning_tpu import choose_rows
    from pallas_kernels.grouped_matmul.work_items import work_items

    rng, experts, top_k = np.random.default_rng(0), c.n_routed_experts, c.num_experts_per_tok
    ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    items = work_items(
        jnp.asarray(ids, jnp.int32), jnp.ones(tokens, bool), num_experts=experts,
        rows=choose_rows(ids.size, experts), every_expert=every_expert,
    )  # fmt: skip
    return _Routing(*(np.asarray(a) for a in (items.expert, items.count, items.total)))


def expert_cases(c: ModelConfig) -> list[Case]:
    import jax
    import jax.numpy as jnp

    experts, top_k, d, f = (
        c.n_routed_experts,
        c.num_experts_per_tok,
        c.hidden_size,
        c.moe_intermediate_size,
    )
    weight_bytes = {"bf16": 2.0, "fp8": 1 + 2.0**-14, "mxfp4": 0.5 + 1 / 32}

    def weights(form: str) -> dict[str, jax.ShapeDtypeStruct]:
        if form == "bf16":
            return dict(gate_up=array(experts, 2, f, d), down=array(experts, d, f))
        u8 = lambda *shape: array(*shape, dtype=jnp.uint8)  # noqa: E731
        if form == "fp8":
            e4m3 = lambda *shape: array(*shape, dtype=jnp.float8_e4m3fn)  # noqa: E731
            blocks = dict(
                gate_up_scale=u8(*fp8_scale_shape((experts, 2, f, d))),
                down_scale=u8(*fp8_scale_shape((experts, d, f))),
            )
            return dict(gate_up=e4m3(experts, 2, f, d), down=e4m3(experts, d, f)) | blocks
        return dict(
            gate_up=u8(*fp4_packed_shape((experts, 2, f, d))),
            gate_up_scale=u8(*fp4_scale_shape((experts, 2, f, d))),
            down=u8(*fp4_packed_shape((experts, d, f))),
            down_scale=u8(*fp4_scale_shape((experts, d, f))),
        )

    def build(form: str, tokens: int, kernels: tuple[str, ...], backward: bool) -> Program:
        from pallas_kernels.grouped_matmul import expert_ffn
        from pallas_kernels.grouped_matmul.kernel_tpu import formulation_of
        from pallas_kernels.grouped_matmul.stored import Stack
        from pallas_kernels.grouped_matmul.tuning_tpu import ROWS_AT_ONCE, choose_rows

        routing = _routing(tokens, c, every_expert=backward)
        given = weights(form)
        stack = Stack(given["gate_up"], given.get("gate_up_scale"))
        rows = choose_rows(tokens * top_k, experts)
        masked = formulation_of(stack, jnp.bfloat16, rows, "output") == "masked rows"
        used = routing.in_use()

        def counted(name: str) -> Kernel:
            if name == "weights":  # start, add and finish; the first and the last once an expert
                once_an_expert = experts / len(routing.count)
                return Kernel(
                    lambda grid: (once_an_expert, used, once_an_expert), None, (routing.expert, routing.total)
                )
            if name == "input":
                return Kernel(lambda grid: (used, 1 / grid[1]), None, tuple(routing))
            if not masked:
                return Kernel(lambda grid: (used,), None, tuple(routing))
            # The first step of an item lays out the rows of each of its passes.
            passes = np.ceil(routing.count[routing.count > 0] / ROWS_AT_ONCE)
            laid_out = [float((passes > number).mean()) for number in range(rows // ROWS_AT_ONCE)]
            return Kernel(lambda grid: (used, 1 / grid[1], *laid_out), float(passes.mean()), tuple(routing))

        def function(x, ids, weights, **given):
            gate_up, down = (
                Stack(given[name], given.get(f"{name}_scale")).matrices for name in ("gate_up", "down")
            )
            return expert_ffn(x, gate_up, down, ids, weights, swiglu_limit=c.swiglu_limit, impl="pallas")

        shapes = dict(
            x=array(tokens, d), ids=array(tokens, top_k, dtype=jnp.int32),
            weights=array(tokens, top_k, dtype=jnp.float32), **given,
        )  # fmt: skip
        if backward:
            function, shapes = gradients(function, shapes, ("x", "gate_up", "down", "weights"))
        return Program(function, shapes, {f"grouped_matmul_{name}": counted(name) for name in kernels})

    def cost(form: str, tokens: int, kernels: tuple[str, ...], backward: bool) -> tuple[float, float]:
        active = len(np.unique(_routing(tokens, c).expert))
        matrices = {"swiglu": 2, "output": 1}
        share = sum(matrices.get(name, 0) for name in kernels)
        pairs = tokens * top_k
        if backward:
            return 16 * pairs * d * f, 2 * (3 * active + 3 * experts) * d * f
        return 2 * pairs * share * d * f, active * share * d * f * weight_bytes[form]

    def case(name: str, form: str, tokens: int, *kernels: str, backward=False, **figures) -> Case:
        sizes = form, tokens, kernels, backward
        label = f"experts {name} {form} {tokens}"
        return Case(label, lambda: build(*sizes), lambda: cost(*sizes), **figures)

    # The peer takes FP8 with one scale a column, MXFP4 on tpu7x only, and bfloat16 by megablox on v6e.
    return [
        case("gate+up", "mxfp4", 64, "swiglu", target=us(1350, 600), peer={"tpu7x": 820}),
        case("whole", "mxfp4", 64, "swiglu", "output"),
        case("gate+up", "fp8", 64, "swiglu", peer=us(2041, 907)),
        case("gate+up", "bf16", 64, "swiglu", peer=us(4785)),
        case("gate+up", "mxfp4", 2048, "swiglu"),
        case("gate+up", "fp8", 2048, "swiglu", peer=us(2714)),
        case("gate+up", "bf16", 2048, "swiglu"),
        case("backward", "bf16", 2048, "output", "input", "weights", backward=True),
    ]
