"""Every public operation has a table of its arrays' dims, and the operation takes and gives such arrays."""

import functools
import importlib
import inspect
import pkgutil
import re

import jax
import pytest

import pallas_kernels
from pallas_kernels.splits import Splits, letters
from tests.kernels.test_empty import OPERATIONS, SIZES

FAMILIES = [
    importlib.import_module(f"pallas_kernels.{module.name}")
    for module in pkgutil.iter_modules(pallas_kernels.__path__)
    if module.ispkg and importlib.util.find_spec(f"pallas_kernels.{module.name}.op")
]
OPS = {
    name: function
    for family in FAMILIES
    for name, function in inspect.getmembers(family, inspect.isfunction)
    if "    Sharding:" in (function.__doc__ or "")
}
OPAQUE = ("Array", "HeldRows", "Queries", "Fp8Blocks", "Mxfp4", "Columns", "StreamMaps")
"""What the annotation of an array, or of something that holds arrays, has in it."""


def table(name: str) -> Splits:
    return inspect.getmodule(OPS[name]).SPLITS[name]


def is_array(parameter: inspect.Parameter) -> bool:
    text = str(parameter.annotation)
    return any(word in text for word in OPAQUE) and "Callable" not in text


def dims_of(annotation) -> list[str]:
    """The dims that the alternatives of an annotation state; none where one of them is a container."""
    alternatives = [each for each in getattr(annotation, "__args__", [annotation]) if each is not type(None)]
    return [each.dim_str for each in alternatives] if all(hasattr(x, "dim_str") for x in alternatives) else []


def test_the_families_are_found():
    assert len(FAMILIES) >= 10
    assert {"hybrid_attention", "pre", "expert_ffn", "index_list", "attend_cached"} <= OPS.keys()


@pytest.mark.parametrize("name", OPS)
def test_the_table_names_every_array(name):
    splits, signature = table(name), inspect.signature(OPS[name])
    arrays = [parameter.name for parameter in signature.parameters.values() if is_array(parameter)]
    assert list(splits.arguments) == arrays
    for argument in arrays:
        words = splits.arguments[argument]
        stated = dims_of(signature.parameters[argument].annotation)
        if isinstance(words, str) and stated:
            assert any(_agree(words.split(), dims.split()) for dims in stated), (argument, words, stated)
    known = {
        letter
        for words in jax.tree.leaves(dict(splits.arguments))
        for w in words.split()
        for letter in letters(w)
    }
    assert {*splits.free.split(), *splits.summed.split(), *splits.multiples} <= known
    assert not set(splits.free.split()) & set(splits.summed.split())


def _agree(words: list[str], dims: list[str]) -> bool:
    """One dim each, but for leading ones; and plain letters are the same."""
    if words and words[0].startswith("*") and not dims[0].startswith("*") and len(dims) == len(words) - 1:
        words = words[1:]
    plain = re.compile(r"[A-Za-z]+")
    return len(words) == len(dims) and all(
        word == dim
        for word, dim in zip(words, dims, strict=True)
        if plain.fullmatch(word) and plain.fullmatch(dim)
    )


@pytest.mark.parametrize("name", OPS)
def test_the_docstring_leaves_the_rule_to_the_table(name):
    section = OPS[name].__doc__.split("    Sharding:")[1].split("    Raises:")[0]
    assert "`SPLITS`" in section
    assert not re.search(r"split freely|must be whole|stays? whole", section)


@pytest.mark.parametrize("case", OPERATIONS, ids=lambda case: case.__name__[1:])
def test_the_operation_takes_and_gives_such_ranks(case, monkeypatch):
    name = case.__name__[1:]
    splits, seen = table(name), []

    def recorded(*arguments, **more):
        result = OPS[name](*arguments, **more)
        seen.append((inspect.signature(OPS[name]).bind(*arguments, **more).arguments, result))
        return result

    family = next(family for family in FAMILIES if getattr(family, name, None) is OPS[name])
    monkeypatch.setattr(family, name, functools.wraps(OPS[name])(recorded))
    jax.eval_shape(functools.partial(case, "reference", **SIZES))
    [(arguments, result)] = seen
    for argument in arguments.keys() & splits.arguments.keys():
        words, given = splits.arguments[argument], arguments[argument]
        given = given.stack if hasattr(given, "stack") else given
        for dims, part in [(words, given)] if isinstance(words, str) else zip(words, given, strict=True):
            for leaf in jax.tree.leaves(part):
                assert _holds(dims, leaf.ndim), argument
    results = zip(jax.tree.leaves(splits.results), jax.tree.leaves(result), strict=True)
    assert all(_holds(words, leaf.ndim) for words, leaf in results)


def _holds(words: str, rank: int) -> bool:
    dims = words.split()
    return rank >= len(dims) - 1 if any(dim.startswith("*") for dim in dims) else rank == len(dims)
