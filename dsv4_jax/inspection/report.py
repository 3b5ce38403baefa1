"""An `Inspection` as tables for people and as plain values for programs."""

import dataclasses
import math

from rich.console import Console
from rich.table import Table

from dsv4_jax.inspection.context_cost import ContextCost
from dsv4_jax.inspection.costs import Inspection
from dsv4_jax.inspection.spread import Spread
from sharding import report as mesh_report
from sharding.mesh import spelled

MIB = 2**20


def as_plain(inspection: Inspection) -> dict[str, object]:
    """The numbers as JSON-ready values; counts are exact integers."""
    parameters = inspection.parameters
    config = dataclasses.asdict(inspection.config)
    return {
        "config": config | {"num_hidden_layers": inspection.config.num_hidden_layers},
        "parameters": dataclasses.asdict(parameters)
        | {
            "total": parameters.total,
            "active": parameters.active,
            "active_with_embedding": parameters.active_with_embedding,
            "mtp_total": inspection.mtp_total,
            "mtp_active": inspection.mtp_active,
            "dspark_total": inspection.dspark_total,
            "dspark_active": inspection.dspark_active,
            "total_with_mtp": inspection.total_with_mtp,
        },
        "per_layer": dataclasses.asdict(inspection.layer),
        "cache": [
            {
                "format": cost.format.name,
                "entry_bytes": cost.format.entry_bytes,
                "index_key_bytes": cost.format.index_key_bytes,
                "bytes_per_token": float(cost.bytes_per_token),
                "bytes_at_max_positions": cost.at(inspection.config.max_position_embeddings),
                "window_bytes": cost.window_bytes,
                "mtp_window_bytes": cost.mtp_window_bytes,
            }
            for cost in inspection.caches
        ],
        "allocated_cache": {
            "dtype": inspection.allocated.dtype,
            "bytes_per_token": float(inspection.allocated.bytes_per_token),
            "fixed_bytes": inspection.allocated.fixed_bytes,
        },
        "compressor_state_bytes": dataclasses.asdict(inspection.state),
        "checkpoint_bytes": dict(inspection.checkpoint_bytes),
        "memory_bytes": dict(inspection.memory_bytes),
    }


def print_tables(inspection: Inspection, console: Console) -> None:
    """Prints the tables of `dsv4 inspect`."""
    console.print(_config_table(inspection))
    console.print(_parameter_table(inspection))
    console.print(_cache_table(inspection))
    console.print(_storage_table(inspection))


def context_as_plain(cost: ContextCost) -> dict[str, object]:
    """The numbers of `dsv4 inspect --context` as JSON-ready values."""
    return {
        "context": cost.context,
        "allocated_tokens": cost.allocated_tokens,
        "cache": [
            {
                "storage": row.name,
                "bytes_per_token": float(row.per_token),
                "bytes": row.at_context,
                "allocated_bytes": row.allocated,
                "v32_over_this": row.v32_over_this,
            }
            for row in cost.caches
        ],
        "flops_per_token": dataclasses.asdict(cost.flops) | {"total": cost.flops.total},
        "v32_flops_per_token": dataclasses.asdict(cost.v32_flops) | {"total": cost.v32_flops.total},
        "flops_share_of_v32": cost.flops_share,
        "fp8_equivalent_share_of_v32": cost.fp8_equivalent_share,
    }


def print_context(cost: ContextCost, console: Console) -> None:
    """Prints the tables of `dsv4 inspect --context`."""
    table = Table(title=f"A context of {cost.context:,} tokens, one sequence", title_justify="left")
    table.add_column("cache")
    for name in ("bytes/token", "GiB", "V3.2 / this", "GiB allocated"):
        table.add_column(name, justify="right")
    gib = lambda size: "" if size is None else f"{size / 2**30:,.2f}"  # noqa: E731
    for row in cost.caches:
        sizes = (gib(row.at_context), f"{row.v32_over_this:.2f}", gib(row.allocated))
        table.add_row(row.name, f"{float(row.per_token):,.2f}", *sizes)
    table.caption_justify = "left"
    table.caption = (
        f"allocated: by this version, for {cost.allocated_tokens:,} tokens (the next power of two), with the"
        " rings of recent rows"
    )
    console.print(table)
    table = Table(title="FLOPs of one decoded token, in billions", title_justify="left")
    table.add_column("model")
    for name in ("linear", "of it bf16/f32", "attention", "indexer", "total"):
        table.add_column(name, justify="right")
    for name, flops in (("this model", cost.flops), ("DeepSeek-V3.2", cost.v32_flops)):
        values = (*dataclasses.astuple(flops), flops.total)
        table.add_row(name, *(f"{value / 1e9:,.2f}" for value in values))
    table.caption_justify = "left"
    table.caption = (
        f"{cost.flops_share:.1%} of V3.2's; {cost.fp8_equivalent_share:.1%} with bf16 work counted twice and"
        " an FP4 indexer half\n(the report does not state its weighting; this one gives its 27 % and 10 %)"
    )
    console.print(table)


def _config_table(inspection: Inspection) -> Table:
    config = inspection.config
    kinds = [f"{config.attention_kinds.count(kind)} {kind}" for kind in ("window", "csa", "hca")]
    routers = [f"{config.router_kinds.count(kind)} {kind}" for kind in ("hash", "learned")]
    rows = {
        "layers": f"{config.num_hidden_layers}: {', '.join(kinds)}; routers {', '.join(routers)}",
        "compression": f"csa {config.csa_ratio}, hca {config.hca_ratio}"
        f"; window {config.sliding_window}; index top-k {config.index_topk}",
        "widths": f"hidden {config.hidden_size}, {config.num_attention_heads} heads of"
        f" {config.head_dim} ({config.qk_rope_head_dim} rotary), query rank {config.q_lora_rank},"
        f" {config.o_groups} output groups of rank {config.o_lora_rank}",
        "indexer": f"{config.index_n_heads} heads of {config.index_head_dim}",
        "experts": f"{config.num_experts_per_tok} of {config.n_routed_experts} routed + 1 shared,"
        f" width {config.moe_intermediate_size}, factor {config.routed_scaling_factor},"
        f" clamp {config.swiglu_limit}",
        "streams": f"{config.hc_mult}, {config.hc_sinkhorn_iters} Sinkhorn iterations",
        "rope": f"theta {config.rope_theta:g} (window), {config.compress_rope_theta:g} with YaRN"
        f" x{config.yarn.factor:g} from {config.yarn.original_max_position_embeddings} (others)",
        "positions": f"{config.max_position_embeddings}",
        "vocabulary": f"{config.vocab_size}",
        "MTP blocks": f"{config.num_nextn_predict_layers}",
    }
    if (head := config.dspark) is not None:
        layers = ", ".join(map(str, head.target_layer_ids))
        rows["DSpark draft head"] = (
            f"blocks of {head.block_size}, reads layers {layers}, Markov rank {head.markov_rank}"
        )
    table = Table(title="Configuration", show_header=False, title_justify="left")
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _parameter_table(inspection: Inspection) -> Table:
    counts, layer = inspection.parameters, inspection.layer
    table = Table(title="Parameters", title_justify="left")
    table.add_column("part")
    table.add_column("count", justify="right")
    for name, value in (
        ("attention projections, norms, sinks", counts.attention),
        ("main compressors", counts.compressors),
        ("indexers", counts.indexers),
        ("MoE (gate, bias, routed, shared)", counts.moe),
        ("mHC with head collapse", counts.hyper_connections),
        ("layer and final norms", counts.norms),
        ("embedding", counts.embedding),
        ("head", counts.head),
    ):
        table.add_row(name, f"{value:,}")
    table.add_section()
    for name, value in (
        ("total without MTP", counts.total),
        ("active per token, without embedding", counts.active),
        ("active per token, with embedding", counts.active_with_embedding),
        ("MTP block, total", inspection.mtp_total),
        ("MTP block, active", inspection.mtp_active),
        *(
            [
                ("DSpark head, total", inspection.dspark_total),
                ("DSpark head, active", inspection.dspark_active),
            ]
            if inspection.dspark_total
            else []
        ),
        ("total with MTP" if not inspection.dspark_total else "total with DSpark", inspection.total_with_mtp),
    ):
        table.add_row(name, f"{value:,}")
    table.add_section()
    for name, value in (
        ("one layer: attention", layer.attention),
        ("one layer: CSA compressor", layer.csa_compressor),
        ("one layer: HCA compressor", layer.hca_compressor),
        ("one layer: indexer", layer.indexer),
        ("one expert", layer.expert),
    ):
        table.add_row(name, f"{value:,}")
    return table


def _cache_table(inspection: Inspection) -> Table:
    positions = inspection.config.max_position_embeddings
    table = Table(title="Cache of one sequence", title_justify="left")
    table.add_column("storage")
    for name in ("bytes/token", f"MiB at {positions:,}", "window bytes", "MTP window"):
        table.add_column(name, justify="right")
    for cost in inspection.caches:
        table.add_row(
            cost.format.name,
            f"{float(cost.bytes_per_token):,.2f}",
            f"{cost.at(positions) / MIB:,.1f}",
            f"{cost.window_bytes:,}",
            f"{cost.mtp_window_bytes:,}",
        )
    state, allocated = inspection.state, inspection.allocated
    table.caption_justify = "left"
    table.caption = (
        f"compressor state, float32: {state.full_buffers:,} bytes; snapshot at a whole number of"
        f" blocks: {state.snapshot:,} bytes\nthis version allocates, in {allocated.dtype}:"
        f" {float(allocated.bytes_per_token):,.2f} bytes/token + {allocated.fixed_bytes:,} bytes"
    )
    return table


def _storage_table(inspection: Inspection) -> Table:
    table = Table(title="Weights", title_justify="left")
    table.add_column("storage")
    table.add_column("bytes on disk", justify="right")
    table.add_column("bytes in memory", justify="right")
    for name, value in inspection.checkpoint_bytes.items():
        resident = inspection.memory_bytes.get(name)
        table.add_row(name, f"{value:,}", "" if resident is None else f"{resident:,}")
    return table


def mesh_as_plain(spread: Spread) -> dict[str, object]:
    """What `dsv4 inspect --mesh` found, as JSON-ready values."""
    rows = (*spread.parameters, *spread.cache)
    return {
        "mesh": dict(spread.placement.mesh.shape),
        "rules": spread.placement.table.name,
        "batch": spread.batch,
        "context": spread.context,
        "bytes_a_device": mesh_report.total(rows),
        "parts": {
            part: {"bytes": once, "bytes_a_device": own, "copied_bytes_a_device": beyond}
            for part, (once, own, beyond) in spread.by_part().items()
        },
        "arrays": mesh_report.lines(rows),
        "tokens": spread.tokens,
        "traffic": [dataclasses.asdict(each) | {"cheaper": each.cheaper} for each in spread.traffic],
    }


def print_mesh(spread: Spread, console: Console) -> None:
    """Prints the table of `dsv4 inspect --mesh`."""
    mesh = spread.placement.mesh
    title = (
        f"On {math.prod(mesh.shape.values())} devices, {spelled(mesh)}, rules {spread.placement.table.name!r}"
    )
    if spread.batch:
        title += f"; {spread.batch} rows of {spread.context} tokens"
    table = Table(title=title)
    table.add_column("part")
    for name in ("GiB, once", "GiB a device", "of these copied"):
        table.add_column(name, justify="right")
    sums = [0, 0, 0]
    for part, amounts in spread.by_part().items():
        table.add_row(part, *(f"{amount / 2**30:.3f}" for amount in amounts))
        sums = [a + b for a, b in zip(sums, amounts, strict=True)]
    table.add_section()
    table.add_row("all", *(f"{amount / 2**30:.3f}" for amount in sums))
    console.print(table)
    _print_traffic(spread, console)


def _print_traffic(spread: Spread, console: Console) -> None:
    """What a step moves, and where the rules do not do what moves the fewest bytes."""
    if not spread.traffic:
        return
    table = Table(
        title=f"MiB that a split weight brings to each device, forward, in a step of {spread.tokens} tokens"
    )
    table.add_column("weight")
    for name in ("layers", "parts", "if gathered", "if rows travel", "done"):
        table.add_column(name, justify="right")
    for each in spread.traffic:
        amounts = (f"{amount / 2**20:.3f}" for amount in (each.weight_bytes, each.rows_bytes))
        table.add_row(
            each.name, str(each.layers), f"{each.parts} ({', '.join(each.axes)})", *amounts, each.chosen
        )
    console.print(table)
    for each in spread.traffic:
        if remark := each.remark(spread.tokens):
            console.print(remark)
