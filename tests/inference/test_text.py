"""Prompts become ids in one place, and drawn ids become text in time linear in their number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from dsv4_jax.inference.text import KEPT, TextStream, prompt_ids
from dsv4_jax.training.tokenizer import BOS, BOS_ID, EOS_ID, train_tokenizer

TEXTS = ["héllo wörld, 你好世界 🙂🙃 def main(): return 'naïve'\n", "日本語のテキスト — ﬁ \u200d👩\u200d💻"]
VOCAB = 420


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train_tokenizer(TEXTS, VOCAB)
    made.add_tokens([AddedToken("<｜User｜>", special=True), AddedToken("<think>", special=False)])
    return made


def streamed(tokenizer: Tokenizer, ids: list[int]) -> tuple[list[str], str]:
    """The pieces, and all of them with what was left."""
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    return pieces, "".join(pieces) + stream.finish()


def split_characters(tokenizer: Tokenizer) -> list[int]:
    """Ids of single bytes, and of merges that begin or end within a character."""
    ids = range(tokenizer.get_vocab_size())
    return [i for i in ids if "\ufffd" in tokenizer.decode([i])]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_streamed_text_is_the_text_of_all_ids_at_once(tokenizer, data):
    """Random ids, half of them pieces of characters; special tokens and ids without a token among them."""
    anything = st.integers(0, tokenizer.get_vocab_size() + 3)
    broken = st.sampled_from(split_characters(tokenizer))
    ids = data.draw(st.lists(st.one_of(anything, broken), max_size=80))
    assert streamed(tokenizer, ids)[1] == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=st.lists(st.integers(0x80, 0xFF), min_size=1, max_size=70))
def test_bytes_that_never_make_a_character(tokenizer, values):
    bytes_of = {piece: i for i, piece in enumerate(bytes_alphabet())}
    of_byte = {bytes_of[piece]: token for piece, token in tokenizer.get_vocab().items() if piece in bytes_of}
    ids = [of_byte[value] for value in values]
    assert streamed(tokenizer, ids)[1] == bytes(values).decode("utf-8", errors="replace")


def bytes_alphabet() -> list[str]:
    """Byte -> the letter that stands for it in a byte-level vocabulary (the table of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def test_the_byte_alphabet_is_the_tokenizers(tokenizer):
    assert set(bytes_alphabet()) <= set(tokenizer.get_vocab())


def test_pieces_are_whole_characters(tokenizer):
    text = "a🙂b你é" * 20
    pieces, whole = streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)
    assert whole == text
    assert "\ufffd" not in "".join(pieces)


def test_a_replacement_character_of_the_text_is_kept(tokenizer):
    text = "a\ufffdb\ufffd"
    assert streamed(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)[1] == text


def test_decoders_that_look_at_the_token_before():
    """Word-piece text depends on its first token: the spaces between later words must stay."""
    words = ["hello", "##s", "world", ",", "on", "##ward"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="hello"))
    tokenizer.decoder = decoders.WordPiece()
    ids = np.random.default_rng(0).integers(0, len(words), 200).tolist()
    assert streamed(tokenizer, ids)[1] == tokenizer.decode(ids)


class CountingTokenizer:
    """A tokenizer that counts the ids it is given to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.decoded = 0

    def __getattr__(self, name: str):
        return getattr(self._tokenizer, name)

    def decode(self, ids, **options) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **options)


@pytest.mark.parametrize("kind", ["words", "special", "unfinished"])
def test_work_for_a_token_does_not_grow_with_the_text(tokenizer, kind):
    words = tokenizer.encode(TEXTS[0], add_special_tokens=False).ids
    piece = {"words": words, "special": [EOS_ID], "unfinished": split_characters(tokenizer)[:1]}[kind]
    for length in (500, 4000):
        counting = CountingTokenizer(tokenizer)
        streamed(counting, (piece * length)[:length])
        assert counting.decoded <= 2 * KEPT * (length + 1)


def test_a_prompt_has_one_bos(tokenizer):
    plain = prompt_ids(tokenizer, "hello", BOS_ID)
    assert plain[0] == BOS_ID and plain.count(BOS_ID) == 1
    assert prompt_ids(tokenizer, BOS + "hello", BOS_ID) == plain
    assert prompt_ids(tokenizer, "hello", None) == plain[1:]


def test_control_text_inside_a_prompt_becomes_its_ids(tokenizer):
    ids = prompt_ids(tokenizer, f"{BOS}<｜User｜>hi{BOS}", BOS_ID)
    assert ids[:2] == [BOS_ID, tokenizer.token_to_id("<｜User｜>")] and ids[-1] == BOS_ID


def test_a_prompt_is_neither_cut_nor_filled_up(tokenizer):
    expected = prompt_ids(tokenizer, "hello world " * 9, BOS_ID)
    batching = Tokenizer.from_str(tokenizer.to_str())
    batching.enable_truncation(4)
    batching.enable_padding(length=500)
    settings_before = batching.truncation, batching.padding
    assert prompt_ids(batching, "hello world " * 9, BOS_ID) == expected
    assert (batching.truncation, batching.padding) == settings_before
