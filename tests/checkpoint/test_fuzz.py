"""Whatever the bytes are: a checkpoint is read whole, or refused with CheckpointError, in time."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv4_jax.checkpoint.files import open_checkpoint
from dsv4_jax.checkpoint.safetensors import DTYPES, load_header
from dsv4_jax.errors import CheckpointError

# An example takes about a millisecond; one that takes seconds is a hang in the making.
FUZZ = settings(max_examples=300, deadline=5000)

DTYPE_NAMES = [*DTYPES, "F4", "BOOL", "f32", "", "BF17"]


def check(directory: Path) -> bool:
    """Opens and reads everything; True if it was accepted. Any other error fails the test."""
    try:
        with open_checkpoint(directory) as files:
            for name, tensor in files.tensors.items():
                array = files.read(name)
                assert array.shape == tensor.shape and array.nbytes == tensor.num_bytes
                assert len(array.tobytes()) == tensor.num_bytes
    except CheckpointError as error:
        assert error.problems
        assert str(error).isascii()
        assert len(str(error)) < 30_000
        return False
    return True


def distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    assert len(dict(pairs)) == len(pairs), "an accepted header has repeated keys"
    return dict(pairs)


def check_single(content: bytes) -> bool:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.safetensors"
        path.write_bytes(content)
        accepted = check(Path(name))
        if accepted:
            header = load_header(path)
            cursor = header.data_start
            for tensor in header.tensors.values():  # the tensors tile the file
                assert tensor.start == cursor < tensor.end
                cursor = tensor.end
            assert cursor == len(content)
            json.loads(content[8 : header.data_start], object_pairs_hook=distinct)
            # whatever we accept, the public library accepts, with the same bytes
            theirs = dict(safetensors.deserialize(content))
            assert theirs.keys() == header.tensors.keys()
            for tensor_name, tensor in header.tensors.items():
                assert theirs[tensor_name]["data"] == content[tensor.start : tensor.end]
        return accepted


def pack(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


VALID_HEADER = {
    "__metadata__": {"format": "pt"},
    "layers.0.w": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 12]},
    "layers.0.s": {"dtype": "F8_E8M0", "shape": [3], "data_offsets": [12, 15]},
    "norm": {"dtype": "F32", "shape": [2], "data_offsets": [15, 23]},
}
VALID = pack(json.dumps(VALID_HEADER).encode(), bytes(range(23)))


def test_the_seed_of_the_mutations_is_valid() -> None:
    assert check_single(VALID)


@FUZZ
@given(st.binary(max_size=200))
@example(b"")
@example(VALID)
def test_random_bytes(content: bytes) -> None:
    check_single(content)


@FUZZ
@given(st.binary(max_size=200), st.binary(max_size=40))
def test_random_header_bytes(text: bytes, data: bytes) -> None:
    check_single(pack(b"{" + text, data))


@FUZZ
@given(st.data())
def test_mutated_file(data: st.DataObject) -> None:
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "cut", "copy", "token"])):
            case "flip" if at < len(content):
                content[at] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del content[at : at + data.draw(st.integers(1, 9))]
            case "cut":
                del content[at:]
            case "copy":
                end = data.draw(st.integers(at, min(len(content), at + 60)))
                content[at:at] = content[at:end]
            case "token":
                tokens = [b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"-", b"1e9", b"NaN"]
                content[at:at] = data.draw(st.sampled_from(tokens))
    check_single(bytes(content))


@FUZZ
@given(st.data())
def test_mutated_header_of_the_right_length(data: st.DataObject) -> None:
    """As above inside the JSON text, with a length that fits: more of these get past the parser."""
    text = bytearray(json.dumps(VALID_HEADER).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(at, min(len(text), at + 12)))
        new = data.draw(
            st.sampled_from([b"", b"0", b"1", b"-", b"12", b"null", b"{}", b"[]", b'"w"', b",", b"."])
            | st.binary(max_size=4)
        )
        text[at:end] = new
    check_single(pack(bytes(text), bytes(range(23))))


sizes = st.one_of(
    st.integers(-2, 40),
    st.sampled_from([2**31, 2**32, 2**60, 2**63 - 1, 2**63, 2**64, 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(DTYPE_NAMES) | sizes,
        "shape": st.lists(sizes, max_size=4) | sizes,
        "data_offsets": st.lists(sizes, max_size=3) | st.lists(sizes, min_size=2, max_size=2),
        "extra": sizes,
    },
)
names = st.sampled_from(["a", "b.w", "__metadata__", "", "../x", "a b"]) | st.text(max_size=6)


@FUZZ
@given(st.lists(st.tuples(names, entries | sizes | st.dictionaries(names, sizes))), st.binary())
def test_structured_header(pairs: list[tuple[str, object]], data: bytes) -> None:
    # by hand, so that keys can repeat
    text = "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs) + "}"
    check_single(pack(text.encode("utf-8", "surrogatepass"), data))


@FUZZ
@given(st.data())
def test_tilings(data: st.DataObject) -> None:
    """Well-formed entries with any offsets: accepted exactly if they tile the data."""
    count = data.draw(st.integers(1, 5))
    header, intervals = {}, []
    cursor = 0
    for number in range(count):
        length = data.draw(st.integers(1, 6))
        begin = cursor + data.draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1, -length]))
        header[f"t{number}"] = {
            "dtype": "U8",
            "shape": [length],
            "data_offsets": [begin, begin + length],
        }
        intervals.append((begin, begin + length))
        cursor = begin + length
    size = cursor + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
    covered = [byte for begin, end in intervals for byte in range(begin, end)]
    tiles = sorted(covered) == list(range(size))
    order = data.draw(st.permutations(list(header)))
    text = json.dumps({name: header[name] for name in order}).encode()
    assert check_single(pack(text, bytes(max(size, 0)))) == tiles


INDEX = {
    "metadata": {"total_size": 46},
    "weight_map": {
        name: f"model-0000{shard}-of-00002.safetensors"
        for shard in (1, 2)
        for name in (f"{shard}.w", f"{shard}.s", f"{shard}.n")
    },
}


def sharded(directory: Path) -> None:
    for shard in (1, 2):
        header = {
            f"{shard}.{new}": VALID_HEADER[old]
            for new, old in zip("wsn", ("layers.0.w", "layers.0.s", "norm"), strict=True)
        }
        path = directory / f"model-0000{shard}-of-00002.safetensors"
        path.write_bytes(pack(json.dumps(header).encode(), bytes(range(23))))


@FUZZ
@given(st.data())
def test_mutated_index(data: st.DataObject) -> None:
    text = bytearray(json.dumps(INDEX).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(at, min(len(text), at + 20)))
        new = [b"", b"/", b"..", b"1", b"2", b"null", b"{}", b"[", b'"', b",", b"\\u0000", b"\xff"]
        text[at:end] = data.draw(st.sampled_from(new) | st.binary(max_size=4))
    with tempfile.TemporaryDirectory() as name:
        sharded(Path(name))
        (Path(name) / "model.safetensors.index.json").write_bytes(text)
        accepted = check(Path(name))
        if accepted:
            weight_map = json.loads(text)["weight_map"]
            assert weight_map == INDEX["weight_map"]


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 63, 64, 65])
def test_every_cut_near_the_start(length: int) -> None:
    assert not check_single(VALID[:length])


def test_every_cut_and_every_single_byte() -> None:
    """All prefixes of a valid file, and each byte replaced by five others, exhaustively."""
    for length in range(len(VALID)):
        assert not check_single(VALID[:length])
    data_start = len(VALID) - 23
    for at in range(data_start):
        for value in (0, ord('"'), ord("{"), ord("0"), 0xFF):
            content = bytearray(VALID)
            content[at] = value
            check_single(bytes(content))
    for at in range(data_start, len(VALID)):  # data bytes carry no structure
        content = bytearray(VALID)
        content[at] ^= 0xFF
        assert check_single(bytes(content))
    assert np.frombuffer(VALID[data_start:], np.uint8).tolist() == list(range(23))
