"""One choice of implementation: what the record says is what runs, and nobody else chooses."""

import ast

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.inspection.native_shapes import native_shapes
from dsv4_jax.model import span as spans
from dsv4_jax.model.cache import new_cache
from dsv4_jax.model.initial import Network
from dsv4_jax.model.operations import operations
from dsv4_jax.model.training_mode import TrainingMode
from dsv4_jax.numerics.cache_formats import CACHE_FORMATS
from dsv4_jax.numerics.policy import Policy
from tests.model.test_kernels import CONFIG
from tests.model.test_x64 import inner_programs
from tests.test_architecture import RUNTIME_SOURCES, Source, within

CHOOSE = ("dsv4_jax.model.operations", "dsv4_jax.numerics.policy")
NAMES = {"xla", "pallas", "pallas-interpret"}
FAMILIES = (
    "block_matmul",
    "compressor",
    "core_attention",
    "entry_write",
    "grouped_matmul",
    "hybrid_attention",
    "hyper_connection",
    "linear_cross_entropy",
)


def choices(source: Source) -> list[str]:
    """Comparisons with an implementation's name, and the attribute that says which one was chosen."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(
                isinstance(part, ast.Constant) and part.value in NAMES for x in sides for part in ast.walk(x)
            ):
                found.append(f"{source.module}:{node.lineno} compares with the name of an implementation")
        if isinstance(node, ast.Attribute) and node.attr == "interpret":
            found.append(f"{source.module}:{node.lineno} reads {node.attr}")
        if isinstance(node, ast.keyword) and node.arg == "interpret":
            found.append(f"{source.module}:{node.value.lineno} passes interpret")
    return found


def test_nobody_else_chooses():
    below = [s for s in RUNTIME_SOURCES if within(s.module, "dsv4_jax") and s.module not in CHOOSE]
    assert [found for source in below for found in choices(source)] == []


def test_the_model_reaches_kernels_through_its_operations():
    # `linear` has the float32 products, of which there is one implementation, in plain XLA.
    allowed = {f"dsv4_jax.model.{name}" for name in ("operations", "operations_on_mesh", "linear")}
    wrong = [
        f"{source.module} imports {name}"
        for source in RUNTIME_SOURCES
        if within(source.module, "dsv4_jax") and source.module not in allowed
        for name in source.imports()
        if any(within(name, f"pallas_kernels.{family}") for family in FAMILIES)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "text", ["p.kernels == 'xla'", "x in ('pallas', 1)", "policy.interpret", "f(interpret=True)"]
)
def test_a_choice_is_found(text):
    assert choices(Source("dsv4_jax.model.moe", text))


def calls(program, scope=""):
    """(operation, family) of every kernel call of a program, from its scopes and the kernel's source file."""
    for equation in program.eqns:
        inside = f"{scope}/{equation.source_info.name_stack}"
        if equation.primitive.name == "pallas_call":
            info = equation.params["jaxpr"].debug_info.func_src_info
            operation = next(
                part for part in inside.replace("(", "/").replace(")", "/").split("/") if part in NAMED
            )
            yield operation, info.split("pallas_kernels/")[1].split("/")[0]
            continue
        for inner in inner_programs(tuple(equation.params.values())):
            yield from calls(inner, inside)


CACHES = {form: Policy.of("bfloat16", kernels="pallas-interpret", cache=form) for form in CACHE_FORMATS}
NAMED = {each.name for each in operations(CACHES["plain"]).each()}


def test_what_the_record_says_is_what_runs():
    """A chunk longer than the rings and a decode step, on weights as official checkpoints keep them; and the
    indexers' loss, which only training has."""

    def step(policy, length):
        network = Network(CONFIG, policy)

        def run(weights, tokens):
            cache = new_cache(CONFIG, 1, 64, policy.cache_dtype, 8, None, policy.cache_format, False)
            span = spans.appended(tokens, cache.length, jnp.full(1, length, jnp.int32))
            model = network.holding(weights)
            hidden = model.hidden(model(span, cache).streams)[0]
            ids = jnp.zeros(length, jnp.int32)
            return model.operations.cross_entropy(hidden, model.head[...], ids, jnp.ones(length))

        return jax.make_jaxpr(run)(native_shapes(CONFIG), jax.ShapeDtypeStruct((1, length), jnp.int32))

    def index_losses(parameters, tokens):
        model = Network(CONFIG, CACHES["plain"]).holding(parameters)
        span = spans.packed(tokens, jnp.ones_like(tokens))
        return model(span, mode=TrainingMode(index_loss=True)).report.by_layer().index_loss

    shapes = Network(CONFIG, CACHES["plain"]).shapes(), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    programs = [step(CACHES["plain"], 1), step(CACHES["plain"], 40), step(CACHES["fp8+mxfp4"], 1)]
    programs.append(jax.make_jaxpr(index_losses)(*shapes))
    ran = {call for program in programs for call in calls(program.jaxpr)}
    assert ran == {
        (each.name, family) for each in operations(CACHES["plain"]).each() for family in each.kernels
    }
