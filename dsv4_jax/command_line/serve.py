"""`dsv4 serve`: from a checkpoint folder to a port that answers."""

import dataclasses
import ipaddress
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.command_line.start import AllowLinks, Checkpoint, CompilationCache, Mesh, prepare
from dsv4_jax.errors import ProblemsError

if TYPE_CHECKING:
    from dsv4_jax.serving.http.service import Model, Service

GiB = 1 << 30
LINE_SECONDS = 5.0
"""Between two lines about a load."""
LONG_COMPILE_SECONDS = 1.0
"""Programs that take longer are told one by one."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a server listens and who may ask.

    Attributes:
        host, port: to listen on. key_file: keys, one a line; None: nobody needs one.
        insecure: strangers may ask without a key.
    """

    host: str
    port: int
    key_file: Path | None
    insecure: bool


def require_extra() -> None:
    """Raises ProblemsError with what to install, if the packages of the server are not there."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        problem = f"the package {error.name!r} is not installed: pip install 'dsv4_jax[serve]'"
        raise ProblemsError("cannot serve", [problem]) from None


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def checked_place(place: Place) -> list[str]:
    """The keys of a server.

    Raises:
        ProblemsError: for a port that is none, bad keys, or a port that is open to others without keys.
    """
    from dsv4_jax.serving.http.auth import read_keys

    keys: list[str] = []
    problems = [] if 0 <= place.port < 65536 else [f"--port {place.port} must be in 0..65535"]
    if place.key_file is not None:
        try:
            keys = read_keys(place.key_file)
        except ProblemsError as error:
            problems += [f"--api-key-file: {problem}" for problem in error.problems]
        except OSError as error:
            problems.append(f"--api-key-file: {error.strerror}: {place.key_file}")
    elif not is_loopback(place.host) and not place.insecure:
        problems.append(
            f"--host {place.host} is open to other machines: give --api-key-file, or --insecure to let "
            "everybody ask"
        )
    if problems:
        raise ProblemsError("cannot serve", problems)
    return keys


class Progress:
    """Tells how a start goes on: the bytes of a checkpoint as they come, and each program of the compiler.

    Args:
        service: whose `/ready` tells it. announce: to the operator, from time to time.
    """

    def __init__(self, service: "Service", announce: Callable[[str], None]) -> None:
        self._service, self._announce = service, announce
        self._what = ""
        self._start = self._told = time.monotonic()
        self._count = 0

    def begin(self, what: str) -> None:
        """A part of the start begins."""
        self._what = self._service.doing = what
        self._announce(what)
        self._start = self._told = time.monotonic()
        self._count = 0

    def read(self, name: str, done: int, total: int) -> None:
        """A tensor of the checkpoint is there (`loading.load`)."""
        now = time.monotonic()
        share, seconds = done / max(total, 1), now - self._start
        self._service.doing = f"{self._what}: {share:.0%}"
        if now - self._told >= LINE_SECONDS:
            self._told = now
            left = seconds / max(share, 1e-9) - seconds
            rate = done / GiB / max(seconds, 1e-9)
            size = f"{done / GiB:.2f} of {total / GiB:.2f} GiB"
            self._announce(f"{self._what}: {share:.0%}, {size}, {rate:.2f} GiB/s, {left:.0f} s left")

    def compiled(self, name: str, seconds: float | None) -> None:
        """A program is being compiled, or was in so many seconds (`serving.compiles`)."""
        if seconds is None:
            self._service.doing = f"{self._what}: {name}, program {self._count + 1}"
            return
        self._count += 1
        if seconds >= LONG_COMPILE_SECONDS:
            self._announce(f"compiled {name} in {seconds:.1f} s (program {self._count})")


def loader(
    load: Callable[[Callable[[str, int, int], None]], Any],
    settings: Any,
    most_waiting: int,
    profile: Any,
    announce: Callable[[str], None],
) -> Callable[["Service"], "Model"]:
    """What the server's loading thread does: load, compile, and be ready.

    Args:
        load: gives the language model, and tells its argument what it has read.
        settings: of the engine. most_waiting: requests that may wait.
        profile: of the chat format. announce: tells the operator.
    """

    def work(service: "Service") -> "Model":
        from dsv4_jax.serving.compiles import compiles
        from dsv4_jax.serving.engine import Engine
        from dsv4_jax.serving.http.service import Model

        progress = Progress(service, announce)
        start = time.monotonic()
        progress.begin("loading the checkpoint")
        lm = load(progress.read)
        seconds = time.monotonic() - start
        size = sum(leaf.nbytes for leaf in _leaves(lm.parameters))
        announce(
            f"loaded {size / GiB:.2f} GiB in {seconds:.1f} s ({size / GiB / max(seconds, 1e-9):.2f} GiB/s)"
        )
        progress.begin("warm-up 1/2: compiling the engine's steps (kept for the next start)")
        with compiles().watched(progress.compiled):
            engine: Engine = Engine(lm, settings, most_waiting=most_waiting)
        announce(f"compiled in {engine.warm_up_seconds:.1f} s")
        progress.begin("warm-up 2/2: compiling the scores of prompts")
        start = time.monotonic()
        with compiles().watched(progress.compiled):
            model = Model.of(engine, profile)
        announce(f"compiled in {time.monotonic() - start:.1f} s")
        return model

    return work


def _leaves(parameters: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(parameters)


def serve(
    checkpoint: Checkpoint,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    insecure: bool = False,
    name: str | None = None,
    max_length: int = 4096,
    slots: int = 8,
    lanes: int = 2,
    prefix_blocks: int = 256,
    share_prefixes: bool = False,
    draft: Literal["mtp", "dspark", "lookup"] | None = None,
    prefix_folder: Path | None = None,
    max_waiting: int = 512,
    max_tokens: int | None = None,
    max_body_mib: int = 64,
    request_seconds: float | None = None,
    drain_seconds: float = 30.0,
    chat_profile: str = "auto",
    strict_reasoning: bool = False,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    numerics: Literal["reference", "qat"] = "reference",
    cache: Literal["plain", "fp8+fp8", "fp8+mxfp4"] = "plain",
    mesh: Mesh = None,
    allow_links: AllowLinks = None,
    compilation_cache: CompilationCache = True,
) -> None:
    """Serve a model to clients of OpenAI's and Anthropic's interfaces, and to a browser at /.

    HTTP answers at once: /health says whether the server lives, /ready whether it takes requests. SIGTERM
    ends it when the running answers are complete, a second signal at once.

    examples:
      dsv4 serve quickstart
      dsv4 serve DIRECTORY --port 9000 --max-length 32768 --slots 16
      dsv4 serve DIRECTORY --mesh expert=4,tensor=2
      dsv4 serve DIRECTORY --host 0.0.0.0 --api-key-file keys.txt
      curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json'
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'

    Args:
        host: address to listen on; one that other machines reach needs keys.
        port: 0 takes a free one, which is printed.
        api_key_file: keys, one a line; a client shows one of them.
        insecure: let everybody who reaches the port ask.
        name: of the model, for clients; by default that of the directory.
        max_length: tokens of a prompt and its answer.
        slots: answers at once.
        lanes: prompts computed at once.
        prefix_blocks: blocks of 128 prompt tokens that are kept for later requests.
        share_prefixes: let requests with different keys profit from each other's prompts; a client could then
            find out by time what others have sent.
        draft: who guesses further tokens, which changes how fast answers come and nothing else.
        prefix_folder: keep prefixes here too, for later starts of the server.
        max_waiting: requests that may wait for a slot; more are told to come again.
        max_tokens: of an answer whose request sets no limit.
        max_body_mib: of a request.
        request_seconds: of a whole answer.
        drain_seconds: that running answers have after SIGTERM.
        chat_profile: see `dsv4 chat --help`.
        strict_reasoning: refuse conversations without the reasoning of turns that called tools.
        dtype: of parameters, activations and a plain cache.
        numerics: see `dsv4 generate --help`.
        cache: see `dsv4 generate --help`.
    """
    require_extra()
    keys = checked_place(Place(host, port, api_key_file, insecure))
    prepare(compilation_cache)
    from dsv4_jax import loading
    from dsv4_jax.command_line import hub, memory_plan
    from dsv4_jax.config import io as config_io
    from dsv4_jax.model.cache_blocks import block_length
    from dsv4_jax.serving.chat.profile import choose_profile
    from dsv4_jax.serving.http import lifecycle
    from dsv4_jax.serving.http.auth import Keys
    from dsv4_jax.serving.http.limits import Limits, MiB
    from dsv4_jax.serving.http.service import Service
    from dsv4_jax.serving.settings import EngineSettings

    limits = Limits(
        body_bytes=max_body_mib * MiB,
        max_tokens=max_tokens,
        request_seconds=request_seconds,
        waiting=max_waiting,
    )
    directory = hub.locate(checkpoint, weights=True, announce=note)
    config = config_io.read_config_file(directory, allow_links=allow_links).config
    max_length = min(max_length, config.max_position_embeddings)
    settings = EngineSettings(
        max_length, slots, lanes, num_pages=prefix_blocks, draft=draft, disk=prefix_folder
    )
    problems = limits.problems() + settings.problems(block_length(config), config)
    if drain_seconds < 0:
        problems.append(f"--drain-seconds {drain_seconds} must be at least 0")
    if problems:
        raise ProblemsError("cannot serve", problems)
    profile, why = choose_profile(directory, chat_profile)
    note(why)
    plan = memory_plan.memory_plan(directory, config, settings, dtype, cache, mesh)
    note(plan.line() + ("" if mesh is None else f" on each device of {mesh}"))
    memory_plan.check_plan(plan, memory_plan.free_memory(mesh), settings)
    service = Service(
        name or directory.resolve().name,
        limits,
        Keys(keys),
        share_prefixes=share_prefixes,
        insist_on_reasoning=strict_reasoning,
    )
    numbers = {"dtype": dtype, "numerics": numerics, "cache": cache}
    load = loader(
        lambda progress: loading.load(
            directory, **numbers, allow_links=allow_links, mesh=mesh, progress=progress
        ),
        settings,
        limits.waiting,
        profile,
        note,
    )
    how = {"host": host, "port": port, "drain_seconds": drain_seconds, "announce": note}
    lifecycle.run(service, load, **how)
