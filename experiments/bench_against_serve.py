"""`dsv4 serve` against `transformers serve` on the same checkpoint: 16 requests at once, tokens a second.

    dsv4 quickstart --minutes 1 --out DIRECTORY          # speed does not depend on what a model has learnt
    python -m experiments.bench_against_serve --checkpoint DIRECTORY

Both servers run on this machine, float32, and answer the same texts over `/v1/completions`, greedily; while
one serves, the other sleeps. Rounds alternate, and the ratio is the median of the rounds' ratios. CPU seconds
of the servers' processes are beside the wall time: on a shared machine they say what a token costs.
transformers' server runs as it comes, but for OMP_WAIT_POLICY=PASSIVE: the threads that torch starts for each
of 16 requests otherwise spin while they wait, and on a busy machine that is most of what a token costs (248
against about 20 CPU milliseconds). Its continuous batching, an option, only if `--batching` is given. It
needs fastapi, uvicorn and accelerate beside the `test` extra.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from dsv4_jax.loading import load as load_model
from dsv4_jax.training.corpus import gather_corpus
from experiments.study_record import stamp, table, write


@dataclasses.dataclass
class Options:
    """What to send."""

    checkpoint: Path
    """With a tokenizer."""
    rounds: int = 3
    requests: int = 16
    """At once, and in a round."""
    prompt_characters: int = 200
    answer_tokens: int = 32
    max_length: int = 1024
    """Of our engine. Prompts that wait may have a few times as many tokens together; more get a 429."""
    batching: bool = False
    """transformers' continuous batching."""
    patience: float = 900.0
    """Seconds that a server may take to start, and a request to be answered."""
    out: Path = Path("experiments/results/bench_against_serve.json")
    """Also names the table (`.md`)."""


class Server:
    """A server in a process of its own.

    Args:
        name: of its row. command: starts it. port: where it listens. ready: a path that says when.
        model: what requests ask for. log: file of what it says.
    """

    def __init__(self, name: str, command: list[str], port: int, ready: str, model: str, log: Path) -> None:
        self.name, self.port, self.model, self._ready, self._log = name, port, model, ready, log
        with log.open("w") as stream:
            environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
            self.process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)

    def wait(self, patience: float) -> None:
        """Until it answers. Raises RuntimeError if it ends, or takes longer than `patience` seconds."""
        began = time.monotonic()
        while time.monotonic() - began < patience:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self._ready}", timeout=5).read()
                return
            time.sleep(1.0)
        raise RuntimeError(f"{self.name} did not start: {self._log.read_text()[-2000:]}")

    def cpu_seconds(self) -> float:
        """Of its process so far, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def complete(self, prompt: str, max_tokens: int, patience: float) -> tuple[int, str]:
        """Tokens of a greedy answer, and its text."""
        fields = {"model": self.model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(fields).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=patience) as response:
            answer = json.load(response)
        return answer["usage"]["completion_tokens"], answer["choices"][0]["text"]

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def both(options: Options, folder: Path) -> Iterator[tuple[Server, Server]]:
    """Our server and theirs, both ready. `folder` takes the converted checkpoint and the logs."""
    converted = folder / "model"
    load_model(options.checkpoint, dtype="float32").save(converted, layout="transformers")
    ports = free_port(), free_port()
    name = str(options.checkpoint)
    ours = [sys.executable, "-m", "dsv4_jax", "serve", name, "--dtype", "float32", "--port", str(ports[0])]
    ours += ["--max-length", str(options.max_length), "--slots", str(options.requests), "--lanes", "4"]
    ours += ["--prefix-blocks", "0", "--name", "model"]  # no prompt is sent without being computed
    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(converted), "--port"]
    theirs += [str(ports[1]), "--device", "cpu", "--dtype", "float32"]
    theirs += ["--continuous-batching"] if options.batching else []
    with contextlib.ExitStack() as stack:
        servers = []
        for label, command, port, ready, model in (
            ("dsv4 serve", ours, ports[0], "/ready", "model"),
            ("transformers serve", theirs, ports[1], "/health", str(converted)),
        ):
            server = Server(label, command, port, ready, model, folder / f"{label}.log")
            stack.callback(server.close)
            server.wait(options.patience)
            servers.append(server)
        yield servers[0], servers[1]


def send(server: Server, prompts: list[str], options: Options) -> dict[str, Any]:
    """All prompts at once."""
    cpu, wall = server.cpu_seconds(), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(
            pool.map(lambda prompt: server.complete(prompt, options.answer_tokens, options.patience), prompts)
        )
    seconds, tokens = time.perf_counter() - wall, sum(count for count, _ in answers)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "cpu_ms_a_token": 1e3 * (server.cpu_seconds() - cpu) / max(tokens, 1),
        "texts": [text for _, text in answers],
    }


def summary(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and medians of the rounds' ratios; above 1: ours is better."""
    wall = sorted(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True))
    cpu = sorted(b["cpu_ms_a_token"] / a["cpu_ms_a_token"] for a, b in zip(ours, theirs, strict=True))
    pairs = [
        left == right
        for a, b in zip(ours, theirs, strict=True)
        for left, right in zip(a["texts"], b["texts"], strict=True)
    ]
    return {
        "times_tokens_per_second": statistics.median(wall),
        "times_tokens_per_second_range": [wall[0], wall[-1]],
        "times_cpu": statistics.median(cpu),
        "times_cpu_range": [cpu[0], cpu[-1]],
        "equal_answers": f"{sum(pairs)} of {len(pairs)}",
        "sides": {
            name: {
                key: statistics.median(one[key] for one in many)
                for key in ("tokens", "tokens_per_second", "cpu_ms_a_token")
            }
            for name, many in (("dsv4 serve", ours), ("transformers serve", theirs))
        },
    }


def markdown(record: dict[str, Any]) -> str:
    """The table."""
    found, options = record["summary"], record["options"]
    rows = [
        [name, f"{one['tokens']:.0f}", f"{one['tokens_per_second']:.1f}", f"{one['cpu_ms_a_token']:.1f}"]
        for name, one in found["sides"].items()
    ]
    return (
        f"# {options['requests']} requests at once, beside `transformers serve`\n\n"
        f"{record['date']}, {record['machine']}, `{record['command']}`\n\n"
        f"{table(['server', 'tokens a round', 'tokens/s', 'CPU ms a token'], rows)}\n"
        f"Tokens a second: {found['times_tokens_per_second']:.2f} times theirs "
        "({:.2f} to {:.2f}); ".format(*found["times_tokens_per_second_range"])
        + f"CPU time of a token: {found['times_cpu']:.2f} times less "
        + "({:.2f} to {:.2f}). ".format(*found["times_cpu_range"])
        + f"Medians over {len(record['rounds'])} alternating rounds; load average {record['load'][0]:.1f} "
        f"before, {record['load'][-1]:.1f} after. Equal answers: {found['equal_answers']}.\n"
    )


def main(options: Options) -> None:
    """Runs all rounds; everything is written after each."""
    characters = "".join(document.text for document in gather_corpus(5_000_000).validation)
    random, record = np.random.default_rng(0), stamp("bench_against_serve")
    shown = {key: str(value) if key == "checkpoint" else value for key, value in vars(options).items()}
    shown.pop("out")
    record |= {"options": shown, "load": [os.getloadavg()[0]], "rounds": []}
    with tempfile.TemporaryDirectory() as folder, both(options, Path(folder)) as (ours, theirs):
        for server in (ours, theirs):
            server.complete("def ", 4, options.patience)  # warm
        for number in range(options.rounds):
            starts = random.integers(0, len(characters) - options.prompt_characters, options.requests)
            prompts = [characters[start : start + options.prompt_characters] for start in starts]
            order = (ours, theirs) if number % 2 else (theirs, ours)
            sent = {server.name: send(server, prompts, options) for server in order}
            record["rounds"].append(sent)
            record["load"].append(os.getloadavg()[0])
            record["summary"] = summary(
                *([each[server.name] for each in record["rounds"]] for server in (ours, theirs))
            )
            write(options.out, record, markdown(record))
            print(number, record["summary"]["times_tokens_per_second"], record["summary"]["times_cpu"])
    Console().print(markdown(record))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
