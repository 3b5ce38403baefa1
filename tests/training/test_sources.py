"""Sources of every kind: what they give, what they refuse, and that a bad record is found in its file."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dsv4_jax.errors import ConfigError, ProblemsError
from dsv4_jax.training.documents import BadRecord, DataError, Reading, matching_files
from dsv4_jax.training.fill_in_the_middle import BEGIN, END, HOLE, FillInTheMiddle
from dsv4_jax.training.record_files import JsonLineRecords
from dsv4_jax.training.sources import (
    ChatFiles,
    JsonLines,
    ParquetFiles,
    StandardLibrary,
    TextFiles,
    TokenFiles,
    all_documents,
)
from dsv4_jax.training.tokenizer import BOS_ID, EOS_ID, train_tokenizer

TEXTS = [f"def function_{i}(argument):\n    return argument * {i}\n" for i in range(30)]
SKIP = Reading("skip", num_threads=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


@pytest.fixture(scope="module")
def with_middle(tokenizer):
    """The same with the special tokens of fill in the middle."""
    other = train_tokenizer(TEXTS, 320)
    other.add_special_tokens([BEGIN, HOLE, END])
    return other


def texts_of(source, tokenizer):
    return [tokenizer.decode(document.tokens.tolist()) for document in all_documents(source, tokenizer)]


def write_lines(path, lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return str(path)


def test_text_files_are_one_document_each_in_order_of_their_paths(tmp_path, tokenizer):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    for name, text in [("b.txt", "two"), ("a/deep/a.txt", "one"), ("c.txt", "thrée\r\n"), ("d.md", "no")]:
        (tmp_path / name).write_bytes(text.encode())
    source = TextFiles((f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt"))
    assert texts_of(source, tokenizer) == ["one", "two", "thrée\r\n"]
    for document in all_documents(source, tokenizer):
        assert document.tokens[0] == BOS_ID and document.tokens[-1] == EOS_ID and document.counts is None


def test_patterns_without_files_are_named_together(tmp_path, monkeypatch):
    with pytest.raises(DataError) as error:
        matching_files((f"{tmp_path}/*.txt", f"{tmp_path}/none"))
    assert len(error.value.problems) == 2
    for empty in ((), "file.txt"):
        with pytest.raises(DataError, match="must be a tuple of at least one path"):
            matching_files(empty)
    (tmp_path / "x.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in matching_files(("*.txt",))] == ["x.txt"]


def test_bad_text_files_are_named(tmp_path, tokenizer):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError) as error:
        all_documents(TextFiles((f"{tmp_path}/*.txt",)), tokenizer)
    assert error.value.problems == (
        f"{tmp_path}/empty.txt: is empty",
        f"{tmp_path}/latin.txt: is not UTF-8 (byte 3: unexpected end of data)",
    )
    assert texts_of(TextFiles((f"{tmp_path}/*.txt",), SKIP), tokenizer) == ["good"]


BAD_LINES = [
    ("{]\n", "unbalanced"),
    ('{"text": 3}\n', "holds int in the field 'text', not a text"),
    ('{"body": "x"}\n', r"has no field 'text' \(its fields: 'body'\)"),
    ("[1]\n", "is list, not an object"),
    ("\n", "is empty"),
    ('{"text": ""}\n', "is empty"),
    (b'{"text": "\xff"}\n', "is not UTF-8"),
    ('{"text": "\\ud800"}\n', "half of a surrogate pair, at character 0"),
    ('{"text": "cut', "unbalanced"),
    ('{"text" "x"}', "is not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, tokenizer, line, message):
    good = ['{"text": "one"}\n', '{"other": [1], "text": "two"}\n']
    path = write_lines(tmp_path / "data.jsonl", [*good, line])
    with pytest.raises(DataError, match=f"data.jsonl, line 3: .*{message}") as error:
        all_documents(JsonLines((path,)), tokenizer)
    assert len(error.value.problems) == 1
    assert texts_of(JsonLines((path,), reading=SKIP), tokenizer) == ["one", "two"]


def test_lines_are_found_over_files_with_and_without_a_last_line_end(tmp_path, tokenizer):
    first = write_lines(tmp_path / "a.jsonl", ['{"t": "one"}\n', '{"t": "two"}'])
    empty = write_lines(tmp_path / "b.jsonl", [])
    last = write_lines(tmp_path / "c.jsonl", ['{"t": "three"}\r\n'])
    source = JsonLines((first, empty, last), "t")
    assert texts_of(source, tokenizer) == ["one", "two", "three"]
    records = JsonLineRecords(matching_files(source.files))
    assert [records.place(n).removeprefix(f"{tmp_path}/") for n in range(3)] == [
        "a.jsonl, line 1",
        "a.jsonl, line 2",
        "c.jsonl, line 1",
    ]


def test_lines_longer_than_a_chunk_of_the_scan_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv4_jax.training.record_files._CHUNK", 7)
    lines = [json.dumps({"text": "x" * n}) for n in (0, 1, 5, 6, 7, 20)]
    records = JsonLineRecords(matching_files((write_lines(tmp_path / "a", "\n".join(lines)),)))
    assert [len(records.read(n)["text"]) for n in range(len(records))] == [0, 1, 5, 6, 7, 20]


def test_parquet_columns(tmp_path, tokenizer):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["one", None, "", "two"], "n": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "b.parquet")
    files = (f"{tmp_path}/*.parquet",)
    assert texts_of(ParquetFiles(files, reading=SKIP), tokenizer) == ["one", "two", "three"]
    with pytest.raises(DataError, match="a.parquet, row 2: is null(.|\n)*a.parquet, row 3: is empty"):
        all_documents(ParquetFiles(files), tokenizer)
    with pytest.raises(DataError, match="column 'n' holds int64, not text(.|\n)*b.parquet: has no column"):
        all_documents(ParquetFiles(files, "n"), tokenizer)
    with pytest.raises(DataError, match="more than max_bytes=10;"):
        all_documents(ParquetFiles(files, max_bytes=10), tokenizer)
    latin = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "latin.parquet")
    with pytest.raises(DataError, match="latin.parquet, row 1: is not UTF-8 .byte 3"):
        all_documents(ParquetFiles((f"{tmp_path}/latin.parquet",)), tokenizer)
    (tmp_path / "latin.parquet").unlink()
    (tmp_path / "c.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="c.parquet: is no Parquet file"):
        all_documents(ParquetFiles(files), tokenizer)


def test_without_pyarrow_the_extra_is_named(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'dsv4_jax\[parquet\]'"):
        ParquetFiles((f"{tmp_path}/a.parquet",)).open(tokenizer, 1, 8, 0)


def test_the_standard_library_needs_no_file(tokenizer):
    train = StandardLibrary(600_000).documents(tokenizer)
    validation = StandardLibrary(600_000, "validation").documents(tokenizer)
    places = [{part.place(n) for n in range(len(part))} for part in (train, validation)]
    assert len(train) > len(validation) > 0 and not places[0] & places[1]


def test_a_source_opens_as_a_stream_that_goes_on_where_it_was(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": text}) + "\n" for text in TEXTS])
    source = JsonLines((path,), reading=Reading(window_rows=4))
    reader = source.open(tokenizer, 4, 64, seed=3)
    for _ in range(5):
        next(reader)
    again = source.open(tokenizer, batch_size=4, seq_len=64, seed=3, process_index=1, num_processes=2)
    again.restore(reader.state())
    for _ in range(9):
        np.testing.assert_array_equal(next(again).tokens, next(reader).tokens[2:])
    texts = []
    reader = source.open(tokenizer, 1, 64, seed=3)
    while reader.epoch == 0:
        batch = next(reader)
        texts += [
            tokenizer.decode(batch.tokens[batch.segment_ids == segment].tolist())
            for segment in range(1, batch.segment_ids.max() + 1)
        ]
    assert sorted(texts) == sorted(TEXTS)


def test_what_a_text_spells_is_never_a_special_token(tmp_path, with_middle):
    path = write_lines(tmp_path / "a.jsonl", [json.dumps({"text": f"a{BEGIN}b{END}"}) + "\n"])
    (document,) = all_documents(JsonLines((path,)), with_middle)
    special = [with_middle.token_to_id(name) for name in (BEGIN, HOLE, END)]
    assert not set(document.tokens[1:-1].tolist()) & {0, 1, *special}
    assert with_middle.decode(document.tokens.tolist(), skip_special_tokens=True) == f"a{BEGIN}b{END}"


class TestFillInTheMiddle:
    def source(self, tmp_path, rate):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
        middle = FillInTheMiddle(rate)
        return JsonLines(
            (write_lines(tmp_path / "a.jsonl", lines),), reading=Reading(num_threads=0, middle=middle)
        )

    def split(self, tokens, tokenizer):
        """(text, whether it was told out of order)"""
        begin, hole, end = (tokenizer.token_to_id(name) for name in (BEGIN, HOLE, END))
        ids = tokens.tolist()
        assert (ids[0], ids[-1]) == (BOS_ID, EOS_ID)
        if ids[1] != begin:
            assert not {begin, hole, end} & set(ids)
            return tokenizer.decode(ids), False
        first, second = ids.index(hole), ids.index(end)
        parts = ids[2:first], ids[second + 1 : -1], ids[first + 1 : second]
        return "".join(map(tokenizer.decode, parts)), True

    @pytest.mark.parametrize(("rate", "least", "most"), [(0.0, 0, 0), (1.0, 30, 30), (0.5, 5, 25)])
    def test_parts_are_the_text_in_another_order(self, tmp_path, with_middle, rate, least, most):
        documents = all_documents(self.source(tmp_path, rate), with_middle)
        texts, cut = zip(*(self.split(d.tokens, with_middle) for d in documents), strict=True)
        assert list(texts) == TEXTS
        assert least <= sum(cut) <= most

    def test_cuts_follow_from_seed_and_epoch_not_from_restarts_or_threads(self, tmp_path, with_middle):
        source = self.source(tmp_path, 0.5)
        reader = source.open(with_middle, 2, 128, seed=1)
        batches = [next(reader).tokens for _ in range(6)]
        threaded = JsonLines(source.files, reading=Reading(middle=source.reading.middle))
        for again in (source, threaded):
            reader = again.open(with_middle, 2, 128, seed=1)
            np.testing.assert_array_equal([next(reader).tokens for _ in range(6)], batches)

    def test_a_tokenizer_without_the_tokens_is_refused(self, tmp_path, tokenizer):
        with pytest.raises(ConfigError) as error:
            self.source(tmp_path, 0.1).open(tokenizer, 1, 64, 0)
        assert len(error.value.problems) == 3 and BEGIN in error.value.problems[0]
        with pytest.raises(ConfigError, match="rate=1.5"):
            self.source(tmp_path, 1.5).open(tokenizer, 1, 64, 0)

    def test_it_is_for_texts(self, tokenizer):
        reading = Reading(middle=FillInTheMiddle())
        for source in (TokenFiles(("a.bin",), reading=reading), ChatFiles(("a.jsonl",), reading=reading)):
            with pytest.raises(DataError, match="fill in the middle"):
                source.documents(tokenizer)


def test_a_tokenizer_without_begin_and_end_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ProblemsError) as error:
        TextFiles((f"{tmp_path}/a.txt",)).documents(Tokenizer(models.BPE()))
    assert len(error.value.problems) == 2


def test_a_bad_record_says_where_it_is():
    assert str(BadRecord("a.jsonl, line 3", "is empty")) == "a.jsonl, line 3: is empty"


def test_naming_sources_imports_neither_grain_nor_pyarrow():
    code = (
        "import sys; import dsv4_jax.training.sources; "
        "print([name for name in ('grain', 'pyarrow', 'jax') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
