"""Disks that are really full: a small file system of its own, and a limit on the size of files."""

import contextlib
import errno
import os
import pathlib
import resource
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, kibibytes: int):
    """A file system of so many KiB at `folder`; the test is skipped where nobody may mount one."""
    folder.mkdir()
    line = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(folder)]
    try:
        done = subprocess.run(line, capture_output=True)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def read_only(folder: pathlib.Path, yes: bool) -> None:
    """Whether the file system at `folder` takes nothing more."""
    subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", str(folder)], check=True)


def fill(folder: pathlib.Path) -> pathlib.Path:
    """Takes all that is left of a disk, and returns the file that does."""
    path = folder / "filler"
    with open(path, "ab", buffering=0) as file:
        for size in (2**16, 2**12, 2**6, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError as full:
                assert full.errno == errno.ENOSPC
    return path


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Within the block the system refuses to make files of this process larger; Python ignores the signal."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_bytes(folder: pathlib.Path) -> int:
    """Left on the disk of a folder."""
    told = os.statvfs(folder)
    return told.f_bavail * told.f_frsize
