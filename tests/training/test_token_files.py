"""Token files: what was written comes back, unread until it is wanted; what does not fit is named."""

import numpy as np
import pytest

from dsv4_jax.training.documents import BadRecord, DataError, Reading
from dsv4_jax.training.sources import TokenFiles, all_documents
from dsv4_jax.training.token_files import TokenFileDocuments, ends_path, write_token_file
from dsv4_jax.training.tokenizer import train_tokenizer

DOCUMENTS = [np.array(ids, np.int32) for ids in ([0, 5, 6, 1], [0, 1], [0, 200, 257, 3, 1])]
DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["abc"], 258)


def read(*paths, dtype=None, end_token=None):
    documents = TokenFileDocuments(paths, dtype, end_token)
    return [documents.read(number, DRAW) for number in range(len(documents))]


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_what_was_written_comes_back_mapped(tmp_path, dtype):
    path = tmp_path / "a.bin"
    assert write_token_file(path, iter(DOCUMENTS), dtype) == 11
    found = read(path, dtype=dtype)
    for document, wanted in zip(found, DOCUMENTS, strict=True):
        np.testing.assert_array_equal(document.tokens, wanted)
        assert isinstance(document.tokens, np.memmap) and document.tokens.dtype == dtype


def test_numpy_files_and_files_without_ends(tmp_path):
    tokens = np.concatenate(DOCUMENTS)
    np.save(tmp_path / "a.npy", tokens.astype(np.uint16))
    for extra, expected in [([], 3), ([0, 7], 4)]:
        np.save(tmp_path / "b.npy", np.concatenate([tokens, extra]).astype(np.uint16))
        found = read(tmp_path / "b.npy", end_token=1)
        assert len(found) == expected
        np.testing.assert_array_equal(np.concatenate([d.tokens for d in found]), [*tokens, *extra])
        assert all(document.tokens[-1] == 1 for document in found[:3])
    np.save(ends_path(tmp_path / "a.npy"), np.array([4, 4, 11]))
    first, empty, last = read(tmp_path / "a.npy")
    assert len(first.tokens) == 4 and len(last.tokens) == 7
    assert empty == BadRecord(f"{tmp_path}/a.npy, document 2", "has no tokens")


def test_places_count_within_their_file(tmp_path):
    for name in "ab":
        write_token_file(tmp_path / f"{name}.bin", DOCUMENTS)
    documents = TokenFileDocuments([tmp_path / "a.bin", tmp_path / "b.bin"], "uint32", None)
    assert documents.place(2).endswith("a.bin, document 3")
    assert documents.place(3).endswith("b.bin, document 1")
    np.testing.assert_array_equal(documents.read(5, DRAW).tokens, DOCUMENTS[2])


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (np.array([4, 3, 11]), "must never fall and end at the 11 tokens"),
        (np.array([4, 10]), "its last 10"),
        (np.array([-1, 11]), "its first is -1"),
        (np.array([4.0, 11.0]), "one axis of int64"),
        (np.array([[4, 11]]), "one axis of int64"),
        (np.array([], np.int64), "one axis of int64"),
    ],
)
def test_document_ends_that_do_not_fit(tmp_path, ends, message):
    write_token_file(tmp_path / "a.bin", DOCUMENTS)
    np.save(ends_path(tmp_path / "a.bin"), ends)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.bin", dtype="uint32")


def test_files_that_are_no_token_files_are_named_together(tmp_path):
    write_token_file(tmp_path / "no_type.bin", DOCUMENTS)
    (tmp_path / "odd.bin").write_bytes(b"123")
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "rows.npy", np.ones((3, 2), np.int32))
    np.save(tmp_path / "alone.npy", np.ones(3, np.int32))
    (tmp_path / "text.npy").write_text("no")
    names = ["no_type.bin", "odd.bin", "floats.npy", "rows.npy", "alone.npy", "text.npy"]
    with pytest.raises(DataError) as error:
        read(*[tmp_path / name for name in names])
    assert len(error.value.problems) == 6
    for name, problem, words in zip(
        names,
        error.value.problems,
        ["dtype must say", "dtype must say", "float64[3]", "int32[3, 2]", "no end_token", ""],
        strict=True,
    ):
        assert name in problem and words in problem
    (tmp_path / "empty.bin").write_bytes(b"")
    with pytest.raises(DataError, match="3 bytes, which is no whole number of uint16(.|\n)*empty.bin: is em"):
        read(tmp_path / "odd.bin", tmp_path / "empty.bin", dtype="uint16")


def test_writing_refuses_what_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="document 1 has token ids that uint16 cannot hold"):
        write_token_file(tmp_path / "a.bin", [np.array([1]), np.array([70000])], "uint16")
    with pytest.raises(ValueError, match="must end in .bin"):
        write_token_file(tmp_path / "a.npy", [])


def test_a_stream_of_token_files_checks_the_ids_of_its_rows(tmp_path, tokenizer):
    write_token_file(tmp_path / "a.bin", DOCUMENTS, "uint16")
    source = TokenFiles((f"{tmp_path}/a.bin",), "uint16", reading=Reading(num_threads=0))
    batch = next(source.open(tokenizer, 1, 11, 0))
    assert batch.tokens.dtype == np.int32 and (batch.segment_ids > 0).all()
    np.testing.assert_array_equal(np.sort(batch.tokens[0]), np.sort(np.concatenate(DOCUMENTS)))
    write_token_file(tmp_path / "a.bin", [np.array([3, 258])], "uint16")
    with pytest.raises(DataError, match="a.bin, document 1: has token ids 3 to 258; those .* are below 258"):
        next(source.open(tokenizer, 1, 11, 0))
    assert len(all_documents(source, tokenizer)) == 1
