"""`decode_attention` at real sizes: it lowers to Mosaic and compiles for TPUs, without copying a cache."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_kernels.decode_attention import decode_attention, sparse_core
from pallas_kernels.decode_attention.tuning import DecodeBlocks
from pallas_kernels.formats.entries import Fp8Entries
from pallas_kernels.formats.entry_rows import Fp8Rows, Layout
from tests.kernels.ahead_of_time import CHIPS, compile_for, devices

MOSAIC_CALL = export.DisabledSafetyCheck.custom_call("tpu_custom_call")
HEADS = {"flash": 64, "pro": 128}
TOP_K = {"flash": 512, "pro": 1024}
ENTRIES = {"window": (0, 0), "hca": (512, 8192), "csa": (16384, 262144)}  # at 64K and at 1M tokens


FP8_PARTS = dict(
    zip(Fp8Entries._fields, ((448, jnp.float8_e4m3fn), (8, jnp.uint8), (64, jnp.bfloat16)), strict=True)
)

LAYOUT = Layout(512, 64)


def full_size(path, model="flash", *, length=1, batch=64, long=False, slots=136, fp8=False, in_rows=False):
    """Shapes of a decode step of 64 sequences; the stack holds two repeats. With `fp8` parts are by name."""
    heads, width = HEADS[model], 512
    num_entries = ENTRIES[path][long]
    shapes = {
        "q": ((batch, length, heads, width), jnp.bfloat16),
        "ring": ((2, batch, slots, width), jnp.bfloat16),
        "position": ((batch, length), jnp.int32),
        "sink": ((heads,), jnp.float32),
        "repeat": ((), jnp.int32),
    }
    if num_entries:
        shapes["entries"] = ((2, batch, num_entries, width), jnp.bfloat16)
    if fp8:
        for name in {"ring", "entries"} & shapes.keys():
            (*rows, _), _ = shapes.pop(name)
            shapes |= {f"{name}.{part}": ((*rows, c), d) for part, (c, d) in FP8_PARTS.items()}
    if in_rows:
        for part in Fp8Entries._fields:
            del shapes[f"entries.{part}"]
        for part, rows in (("words", num_entries), ("rest", LAYOUT.rest_rows(num_entries))):
            shapes[f"entries.{part}"] = ((2, batch, rows, LAYOUT.row), jnp.uint32)
    if path == "hca":
        shapes["hi"] = ((batch, length), jnp.int32)
    if path == "csa":
        shapes["index"] = ((batch, length, TOP_K[model]), jnp.int32)
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def step(names, blocks, *arrays):
    o = dict(zip(names, arrays, strict=True))
    if "entries.words" in o:
        o["entries"] = Fp8Rows(o.pop("entries.words"), o.pop("entries.rest"), LAYOUT.num_rotary)
    for name in ("ring", "entries"):
        if f"{name}.values" in o:
            o[name] = Fp8Entries(*(o.pop(f"{name}.{part}") for part in Fp8Entries._fields))
    return decode_attention(**o, window=128, blocks=blocks)


def compile_full_size(chip, shapes, blocks=None, fetched=0):
    """Compiles, and holds the program to its promise: temporaries are small, so no cache is copied.

    `fetched` are the bytes of the dense array that the SparseCore writes. A choice among fp8 entries becomes
    a mask of B T S bytes, from a float32 table of as many numbers that some compilers keep in HBM; one among
    rows takes two lists of rows, one of places, and a permutation of channels.
    """
    # A SparseCore kernel asks what chip it is for, which is otherwise the first device there is.
    mesh = jax.sharding.Mesh(np.array(devices(chip)[:1]), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = compile_for(chip, functools.partial(step, tuple(shapes), blocks), *shapes.values())
    cache = [shape for name, shape in shapes.items() if name.startswith(("ring", "entries"))]
    smallest = min(math.prod(shape.shape) * shape.dtype.itemsize for shape in cache)
    masked = "index" in shapes and "entries.values" in shapes
    table = 5 * math.prod(shapes["position"].shape) * shapes["entries.values"].shape[2] if masked else 0
    lists = 12 * math.prod(shapes["index"].shape) + 2 * 512**2 if "entries.words" in shapes else 0
    assert program.memory_analysis().temp_size_in_bytes < max(smallest, 2**20) + fetched + table + lists
    return program


@pytest.mark.parametrize("path", ENTRIES)
def test_lowers_to_mosaic(path):
    shapes = full_size(path)
    program = jax.jit(functools.partial(step, tuple(shapes), None))
    exported = export.export(program, platforms=["tpu"], disabled_checks=[MOSAIC_CALL])(*shapes.values())
    assert "@tpu_custom_call" in exported.mlir_module()


COMPILED = {
    "window": (full_size("window"), None),
    "hca": (full_size("hca"), None),
    "csa masked": (full_size("csa"), DecodeBlocks(sequences=4, entries=1024)),
    "csa gathered": (full_size("csa"), None),
    "window in fp8": (full_size("window", fp8=True), None),
    "hca in fp8": (full_size("hca", fp8=True), None),
    "csa in fp8 rows": (full_size("csa", fp8=True, in_rows=True), None),
}


BY_DEFAULT = ("csa gathered", "hca in fp8", "csa in fp8 rows")


@pytest.mark.parametrize(
    "name", [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in COMPILED]
)
def test_compiles_ahead_of_time(name):
    compile_full_size("v6e", *COMPILED[name])


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("path", ENTRIES)
@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_ahead_of_time_everywhere(chip, model, path, length, long):
    # Four sequences of a million tokens: 64 of them fill no chip's memory.
    compile_full_size(chip, full_size(path, model, length=length, batch=4 if long else 64, long=long))


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("path", ENTRIES)
@pytest.mark.parametrize("chip", CHIPS)
def test_fp8_compiles_ahead_of_time_everywhere(chip, path, long):
    compile_full_size(chip, full_size(path, batch=4 if long else 64, long=long, fp8=True))


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("chip", CHIPS)
def test_fp8_rows_compile_ahead_of_time_everywhere(chip, model, length, long):
    shapes = full_size(
        "csa", model, length=length, batch=4 if long else 64, long=long, fp8=True, in_rows=True
    )
    compile_full_size(chip, shapes)


def compile_for_sparse_core(chip, model="flash", **sizes):
    shapes = full_size("csa", model, **sizes)
    blocks = sparse_core.blocks(heads=HEADS[model], width=512, slots=136, num_chosen=TOP_K[model], itemsize=2)
    return compile_full_size(chip, shapes, blocks, fetched=math.prod(shapes["index"].shape) * 512 * 2)


def test_fetching_ahead_compiles_ahead_of_time():
    """The rows are fetched by a kernel of the SparseCore, which reads the cache where it lies."""
    program = compile_for_sparse_core("v6e").as_text()
    assert re.search("decode_attention_fetch.*sparsecore", program)
    with pytest.raises(RuntimeError, match="does not have SparseCores"):
        compile_for_sparse_core("v5e")


@pytest.mark.slow
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("chip", sorted(CHIPS.keys() - {"v5e"}))
def test_fetching_ahead_compiles_ahead_of_time_everywhere(chip, model, length, long):
    compile_for_sparse_core(chip, model, length=length, batch=4 if long else 64, long=long)
