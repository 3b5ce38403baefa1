"""The table of parameters: reviewed as golden files, equal to what the modules declare, asked by everybody.

After a change on purpose, `python -m tests.test_parameters` writes the golden files again.
"""

import ast
import json
import math
import pathlib

import jax
import pytest

from dsv4_jax.checkpoint import names
from dsv4_jax.config import DSpark, tiny, v4_flash, v4_pro
from dsv4_jax.model.initial import Network
from dsv4_jax.numerics.policy import Policy
from dsv4_jax.parameters import (
    INITIAL_VALUE,
    LAYER_ROWS,
    MODEL_ROWS,
    MTP_ROWS,
    WIDE_ROLES,
    WITHOUT_GRADIENT,
    layers_of,
    parameters,
    row_at,
)
from tests.checkpoint.synthetic import repeated_config

GOLDEN = pathlib.Path(__file__).parent / "golden"
PRESETS = {"flash": v4_flash, "pro": v4_pro}
ROOT = pathlib.Path(__file__).parents[1]
WITH_DSPARK = tiny(4, num_nextn_predict_layers=0, dspark=DSpark(5, 0, (1, 2, 3), 6))


def as_text(config) -> str:
    """One JSON object a line: path, dims, shape, role, and how the dims fold into [O, I]."""
    lines = [
        json.dumps(
            {
                "path": "/".join(map(str, parameter.path)),
                "dims": " ".join(parameter.dims),
                "shape": parameter.shape,
                "role": parameter.role,
                "matrix": parameter.matrix,
            }
        )
        for parameter in parameters(config).values()
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", PRESETS)
def test_the_table_is_the_reviewed_one(name):
    assert as_text(PRESETS[name]()) == (GOLDEN / f"parameters_{name}.jsonl").read_text()


@pytest.mark.parametrize(
    "config",
    [tiny(), repeated_config(num_nextn_predict_layers=0), tiny(4, like="pro"), WITH_DSPARK],
    ids=["tiny", "repeated", "pro", "dspark"],
)
def test_modules_declare_what_the_table_says(config):
    shapes = Network(config, Policy.of("bfloat16")).shapes()
    declared = {
        tuple(key.key for key in path): (leaf.shape, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert declared == {
        path: (parameter.shape, parameter.dtype("bfloat16")) for path, parameter in parameters(config).items()
    }


def test_a_row_is_found_by_the_path_alone():
    for path, parameter in (parameters(repeated_config()) | parameters(WITH_DSPARK)).items():
        assert row_at(path) is parameter.row
    for path in [("embed", "x"), ("stacks", 0, "blocks", 0, "embed"), ("mtp", 0, "attn_norm"), ()]:
        with pytest.raises(KeyError, match="no parameter"):
            row_at(path)


def test_every_role_starts_somewhere_and_is_either_wide_or_float32():
    roles = {row.role for row in (*MODEL_ROWS, *LAYER_ROWS, *MTP_ROWS)}
    assert roles == WIDE_ROLES | INITIAL_VALUE.keys() | {"mixing", "table"}
    assert WITHOUT_GRADIENT < roles


def test_layers_of_a_stack_cover_the_model():
    config = repeated_config()
    found = [
        layer
        for path in parameters(config)
        if path[0] == "stacks" and path[-1] == "attn_norm"
        for layer in layers_of(config, path)
    ]
    assert sorted(found) == list(range(config.num_hidden_layers))


def test_stored_shapes_fold_every_axis_once():
    for parameter in parameters(v4_flash()).values():
        assert sum(parameter.folds) == len(parameter.own)
        assert math.prod(parameter.stored) * math.prod(parameter.leading) == parameter.size
        if parameter.matrix is not None:
            out, contracted = parameter.matrix
            assert len(parameter.stored) == 2 and out + contracted == len(parameter.own)
    wo_a = parameters(v4_flash())["stacks", 0, "blocks", 0, "attn", "wo_a"]
    assert (wo_a.dims, wo_a.matrix, wo_a.stored) == (("R", "G", "O", "J", "Dh"), (2, 2), (8192, 4096))


def test_every_parameter_has_an_official_name_and_nothing_else_has():
    for config in (v4_flash(), WITH_DSPARK):
        named = {spec.path for spec in names.official_tensors(config)}
        assert named == set(parameters(config))


# Words of paths that say what a parameter is. Code that compares or searches them asks the table instead.
TELLING = {"experts", "bias", "tid2eid", "attn_sink", "ape", "wq_b", "gate_up"}
SPELLED_IN = {"dsv4_jax/parameters.py", "dsv4_jax/checkpoint/names.py", "dsv4_jax/checkpoint/expected.py"}


def test_no_code_guesses_what_a_parameter_is_from_its_name():
    found = []
    for path in sorted((ROOT / "dsv4_jax").rglob("*.py")):
        where = path.relative_to(ROOT).as_posix()
        if where in SPELLED_IN:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare):
                continue
            words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            found += [f"{where}:{node.lineno}: {word}" for word in words & TELLING]
    assert not found


if __name__ == "__main__":
    for preset, make in PRESETS.items():
        (GOLDEN / f"parameters_{preset}.jsonl").write_text(as_text(make()))
