"""Every public argument that is an integer, a seed or an array of integers, checked for type and range."""

import inspect
import typing
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.arguments import checked_prompts, checked_seed, seed_problem
from dsv4_jax.config import ModelConfig, tiny
from dsv4_jax.inspection.context_cost import context_cost
from dsv4_jax.language_model import LanguageModel
from dsv4_jax.model.cache import Cache
from dsv4_jax.model.initial import initial_parameters
from dsv4_jax.numerics.policy import Policy

CONFIG = tiny(
    4,
    vocab_size=300,
    attention_kinds=("csa", "hca"),
    router_kinds=("hash", "learned"),
    csa_ratio=2,
    hca_ratio=4,
    sliding_window=4,
    index_topk=3,
)
POLICY = Policy.of("float32")
NO_INTEGERS = [True, np.True_, 1.0, np.float32(2), float("nan"), "3", None, [1], 1j]


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.random(CONFIG, POLICY)


def first(iterator):
    return next(iterator)


# (argument, lowest, highest, call): everything in the public API that takes one integer.
SCALARS = {
    "LanguageModel.random(seed)": (0, 2**63 - 1, lambda lm, x: LanguageModel.random(CONFIG, POLICY, x)),
    "initial_parameters(seed)": (0, 2**63 - 1, lambda lm, x: initial_parameters(CONFIG, POLICY, x)),
    "generate(seed)": (0, 2**63 - 1, lambda lm, x: lm.generate([[1]], 0, seed=x)),
    "stream(seed)": (0, 2**63 - 1, lambda lm, x: first(lm.stream([[1]], 1, seed=x))),
    "stream_ids(seed)": (0, 2**63 - 1, lambda lm, x: first(lm.stream_ids([1], 1, seed=x))),
    "generate(max_new_tokens)": (0, None, lambda lm, x: lm.generate([[1]], x)),
    "stream(max_new_tokens)": (0, None, lambda lm, x: first(lm.stream([[1]], x))),
    "stream_ids(max_new_tokens)": (0, None, lambda lm, x: first(lm.stream_ids([1], x))),
    "new_cache(batch)": (1, 2**31 - 1, lambda lm, x: lm.new_cache(x, 8)),
    "new_cache(max_length)": (1, 65536, lambda lm, x: lm.new_cache(1, x)),
    "new_cache(max_rewind)": (0, 2**31 - 1, lambda lm, x: lm.new_cache(1, 8, x)),
    "layer(index)": (0, 1, lambda lm, x: lm.layer(x, np.zeros((1, 1, 4, 64), np.float32), [[1]])),
    "context_cost(context)": (1, 65536, lambda lm, x: context_cost(CONFIG, x)),
    "tiny(num_layers)": (4, None, lambda lm, x: tiny(x)),
}


TAKES_ONE_A_ROW = {"generate(seed)", "stream(seed)"}


@pytest.mark.parametrize("name", SCALARS)
def test_an_integer_argument(lm, name):
    low, high, call = SCALARS[name]
    argument = name[name.index("(") + 1 : -1]
    outside = [low - 1, -(2**70)] + ([high + 1, 2**70, np.uint64(high + 1)] if high else [])
    for value in NO_INTEGERS + outside:
        if isinstance(value, list) and name in TAKES_ONE_A_ROW:
            continue
        with pytest.raises(ValueError, match=rf"{argument}=.* must be an integer .*{low}"):
            call(lm, value)


def test_the_table_names_every_public_integer():
    """A public method or function with a new `int` argument fails here until it has a row."""
    public = {name: getattr(dsv4_jax, name) for name in dsv4_jax.__all__}
    functions = {name: f for name, f in public.items() if inspect.isfunction(f)}
    functions |= {n: f for n, f in vars(LanguageModel).items() if inspect.isfunction(f) and n[0] != "_"}
    functions["LanguageModel.random"] = LanguageModel.random
    functions["Policy.of"] = Policy.of
    expected = set()
    for name, function in functions.items():
        for argument, hint in typing.get_type_hints(function).items():
            if argument != "return" and hint in (int, int | None, int | Sequence[int]):
                expected.add(f"{name}({argument})")
    # Text goes the way of ids (stream_text calls stream_ids); the fields of a config have rules of their own.
    expected -= {"stream_text(seed)", "stream_text(max_new_tokens)", "tiny(vocab_size)"}
    assert expected <= SCALARS.keys()
    assert len(expected) >= 11


@pytest.mark.parametrize("field", [n for n, t in typing.get_type_hints(ModelConfig).items() if t is int])
@pytest.mark.parametrize("value", [True, 4.0, -1, 2**31])
def test_the_integer_fields_of_a_config(field, value):
    with pytest.raises(ValueError, match=field):
        tiny(**{"vocab_size": 512} | {field: value})


TRUNCATED = 2**32 + 1  # what a cast to int32 would make 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lm, x: lm.logits([[1, 2]], segment_ids=[[1, x]]), "segment_ids|segment ids"),
        (lambda lm, x: lm.streams([[1, 2]], segment_ids=[[1, x]]), "segment_ids|segment ids"),
        (lambda lm, x: lm.taps([[1, 2]], [], segment_ids=[[1, x]]), "segment_ids|segment ids"),
        (lambda lm, x: lm.logits([[1, 2]], num_valid=[x]), "num_valid"),
        (lambda lm, x: lm.extend(lm.new_cache(1, 8), [[1, 2]], [x]), "num_valid"),
        (lambda lm, x: lm.new_cache(1, 8).rewind(x), "num_tokens|rewinding"),
        (lambda lm, x: lm.new_cache(2, 8).rewind([0, x]), "num_tokens|rewinding"),
        (lambda lm, x: lm.logits([[1, x]]), "token"),
        (lambda lm, x: lm.mtp_logits([[1, x]]), "token"),
        (lambda lm, x: lm.layer(0, np.zeros((1, 2, 4, 64)), [[1, x]]), "token"),
        (lambda lm, x: lm.generate([[1, x]], 0), "token"),
        (lambda lm, x: lm.generate([[1]], 0, stop_token_ids=[x]), "stop_token_ids"),
        (lambda lm, x: first(lm.stream_ids([1, x], 0)), "token"),
        (lambda lm, x: first(lm.stream_ids([1], 0, stop_token_ids=[x])), "stop_token_ids"),
    ],
)
@pytest.mark.parametrize("value", [True, 1.5, 1.0, float("nan"), "1", -1, TRUNCATED, 2**70])
def test_arrays_of_integers(lm, call, message, value):
    with pytest.raises(ValueError, match=message):
        call(lm, value)


def test_arrays_of_other_dtypes(lm):
    with pytest.raises(ValueError, match="segment_ids of dtype float32 must be integers"):
        lm.logits([[1, 2]], segment_ids=np.array([[1, np.nan]], np.float32))
    with pytest.raises(ValueError, match=r"segment ids \[4294967297\] must be in 0..2147483647"):
        lm.logits([[1, 2]], segment_ids=np.array([[1, TRUNCATED]]))
    with pytest.raises(ValueError, match="num_valid of dtype float64 must be integers"):
        lm.logits([[1, 2]], num_valid=np.array([1.0]))
    with pytest.raises(ValueError, match="tokens of dtype bool must be integers"):
        lm.logits(jnp.ones((1, 2), bool))
    with pytest.raises(ValueError, match=r"shape \(3,\) must be one count, or 2"):
        lm.new_cache(2, 8).rewind(np.array([1, 1, 1]))
    with pytest.raises(ValueError, match="rows have different lengths"):
        lm.logits([[1, 2], [3]])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([0, 5, 9], r"\[\[0, 5, 9\]\]"),
        (np.array([0, 5, 9]), r"\[\[0, 5, 9\]\]"),
        ((0, 5, 9), r"\[\[0, 5, 9\]\]"),
        (list(range(20)), r"\[\[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\]\]"),
        (5, r"shape \(\) must be \[B, T\]"),
        (b"abc", "bytes"),
        (["abc", "def"], "str"),
        ([b"abc"], "bytes"),
        ([[1, "2"]], "prompt 0: .*str"),
        ([[1], [2.0]], "prompt 1: .*float64"),
        ([[1], [True]], "prompt 1: .*bool"),
        ([[1], [300]], r"prompt 1: .*\[300\] are outside the vocabulary 0..299"),
        (np.zeros((1, 2, 2), int), r"shape \(1, 2, 2\)"),
        ([np.zeros((2, 2), int)], r"prompt 0: .*shape \(1, 2, 2\)"),
        ([], "at least one prompt"),
        ([[1], []], "at least one token"),
        ({1: 2}, "integers"),
        (None, "integers"),
    ],
)
def test_prompts_of_other_forms(lm, prompts, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(prompts, 4)


@pytest.mark.parametrize(
    "prompts", [[[0, 5], [9]], ((0, 5), (9,)), [np.array([0, 5], np.uint8), jnp.array([9])]]
)
def test_prompts_of_any_integer_type(prompts):
    assert checked_prompts(prompts, 300) == [[0, 5], [9]]


def test_a_flat_list_is_answered_alike_by_logits(lm):
    with pytest.raises(ValueError, match=r"one sequence is written \[\[0, 5, 9\]\]"):
        lm.logits([0, 5, 9])


@pytest.mark.parametrize("ids", [5, [[5]], "ab", {"a": 1}])
def test_stop_ids_are_a_list(lm, ids):
    with pytest.raises(ValueError, match="stop_token_ids"):
        lm.generate([[1]], 0, stop_token_ids=ids)


@pytest.mark.parametrize("value", ["1", True, None, -1e-9, float("nan"), float("inf"), 1e39, [0.5], 1j])
def test_temperature_and_top_p(lm, value):
    with pytest.raises(ValueError, match="temperature=.* must be a number.*; top_p=.* must be a number"):
        lm.generate([[1]], 0, temperature=value, top_p=0 if value != value else value)


@pytest.mark.parametrize("kind", [float, np.float16, np.float64, jnp.float32, int])
def test_numbers_of_any_type(lm, kind):
    assert lm.generate([[1]], 0, temperature=kind(1), top_p=kind(1)).shape == (1, 0)


@pytest.mark.parametrize("kind", [int, np.int8, np.uint64, np.array, jnp.int32])
def test_integers_of_any_type(lm, kind):
    assert checked_seed(kind(3)) == 3 and seed_problem(kind(3)) is None
    assert lm.generate([[1]], kind(0), seed=kind(3)).shape == (1, 0)
    assert lm.new_cache(kind(2), kind(9)).max_length.tolist() == [9, 9]
    assert isinstance(lm.new_cache(1, 8).rewind(kind(0)), Cache)


@pytest.mark.parametrize("collect", ["streams", ["stream"]])
def test_names_of_taps(lm, collect):
    with pytest.raises(ValueError, match="streams"):
        lm.taps([[1, 2]], collect)


def test_streams_of_another_shape(lm):
    with pytest.raises(ValueError, match=r"streams of shape \(1, 3, 64\) must be .*\(1, 2, 4, 64\)"):
        lm.layer(0, np.zeros((1, 3, 64)), [[1, 2]])


@pytest.mark.parametrize("dtype", [5, "float64", np.float64, None])
def test_a_dtype_that_is_none(dtype):
    with pytest.raises(ValueError, match="dtype="):
        Policy.of(dtype)
