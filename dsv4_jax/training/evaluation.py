"""How well a model predicts text, and whether it finds again what stands far back in its context.

    bits per byte = sum over tokens of -log2 p(token | what is before it) / bytes of the text

Bits per byte compare models whatever their tokenizers; perplexity, exp(nats per token), only those that share
one. A needle is a sentence with a number, hidden at some depth of a text of other content; the question after
the text asks for the number.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32
from tokenizers import Tokenizer

from dsv4_jax.config.quantities import integer_problem
from dsv4_jax.errors import ProblemsError
from dsv4_jax.model import span as spans
from dsv4_jax.model.initial import Network
from dsv4_jax.parameters import Parameters
from dsv4_jax.training.data import Batch
from dsv4_jax.training.packing import best_fit_rows, laid_out
from dsv4_jax.training.step import validation_sums
from dsv4_jax.training.tokenizer import literal


@dataclasses.dataclass(frozen=True)
class TextScore:
    """What a model thinks of texts.

    Attributes:
        nats: -log p summed over all tokens of the texts; the begin of each text is given, not predicted.
        tokens: how many.
        num_bytes: of the texts in UTF-8.
    """

    nats: float
    tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp of the mean nats per token."""
        return math.exp(min(self.nats / max(self.tokens, 1), 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Of the text."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)


def text_score(
    network: Network,
    params: Parameters,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    seq_len: int,
    batch_size: int = 1,
) -> TextScore:
    """Scores texts, each on its own behind a begin token; every token of them exactly once.

    A text longer than `seq_len` is scored in pieces: each begins with the last token of the piece before it,
    and sees nothing else of it. So longer rows score better.

    Args:
        network: the model. params: its parameters.
        tokenizer: of the model; what a text spells is never a special token.
        texts: of UTF-8; empty ones add nothing.
        seq_len: T, at least 2. batch_size: rows that are computed together.

    Raises:
        ProblemsError: sizes that cannot be, or texts without a token; all problems at once.
    """
    sizes = (("seq_len", seq_len, 2), ("batch_size", batch_size, 1))
    problems = [problem for size in sizes if (problem := integer_problem(*size))]
    encodings = literal(tokenizer).encode_batch_fast(list(texts), add_special_tokens=False)
    if not any(encoding.ids for encoding in encodings):
        problems.append("the texts have no token")
    if problems:
        raise ProblemsError("cannot score text", problems)
    pieces = []
    for encoding in encodings:
        ids = np.asarray([network.config.bos_token_id, *encoding.ids], np.int32)
        pieces += [ids[start : start + seq_len] for start in range(0, len(ids) - 1, seq_len - 1)]
    rows = best_fit_rows([len(piece) for piece in pieces], seq_len)
    nats, tokens = 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        laid = [laid_out(row, pieces, seq_len) for row in rows[start : start + batch_size]]
        laid += [(np.zeros(seq_len, np.int32),) * 2] * (batch_size - len(laid))
        batch = Batch(*(np.stack(part) for part in zip(*laid, strict=True)))
        total, count = jax.device_get(validation_sums(network, params, batch))
        nats, tokens = nats + float(total), tokens + float(count)
    return TextScore(nats, round(tokens), sum(len(text.encode()) for text in texts))


class NeedleError(ProblemsError):
    """A test of retrieval that cannot be made."""


@dataclasses.dataclass(frozen=True)
class NeedleCase:
    """A text with a needle and its question.

    Attributes:
        length: tokens of all, the answer included.
        depth: where the needle is, from 0, the begin, to 1, right before the question.
        tokens: i32[length]; the last ones are the answer.
        answer: how many those are.
    """

    length: int
    depth: float
    tokens: np.ndarray
    answer: int


@dataclasses.dataclass(frozen=True)
class NeedleResult:
    """What became of a case.

    Attributes:
        length, depth: of the case.
        found: whether the model, taking the most likely token each time, writes exactly the answer.
        nats: -log p of the answer, per token.
    """

    length: int
    depth: float
    found: bool
    nats: float


def needle_cases(
    tokenizer: Tokenizer,
    bos_id: int,
    filler: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 1,
    seed: int = 0,
) -> list[NeedleCase]:
    """Texts of each length with a needle at each depth; cities, numbers and filler are drawn anew each time.

    Args:
        tokenizer: of the model. bos_id: its begin token.
        filler: text to hide needles in, longer than needed or repeated.
        lengths: of whole cases in tokens.
        depths: 0 to 1. trials: cases of each length and depth. seed: of what is drawn.

    Raises:
        NeedleError: lengths too short for needle and question, depths outside 0..1; all problems at once.
    """
    encode = functools.partial(literal(tokenizer).encode, add_special_tokens=False)
    hay = np.asarray(encode(filler).ids, np.int32)
    problems = [p for n in lengths if (p := integer_problem("length", n, 1))]
    problems += [f"depth={depth!r} must be in 0..1" for depth in depths if not 0.0 <= depth <= 1.0]
    if problem := integer_problem("trials", trials, 1):
        problems.append(problem)
    if not len(hay):
        problems.append("the filler has no token")
    if problems:
        raise NeedleError("cannot test retrieval", problems)
    draw = np.random.Generator(np.random.Philox(seed))
    cases = []
    for length in lengths:
        for depth in [depth for depth in depths for _ in range(trials)]:
            city, number = _CITIES[draw.integers(len(_CITIES))], int(draw.integers(10**6, 10**7))
            needle = np.asarray(encode(f"\nThe number of {city} is {number}.\n").ids, np.int32)
            question = np.asarray(encode(f"\nThe number of {city} is").ids, np.int32)
            answer = np.asarray(encode(f" {number}").ids, np.int32)
            space = length - 1 - len(needle) - len(question) - len(answer)
            if space < 0:
                problems.append(f"length={length} is too short: needle and question take {length - space}")
                break
            before = round(depth * space)
            around = np.take(hay, draw.integers(len(hay)) + np.arange(space), mode="wrap")
            parts = ([bos_id], around[:before], needle, around[before:], question, answer)
            cases.append(NeedleCase(length, depth, np.concatenate(parts).astype(np.int32), len(answer)))
    if problems:
        raise NeedleError("cannot test retrieval", problems)
    return cases


def needle_results(network: Network, params: Parameters, cases: Sequence[NeedleCase]) -> list[NeedleResult]:
    """Asks a model, one case at a time: one pass over text, question and answer.

    The answer is in the pass, so what is found is what greedy decoding would write: it goes on with the
    answer as long as each token of it is the most likely one. Each length is compiled once.
    """
    results = []
    for case in cases:
        scores = jax.device_get(_answer_scores(network, params, case.tokens[None], case.answer))
        found, nats = (float(score) for score in scores)
        results.append(NeedleResult(case.length, case.depth, bool(found), nats))
    return results


@functools.partial(jax.jit, static_argnums=(0, 3))
def _answer_scores(
    network: Network, params: Parameters, tokens: Int32[Array, "1 T"], answer: int
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(1 if every answer token is the most likely one, else 0; mean nats of them)."""
    tokens = jnp.asarray(tokens)
    length = tokens.shape[1]
    model = network.holding(params)
    streams = model(spans.from_start(tokens, jnp.full((1,), length, jnp.int32))).streams
    logits = model.logits(model.hidden(streams[:, length - answer - 1 : length - 1]))[0]
    wanted = tokens[0, length - answer :]
    found = jnp.all(jax.lax.argmax(logits, 1, jnp.int32) == wanted)
    of_answer = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), wanted[:, None], axis=-1)
    return found.astype(jnp.float32), -of_answer.mean(dtype=jnp.float32)


_CITIES = (
    "Oslo Lima Cairo Quito Hanoi Delhi Rome Riga Accra Dakar Minsk Seoul Tunis Sofia Paris Kyoto Perth "
    "Bergen Porto Leeds Turin Ghent Basel Graz"
).split()
