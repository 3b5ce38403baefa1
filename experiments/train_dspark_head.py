"""A DSpark draft head for a small trained model: how many of its drafts are right, before and after training.

    python -m experiments.train_dspark_head                          # trains a small backbone first
    python -m experiments.train_dspark_head --checkpoint quickstart  # or takes one of `dsv4 quickstart`

The backbone is frozen: it gives the contexts, the distribution that drafts are to follow, and the output
head. The head starts at random. An anchor is a position p of a text; the head sees the window up to p, the
token at p + 1 and noise, exactly as it does when it serves (`DSpark.remember`, `DSpark.block`), and slot i is
trained on position p + 2 + i with the text's own token before it (DeepSpec's loss for each slot, weighted by
exp(-i / 4)):

    0.1 cross entropy + 0.9 |p - q|_1 + 1.0 cross entropy of the confidence

q is the backbone's distribution there. A draft drawn from p can be accepted with probability sum min(p, q),
which is what the confidence is trained on; its inputs are detached, so that it changes no draft.

Acceptance is counted on greedy answers to held-out text; answers must be those without drafts.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console

from dsv4_jax.command_line.quickstart import tokenized
from dsv4_jax.config import DSpark
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.loading import load
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.data import TrainingRows
from dsv4_jax.training.optimizer import Schedule
from dsv4_jax.training.recipe import QUICKSTART, start
from dsv4_jax.training.step import Rates, StepSettings, initial_state, train_step
from dsv4_jax.training.tokenizer import encode_documents
from experiments.study_record import stamp, table, write

SLOT_DECAY = 4.0
WEIGHTS = {"cross_entropy": 0.1, "l1": 0.9, "confidence": 1.0}


@dataclasses.dataclass
class Options:
    """What to train."""

    checkpoint: Path | None = None
    """A folder that `dsv4 quickstart` wrote; None: a smaller model is trained first."""
    base_steps: int = 300
    """Of that smaller model."""
    corpus_bytes: int = 1_500_000
    steps: int = 300
    rows: int = 4
    seq_len: int = 128
    anchors: int = 12
    """Of each row in a step."""
    learning_rate: float = 3e-3
    prompts: int = 24
    """Held-out texts that are continued."""
    prompt_tokens: int = 64
    new_tokens: int = 48
    seed: int = 0
    out: Path = Path("experiments/results/train_dspark_head.json")


def small_backbone(options: Options) -> tuple[LanguageModel, list[np.ndarray], list[np.ndarray], float]:
    """A model like the quickstart's, of half its width and without the MTP block, trained; its texts as token
    ids, for training and held out; and its last training loss, nats a token."""
    small = {
        "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 64, "n_routed_experts": 4,
        "num_nextn_predict_layers": 0, "sliding_window": 32,
    }  # fmt: skip
    recipe = dataclasses.replace(
        QUICKSTART,
        config=dataclasses.replace(QUICKSTART.config, **small),
        batch_size=options.rows,
        seq_len=options.seq_len,
        corpus_bytes=options.corpus_bytes,
    )
    tokenizer, training, held_out = tokenized(gather_corpus(recipe.corpus_bytes), recipe)
    rows = TrainingRows(training, recipe.batch_size, recipe.seq_len, options.seed)
    network = Network(recipe.config, recipe.policy)
    settings = StepSettings(recipe.optimizer, indexer="sparse")
    schedule = Schedule(recipe.peak_learning_rate, options.base_steps, recipe.warmup_fraction)
    state, main = initial_state(start(recipe, options.seed), recipe.optimizer), math.nan
    for step in range(options.base_steps):
        rates = Rates(np.float32(schedule.learning_rate(step)))
        state, report = train_step(network, settings, state, rows.batch(step), rates)
        if step % 50 == 0 or step == options.base_steps - 1:
            main = float(report.main)
            print(f"backbone, step {step}: {main:.3f} nats a token", flush=True)
    return LanguageModel(recipe.config, recipe.policy, state.params, tokenizer), training, held_out, main


def of_checkpoint(options: Options) -> tuple[LanguageModel, list[np.ndarray], list[np.ndarray], float | None]:
    """As `small_backbone`, of a folder; its loss is not measured."""
    assert options.checkpoint is not None
    base = load(options.checkpoint, dtype="float32")
    corpus = gather_corpus(options.corpus_bytes)
    training, held_out = (
        encode_documents(base.tokenizer, [document.text for document in part])
        for part in (corpus.train, corpus.validation)
    )
    return base, training, held_out, None


def with_random_head(base: LanguageModel, seed: int) -> LanguageModel:
    """The model with a random DSpark head in place of its MTP block; it reads the last three layers."""
    config, layers = base.config, len(base.config.attention_kinds)
    spark = DSpark(5, config.vocab_size - 1, tuple(range(max(layers - 3, 0), layers)), 64)
    config = dataclasses.replace(config, num_nextn_predict_layers=0, dspark=spark)
    head = LanguageModel.random(config, base.policy, seed).parameters["dspark"]
    backbone = {name: tree for name, tree in base.parameters.items() if name != "mtp"}
    return LanguageModel(config, base.policy, backbone | {"dspark": head}, base.tokenizer)


def slot_losses(
    network: Network, head: Any, backbone: Any, tokens: jax.Array, anchors: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of all slots of all anchors, and its parts by slot.

    Args:
        network: static. head: the trained tree. backbone: the rest of the parameters.
        tokens: i32[B, T], each row one text.
        anchors: i32[B, A], positions p with p + 1 + K < T.
    """
    model = network.holding(backbone | {"dspark": head})
    config, spark = network.config, network.config.dspark
    batch, length = tokens.shape
    count, window, size = anchors.shape[1], config.sliding_window, spark.block_size
    forward = model(
        spans.from_start(tokens, jnp.full((batch,), length, jnp.int32)), collect=frozenset({"streams"})
    )
    hidden = jax.lax.stop_gradient(model.hidden(forward.streams))
    captured = jnp.stack(
        [forward.taps[layer]["streams"].astype(jnp.float32).mean(axis=2) for layer in spark.target_layer_ids]
    ).astype(network.policy.compute_dtype)
    captured = jax.lax.stop_gradient(captured)

    # One row an anchor: what the head remembers of the window that ends there.
    p = anchors.reshape(-1)
    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), count)
    start = jnp.maximum(p + 1 - window, 0)
    place = jnp.minimum(start[:, None] + jnp.arange(window, dtype=jnp.int32), length - 1)
    seen = captured[:, row[:, None], place]
    near = spans.appended(jnp.zeros(place.shape, jnp.int32), start, p + 1 - start)
    empty = new_cache(config, len(p), 2 * window, np.dtype(network.policy.compute_dtype), dspark=True)
    rings = model.dspark.remember(seen, near, empty.dspark)

    true = tokens[row[:, None], p[:, None] + 1 + jnp.arange(size + 1, dtype=jnp.int32)]  # p + 1 .. p + 1 + K
    ids = jnp.full((len(p), size), spark.noise_token_id, jnp.int32).at[:, 0].set(true[:, 0])
    slots = model.dspark.block(model.embedding(ids), p + 1, rings)
    base = model.logits(slots.hidden)
    wanted = jax.nn.log_softmax(
        model.logits(hidden[row[:, None], p[:, None] + 1 + jnp.arange(size, dtype=jnp.int32)]), axis=-1
    )
    weight = jnp.exp(-jnp.arange(size, dtype=jnp.float32) / SLOT_DECAY)
    parts: dict[str, list[jax.Array]] = {name: [] for name in (*WEIGHTS, "right")}
    for slot in range(size):
        followed = model.dspark.follow(true[:, slot])
        scores = jax.nn.log_softmax(base[:, slot] + model.dspark.correction(followed), axis=-1)
        of_text = jnp.take_along_axis(scores, true[:, slot + 1, None], axis=1)[:, 0]
        parts["cross_entropy"].append(-of_text.mean())
        draft, target = jnp.exp(scores), jnp.exp(wanted[:, slot])
        parts["l1"].append(jnp.abs(draft - target).sum(axis=1).mean())
        chance = jax.lax.stop_gradient(jnp.minimum(draft, target).sum(axis=1))
        fixed = jax.lax.stop_gradient((slots.collapsed[:, slot], followed))
        logit = model.dspark.confidence_logit(*fixed)
        parts["confidence"].append(optax.sigmoid_binary_cross_entropy(logit, chance).mean())
        parts["right"].append((scores.argmax(axis=1) == wanted[:, slot].argmax(axis=1)).mean())
    by_slot = {name: jnp.stack(values) for name, values in parts.items()}
    total = sum(factor * (weight * by_slot[name]).sum() for name, factor in WEIGHTS.items())
    return total / weight.sum(), by_slot


def trained(lm: LanguageModel, documents: list[np.ndarray], options: Options) -> tuple[Any, list[Any]]:
    """The head after training, and what was measured on the way."""
    size = lm.config.dspark.block_size
    rows = TrainingRows(documents, options.rows, options.seq_len, options.seed)
    rng = np.random.default_rng(options.seed)
    rate = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, 20, options.steps)
    update = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.95, weight_decay=0.0))
    head = lm.parameters["dspark"]
    backbone = {name: tree for name, tree in lm.parameters.items() if name != "dspark"}
    moments = update.init(head)
    network = lm.network

    @jax.jit
    def step(head, moments, backbone, tokens, anchors):
        loss = lambda head: slot_losses(network, head, backbone, tokens, anchors)  # noqa: E731
        (total, parts), gradients = jax.value_and_grad(loss, has_aux=True)(head)
        changes, moments = update.update(gradients, moments, head)
        return optax.apply_updates(head, changes), moments, total, parts

    lines, begun = [], time.monotonic()
    for number in range(options.steps):
        anchors = rng.integers(0, options.seq_len - size - 1, (options.rows, options.anchors)).astype(
            np.int32
        )
        head, moments, total, parts = step(
            head, moments, backbone, rows.batch(number).tokens, jnp.int32(anchors)
        )
        if number % 25 == 0 or number == options.steps - 1:
            by_slot = {name: [round(float(x), 4) for x in values] for name, values in parts.items()}
            line = {"step": number, "loss": float(total), "seconds": time.monotonic() - begun} | by_slot
            lines.append(line)
            print(f"step {number}: loss {float(total):.3f}, right by slot {by_slot['right']}", flush=True)
            if not math.isfinite(line["loss"]):
                raise FloatingPointError(f"the loss of step {number} is {line['loss']}")
    return head, lines


def counted(
    lm: LanguageModel, prompts: list[list[int]], new_tokens: int, plain: np.ndarray
) -> dict[str, Any]:
    """Acceptance by position on greedy answers, which must be `plain`."""
    answers = np.asarray(lm.generate(prompts, new_tokens, stop_token_ids=(), draft="dspark"))
    if not np.array_equal(answers, plain):
        raise AssertionError(
            f"{(answers != plain).any(axis=1).sum()} answers differ from those without drafts"
        )
    by_position = lm.acceptance.by_position()
    steps = sum(len(row) for row in lm.acceptance.accepted)
    return {
        "by_position": by_position,
        "conditional": [kept / tried if tried else 0.0 for kept, tried in by_position],
        # A row's first token comes with its prompt, no step is needed for it.
        "tokens_a_step": len(prompts) * (new_tokens - 1) / steps,
    }


def main(options: Options) -> None:
    """Trains a head, counts acceptance before and after, and writes JSON and a table."""
    made = small_backbone if options.checkpoint is None else of_checkpoint
    base, training, held_out, base_loss = made(options)
    lm = with_random_head(base, options.seed)
    long_enough = [text for text in held_out if len(text) > options.prompt_tokens]
    prompts = [text[: options.prompt_tokens].tolist() for text in long_enough[: options.prompts]]
    plain = np.asarray(lm.generate(prompts, options.new_tokens, stop_token_ids=()))
    before = counted(lm, prompts, options.new_tokens, plain)
    print("before:", before["conditional"], flush=True)
    head, lines = trained(lm, training, options)
    after_lm = LanguageModel(lm.config, lm.policy, dict(lm.parameters) | {"dspark": head}, lm.tokenizer)
    after = counted(after_lm, prompts, options.new_tokens, plain)
    rows = [
        [name, *(f"{x:.3f}" for x in found["conditional"]), f"{found['tokens_a_step']:.2f}"]
        for name, found in (("random head", before), (f"after {options.steps} steps", after))
    ]
    header = ["head", *(f"position {n + 1}" for n in range(lm.config.dspark.block_size)), "tokens a step"]
    text = (
        "# A DSpark head for a small trained model\n\nShare of drafts that were right, of those whose"
        f" predecessors were, on {len(prompts)} greedy answers of {options.new_tokens} tokens to held-out"
        " text. The answers are those without drafts, token for token.\n\n" + table(header, rows)
    )
    sizes = {key: value for key, value in dataclasses.asdict(options).items() if not isinstance(value, Path)}
    record = {"options": sizes, "before": before, "after": after, "training": lines, "identical": True}
    record["backbone_nats"] = base_loss
    write(options.out, stamp("train_dspark_head") | record, text)
    Console().print(text)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
