"""Cases of `tpu_cycles.py`: FP8 dense layers."""

import numpy as np

from dsv4_jax.config import ModelConfig
from experiments.tpu_case import Case, Kernel, Program, array, gradients
from pallas_kernels.arithmetic import cdiv


def block_matmul_cases(c: ModelConfig) -> list[Case]:
    import jax
    import jax.numpy as jnp

    layers = {
        "wq_b": (c.num_attention_heads * c.head_dim, c.q_lora_rank),
        "wo_b": (c.hidden_size, c.o_groups * c.o_lora_rank),
    }

    def build(tokens: int, outputs: int, inputs: int, backward: bool) -> Program:
        from pallas_kernels.block_matmul import block_matmul
        from pallas_kernels.block_matmul.tuning import FEW_ROWS
        from pallas_kernels.formats.blocks import Fp8Blocks

        shapes = {
            "x": array(tokens, inputs),
            "weight": jax.ShapeDtypeStruct((outputs, inputs), jnp.float8_e4m3fn),
            "scale": jax.ShapeDtypeStruct((outputs // 128, inputs // 128), jnp.uint8),
        }

        def function(x, weight, scale):
            return block_matmul(x, Fp8Blocks(weight, scale))

        if backward:
            function, shapes = gradients(function, shapes, ("x",))
        kernel = "block_matmul_input" if backward else "block_matmul_output"
        if tokens <= FEW_ROWS and not backward:
            kernel = "block_matmul_few_rows"
        # Sums start and end once for every row of summed blocks. The weight is a stack of one repeat.
        first = (np.zeros(1, np.int32),)
        return Program(function, shapes, {kernel: Kernel(when=lambda grid: 1 / grid[2], prefetch=first)})

    def cost(tokens: int, outputs: int, inputs: int, backward: bool) -> tuple[float, float]:
        from pallas_kernels.block_matmul.tuning import choose_blocks

        outer, summed = (inputs, outputs) if backward else (outputs, inputs)
        blocks = choose_blocks(tokens, outer, summed, 2)
        rereads = 1 if blocks.summed == summed else outer // blocks.outer
        moved = outputs * inputs * (1 + 1 / 32) * cdiv(tokens, blocks.rows)
        return 2 * tokens * outputs * inputs, moved + 2 * tokens * (summed * rereads + outer)

    def case(layer: str, tokens: int, backward: bool = False) -> Case:
        sizes = (tokens, *layers[layer], backward)
        name = f"block_matmul {layer} {tokens}" + (" backward" if backward else "")
        return Case(name, lambda: build(*sizes), lambda: cost(*sizes))

    return [
        *(case(layer, tokens) for layer in layers for tokens in (64, 2048)),
        *(case(layer, 2048, True) for layer in layers),
    ]
