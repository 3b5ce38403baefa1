"""Commands that look at checkpoints and at this machine: one small function each, no logic of its own.

Imports are inside the functions, so that `dsv4 --help` does not wait for JAX.
"""

import json
from typing import Literal

from dsv4_jax.command_line import devices, processes
from dsv4_jax.command_line.standard_streams import note
from dsv4_jax.command_line.start import (
    AllowLinks,
    Checkpoint,
    Destination,
    Json,
    Mesh,
    require,
)
from dsv4_jax.errors import CheckpointError, ProblemsError


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
    require(devices.settings_problem)  # no device: everything is computed from shapes
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


def verify(
    checkpoint: Checkpoint,
    mesh: Mesh = None,
    hosts: processes.Group = processes.ALONE,
    allow_links: AllowLinks = None,
    as_json: Json = False,
) -> None:
    """Check a checkpoint in full: config, index, headers, and every value. Exit code 2 if unsound.

    With a mesh it is read as it would be loaded there, each process its own part, and the devices
    must be there.

    examples:
      dsv4 verify DIRECTORY
      dsv4 verify DIRECTORY --mesh expert=4,tensor=2
    """
    processes.join(hosts, mesh, {"checkpoint": checkpoint})
    if mesh is not None:
        require(devices.device_problem)
    from dsv4_jax.checkpoint.verify import verify_checkpoint
    from dsv4_jax.command_line import hub, terminal
    from dsv4_jax.inspection import verification
    from dsv4_jax.placing import placement_of
    from dsv4_jax.refusing import refused_together

    where = {} if mesh is None else {"placement": placement_of(mesh, None)}
    directory = refused_together(lambda: hub.locate(checkpoint, weights=True, announce=note))
    with terminal.byte_progress("verifying") as progress:
        found = verify_checkpoint(directory, progress=progress, allow_links=allow_links, **where)
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
    mesh: Mesh = None,
    hosts: processes.Group = processes.ALONE,
    allow_links: AllowLinks = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another naming layout or number format.

    The files are the same with a mesh: then all of it is read onto the devices first, and of
    several processes each reads and writes a part.

    examples:
      dsv4 convert SOURCE DESTINATION --layout transformers
      dsv4 convert SOURCE DESTINATION --to bfloat16
      dsv4 convert SOURCE DESTINATION --to fp8-fp4
      dsv4 convert SOURCE DESTINATION --to bfloat16 --mesh expert=8

    Args:
        destination: a new or empty directory.
        layout: tensor names; 'hybrid' is what transformers' save_pretrained writes by default.
        to: of matrices and norms. 'keep' writes every tensor as it is stored; 'fp8-fp4' rounds experts to
            FP4 and other linear layers to FP8, as the instruct releases store them; 'fp8' rounds all to FP8.
        ignore_draft_head: leave a DSpark draft head out.
        overwrite: replace a checkpoint at the destination.
    """
    request = {"checkpoint": checkpoint, "destination": destination, "layout": layout, "to": to}
    draft_head = "ignore" if ignore_draft_head else "load"
    processes.join(hosts, mesh, request | {"draft head": draft_head, "overwrite": overwrite})
    require(devices.device_problem)
    from dsv4_jax.checkpoint.convert import convert_checkpoint
    from dsv4_jax.command_line import hub, terminal
    from dsv4_jax.placing import placement_of
    from dsv4_jax.refusing import refused_together

    placement = placement_of(mesh, None)
    directory = refused_together(lambda: hub.locate(checkpoint, weights=True, announce=note))
    with terminal.byte_progress("reading") as reading, terminal.byte_progress("writing") as writing:
        warnings = convert_checkpoint(
            directory,
            destination,
            layout=layout,
            to=to,
            draft_head=draft_head,
            overwrite=overwrite,
            allow_links=allow_links,
            placement=placement,
            reading=reading,
            writing=writing,
        )
    for warning in warnings:
        note(f"warning: {warning}")


def doctor(
    mesh: Mesh = None,
    model: Literal["flash", "pro"] = "flash",
    tokens: tuple[int, ...] = (64, 4096, 131072),
    link: Literal["here", "v5e", "v5p", "v6e", "tpu7x", "gpu", "cpu"] = "here",
    as_json: Json = False,
) -> None:
    """Show versions, devices, and what will be used. Exit code 2 if something will not work.

    examples:
      dsv4 doctor
      dsv4 doctor --mesh expert=16,tensor=2 --link v6e

    Args:
        mesh: also what it costs to bring tokens to their experts and back on such a mesh, a layer, by
            formula, and which transport is chosen; nobody needs to have the mesh.
        model: whose experts they are.
        tokens: of a step over the whole mesh.
        link: what connects the devices of the mesh; 'here' stands for the devices of this machine.
    """
    from dsv4_jax.command_line import doctor as checks

    diagnosis = checks.diagnose()
    if mesh is not None and not diagnosis.problems:
        from dsv4_jax.command_line import transports

        diagnosis = transports.asked(diagnosis, mesh, model, tokens, link)
    print(json.dumps(diagnosis.as_plain()) if as_json else "\n".join(diagnosis.lines()))
    if diagnosis.problems:
        raise ProblemsError("this installation has problems", diagnosis.problems)
