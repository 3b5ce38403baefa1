"""Commands that run a model: one small function each, no logic of its own.

Imports are inside the functions, so that `dsv4 --help` does not wait for JAX.
"""

import json
import pathlib
import sys
from typing import Literal

from dsv4_jax.command_line import processes
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.command_line.start import (
    AllowLinks,
    Checkpoint,
    CompilationCache,
    Json,
    Mesh,
    Prompt,
    prepare,
)


def generate(
    checkpoint: Checkpoint,
    prompt: Prompt = None,
    ids: tuple[int, ...] = (),
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    numerics: Literal["reference", "qat"] = "reference",
    cache: Literal["plain", "fp8+fp8", "fp8+mxfp4"] = "plain",
    draft: Literal["mtp", "dspark", "lookup"] | None = None,
    mesh: Mesh = None,
    hosts: processes.Group = processes.ALONE,
    allow_links: AllowLinks = None,
    as_json: Json = False,
    compilation_cache: CompilationCache = True,
) -> None:
    """Continue a prompt, printing text as it comes.

    examples:
      dsv4 generate quickstart "import os" --temperature 0
      dsv4 generate DIRECTORY --ids 0 17 42 --max-new-tokens 8 --json
      dsv4 generate DIRECTORY "import os" --mesh expert=4,tensor=2
      dsv4 generate DIRECTORY "import os" --mesh expert=16 --coordinator 10.0.0.1:8476
        --num-processes 4 --process-id 0

    Args:
        prompt: text to continue; needs a tokenizer.json in the checkpoint.
        ids: token ids to continue instead of text.
        max_new_tokens: stop after this many; the end-of-sequence token stops earlier.
        temperature: 0 takes the most likely token each time.
        top_p: draw from the most likely tokens that hold this probability together.
        seed: the same seed gives the same continuation.
        dtype: of parameters, activations and a plain cache.
        numerics: qat rounds activations, cache and index scores as the official code does.
        cache: how entries and indexer keys are kept; bytes of one entry + one key of the released models:
            plain 1024 + 256 (bfloat16), fp8+fp8 584 + 132, fp8+mxfp4 584 + 68.
        draft: guess several tokens a step: by the draft head of the checkpoint (mtp or dspark), or by looking
            up what followed before (lookup). The same text as without; acceptance goes to stderr.
    """
    from dsv4_jax.command_line import completion

    sampling = completion.Sampling(max_new_tokens, temperature, top_p, seed, draft)
    given = completion.checked_request(prompt, ids, sampling)
    numbers = {"dtype": dtype, "numerics": numerics, "cache": cache}
    processes.join(hosts, mesh, {"prompt": given, "sampling": sampling, **numbers})
    prepare(compilation_cache)
    from dsv4_jax import loading
    from dsv4_jax.command_line import hub
    from dsv4_jax.refusing import refused_together

    directory = refused_together(lambda: hub.locate(checkpoint, weights=True, announce=note))
    model = loading.load(
        directory,
        dtype=dtype,
        numerics=numerics,
        cache=cache,
        tokenizer="read" if isinstance(given, str) else "ignore",
        allow_links=allow_links,
        mesh=mesh,
    )
    if as_json:
        print(json.dumps(completion.complete(model, given, sampling)))
    else:
        for piece in completion.stream(model, given, sampling):
            print(piece, end="", flush=True)
        print()
    if line := completion.acceptance_line(model):
        note(line)


def chat(
    checkpoint: Checkpoint,
    system: str | None = None,
    effort: str | None = None,
    chat_profile: str = "auto",
    max_new_tokens: int = 2048,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    numerics: Literal["reference", "qat"] = "reference",
    cache: Literal["plain", "fp8+fp8", "fp8+mxfp4"] = "plain",
    mesh: Mesh = None,
    allow_links: AllowLinks = None,
    compilation_cache: CompilationCache = True,
) -> None:
    """Talk with a model. /help lists what can be typed; Ctrl-C ends an answer, Ctrl-D the conversation.

    examples:
      dsv4 chat quickstart
      dsv4 chat DIRECTORY --effort max --system "Answer in one sentence."

    Args:
        system: what the model is told before everything else.
        effort: how much it thinks before an answer, such as none, low, high or max.
        chat_profile: words around tools and efforts: auto (of the checkpoint's encoding folder, read as
            text, or our own without one), preview, official, own, or a file.
        max_new_tokens: of one answer, thinking included.
        temperature: 0 takes the most likely token each time.
        top_p: draw from the most likely tokens that hold this probability together.
        seed: of the first answer; each further one counts it up.
        dtype: of parameters, activations and a plain cache.
        numerics: qat rounds activations, cache and index scores as the official code does.
        cache: how entries and indexer keys are kept, see `dsv4 generate --help`.
    """
    from dsv4_jax.command_line import chat as conversation
    from dsv4_jax.serving.chat.manner import Manner, checked_manner

    manner = checked_manner(Manner(True, "high", max_new_tokens, temperature, top_p, seed))
    read_line = conversation.terminal_lines()
    prepare(compilation_cache)
    from dsv4_jax import loading
    from dsv4_jax.command_line import hub
    from dsv4_jax.serving.chat.profile import choose_profile
    from dsv4_jax.serving.chat.session import ChatSession

    directory = hub.locate(checkpoint, weights=True, announce=note)
    profile, why = choose_profile(directory, chat_profile)
    note(why)
    numbers = {"dtype": dtype, "numerics": numerics, "cache": cache}
    model = loading.load(directory, **numbers, allow_links=allow_links, mesh=mesh)
    session = ChatSession(model, profile, system, manner)
    for remark in conversation.begin(session, effort):
        note(remark)
    conversation.converse(session, read_line, sys.stdout, styled=sys.stdout.isatty())


def bench(
    checkpoint: Checkpoint,
    requests: int = 32,
    clients: int | None = 8,
    per_second: float | None = None,
    prompt_tokens: int = 96,
    answer_tokens: int = 32,
    shared_tokens: int = 0,
    cancelled: float = 0.0,
    max_length: int = 4096,
    slots: int = 8,
    lanes: int = 2,
    draft: Literal["mtp", "dspark", "lookup"] | None = None,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    mesh: Mesh = None,
    out: pathlib.Path | None = None,
    allow_links: AllowLinks = None,
    compilation_cache: CompilationCache = True,
) -> None:
    """Send a short load to a checkpoint's engine, and show what its clients saw.

    examples:
      dsv4 bench quickstart
      dsv4 bench quickstart --clients 16 --slots 16 --draft lookup --max-length 512
      dsv4 bench DIRECTORY --per-second 4 --shared-tokens 300 --out load.json

    Args:
        requests: how many are sent.
        clients: so many at once, each sends when it has its answer.
        per_second: instead of clients: arrivals by chance, so many a second on average.
        prompt_tokens: random ids of a prompt, on average.
        answer_tokens: of every answer.
        shared_tokens: that all prompts begin with.
        cancelled: share of requests whose client leaves early.
        max_length: tokens that a prompt and its answer may have.
        slots: answers at once. lanes: prompts computed at once.
        draft: who guesses further tokens.
        seed: of prompts and arrivals.
        dtype: of parameters, activations and the cache.
        out: JSON file for the numbers.
    """
    prepare(compilation_cache)
    from dsv4_jax.command_line import bench as benchmark
    from dsv4_jax.command_line import hub
    from dsv4_jax.serving.load import Load
    from dsv4_jax.serving.settings import EngineSettings

    at_once = None if per_second is not None else clients
    sent = Load(
        requests, prompt_tokens, answer_tokens, shared_tokens, at_once, per_second, cancelled, seed=seed
    )
    settings = EngineSettings(max_length=max_length, num_slots=slots, num_lanes=lanes, draft=draft)
    directory = hub.locate(checkpoint, weights=True, announce=note)
    benchmark.bench(directory, sent, settings, dtype, mesh, allow_links, out)
