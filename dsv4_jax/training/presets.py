"""Runs that need no file of their own. Each is a function without parameters that returns a `RunConfig`."""

import dataclasses
import pathlib

from dsv4_jax.config import tiny, v4_flash
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.training.health import Health
from dsv4_jax.training.lora import Lora
from dsv4_jax.training.muon import Muon
from dsv4_jax.training.optimizer import AdamW
from dsv4_jax.training.recipe import QUICKSTART
from dsv4_jax.training.run_config import Checkpoints, Logging, RunConfig, Stage, Validation
from dsv4_jax.training.schedules import BatchRamp, LearningRate, LossWeights
from dsv4_jax.training.sources import ChatFiles, StandardLibrary

PROMPT = "def "
LORA_TARGETS = ("*/attn/w*", "*/ffn/experts/*", "*/ffn/shared/*", "head")


def stdlib() -> RunConfig:
    """The quickstart's model on Python's own sources, longer than the quickstart."""
    return RunConfig(
        model=QUICKSTART.config,
        policy=QUICKSTART.policy,
        source=StandardLibrary(),
        stages=(Stage(num_steps=2000, seq_len=256, batch_size=4, indexer="sparse"),),
        learning_rate=LearningRate(QUICKSTART.peak_learning_rate, warmup_steps=100, decay_steps=1000),
        optimizer=QUICKSTART.optimizer,
        out=pathlib.Path("stdlib_run"),
        checkpoints=Checkpoints(every=200),
        logging=Logging(every=10),
        validation=Validation(StandardLibrary(part="validation"), every=200, prompt=PROMPT),
    )


def smallest() -> RunConfig:
    """A tiny model with every part for a dozen steps: to see that everything works, in a minute."""
    config = tiny(
        4,
        vocab_size=512,
        hidden_size=32,
        num_attention_heads=2,
        attention_kinds=("csa", "hca"),
        router_kinds=("hash", "learned"),
        sliding_window=16,
        initializer_range=0.1,
    )
    return dataclasses.replace(
        stdlib(),
        model=config,
        source=StandardLibrary(300_000),
        stages=(Stage(num_steps=12, seq_len=48, batch_size=2),),
        learning_rate=LearningRate(1e-2, warmup_steps=2, decay_steps=6),
        out=pathlib.Path("smallest_run"),
        checkpoints=Checkpoints(every=5),
        logging=Logging(every=1),
        validation=Validation(
            StandardLibrary(300_000, part="validation"),
            every=6,
            num_batches=2,
            prompt=PROMPT,
            sample_tokens=8,
        ),
    )


def sft() -> RunConfig:
    """A checkpoint folder trained further on chats, in all its parameters; the loss is of the answers.

    Two passes or so over a thousand short chats for a model of the quickstart's size. The routers' biases
    stay: a little data of one kind would drive them to balance that kind.
    """
    return RunConfig(
        model=pathlib.Path("quickstart"),
        policy=Policy.of("float32"),
        source=ChatFiles(("chats.jsonl",)),
        stages=(Stage(num_steps=200, seq_len=128, batch_size=8),),
        learning_rate=LearningRate(2e-3, warmup_steps=10, decay_steps=180),
        optimizer=AdamW(weight_decay=0.0),
        losses=LossWeights(bias_speed=0.0),
        out=pathlib.Path("sft_run"),
        checkpoints=Checkpoints(every=50),
        logging=Logging(every=10),
    )


def lora() -> RunConfig:
    """The same by LoRA: of attention, of the routed and shared experts and of the head."""
    rate = LearningRate(4e-3, warmup_steps=10, decay_steps=180)
    run = dataclasses.replace(sft(), learning_rate=rate, out=pathlib.Path("lora_run"))
    return with_rank(run, 8)


def with_rank(run: RunConfig, rank: int) -> RunConfig:
    """The same run by LoRA of this rank: with its own targets and scale, or the usual ones.

    Raises:
        ConfigError: for a rank below 1.
    """
    if run.lora is None:
        settings = Lora(rank, 2.0 * rank, LORA_TARGETS)
    else:
        settings = Lora(rank, run.lora.scale * rank, run.lora.targets)
    losses = dataclasses.replace(run.losses, bias_speed=0.0)
    return dataclasses.replace(run, lora=settings, losses=losses)


def flash() -> RunConfig:
    """V4-Flash as the report trains it, as far as it says (section 4.2.2); for `--dry-run` with a mesh.

    Peak and end of the learning rate, warm-up, the full batch, the lengths and the order dense before sparse
    are published. How long each stage is, the ramp, and how long the rate decays are not: these are guesses
    that add up to 32T tokens. So is how long it routes by older parameters after a spike.
    """
    tokens = 75_500_000  # a full batch
    batches = {length: tokens // length for length in (4096, 16384, 65536, 1048576)}
    full = 16384  # rows of the first stage: a power of two times the first batch of the ramp

    def stage(num_steps: int, length: int, **fields: object) -> Stage:
        rows = batches[length]
        return Stage(num_steps, length, rows, accumulate=36, **fields)

    return RunConfig(
        model=v4_flash(),
        policy=Policy.of("bfloat16", remat="unit"),
        source=StandardLibrary(),
        stages=(
            Stage(20_000, 4096, full, BatchRamp(full // 16, 10_000), full // 512, attention="dense"),
            stage(300_000, 4096, attention="dense"),
            stage(60_000, 16384, attention="dense"),
            stage(1_000, 65536, attention="dense", indexer="warm-up"),
            stage(40_000, 65536, indexer="sparse"),
            stage(5_000, 1048576, indexer="sparse"),
        ),
        learning_rate=LearningRate(2.7e-4, warmup_steps=2000, decay_steps=80_000),
        optimizer=Muon(),
        out=pathlib.Path("flash_run"),
        health=Health(on_spike="roll back", anticipation_steps=500),
    )
