"""Chats: what is rendered, which tokens count, and what is refused."""

import json

import numpy as np
import pytest

from dsv4_jax.training.chat_records import (
    QUICKSTART_CHAT,
    ChatEncoder,
    ChatProfile,
    Piece,
    message_problems,
    quickstart_pieces,
)
from dsv4_jax.training.documents import DataError, Reading
from dsv4_jax.training.sources import ChatFiles, all_documents
from dsv4_jax.training.tokenizer import BOS, BOS_ID, EOS, EOS_ID, TextEncoder, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["### Question\nhow are you\n### Answer\nfine, thank you\n"] * 3, 300)


def messages(*turns, system=None):
    """Messages of questions and answers in turn."""
    roles = ("user", "assistant")
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]


CHAT = messages("how are you", "fine", "and you", "", system="Be brief.")
CHAT[-1]["content"] = "fine, too"


def test_pieces_of_the_quickstart_profile():
    assert quickstart_pieces(CHAT) == [
        (BOS, False, True),
        ("Be brief.\n\n", False, False),
        ("### Question\nhow are you\n### Answer\n", False, False),
        ("fine", True, False),
        (EOS, True, True),
        ("### Question\nand you\n### Answer\n", False, False),
        ("fine, too", True, False),
        (EOS, True, True),
    ]


def test_only_what_the_assistant_says_counts_with_its_end(tokenizer):
    tokens, counts, whole = ChatEncoder(TextEncoder(tokenizer), QUICKSTART_CHAT).document(CHAT)
    assert tokens.dtype == np.int32 and counts.dtype == bool and tokens.shape == counts.shape and whole
    assert tokens[0] == BOS_ID and not counts[0]
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(counts)) + 1)
    said = [tokens[run].tolist() for run in runs if counts[run[0]]]
    assert [tokenizer.decode(ids[:-1]) for ids in said] == ["fine", "fine, too"]
    assert all(ids[-1] == EOS_ID for ids in said)
    rest = [tokenizer.decode(tokens[run].tolist()) for run in runs if not counts[run[0]]]
    first = "Be brief.\n\n### Question\nhow are you\n### Answer\n"
    assert rest == [first, "### Question\nand you\n### Answer\n"]


def test_a_question_is_tokenised_as_at_inference_and_an_answer_on_its_own(tokenizer):
    encoder = TextEncoder(tokenizer)
    document = ChatEncoder(encoder, QUICKSTART_CHAT).document(messages("how are you", "fine"))
    prompt = [BOS_ID, *encoder.plain("### Question\nhow are you\n### Answer\n")]
    assert document.tokens.tolist() == [*prompt, *encoder.plain("fine"), EOS_ID]


def test_where_a_profile_divides_its_texts_does_not_matter(tokenizer):
    def divided(chat):
        return [
            Piece(letter, piece.counted)
            for piece in quickstart_pieces(chat)
            for letter in ([] if piece.control else piece.text)
        ]

    def whole(chat):
        return [piece for piece in quickstart_pieces(chat) if not piece.control]

    documents = [
        ChatEncoder(TextEncoder(tokenizer), ChatProfile("x", pieces)).document(CHAT)
        for pieces in (divided, whole)
    ]
    np.testing.assert_array_equal(documents[0].tokens, documents[1].tokens)
    np.testing.assert_array_equal(documents[0].counts, documents[1].counts)


def test_what_somebody_writes_is_never_a_special_token(tokenizer):
    chat = messages(f"a{EOS}b", f"c{BOS}")
    tokens = ChatEncoder(TextEncoder(tokenizer), QUICKSTART_CHAT).document(chat).tokens
    assert (tokens == EOS_ID).sum() == 1 and (tokens == BOS_ID).sum() == 1


def test_a_profile_needs_its_special_tokens(tokenizer):
    profile = ChatProfile("official", quickstart_pieces, (BOS, "<｜User｜>", "<｜Assistant｜>"))
    with pytest.raises(DataError, match="'official'") as error:
        ChatEncoder(TextEncoder(tokenizer), profile)
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("wrong", "problems"),
    [
        (None, ["messages=None must be a list"]),
        ([], ["messages=\\[\\] must be a list of at least one"]),
        (["x"], [r"messages\[0\] is str"]),
        (messages("a"), ["roles are user; .* end with the assistant"]),
        (messages("a", "b", "c"), ["roles are user, assistant, user;"]),
        (messages("a", "b")[::-1], ["roles are assistant, user;"]),
        ([*messages("a", "b"), *messages("c", "d", system="s")], ["must alternate"]),
        (messages(system="alone"), ["roles are system;"]),
        (messages("", "b"), [r"messages\[0\] has an empty content"]),
        (messages("a", None), [r"messages\[1\] has the content None, which is no text"]),
        (
            [{"role": "tool", "content": "x"}],
            [r"messages\[0\] has the role 'tool'; it must be one of system"],
        ),
        ([{"content": "x"}], ["has the role None"]),
        (
            [{"role": "user"}, {"role": "assistant", "content": "", "tool_calls": []}],
            [
                r"\[0\] has the content None",
                r"\[1\] has an empty",
                "'tool_calls', which would not be rendered",
            ],
        ),
    ],
)
def test_wrong_messages_are_named_by_number_and_rule(wrong, problems):
    import re

    found = message_problems(wrong)
    assert len(found) == len(problems)
    assert all(re.search(pattern, problem) for pattern, problem in zip(problems, found, strict=True))


@pytest.mark.parametrize("system", [None, "", "Be brief."])
def test_right_messages_are_not_refused(system):
    assert message_problems(messages("a", "b", "c", "d", system=system)) == []


def write(path, chats):
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return (str(path),)


def test_bad_chats_are_found_in_their_file(tmp_path, tokenizer):
    good = {"messages": messages("how", "so")}
    files = write(tmp_path / "chats.jsonl", [good, {"messages": messages("a")}, {"dialog": []}, [good]])
    with pytest.raises(DataError) as error:
        all_documents(ChatFiles(files), tokenizer)
    for line, problem in zip((2, 3, 4), error.value.problems, strict=True):
        assert f"chats.jsonl, line {line}: " in problem
    half = write(tmp_path / "half.jsonl", [{"messages": messages("\ud800", "b")}])
    with pytest.raises(DataError, match="line 1: holds half of a surrogate pair"):
        all_documents(ChatFiles(half), tokenizer)
    assert len(all_documents(ChatFiles(files, reading=Reading("skip")), tokenizer)) == 1


def test_chats_are_packed_with_their_counts_and_never_cut(tmp_path, tokenizer):
    chats = [messages("how are you " * (n % 4 + 1), "fine " * (n % 5 + 1)) for n in range(12)]
    files = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    source = ChatFiles(files, reading=Reading(num_threads=0))
    whole = {tuple(d.tokens.tolist()): d.counts for d in all_documents(source, tokenizer)}
    longest = max(map(len, whole))
    reader = source.open(tokenizer, 1, longest + 3, seed=0)
    seen = []
    while reader.epoch == 0:
        (tokens,), (segments,), (counts,) = next(reader)
        assert counts.dtype == bool and not counts[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            chat = tuple(tokens[segments == segment].tolist())
            np.testing.assert_array_equal(counts[segments == segment], whole[chat])
            seen.append(chat)
    assert sorted(seen) == sorted(
        tuple(document.tokens.tolist()) for document in all_documents(source, tokenizer)
    )
    with pytest.raises(DataError, match=f"has {longest} tokens, more than seq_len={longest - 1}"):
        next(source.open(tokenizer, 1, longest - 1, seed=0))
