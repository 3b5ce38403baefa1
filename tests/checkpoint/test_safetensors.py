"""Every malformed safetensors file gives one CheckpointError that names the file and the tensor."""

import dataclasses
import errno
import math
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from dsv4_jax.checkpoint import safetensors as reader
from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.errors import CheckpointError
from dsv4_jax.reading.stored_file import StoredFile
from tests.checkpoint.bad_files import DATA, FILE_CASES, GOOD, HEADER_CASES, W, entry, pack


def write(directory: Path, content: bytes) -> Path:
    path = directory / "model.safetensors"
    path.write_bytes(content)
    return path


def refused(act: Callable[[], object], words: list[str]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        act()
    message = str(caught.value)
    assert "model.safetensors" in message
    assert message.encode("utf-8")  # can be printed
    assert len(message) < 20_000
    for word in words:
        assert word in message, (word, message)
    assert "Traceback" not in message
    return caught.value


@pytest.mark.parametrize("case", FILE_CASES)
def test_malformed_file(case: str, tmp_path: Path) -> None:
    content, words = FILE_CASES[case]
    path = write(tmp_path, content)
    error = refused(lambda: reader.read_header(path), words)
    assert len(error.problems) == 1  # one mistake, one sentence
    # the public way to a single file says the same
    refused(lambda: open_checkpoint(tmp_path), words)


@pytest.mark.parametrize("case", HEADER_CASES)
def test_malformed_header(case: str, tmp_path: Path) -> None:
    header, words = HEADER_CASES[case]
    path = write(tmp_path, pack(header, DATA))
    refused(lambda: reader.read_header(path), words)


def test_the_cases_differ_from_a_good_file(tmp_path: Path) -> None:
    # otherwise every case above could be refused for one common mistake
    path = write(tmp_path, pack(GOOD, DATA))
    header = reader.load_header(path)
    assert list(header.tensors) == ["layers.0.w", "layers.0.s"]
    assert header.metadata == {}
    tensor = header.tensors["layers.0.w"]
    start = path.stat().st_size - 29
    assert (tensor.dtype, tensor.shape, tensor.path) == ("F32", (2, 3), path)
    assert (tensor.start, tensor.end, tensor.num_bytes) == (start, start + 24, 24)
    with open_checkpoint(tmp_path) as files:
        np.testing.assert_array_equal(files.read("layers.0.w"), np.frombuffer(DATA[:24], "<f4").reshape(2, 3))


def test_all_problems_of_a_file_at_once(tmp_path: Path) -> None:
    header = {
        "a": entry("BF17", [2], 0, 4),
        "b": entry("F32", [True], 4, 8),
        "c": entry("F32", [2], 8, 12, extra=1),
        "d": entry("F32", [1], 16, 12),
        "__metadata__": {"x": 1},
    }
    path = write(tmp_path, pack(header, b"\0" * 16))
    problems = refused(lambda: reader.read_header(path), []).problems
    assert len(problems) == 6  # c has two
    for name in "abcd":
        assert any(f"tensor '{name}'" in problem for problem in problems)


def test_first_twenty_problems_and_a_count(tmp_path: Path) -> None:
    header = {f"t{i}": entry("BF17", [1], i, i + 1) for i in range(57)}
    path = write(tmp_path, pack(header, b"\0" * 57))
    message = str(refused(lambda: reader.read_header(path), ["57 problems", "and 37 more"]))
    assert message.count("BF17") == 20


def test_layout_is_judged_only_when_every_entry_is_readable(tmp_path: Path) -> None:
    path = write(tmp_path, pack(GOOD | {"layers.0.w": entry("BF17", [6], 0, 24)}, DATA))
    assert len(refused(lambda: reader.read_header(path), [W]).problems) == 1


def test_claimed_sizes_allocate_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, FILE_CASES["claimed tensor of 2^60 bytes"][0])
    huge_header = tmp_path / "huge.safetensors"
    huge_header.write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")
    capped = tmp_path / "capped.safetensors"
    with capped.open("wb") as file:  # a real sparse file of the claimed size
        file.write((2**36).to_bytes(8, "little"))
        file.truncate(2**36 + 8)
    tracemalloc.start()
    try:
        for bad in (path, huge_header, capped):
            with pytest.raises(CheckpointError):
                reader.read_header(bad)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_tensor_count_is_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = {f"t{i}": entry("U8", [1], i, i + 1) for i in range(30)}
    path = write(tmp_path, pack(header, b"\0" * 30))
    monkeypatch.setattr(reader, "MAX_TENSORS", 30)
    assert len(reader.read_header(path)) == 30
    monkeypatch.setattr(reader, "MAX_TENSORS", 29)
    refused(lambda: reader.read_header(path), ["30 tensors, expected 1 to 29"])
    monkeypatch.setattr(reader, "MAX_TENSORS", 5)  # refused by its commas, before objects are made
    refused(lambda: reader.read_header(path), ["commas"])


def test_a_hundred_thousand_tensors(tmp_path: Path) -> None:
    header = {f"layers.{i}.w": entry("U8", [1], i, i + 1) for i in range(100_000)}
    path = write(tmp_path, pack(header, b"\0" * 100_000))
    assert len(reader.read_header(path)) == 100_000


def test_directory_pipe_missing_file_and_bad_path(tmp_path: Path) -> None:
    directory = tmp_path / "model.safetensors"
    directory.mkdir()
    refused(lambda: reader.read_header(directory), ["is a directory"])
    refused(lambda: open_checkpoint(tmp_path), ["is a directory"])
    directory.rmdir()
    refused(lambda: reader.read_header(directory), ["No such file"])
    os.mkfifo(directory)
    refused(lambda: reader.read_header(directory), ["not a regular file"])
    with pytest.raises(CheckpointError, match="null byte"):
        reader.read_header("model\0.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path: Path) -> None:
    path = write(tmp_path, pack(GOOD, DATA))
    path.chmod(0)
    refused(lambda: reader.read_header(path), ["Permission denied"])


@pytest.mark.parametrize(
    ("function", "code", "words"),
    [
        ("open", errno.EACCES, ["Permission denied"]),
        ("open", errno.EMFILE, ["Too many open files"]),
        ("fstat", errno.EIO, ["Input/output error"]),
        ("preadv", errno.EIO, ["Input/output error", "byte 0"]),
    ],
)
def test_system_errors(
    function: str, code: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, pack(GOOD, DATA))

    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        refused(lambda: reader.read_header(path), words)
    reader.read_header(path)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number, (content, _) in enumerate(FILE_CASES.values()):
        bad = tmp_path / f"{number}.safetensors"
        bad.write_bytes(content)
        with pytest.raises(CheckpointError):
            reader.read_header(bad)
    with pytest.raises(CheckpointError, match="is a directory"):
        reader.read_header(tmp_path)
    with StoredFile(write(tmp_path, pack(GOOD, DATA))) as file:
        identity = file.identity
    with pytest.raises(CheckpointError, match="modified_ns"):
        StoredFile(tmp_path / "model.safetensors", dataclasses.replace(identity, modified_ns=1))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("dtype", reader.DTYPES)
@pytest.mark.parametrize("copy", [False, True])
def test_every_dtype_bit_for_bit(dtype: str, copy: bool, tmp_path: Path) -> None:
    numpy_dtype = reader.DTYPES[dtype]
    data = np.random.default_rng(0).bytes(3 * 5 * numpy_dtype.itemsize)
    if numpy_dtype.itemsize == 1:
        data = bytes(range(256))  # every code, NaNs and negative zeros among them
    shape = (15,) if len(data) != 256 else (2, 128)
    # The odd first tensor puts the second at an odd address.
    header = {"odd": entry("U8", [3], 0, 3), "t": entry(dtype, shape, 3, 3 + len(data))}
    write(tmp_path, pack(header, b"abc" + data))
    with open_checkpoint(tmp_path, copy=copy) as files:
        array = files.read("t")
        assert array.dtype == numpy_dtype
        assert array.shape == shape
        assert array.tobytes() == data
        assert array.flags.aligned and array.flags.c_contiguous and not array.flags.writeable
        assert files.tensors["t"].numpy_dtype == numpy_dtype
    assert math.prod(shape) * numpy_dtype.itemsize == len(data)


def test_numeric_meaning_of_the_small_formats(tmp_path: Path) -> None:
    header = {
        "e4m3": entry("F8_E4M3", [4], 0, 4),
        "e8m0": entry("F8_E8M0", [4], 4, 8),
        "bf16": entry("BF16", [2], 8, 12),
    }
    data = bytes([0x7E, 0x01, 0x80, 0x7F]) + bytes([0, 127, 134, 255]) + b"\x80\x3f\x00\xc0"
    write(tmp_path, pack(header, data))
    with open_checkpoint(tmp_path) as files:
        e4m3 = files.read("e4m3").astype(np.float32)
        e8m0 = files.read("e8m0").astype(np.float32)
        bf16 = files.read("bf16").astype(np.float32)
    np.testing.assert_array_equal(e4m3, np.float32([448, 2**-9, -0.0, np.nan]))
    assert np.signbit(e4m3[2])
    np.testing.assert_array_equal(e8m0, np.float32([2.0**-127, 1, 128, np.nan]))
    np.testing.assert_array_equal(bf16, np.float32([1, -2]))
    assert files.tensors["e4m3"].numpy_dtype == ml_dtypes.float8_e4m3fn


def test_files_of_the_public_library(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.randn(3, 5).to(torch.bfloat16),
        "b.scale": torch.arange(7, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        "c.weight": torch.randn(2, 2).to(torch.float8_e4m3fn),
        "d.tid2eid": torch.arange(6).reshape(2, 3),
        "e.fn": torch.tensor(3.5),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    header = reader.load_header(path)
    assert header.metadata == {"format": "pt"}
    with open_checkpoint(tmp_path) as files:
        assert files.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            expected = tensor.reshape(-1).contiguous().view(torch.uint8).numpy()
            assert files.read(name).shape == tuple(tensor.shape)
            assert files.read(name).tobytes() == expected.tobytes()


def test_the_public_library_agrees_on_plain_refusals(tmp_path: Path) -> None:
    """We refuse whatever it refuses, and the cases that it is known to accept besides."""
    accepted = set()
    for case, (content, _) in FILE_CASES.items():
        try:
            safetensors.numpy.load_file(write(tmp_path, content))
        except Exception:  # SafetensorError, or no numpy dtype
            continue
        accepted.add(case)
    assert accepted <= {"no tensors", "only metadata", "zero-size tensor sharing an offset"}
