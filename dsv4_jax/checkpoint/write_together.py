"""Several processes write one checkpoint folder: each its own files, all of which appear at once or not.

The folder is on a file system that all hosts share. Process 0 locks it and makes the staging folder; every
process writes and syncs its files there; process 0 adds the index and the small files and renames them into
their places. What stops one of them before that stops all, and the folder is as it was.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from dsv4_jax.checkpoint.files import INDEX_FILE, SINGLE_FILE, Progress
from dsv4_jax.checkpoint.shares import Shares
from dsv4_jax.checkpoint.staging import StagedByAnother, StagedFiles
from dsv4_jax.checkpoint.write import (
    Planned,
    check_space,
    commit,
    grouped,
    index_of,
    named_shards,
    plan_problems,
    shard_header,
    target_problems,
    write_tensor,
)
from dsv4_jax.errors import CheckpointError
from dsv4_jax.refusing import refused_together
from sharding.agreement import collected


def write_together(
    directory: Path,
    planned: list[Planned],
    shares: Shares,
    *,
    max_shard_bytes: float,
    extra_files: Mapping[str, bytes],
    overwrite: bool,
    progress: Progress | None = None,
    last_check: Callable[[], None] | None = None,
) -> None:
    """As `write.write_sharded`, called by every process with the same arguments.

    A file has the tensors of one process, so there is at least one for each; together they are numbered as if
    one had written them.

    Args:
        directory, max_shard_bytes, extra_files, overwrite: as there.
        planned: all tensors; those of other processes are not produced here, except torn ones.
        shares: who writes what.
        progress: called for the tensors of this process, with their bytes.
        last_check: called by process 0, when all is written.

    Raises:
        CheckpointError: as there; with the problems of all processes.
    """
    is_first = jax.process_index() == 0
    if problems := list(plan_problems(planned, extra_files, max_shard_bytes)):
        raise CheckpointError(f"checkpoint {directory} cannot be written", problems)
    groups = []
    for number in range(jax.process_count()):
        if own := [item for item in planned if shares.owners[item[0]] == number]:
            groups += grouped(own, max_shard_bytes)
    shards = named_shards(groups)
    headers = {name: shard_header(shard, {"format": "pt"}) for name, shard in shards.items()}
    sizes = {
        name: len(headers[name]) + sum(plan.num_bytes for _, plan, _ in shard)
        for name, shard in shards.items()
    }
    small = dict(extra_files)
    if len(shards) > 1:
        small[INDEX_FILE] = index_of(shards, sum(plan.num_bytes for _, plan, _ in planned))

    with contextlib.ExitStack() as open_until_the_end:

        def opened() -> StagedFiles | None:
            if not is_first:
                return None
            for again in (False, True):  # again when it is locked
                if problems := target_problems(directory, overwrite):
                    raise CheckpointError(f"checkpoint {directory} cannot be written", problems)
                if not again:
                    staged = open_until_the_end.enter_context(StagedFiles(directory))
            check_space(staged, sum(sizes.values()) + sum(map(len, small.values())))
            return staged

        staged = refused_together(opened)
        incoming = collected([staged.incoming] if staged else [])[0][0]
        staging = refused_together(lambda: staged or StagedByAnother(directory, incoming))
        failure = _written(staging, shards, headers, shares, progress)

        def finished() -> None:
            if failure is not None:
                raise failure

        refused_together(finished)

        def appeared() -> None:
            if staged is None:
                return
            for name, shard in shards.items():
                if not shares.is_mine(shard[0][0]):
                    staged.adopt(name, sizes[name])
            for name, data in small.items():
                with staged.create(name) as output:
                    output.write(data)
            if last_check is not None:
                last_check()
            commit(staged, INDEX_FILE if INDEX_FILE in small else SINGLE_FILE, extra_files)

        refused_together(appeared)


def _written(
    staging: StagedFiles,
    shards: Mapping[str, list[Planned]],
    headers: Mapping[str, bytes],
    shares: Shares,
    progress: Progress | None,
) -> Exception | None:
    """Writes the shards of this process, and takes part in reading torn tensors of the others; gives what
    stopped the writing. It goes on reading then: the others wait for it."""
    failure: Exception | None = None
    total = sum(
        plan.num_bytes for shard in shards.values() for name, plan, _ in shard if shares.is_mine(name)
    )
    written = 0
    for shard_name, shard in shards.items():
        rest = iter(shard)
        if failure is None and shares.is_mine(shard[0][0]):
            try:
                with staging.create(shard_name) as output:
                    output.write(headers[shard_name])
                    for name, plan, produce in rest:
                        write_tensor(output, name, plan, produce)
                        written += plan.num_bytes
                        if progress is not None:
                            progress(name, written, total)
            except Exception as stopped:  # told to all, who then stop too
                failure = stopped
        for name, _, produce in rest:
            if name in shares.torn:
                produce()
    return failure
