"""Where training data comes from: files of text, JSON lines, Parquet, token ids, chats; Python's own sources.

A source is what a run's configuration names; `open` makes a stream of it. Nothing is read before.
"""

import dataclasses
from typing import Literal, Protocol

import numpy as np
from tokenizers import Tokenizer

from dsv4_jax.training.chat_records import QUICKSTART_CHAT, ChatDocuments, ChatEncoder, ChatProfile
from dsv4_jax.training.corpus import gather_corpus
from dsv4_jax.training.documents import BadRecord, DataError, Document, Documents, Reading, matching_files
from dsv4_jax.training.record_files import (
    EncodedTexts,
    JsonLineRecords,
    ParquetRecords,
    TextField,
    TextFileRecords,
    TextsInMemory,
)
from dsv4_jax.training.stream import PackedStream
from dsv4_jax.training.token_files import TokenFileDocuments, TokenType
from dsv4_jax.training.tokenizer import TextEncoder

Files = tuple[str, ...]
"""Paths and glob patterns; the files that they name count in order of their paths."""


class Source(Protocol):
    """What a run's configuration says of its data."""

    reading: Reading

    def documents(self, tokenizer: Tokenizer) -> Documents:
        """The documents. Raises ProblemsError for files that cannot be used."""


def opened(
    source: Source,
    tokenizer: Tokenizer,
    batch_size: int,
    seq_len: int,
    seed: int,
    process_index: int = 0,
    num_processes: int = 1,
) -> PackedStream:
    """The stream of a source's batches; sources have it as their method `open`.

    Args:
        source: of the documents.
        tokenizer: of the model; its special tokens begin and end documents.
        batch_size: B of the global batch. seq_len: T. seed: of all orders.
        process_index: whose share of each batch's rows, of `num_processes`.

    Raises:
        ProblemsError: what cannot be read, or not with these arguments.
    """
    documents = source.documents(tokenizer)
    vocab_size = tokenizer.get_vocab_size()
    share = (process_index, num_processes)
    return PackedStream(documents, batch_size, seq_len, seed, source.reading, *share, vocab_size)


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """Files of UTF-8 text, one document each."""

    files: Files
    reading: Reading = Reading()
    open = opened

    def documents(self, tokenizer: Tokenizer) -> Documents:
        """One document a file."""
        paths = matching_files(self.files)
        return EncodedTexts(TextFileRecords(paths), TextEncoder(tokenizer, self.reading.middle))


@dataclasses.dataclass(frozen=True)
class JsonLines:
    """Files with one JSON object a line, whose text is in a field."""

    files: Files
    field: str = "text"
    reading: Reading = Reading()
    open = opened

    def documents(self, tokenizer: Tokenizer) -> Documents:
        """One document a line."""
        texts = TextField(JsonLineRecords(matching_files(self.files)), self.field)
        return EncodedTexts(texts, TextEncoder(tokenizer, self.reading.middle))


@dataclasses.dataclass(frozen=True)
class ParquetFiles:
    """Parquet files with a column of texts. It needs pyarrow, and is held in memory up to `max_bytes`."""

    files: Files
    column: str = "text"
    max_bytes: int = 8 * 2**30
    reading: Reading = Reading()
    open = opened

    def documents(self, tokenizer: Tokenizer) -> Documents:
        """One document a row."""
        texts = ParquetRecords(matching_files(self.files), self.column, self.max_bytes)
        return EncodedTexts(texts, TextEncoder(tokenizer, self.reading.middle))


@dataclasses.dataclass(frozen=True)
class TokenFiles:
    """Files of token ids, mapped into memory (`token_files` tells their format).

    Attributes:
        files: `.npy` or `.bin`.
        dtype: of the numbers in `.bin` files.
        end_token: the id that ends a document, for files without document ends.
        reading: how documents become rows; fill in the middle needs texts.
    """

    files: Files
    dtype: TokenType | None = None
    end_token: int | None = None
    reading: Reading = Reading()
    open = opened

    def documents(self, tokenizer: Tokenizer) -> Documents:
        """One document between two document ends."""
        if self.reading.middle is not None:
            raise DataError("cannot read token files", ["fill in the middle needs texts, not token ids"])
        return TokenFileDocuments(matching_files(self.files), self.dtype, self.end_token)


@dataclasses.dataclass(frozen=True)
class ChatFiles:
    """Files with one chat a line, {"messages": [...]}; the loss is of what the assistant says.

    Chats are packed like other documents, but never cut: one longer than a row is a bad record.
    """

    files: Files
    profile: ChatProfile = QUICKSTART_CHAT
    reading: Reading = Reading()
    open = opened

    def documents(self, tokenizer: Tokenizer) -> Documents:
        """One document a chat."""
        if self.reading.middle is not None:
            raise DataError("cannot read chats", ["fill in the middle is for texts, not for chats"])
        encoder = ChatEncoder(TextEncoder(tokenizer), self.profile)
        return ChatDocuments(JsonLineRecords(matching_files(self.files)), encoder)


@dataclasses.dataclass(frozen=True)
class StandardLibrary:
    """The sources of the running Python's standard library, which every installation has.

    Attributes:
        max_bytes: of text at most.
        part: the training or the validation files (`corpus.is_validation`).
        reading: how documents become rows.
    """

    max_bytes: int = 16_000_000
    part: Literal["train", "validation"] = "train"
    reading: Reading = Reading()
    open = opened

    def documents(self, tokenizer: Tokenizer) -> Documents:
        """One document a file."""
        found = getattr(gather_corpus(self.max_bytes), self.part)
        texts = [(document.name, document.text) for document in found]
        return EncodedTexts(TextsInMemory(texts), TextEncoder(tokenizer, self.reading.middle))


def all_documents(source: Source, tokenizer: Tokenizer, seed: int = 0) -> list[Document]:
    """Every document of a source, in the order of the source: for validation, and to write a token file.

    Raises:
        ProblemsError: files that cannot be used; bad records, unless the source skips them.
    """
    documents = source.documents(tokenizer)
    draw = np.random.Generator(np.random.Philox(seed))
    found = [documents.read(number, draw) for number in range(len(documents))]
    bad = [str(record) for record in found if isinstance(record, BadRecord)]
    if bad and source.reading.bad_records == "refuse":
        raise DataError("the training data has bad records", bad)
    return [record for record in found if isinstance(record, Document)]
