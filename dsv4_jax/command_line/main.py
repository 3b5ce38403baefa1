"""The `dsv4` command: one small function per subcommand, no logic of its own.

Imports are inside the functions, so that `dsv4 --help` does not wait for JAX.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import tyro

from dsv4_jax.command_line import devices, processes, standard_streams
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.errors import CheckpointError, ProblemsError

DESCRIPTION = """\
DeepSeek-V4 in JAX: train a small model, run and check official checkpoints.

CHECKPOINT is a directory, or hf://org/name@revision; with HF_HUB_OFFLINE=1 such an address is
looked up in the hub's local cache.

examples:
  dsv4 quickstart
  dsv4 generate quickstart "def main("
  dsv4 chat quickstart
  dsv4 inspect config.json
"""

Checkpoint = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="CHECKPOINT", help="directory, or hf://org/name@revision"),
]
Destination = Annotated[tyro.conf.Positional[pathlib.Path], tyro.conf.arg(metavar="DESTINATION")]
Prompt = Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]")]
CompilationCache = Annotated[
    bool, tyro.conf.arg(help="keep compiled programs under ~/.cache/dsv4_jax/compiled")
]
AllowLinks = Annotated[
    pathlib.Path | None,
    tyro.conf.arg(metavar="DIR", help="accept links of CHECKPOINT that lead into this directory"),
]
Mesh = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="AXIS=SIZE,...", help="devices to spread the model over, such as expert=8,tensor=2"
    ),
]
Json = Annotated[bool, tyro.conf.arg(name="json", help="print one JSON object")]


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
            up what followed before (lookup). The same text but for rounding; acceptance: stderr.
    """
    from dsv4_jax.command_line import completion

    sampling = completion.Sampling(max_new_tokens, temperature, top_p, seed, draft)
    given = completion.checked_request(prompt, ids, sampling)
    numbers = {"dtype": dtype, "numerics": numerics, "cache": cache}
    processes.join(hosts, mesh, {"prompt": given, "sampling": sampling, **numbers})
    _prepare(compilation_cache)
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
        chat_profile: words around tools and efforts: auto (of the checkpoint's encoding folder, read as text, or
            our own without one), preview, official, own, or a file.
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
    _prepare(compilation_cache)
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


def inspect(
    checkpoint: Checkpoint,
    context: int | None = None,
    mesh: Mesh = None,
    rules: Literal["decode", "prefill", "train"] = "decode",
    rows: int | None = None,
    allow_links: AllowLinks = None,
    as_json: Json = False,
) -> None:
    """Show the configuration, parameters by part, cache and checkpoint bytes.

    Everything is computed from shapes: a config.json is enough, and of an hf:// address only JSON
    files are fetched. 'flash' and 'pro' are the released models, without any file; a file or directory
    of that name goes first.

    examples:
      dsv4 inspect flash
      dsv4 inspect config.json
      dsv4 inspect DIRECTORY --json
      dsv4 inspect config.json --context 1048576
      dsv4 inspect flash --mesh expert=16,tensor=2 --context 65536 --rows 64

    Args:
        context: also what so many tokens of context cost, beside DeepSeek-V3.2 and a GQA cache.
        mesh: what each device would hold of such a mesh; nobody needs to have it.
        rules: how the mesh is used (`sharding.rules`).
        rows: sequences of so much context over the whole mesh; one a device if not given.
    """
    _require(devices.settings_problem)  # no device: everything is computed from shapes
    from dsv4_jax.command_line import hub, terminal
    from dsv4_jax.config import io as config_io
    from dsv4_jax.inspection import context_cost, costs, report

    path = hub.locate(checkpoint, weights=False, announce=note)
    if checkpoint in costs.PRESETS and not path.exists():
        result = costs.inspect_config(costs.PRESETS[checkpoint]())
    else:
        if checkpoint in costs.PRESETS:
            note(f"note: the path {checkpoint!r}, not the released model of that name")
        file = config_io.read_config_file(path, text_only=True, allow_links=allow_links)
        result = costs.inspect_file(file)
        for remark in file.notes:
            note(f"note: {remark}")
    try:
        cost = None if context is None else context_cost.context_cost(result.config, context)
    except ValueError as refused:
        raise ProblemsError("cannot inspect", [str(refused)]) from refused
    held = None
    if mesh is not None:
        from dsv4_jax.inspection import spread

        held = spread.spread(result.config, mesh, rules, batch=rows, context=context)
    if as_json:
        plain = report.as_plain(result)
        if cost is not None:
            plain["context"] = report.context_as_plain(cost)
        if held is not None:
            plain["mesh"] = report.mesh_as_plain(held)
        print(json.dumps(plain))
        return
    tables = terminal.Tables()
    report.print_tables(result, tables)
    if cost is not None:
        report.print_context(cost, tables)
    if held is not None:
        report.print_mesh(held, tables)


def evaluate(
    checkpoint: Checkpoint,
    files: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE")] = (),
    seq_len: int = 4096,
    batch_size: int = 1,
    max_bytes: int = 1_000_000,
    needles: Annotated[tuple[int, ...], tyro.conf.arg(metavar="LENGTH")] = (),
    trials: int = 1,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    mesh: Mesh = None,
    allow_links: AllowLinks = None,
    as_json: Json = False,
    compilation_cache: CompilationCache = True,
) -> None:
    """Measure how well a model predicts text, and whether it finds needles in long contexts.

    examples:
      dsv4 eval quickstart --seq-len 256
      dsv4 eval DIRECTORY --files "books/*.txt" --needles 4096 65536

    Args:
        files: UTF-8 texts, paths or patterns; by default the validation part of Python's standard library.
        seq_len: tokens of context at most.
        batch_size: rows that are computed together.
        max_bytes: of text, whole files.
        needles: also hide a number in contexts of so many tokens, at five depths, and ask for it.
        trials: needles of each length and depth.
        seed: of the needles.
        dtype: of parameters and activations.
    """
    _prepare(compilation_cache)
    from dsv4_jax import loading
    from dsv4_jax.command_line import evaluate as evaluation
    from dsv4_jax.command_line import hub

    directory = hub.locate(checkpoint, weights=True, announce=note)
    model = loading.load(directory, dtype=dtype, allow_links=allow_links, mesh=mesh)
    evaluation.show(
        evaluation.evaluate(model, files, seq_len, batch_size, max_bytes, needles, trials, seed), as_json
    )


def verify(checkpoint: Checkpoint, allow_links: AllowLinks = None, as_json: Json = False) -> None:
    """Check a checkpoint in full: config, index, headers, and every value. Exit code 2 if unsound.

    examples:
      dsv4 verify DIRECTORY
    """
    from dsv4_jax.checkpoint.verify import verify_checkpoint
    from dsv4_jax.command_line import hub, terminal
    from dsv4_jax.inspection import verification

    directory = hub.locate(checkpoint, weights=True, announce=note)
    with terminal.byte_progress("verifying") as progress:
        found = verify_checkpoint(directory, progress=progress, allow_links=allow_links)
    if as_json:
        print(json.dumps(verification.as_plain(found)))
    else:
        print("\n".join(verification.lines(found)))
    if not found.sound:
        raise CheckpointError(f"checkpoint {directory} cannot be used", found.problems)


def convert(
    checkpoint: Checkpoint,
    destination: Destination,
    layout: Literal["official", "transformers", "hybrid"] = "official",
    to: Literal["keep", "bfloat16", "float32", "fp8", "fp8-fp4"] = "keep",
    ignore_draft_head: bool = False,
    allow_links: AllowLinks = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another naming layout or number format.

    examples:
      dsv4 convert SOURCE DESTINATION --layout transformers
      dsv4 convert SOURCE DESTINATION --to bfloat16
      dsv4 convert SOURCE DESTINATION --to fp8-fp4

    Args:
        destination: a new or empty directory.
        layout: tensor names; 'hybrid' is what transformers' save_pretrained writes by default.
        to: of matrices and norms. 'keep' writes every tensor as it is stored; 'fp8-fp4' rounds experts to
            FP4 and other linear layers to FP8, as the instruct releases store them; 'fp8' rounds all to FP8.
        ignore_draft_head: leave a DSpark draft head out.
        overwrite: replace a checkpoint at the destination.
    """
    from dsv4_jax.checkpoint.convert import convert_checkpoint
    from dsv4_jax.command_line import hub, terminal

    _require(devices.device_problem)
    directory = hub.locate(checkpoint, weights=True, announce=note)
    with terminal.byte_progress("reading") as reading, terminal.byte_progress("writing") as writing:
        warnings = convert_checkpoint(
            directory,
            destination,
            layout=layout,
            to=to,
            draft_head="ignore" if ignore_draft_head else "load",
            overwrite=overwrite,
            allow_links=allow_links,
            reading=reading,
            writing=writing,
        )
    for warning in warnings:
        note(f"warning: {warning}")


def doctor(as_json: Json = False) -> None:
    """Show versions, devices, and what will be used. Exit code 2 if something will not work."""
    from dsv4_jax.command_line import doctor as checks

    diagnosis = checks.diagnose()
    print(json.dumps(diagnosis.as_plain()) if as_json else "\n".join(diagnosis.lines()))
    if diagnosis.problems:
        raise ProblemsError("this installation has problems", diagnosis.problems)


def quickstart(
    minutes: float = 5.5,
    out: pathlib.Path = pathlib.Path("quickstart"),
    seed: int = 0,
    prompt: str = "def ",
    compilation_cache: CompilationCache = True,
) -> None:
    """Train a small, complete V4 on Python's own sources, save it, load it, and let it write.

    Needs no download. Ctrl-C ends the training early and keeps what was trained.

    examples:
      dsv4 quickstart --minutes 1 --out first_model

    Args:
        minutes: time for everything, on two CPU cores.
        out: directory of the checkpoint and the loss curve.
        seed: of parameters, data order and sampling.
        prompt: what the trained model continues.
    """
    _prepare(compilation_cache)
    from dsv4_jax.command_line import quickstart as first_run

    first_run.quickstart(minutes=minutes, out=out, seed=seed, prompt=prompt)


SUBCOMMANDS = {
    "quickstart": quickstart,
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "inspect": inspect,
    "verify": verify,
    "convert": convert,
    "doctor": doctor,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0; 2 for a refusal, all its reasons on stderr; 130 for Ctrl-C; 141 when nobody
    reads the output; 1 for a fault of this program."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code."""
    try:
        with standard_streams.prepared():
            tyro.extras.subcommand_cli_from_dict(
                SUBCOMMANDS,
                prog="dsv4",
                description=DESCRIPTION,
                args=list(arguments),
                config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
            )
    except BrokenPipeError:  # `dsv4 ... | head`: nobody reads on
        standard_streams.settle()
        return 141
    except (ProblemsError, OSError) as refused:
        standard_streams.settle()
        note(f"dsv4: {refused}")
        return 2
    except MemoryError:
        note("dsv4: this machine has not enough memory for that")
        return 2
    except KeyboardInterrupt:
        note("dsv4: interrupted")
        return 130
    except Exception as fault:
        if sys.flags.dev_mode:
            raise
        name = type(fault).__name__
        note(f"dsv4: a fault of this program, {name}: {fault}\n`python -X dev -m dsv4_jax` shows where")
        return 1
    return 0


def _prepare(keep_programs: bool) -> None:
    """A device to compute on, and the place where compiled programs are kept."""
    _require(devices.device_problem)
    if not keep_programs:
        return
    from dsv4_jax.command_line import compilation_cache

    try:
        compilation_cache.enable()
    except compilation_cache.NoCache as why:
        note(f"note: compiled programs are not kept: {why}")


def _require(check: Callable[[], str | None]) -> None:
    """Comes before the imports of modules that import JAX, so that its refusal is a sentence."""
    if problem := check():
        raise ProblemsError("cannot compute", [problem])


if __name__ == "__main__":
    main()
