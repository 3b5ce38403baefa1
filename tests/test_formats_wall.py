"""One owner of number formats: nobody else decodes E4M3, E2M1 or E8M0 or says how many numbers share a scale.

And modules of the model name no format, and ask nobody what is rounded.
"""

import ast

import pytest

from tests.test_architecture import RUNTIME_SOURCES, Source, within

OWNER = "pallas_kernels.formats"
GROUP_SIZES = {32, 64, 128}
OTHER_GROUPS = {("pallas_kernels.indexer.chosen_list", "GROUP")}  # entries counted together
SCALE_TYPES = {"float8_e8m0fnu", "float8_e5m2", "float4_e2m1fn"}
MANTISSA_BITS = 23  # of a float32: who shifts by it builds powers of two
LARGEST = {448, 6.0 * 2.0**-126, 2.0**-127}
CONTAINERS = ("Fp8", "Mxfp4")


def knowledge(source: Source) -> list[str]:
    """What a source says about the meaning of quantised bytes."""
    found = []

    def note(node: ast.AST, what: str) -> None:
        found.append(f"{source.module}:{node.lineno} {what}")

    for node in ast.walk(source.tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift | ast.RShift):
            if isinstance(node.right, ast.Constant) and node.right.value == MANTISSA_BITS:
                note(node, "shifts the exponent of a float32")
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and node.value in LARGEST:
            note(node, f"has the number {node.value}")
        if isinstance(node, ast.Attribute) and node.attr in SCALE_TYPES:
            if not within(source.module, "dsv4_jax.checkpoint"):  # dtypes of tensors in files
                note(node, f"uses {node.attr}")
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            for name in names:
                sized = {"GROUP", "BLOCK"} & set(name.split("_")) and node.value.value in GROUP_SIZES
                if sized and (source.module, name) not in OTHER_GROUPS:
                    note(node, f"defines {name}, a size of groups")
        if isinstance(node, ast.FunctionDef) and any(
            part in node.name.split("_") for part in ("e4m3", "e2m1", "e8m0", "nibbles")
        ):
            note(node, f"defines {node.name}")
        if isinstance(node, ast.ClassDef) and node.name.startswith(CONTAINERS):
            note(node, f"defines {node.name}")
    return found


def test_only_the_owner_knows_formats():
    others = [source for source in RUNTIME_SOURCES if not within(source.module, OWNER)]
    assert [found for source in others for found in knowledge(source)] == []


def test_the_owner_is_seen_to_know_them():
    """The search above finds what it looks for, where that is allowed."""
    owner = [source for source in RUNTIME_SOURCES if within(source.module, OWNER)]
    text = "\n".join(found for source in owner for found in knowledge(source))
    for part in (
        "shifts",
        "has the number 448",
        "defines FP8_BLOCK",
        "defines Fp8Entries",
        "uses float8_e5m2",
    ):
        assert part in text


@pytest.mark.parametrize(
    "text",
    [
        "x = code << 23",
        "MAX = 448.0",
        "scale = codes.view(jnp.float8_e8m0fnu)",
        "INDEX_FP8_GROUP = 128",
        "def e2m1_value(code): ...",
        "class Fp8Things: ...",
    ],
)
def test_knowledge_is_found(text):
    assert knowledge(Source("dsv4_jax.model.other", text))


# ---- the model ---------------------------------------------------------------------------------------------

WEIGHTS = f"{OWNER}.weights"
"""A parameter in any format: modules hand it on."""
STORED = {"as_stored", "bits", "entry_rows", "rows_pay"}
SWITCHES = {"simulates", "switches", "numerics"}


def questions(source: Source) -> list[str]:
    """Formats that a module of the model names, and roundings that it asks the policy about."""
    found = []
    for name in source.imports():
        part = name.rpartition(".")[2]
        if (
            (within(name, OWNER) and not within(name, WEIGHTS))
            or part.startswith(CONTAINERS)
            or part in STORED
        ):
            found.append(f"{source.module} imports {name}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in SWITCHES and not is_module(node):
            found.append(f"{source.module}:{node.lineno} asks for {node.attr}")
        if isinstance(node, ast.Compare) and any(
            isinstance(x, ast.Attribute) and x.attr == "cache_format" for x in ast.walk(node)
        ):
            found.append(f"{source.module}:{node.lineno} compares the format of a cache")
    return found


def is_module(node: ast.Attribute) -> bool:
    """dsv4_jax.numerics is no attribute of a policy."""
    return isinstance(node.value, ast.Name) and node.value.id == "dsv4_jax"


def test_the_model_names_no_format():
    model = [source for source in RUNTIME_SOURCES if within(source.module, "dsv4_jax.model")]
    assert model and [found for source in model for found in questions(source)] == []


@pytest.mark.parametrize(
    "text",
    [
        "from pallas_kernels.formats import e4m3",
        "from pallas_kernels.formats.entry_rows import Fp8Rows",
        "from pallas_kernels.decode_attention.tuning import rows_pay",
        "if policy.simulates('kv_fp8'): ...",
        "if self.policy.cache_format == 'plain': ...",
    ],
)
def test_questions_are_found(text):
    assert questions(Source("dsv4_jax.model.other", text))
