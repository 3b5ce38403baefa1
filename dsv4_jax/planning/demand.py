"""What one step asks of one device: FLOPs, bytes of its memory, bytes over its links."""

import dataclasses
import math

from dsv4_jax.inspection.context_cost import token_flops
from dsv4_jax.inspection.costs import cache_formats
from dsv4_jax.inspection.movement import traffic
from dsv4_jax.inspection.training_cost import FORWARD_AND_BACKWARD, flops_per_token
from dsv4_jax.model.gathering import GATHERED
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from dsv4_jax.planning.held import Part, heads_ways, moments, parts_of, seen_tokens
from dsv4_jax.planning.job import Job
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer_groups import partition
from sharding.dispatch_cost import LINKS

MULTIPLIED = ("matrix", "expert", "head", "mixing")
"""Roles of weights that tokens are multiplied with."""

RECOMPUTED = 4 / 3
"""FLOPs of a training step that computes its layers again, over those of one that does not."""

NEWTON_SCHULZ_STEPS = 10
"""Of Muon (report, section 2.4)."""


@dataclasses.dataclass(frozen=True)
class Moved:
    """Bytes that come to a device over links between chips.

    Attributes:
        what: moves.
        axes: of the mesh that it moves along, joined by +.
        num_bytes: in a step.
        collectives: in a step, one after the other.
    """

    what: str
    axes: str
    num_bytes: float
    collectives: int


@dataclasses.dataclass(frozen=True)
class Demand:
    """Of one step on one device.

    Attributes:
        model_flops: of the model, evenly spread: what a utilisation is counted from.
        flops: by kind of work, that are really computed: copies, padding experts' luck and recomputation
            included where they are known.
        hbm_bytes: by kind, read and written at least once.
        moved: over the links.
        expert_tokens: pairs of a token and an expert that reach a device's experts in a layer, on average.
    """

    model_flops: float
    flops: dict[str, float]
    hbm_bytes: dict[str, float]
    moved: tuple[Moved, ...]
    expert_tokens: float

    @property
    def link_bytes(self) -> float:
        """Over all links."""
        return sum(each.num_bytes for each in self.moved)

    @property
    def collectives(self) -> int:
        """One after the other."""
        return sum(each.collectives for each in self.moved)


def demand(job: Job) -> Demand:
    """What a step asks of each device, by formula.

    Raises:
        ProblemsError: where the model's sizes forbid the mesh.
    """
    flops, attention = _products(job), _attention_flops(job)
    flops |= {"attention": attention[0], "indexer": attention[1]}
    if job.work == "train":
        flops = {name: FORWARD_AND_BACKWARD * RECOMPUTED * amount for name, amount in flops.items()}
        if job.optimizer == "muon":
            flops["Newton-Schulz"] = newton_schulz_flops(job) / job.slice.devices
    expert = next((p for p in parts_of(job) if p.parameter.role == "expert" and not p.is_draft), None)
    pairs = 0.0
    if expert is not None:
        share = job.config.num_experts_per_tok / _ways(job, expert, "E")
        pairs = seen_tokens(job, expert, job.tokens) * share
    return Demand(_model_flops(job), flops, _hbm_bytes(job), tuple(_moved(job)), pairs)


def mean_of_least(limit: int, ratio: int, first: int, last: int) -> float:
    """Mean over contexts of n tokens, first <= n <= last, of min(limit, n / ratio).

    Args:
        limit: of entries.
        ratio: tokens of an entry.
        first, last: contexts.
    """

    def upto(n: int) -> float:  # the sum over 1 .. n
        linear = min(n, limit * ratio)
        return linear * (linear + 1) / (2 * ratio) + (n - linear) * limit

    return (upto(last) - upto(first - 1)) / (last - first + 1)


def _contexts(job: Job) -> tuple[int, int]:
    """First and last context of the tokens of a step: decode is at its full context, prefill and training are
    the mean of a whole row."""
    return (job.context, job.context) if job.work == "decode" else (1, job.context)


def _attention_flops(job: Job) -> tuple[float, float]:
    """(attention, indexer), forward, of one device: 4 H Dh for each key that a query meets, 2 Hi Di for each
    key that the indexer scores (`inspection.context_cost.token_flops`, on average over contexts)."""
    config, (first, last) = job.model, _contexts(job)
    kinds = (*config.attention_kinds, *("window",) * (config.num_nextn_predict_layers * (job.draft == "mtp")))
    keys = len(kinds) * mean_of_least(config.sliding_window, 1, first, last)
    csa, hca = kinds.count("csa"), kinds.count("hca")
    keys += csa * mean_of_least(config.index_topk, config.csa_ratio, first, last)
    keys += hca * mean_of_least(last, config.hca_ratio, first, last)
    scored = csa * mean_of_least(last, config.csa_ratio, first, last)
    tokens = job.tokens / math.prod(job.placement.mesh.shape[axis] for axis in job.row_axes)
    tokens /= heads_ways(job)
    per_key = 4 * config.num_attention_heads * config.head_dim
    return tokens * per_key * keys, tokens * 2 * config.index_n_heads * config.index_head_dim * scored


def _products(job: Job) -> dict[str, float]:
    """FLOPs of the products with weights, forward: 2 for each number of a weight and token that meets it."""
    found = {"dense products": 0.0, "expert products": 0.0, "head": 0.0}
    for part in parts_of(job):
        role, elements = part.parameter.role, part.elements
        if role not in MULTIPLIED:
            continue
        if GATHERED in part.axes:
            elements *= job.placement.mesh.shape[GATHERED]
        tokens = job.tokens
        if role == "head" and job.work == "prefill":
            tokens = job.batch  # only each prompt's last token meets the head
        if role == "head" and job.work == "train":
            tokens *= 1 + job.model.num_nextn_predict_layers
        flops = 2 * elements * seen_tokens(job, part, tokens)
        if role == "expert":
            flops *= job.config.num_experts_per_tok / job.config.n_routed_experts
        name = {"expert": "expert products", "head": "head"}.get(role, "dense products")
        found[name] += flops
    return found


def _model_flops(job: Job) -> float:
    """Of the tokens that count, a device's even share, as utilisations are usually counted."""
    config, devices = job.config, job.slice.devices
    if job.work == "train":
        return job.tokens * flops_per_token(config, job.context) / devices
    first, last = _contexts(job)
    flops = token_flops(config, last)
    attention, indexer = flops.attention, flops.indexer
    if first < last:  # of a whole prompt, on average: half of the last token's, as far as it grows
        attention, indexer = (each * job.slice.devices / job.tokens for each in _even(job))
    linear = flops.linear
    if job.work == "prefill":
        linear -= 2 * config.vocab_size * config.hidden_size * (1 - job.batch / job.tokens)
    return job.useful_tokens * (linear + attention + indexer) / devices


def _even(job: Job) -> tuple[float, float]:
    """Attention and indexer if they were spread over all devices evenly."""
    ways = math.prod(job.placement.mesh.shape[axis] for axis in job.row_axes) * heads_ways(job)
    attention, indexer = _attention_flops(job)
    return attention * ways / job.slice.devices, indexer * ways / job.slice.devices


def newton_schulz_flops(job: Job) -> float:
    """Of Muon's iterations over the whole model: 4 p^2 r + 2 p^3 each for a matrix of p x r, p <= r."""
    total = 0.0
    for each in partition(job.model, Muon()):
        for count, rows, columns in each.matrices:
            p, r = sorted((rows, columns))
            total += count * NEWTON_SCHULZ_STEPS * (4 * p * p * r + 2 * p**3)
    return total


def _hbm_bytes(job: Job) -> dict[str, float]:
    """Bytes that a step must read or write in a device's memory."""
    dense = experts = embedding = all_bytes = 0.0
    gathered = job.placement.mesh.shape[GATHERED]
    for part in parts_of(job):
        role, num_bytes = part.parameter.role, float(part.num_bytes)
        all_bytes += num_bytes
        if GATHERED in part.axes and job.work == "train":
            num_bytes *= 1 + gathered  # float32 is read; what arrives, bfloat16, is written and read
        elif GATHERED in part.axes:
            num_bytes *= 2 * gathered - 1  # what arrives is written and read
        if role == "expert":
            experts += num_bytes * hit_share(job, part)
        elif role == "embedding":  # rows of tokens, not the table
            embedding += job.tokens / job.slice.devices * 2 * job.config.hidden_size
        elif role != "table":
            dense += num_bytes
    found = {"dense weights": dense, "experts": experts, "embedding rows": embedding}
    ways = math.prod(job.placement.mesh.shape[axis] for axis in job.row_axes)
    activations = job.tokens / ways * activation_bytes(job)
    if job.work == "train":
        # Forward, again, and backward read the weights; gradients are written and read, masters and moments
        # read and written. Streams and products move about four times as often as forward.
        found = {name: 3 * amount for name, amount in found.items()}
        return found | {"optimizer": 4 * all_bytes + 2 * moments(job), "activations": 4 * activations}
    return found | {"cache": _cache_reads(job), "activations": activations}


def hit_share(job: Job, part: Part) -> float:
    """Share of a device's experts that at least one token of a step chooses, if routing is uniform:

    1 - (1 - Ke / E)^tokens
    """
    chosen = job.config.num_experts_per_tok / job.config.n_routed_experts
    return 1 - (1 - chosen) ** seen_tokens(job, part, job.tokens)


def activation_bytes(job: Job) -> float:
    """Bytes that a token's activations move in memory at least, forward, bfloat16.

    (3 N + 2) D a sublayer by mHC: its maps read N streams and write one row, its end reads N + 1 and writes
    N; 4 H Dh / h a layer for queries and results of attention, written and read; Ke (2 D + 6 F) for rows and
    hidden numbers of experts.
    """
    config = job.model
    layers = config.num_hidden_layers
    streams = 2 * (3 * config.hc_mult + 2) * config.hidden_size
    queries = 4 * config.num_attention_heads * config.head_dim / heads_ways(job)
    width, hidden = config.moe_intermediate_size, config.hidden_size
    return 2 * layers * (streams + queries + config.num_experts_per_tok * (2 * hidden + 6 * width))


def _cache_reads(job: Job) -> float:
    """Bytes of caches that a device reads: windows, chosen and all HCA entries, all indexer keys; a chunk
    of a prompt reads them once, at the mean context of the prompt, and all entries of CSA where it may choose
    any."""
    config, (first, last) = job.model, _contexts(job)
    form = cache_formats(config)[CACHE_FORMATS.index(job.cache)]
    csa, hca = config.attention_kinds.count("csa"), config.attention_kinds.count("hca")
    entries = mean_of_least(last, config.csa_ratio, first, last)
    chosen = mean_of_least(config.index_topk, config.csa_ratio, first, last)
    chosen = min(entries, job.places * chosen)
    rows = config.num_hidden_layers * mean_of_least(config.sliding_window, 1, first, last)
    rows += csa * chosen + hca * mean_of_least(last, config.hca_ratio, first, last)
    return job.rows_a_device * (rows * form.entry_bytes + csa * entries * form.index_key_bytes)


def _moved(job: Job) -> list[Moved]:
    """Bytes over the links, by what they belong to (`inspection.movement.traffic`), and sums of gradients."""
    found: dict[tuple[str, str], list[float]] = {}
    native = job.work != "train" and job.weights == "native"
    routed = {part.parameter.row.path for part in parts_of(job) if part.parameter.role == "expert"}
    for each in traffic(job.model, job.placement, job.tokens, native, LINKS[job.slice.kind]):
        way, is_routed = each.chosen, each.name.removeprefix("mtp/") in routed
        num_bytes = each.layers * (each.weight_bytes if way == "weights" else each.rows_bytes)
        # Rows go there and come back; of experts ids go ahead, and the two matrices share one exchange.
        steps = each.layers * (1 if way == "weights" else 1.5 if is_routed else 2)
        if job.work == "train":
            # Again in the recomputation; the backward pass moves rows once, weights and their gradients.
            factor = 4 if way == "weights" else 3
            num_bytes, steps = factor * num_bytes, factor * steps
        what = "experts' rows" if is_routed and way == "rows" else f"{way} of split products"
        sums = found.setdefault((what, "+".join(each.axes)), [0.0, 0.0])
        sums[0] += num_bytes
        sums[1] += steps
    if job.work == "train":
        for part in parts_of(job):
            axes = [axis for axis in job.row_axes if axis not in part.axes]
            ways = math.prod(job.placement.mesh.shape[axis] for axis in axes)
            if ways > 1 and part.parameter.role not in ("table", "selection_bias"):
                sums = found.setdefault(("sums of gradients", "+".join(axes)), [0.0, 0.0])
                sums[0] += 2 * (ways - 1) / ways * 4 * part.elements
                sums[1] += 1
    return [Moved(what, axes, total, round(steps)) for (what, axes), (total, steps) in found.items()]


def _ways(job: Job, part: Part, letter: str) -> int:
    """Devices that share the experts of a part: all ways but those that split their width."""
    axes = [axis for axis in part.axes if axis in _axes_of_rule(job, letter)]
    return math.prod(job.placement.mesh.shape[axis] for axis in axes)


def _axes_of_rule(job: Job, letter: str) -> tuple[str, ...]:
    rule = job.placement.table.parameters.get(letter, ())
    return (rule,) if isinstance(rule, str) else tuple(rule)
