"""Every malformed safetensors file gives one CheckpointError that names the file and the tensor."""

import errno
import json
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


def pack(header: object, data: bytes = b"") -> bytes:
    """A file from a header (JSON text, bytes, or a value to encode) and its data."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: object, shape: object, begin: object, end: object, **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


GOOD = {
    "layers.0.w": entry("F32", [2, 3], 0, 24),
    "layers.0.s": entry("F8_E8M0", [5], 24, 29),
}
DATA = bytes(range(29))
W = "'layers.0.w'"
S = "'layers.0.s'"


def with_w(**changes: object) -> dict:
    return {"layers.0.w": GOOD["layers.0.w"] | changes, "layers.0.s": GOOD["layers.0.s"]}


def without_w(key: str) -> dict:
    fields = {name: value for name, value in GOOD["layers.0.w"].items() if name != key}
    return GOOD | {"layers.0.w": fields}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4999999999\n"

# case -> (bytes of the file, words that the message must hold)
FILE_CASES: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["is empty", "download it again"]),
    "one byte": (b"\x08", ["only 1 bytes", "download it again"]),
    "seven bytes": (b"\x02\0\0\0\0\0\0", ["only 7 bytes", "expected at least 8"]),
    "eight bytes": (b"\x02" + b"\0" * 7, ["truncated", "at least 10", "found 8"]),
    "header length past the end": (
        (1000).to_bytes(8, "little") + b"{}",
        ["truncated", "at least 1008", "found 10", "download it again"],
    ),
    "header length over the cap": (
        (100_000_001).to_bytes(8, "little") + b"{}",
        ["100000001", "at most 100000000"],
    ),
    "header length 2^63": ((2**63).to_bytes(8, "little") + b"{}", [str(2**63)]),
    "header length 2^64 - 1": (b"\xff" * 8 + b"{}", [str(2**64 - 1)]),
    "header length 0": (pack(b""), ["expected '{'"]),
    "git-LFS pointer": (LFS, ["git-LFS pointer", "download the real files"]),
    "short git-LFS pointer": (b"version https://git-lfs.github.com", ["git-LFS pointer"]),
    "HTML page": (b"<!DOCTYPE html><html>not found</html>", ["HTML", "download the real file"]),
    "JSON error page": (b'{"error": "not found", "code": 404}', ["JSON"]),
    "zip of a pickle": (b"PK\x03\x04\x14\0\x08\x08" + b"\0" * 40, ["zip archive"]),
    "pickle": (b"\x80\x02}q\x00(X\x01\x00\x00\x00a", ["pickle"]),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 40, ["GGUF"]),
    "random text": (b"hello, this is no checkpoint", ["claims a header"]),
    "header is no JSON": (pack(b"{not json at all}"), ["not JSON"]),
    "header never ends": (pack(b"{not json at all"), ["brackets"]),
    "header is cut": (pack(b'{"a": {"dtype": "F32", '), ["brackets"]),
    "header is no UTF-8": (pack(b'{"\xff\xfe": 1}'), ["not UTF-8"]),
    "header is UTF-16": (pack('{"a": 1}'.encode("utf-16-le")), ["not"]),
    "header starts with a space": (pack(" " + json.dumps(GOOD), DATA), ["expected '{'"]),
    "header is an array": (pack(b"[]"), ["expected '{'"]),
    "header is null": (pack(b"null"), ["expected '{'"]),
    "text after the header object": (pack(json.dumps(GOOD) + "x", DATA), ["not JSON"]),
    "header holds NaN": (pack('{"a": NaN}'), ["NaN"]),
    "no tensors": (pack({}), ["0 tensors"]),
    "only metadata": (pack({"__metadata__": {"format": "pt"}}), ["0 tensors"]),
    "deep nesting": (pack(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), ["nested deeper than 3"]),
    "deep nesting, never closed": (pack(b'{"a":' + b"[" * 1_000_000), ["deeper than 3"]),
    "nesting of depth 4": (pack('{"a": {"shape": [[1]]}}'), ["nested deeper than 3"]),
    "truncated data": (pack(GOOD, DATA[:-1]), ["truncated", S, "download it again"]),
    "no data": (pack(GOOD), ["truncated", "expected", "found"]),
    "trailing byte": (pack(GOOD, DATA + b"\0"), ["1 trailing bytes", "expected", "found"]),
    "hole at the start": (
        pack({"layers.0.s": entry("F8_E8M0", [5], 24, 29)}, DATA),
        [S, "24 bytes before it belong to no tensor"],
    ),
    "hole in the middle": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [4], 25, 29)}, DATA),
        [S, "1 bytes before it belong to no tensor"],
    ),
    "overlap": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [5], 23, 28)}, DATA[:-1]),
        [S, f"overlaps {W} by 1 bytes"],
    ),
    "contained": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [5], 8, 13)}, DATA[:24]),
        [S, f"overlaps {W}"],
    ),
    "alias": (
        pack(GOOD | {"layers.0.s": entry("I8", [24], 0, 24)}, DATA[:24]),
        [S, f"the same bytes as {W}"],
    ),
    "zero-size tensor sharing an offset": (
        pack(GOOD | {"layers.0.s": entry("F8_E8M0", [0, 5], 24, 24)}, DATA[:24]),
        [S, "shape [0, 5] is empty"],
    ),
    "claimed tensor of 2^60 bytes": (
        pack(GOOD | {"layers.0.s": entry("U8", [2**60], 24, 24 + 2**60)}, DATA),
        ["truncated", str(2**60 + 24 + 188), S],
    ),
}

HEADER_CASES: dict[str, tuple[object, list[str]]] = {
    "tensor twice": (
        json.dumps(GOOD)[:-1] + ', "layers.0.w": ' + json.dumps(GOOD["layers.0.w"]) + "}",
        [W, "occurs twice"],
    ),
    "metadata twice": (
        '{"__metadata__": {}, "__metadata__": {}, ' + json.dumps(GOOD)[1:],
        ["'__metadata__' occurs twice"],
    ),
    "dtype twice": (
        json.dumps(GOOD).replace('"dtype": "F32"', '"dtype": "I32", "dtype": "F32"'),
        [W, "'dtype' occurs twice"],
    ),
    "metadata key twice": (
        '{"__metadata__": {"format": "pt", "format": "tf"}, ' + json.dumps(GOOD)[1:],
        ["'format' occurs twice"],
    ),
    "metadata value is a number": (GOOD | {"__metadata__": {"step": 3}}, ["'step' is 3"]),
    "metadata value is null": (GOOD | {"__metadata__": {"step": None}}, ["'step' is None"]),
    "metadata is a list": (GOOD | {"__metadata__": ["pt"]}, ["__metadata__ is ['pt']"]),
    "metadata is null": (GOOD | {"__metadata__": None}, ["__metadata__ is None"]),
    "entry is a list": (GOOD | {"layers.0.w": [1]}, [W, "expected an object"]),
    "entry is null": (GOOD | {"layers.0.w": None}, [W, "expected an object"]),
    "unknown dtype": (with_w(dtype="BF17"), [W, "'BF17' is unknown"]),
    "dtype in lower case": (with_w(dtype="f32"), [W, "'f32' is unknown"]),
    "dtype F4": (with_w(dtype="F4", shape=[48]), [W, "'F4' is not supported"]),
    "dtype is a number": (with_w(dtype=7), [W, "dtype 7 is unknown"]),
    "dtype is a list": (with_w(dtype=["F32"]), [W, "dtype ['F32'] is unknown"]),
    "dtype missing": (without_w("dtype"), [W, "lacks dtype"]),
    "shape missing": (without_w("shape"), [W, "lacks shape"]),
    "offsets missing": (without_w("data_offsets"), [W, "lacks data_offsets"]),
    "everything missing": (GOOD | {"layers.0.w": {}}, [W, "lacks data_offsets, dtype, shape"]),
    "extra key": (with_w(strides=[3, 1]), [W, "unknown keys ['strides']"]),
    "shape too large for its bytes": (with_w(shape=[2, 4]), [W, "takes 32 bytes", "hold 24"]),
    "shape too small for its bytes": (with_w(shape=[5]), [W, "takes 20 bytes", "hold 24"]),
    "dtype wider than its bytes": (with_w(dtype="F64"), [W, "takes 48 bytes", "hold 24"]),
    "scalar shape of 24 bytes": (with_w(shape=[]), [W, "takes 4 bytes", "hold 24"]),
    "negative dim": (with_w(shape=[-2, -3]), [W, "[-2, -3]", "integers in [0, 2^63)"]),
    "float dim": (with_w(shape=[2.0, 3]), [W, "[2.0, 3]"]),
    "boolean dim": (with_w(shape=[True, 6]), [W, "[True, 6]"]),
    "string dim": (with_w(shape=["2", 3]), [W, "['2', 3]"]),
    "null dim": (with_w(shape=[None]), [W, "[None]"]),
    "shape is a number": (with_w(shape=6), [W, "shape 6"]),
    "shape is an object": (with_w(shape={"0": 6}), [W, "shape {'0': 6}"]),
    "dim 2^63": (with_w(shape=[2**63]), [W, str(2**63)]),
    "dim of 4000 digits": (
        json.dumps(with_w(shape=["N"])).replace('"N"', "9" * 4000),
        [W, "integers in [0, 2^63)"],
    ),
    "product overflow to the right size": (
        # 2^32 * 2^32 * 6 * 4 bytes = 0 modulo 2^64, plus nothing: a wrapping product matches 0
        with_w(shape=[2**32, 2**32, 6], data_offsets=[0, 0]),
        [W, "overflows"],
    ),
    "product of eight huge dims": (with_w(shape=[2**62] * 8), [W, "overflows"]),
    "nine dims": (with_w(shape=[1] * 7 + [2, 3]), [W, "at most 8"]),
    "zero dim": (with_w(shape=[0], data_offsets=[0, 0]), [W, "shape [0] is empty"]),
    "one offset": (with_w(data_offsets=[0]), [W, "data_offsets [0]"]),
    "three offsets": (with_w(data_offsets=[0, 24, 24]), [W, "data_offsets [0, 24, 24]"]),
    "offsets are a number": (with_w(data_offsets=24), [W, "data_offsets 24"]),
    "negative offset": (with_w(data_offsets=[-24, 0]), [W, "data_offsets [-24, 0]"]),
    "float offset": (with_w(data_offsets=[0.0, 24]), [W, "data_offsets [0.0, 24]"]),
    "boolean offset": (with_w(data_offsets=[False, 24]), [W, "data_offsets [False, 24]"]),
    "offset 2^64": (with_w(data_offsets=[2**64, 2**64 + 24]), [W, str(2**64)]),
    "begin after end": (with_w(data_offsets=[24, 0]), [W, "begin after their end"]),
} | {
    f"name {name!r}": (
        {name: GOOD["layers.0.w"], "layers.0.s": GOOD["layers.0.s"]},
        [ascii(name)[1:20], "the name is not words"],
    )
    for name in (
        "",
        " layers.0.w",
        "layers.0.w ",
        "../../etc/passwd",
        "layers/0/w",
        "/layers",
        "layers..w",
        ".layers",
        "layers.",
        "layers.\x00w",
        "layers.0.w\n",
        "lâyers",
        "\ud800",
        "x" * 513,
        "C:\\w",
    )
}


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
    refused(lambda: reader.read_header(path), words)
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
        np.testing.assert_array_equal(
            files.read("layers.0.w"), np.frombuffer(DATA[:24], "<f4").reshape(2, 3)
        )


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
    reader.read_header(write(tmp_path, pack(GOOD, DATA)))
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
