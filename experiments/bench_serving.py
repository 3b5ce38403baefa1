"""What HTTP costs over the bare engine, and what a long prompt costs those who read their answers.

    dsv4 quickstart --minutes 0.2 --out DIRECTORY        # speed does not depend on what a model has learnt
    python -m experiments.bench_serving --checkpoint DIRECTORY

`dsv4 serve` runs in a process of its own, an equal engine in this one; while one serves, the other sleeps.
Every load goes to both in turn, in rounds that alternate, with the same prompts and seeds: the overhead is
the median of the rounds' ratios. Over HTTP each token is an event (`logprobs: 0`, also asked of the bare
engine). Times are a client's. The clients need the processor, too: on few cores they are part of the
overhead. CPU milliseconds a token are of all processes together, clients included: on a machine that others
use they say what HTTP costs, and the rates say what others left.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.errors import ProblemsError
from dsv4_jax.loading import load as load_model
from dsv4_jax.serving.engine import Engine
from dsv4_jax.serving.load import Generate, Load, Seen, send, summary
from dsv4_jax.serving.requests import Output, Sampling
from dsv4_jax.serving.settings import EngineSettings
from experiments.study_record import stamp, table, write

SHOWN = (
    "output_tokens_per_second", "cpu_ms_a_token", "first_token_ms_p50", "first_token_ms_p90",
    "first_token_ms_p99", "token_gap_ms_p50", "token_gap_ms_p90", "token_gap_ms_p99", "whole_answer_ms_p50",
    "whole_answer_ms_p99",
)  # fmt: skip


class Server:
    """A running `dsv4 serve` that takes a free port.

    Args:
        checkpoint: its folder. settings: of its engine.
    """

    def __init__(self, checkpoint: Path, settings: EngineSettings) -> None:
        sizes = {
            "--max-length": settings.max_length, "--slots": settings.num_slots, "--lanes": settings.num_lanes,
            "--prefix-blocks": settings.num_pages, "--port": 0,
        }  # fmt: skip
        words = [str(word) for pair in sizes.items() for word in pair]
        command = [sys.executable, "-m", "dsv4_jax", "serve", str(checkpoint), "--dtype", "float32", *words]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = 0

    def wait(self) -> None:
        """Until it is ready. Raises RuntimeError if it ends instead."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            print("server:", line, end="")
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found[1])
            if line.startswith("ready"):
                return
        raise RuntimeError(f"the server ended with code {self._process.wait()}")

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Output]:
        """One streamed completion, over a connection of its own that is closed when the caller leaves."""
        fields = {
            "prompt": prompt, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
            "seed": sampling.seed, "ignore_eos": sampling.ignore_eos, "logprobs": 0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        body = json.dumps(fields).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 22)
        try:
            writer.write(head.encode() + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"the server said {status!r}")
            reason, counted, expected = None, 0, 0
            while line := await reader.readline():
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"the server said {event['error']}")
                if not event["choices"]:
                    expected = event["usage"]["completion_tokens"]
                    cached = event["usage"]["prompt_cache_hit_tokens"]
                    yield Output(finish_reason=reason, cached_tokens=cached)
                    break
                (choice,) = event["choices"]
                count = len(choice["logprobs"]["tokens"])
                counted, reason = counted + count, choice["finish_reason"]
                yield Output(token_ids=(0,) * count)
            if counted != expected:
                raise RuntimeError(f"{counted} tokens were streamed, but {expected} counted")
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def cpu_seconds(self) -> float:
        """Of its process so far, all threads."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        self._process.terminate()
        self._process.wait(60)
        assert self._process.stderr is not None
        self._process.stderr.close()


async def beside_long_prompts(
    generate: Generate, vocab_size: int, load: Load, long_tokens: int
) -> tuple[list[Seen], float, int]:
    """A load while one more client sends long prompts, one after the other; also how many were computed."""
    random = np.random.default_rng(load.seed + 1000)
    complete = 0

    async def long_prompts() -> None:
        nonlocal complete
        while True:
            prompt = random.integers(0, vocab_size, long_tokens).tolist()
            async for _ in generate(prompt, Sampling(max_tokens=1, ignore_eos=True, seed=0)):
                pass
            complete += 1

    beside = asyncio.create_task(long_prompts())
    try:
        seen, seconds = await send(generate, vocab_size, load)
    finally:
        beside.cancel()
        await asyncio.gather(beside, return_exceptions=True)
    return seen, seconds, complete


def main(
    checkpoint: Path,
    rounds: int = 3,
    streams: int = 16,
    num_requests: int = 32,
    answer_tokens: int = 48,
    max_length: int = 2048,
    out: Path = Path("experiments/results/bench_serving.json"),
) -> None:
    """Sends every load to both, `rounds` times, and writes medians.

    Args:
        checkpoint: a folder with a tokenizer.
        rounds: how often each load is sent.
        streams: clients at once, and slots but for the one of long prompts.
        num_requests, answer_tokens: of a load.
        max_length: of the engine; a long prompt is almost as long.
    """
    settings = EngineSettings(max_length, num_slots=streams + 1, num_lanes=4, num_pages=64)
    load = Load(num_requests=num_requests, prompt_tokens=64, answer_tokens=answer_tokens, at_once=streams)
    if problems := load.problems(max_length):
        raise ProblemsError("this load cannot be sent", problems)
    kinds = [(way, long) for long in (0, max_length - 8) for way in ("engine", "HTTP")]
    found: dict[str, list[dict[str, float]]] = {_name(*kind): [] for kind in kinds}
    load_before = os.getloadavg()[0]
    with serving(checkpoint, settings) as (engine, server):
        vocab_size = engine.lm.config.vocab_size

        def bare(prompt: list[int], sampling: Sampling) -> AsyncIterator[Output]:
            return engine.generate(prompt, dataclasses.replace(sampling, logprobs=0))

        ways = {"engine": bare, "HTTP": server.generate}
        for number in range(-1, rounds):  # one that does not count
            seeded = dataclasses.replace(load, seed=number + 1)
            for way, long in kinds if number % 2 else kinds[::-1]:
                cpu = time.process_time() + server.cpu_seconds()
                if long:
                    seen, seconds, prompts = asyncio.run(
                        beside_long_prompts(ways[way], vocab_size, seeded, long)
                    )
                else:
                    (seen, seconds), prompts = asyncio.run(send(ways[way], vocab_size, seeded)), 0
                cpu = time.process_time() + server.cpu_seconds() - cpu
                tokens = sum(len(one.arrived) for one in seen)
                row = summary(seen, seconds) | {
                    "long_prompts": prompts,
                    "cpu_ms_a_token": 1e3 * cpu / max(tokens, 1),
                }
                if number >= 0:
                    found[_name(way, long)].append(row)
                print(number, _name(way, long), f"{row['output_tokens_per_second']:.1f} tokens/s")
                time.sleep(0.5)
    rows = {
        name: {key: statistics.median(one[key] for one in many) for key in many[0]}
        for name, many in found.items()
    }
    bare_rows, http_rows = found[_name("engine", 0)], found[_name("HTTP", 0)]
    overhead = {
        key: statistics.median(b[key] / a[key] for a, b in zip(bare_rows, http_rows, strict=True))
        for key in SHOWN
    }
    head = ["load", *(key.replace("_", " ") for key in SHOWN), "long prompts"]
    lines = [
        [name, *(f"{row[key]:.4g}" for key in SHOWN), f"{row['long_prompts']:.0f}"]
        for name, row in rows.items()
    ]
    lines.append(["HTTP / engine, median of pairs", *(f"{overhead[key]:.3f}" for key in SHOWN), ""])
    load_after = os.getloadavg()[0]
    text = (
        f"# HTTP over the bare engine, {streams} streams\n\nMedians of {rounds} rounds; load average "
        f"{load_before:.1f} before and {load_after:.1f} after.\n\n{table(head, lines)}"
    )
    sizes = dataclasses.asdict(settings)
    record = {
        "load": [load_before, load_after],
        "engine": sizes,
        "rounds": rounds,
        "rows": rows,
        "http_over_engine": overhead,
        "each": found,
    }
    write(out, stamp("bench_serving") | record, text)
    Console().print(text)


@contextlib.contextmanager
def serving(checkpoint: Path, settings: EngineSettings) -> Iterator[tuple[Engine, Server]]:
    """An engine in this process and a server in another, both ready."""
    server = Server(checkpoint, settings)
    try:
        server.wait()
        with Engine(load_model(checkpoint, dtype="float32"), settings) as engine:
            yield engine, server
    finally:
        server.close()


def _name(way: str, long: int) -> str:
    return f"{way}, beside prompts of {long} tokens" if long else way


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
