"""Checkpoints by address: `hf://org/name@revision` becomes a local directory, all else is a path.

Only tensors and JSON are fetched, never code or pickles. The revision must be given and is resolved
to a commit before anything is downloaded, so that all files are of one state of the repository.
"""

import pathlib
import re
from collections.abc import Callable

from dsv4_jax.errors import CheckpointError

SCHEME = "hf://"
JSON_FILES = ("*.json",)
WEIGHT_FILES = ("*.safetensors",)
SUBFOLDERS = ("*/*",)  # inference/, encoding/, original copies: nothing in there is ever read

_ADDRESS = re.compile(
    r"hf://(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def locate(
    source: str,
    *,
    weights: bool,
    announce: Callable[[str], None] = lambda message: None,
    resolve: Callable[[str, str], str] | None = None,
    download: Callable[..., str] | None = None,
) -> pathlib.Path:
    """The local directory (or file) that `source` names, downloaded first if it is an address.

    Args:
        source: a path, or `hf://org/name@revision` with a branch, tag or commit. With HF_HUB_OFFLINE=1 a
            branch or tag means the commit that it had when the local cache fetched it.
        weights: fetch the tensors too, not only the JSON files.
        announce: told the commit before the download starts; the download shows its own progress.
        resolve: (repository, revision) -> commit; by default asks the hub.
        download: by default `huggingface_hub.snapshot_download`.

    Raises:
        CheckpointError: for a malformed address, or one that cannot be fetched.
    """
    if not source.startswith(SCHEME):
        if not source or "\0" in source:
            raise CheckpointError("cannot use this checkpoint", [f"{source!r} is not a path"])
        return pathlib.Path(source)
    repository, revision = parse_address(source)
    try:
        commit = revision
        if not _COMMIT.fullmatch(revision):
            commit = (resolve or _commit_of)(repository, revision)
        offline = " (offline: what the local cache holds)" if _is_offline() else ""
        announce(f"{SCHEME}{repository}@{commit}{offline}")
        directory = (download or _snapshot_download)(
            repo_id=repository,
            revision=commit,
            allow_patterns=[*JSON_FILES, *(WEIGHT_FILES if weights else ())],
            ignore_patterns=[*SUBFOLDERS],
        )
    except Exception as failure:  # the hub's client raises its own, its HTTP library's, and OSError
        reason = str(failure).strip() or type(failure).__name__
        raise CheckpointError(f"cannot fetch {source}", [reason]) from failure
    return pathlib.Path(directory)


def parse_address(address: str) -> tuple[str, str]:
    """(repository, revision) of `hf://org/name@revision`.

    Raises:
        CheckpointError: if it is anything else, or the revision is missing.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or ".." in address:
        raise CheckpointError(f"cannot use the address {address!r}", ["it must read hf://org/name@revision"])
    if match["revision"] is None:
        raise CheckpointError(
            f"cannot use the address {address!r}",
            [f"the revision is missing: {address}@<branch, tag or commit>"],
        )
    return match["repository"], match["revision"]


def _is_offline() -> bool:
    """Whether the user forbids the hub's client to use the network (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.is_offline_mode()


def _commit_of(repository: str, revision: str) -> str:
    import huggingface_hub

    if _is_offline():
        return _cached_commit(repository, revision)
    commit = huggingface_hub.HfApi().model_info(repository, revision=revision).sha
    if commit is None:
        raise ValueError(f"the hub names no commit for revision {revision!r}")
    return commit


def _cached_commit(repository: str, revision: str) -> str:
    """The commit that a branch or tag had when it was last fetched into the local cache.

    The cache notes it in models--org--name/refs/<revision>.
    """
    from huggingface_hub import constants, file_download

    folder = file_download.repo_folder_name(repo_id=repository, repo_type="model")
    noted = pathlib.Path(constants.HF_HUB_CACHE) / folder / "refs" / revision
    try:
        commit = noted.read_text().strip()
    except OSError as failure:
        cache = constants.HF_HUB_CACHE
        raise ValueError(
            f"offline, and the local cache {cache} does not know {revision!r} of {repository}"
        ) from failure
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"{noted} holds no commit")
    return commit


def _snapshot_download(**arguments: object) -> str:
    import huggingface_hub

    return huggingface_hub.snapshot_download(**arguments)
