"""Any box of a parameter is that slice of the whole; a model read or saved on a mesh is as on one device."""

import contextlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.boxes import whole
from dsv4_jax.checkpoint import storage
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.manifest import Options, open_manifest
from dsv4_jax.checkpoint.read import Findings, stored_parameters
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.errors import ProblemsError
from dsv4_jax.numerics.policy import Policy
from tests.checkpoint import synthetic

CONFIG = synthetic.smallest_config(hidden_size=160, moe_intermediate_size=160, num_nextn_predict_layers=0)
STORED = {
    "plain": (storage.PLAIN, "official"),
    "transformers": (storage.PLAIN, "transformers"),
    "fp8": (storage.BASE, "official"),
    "fp8+fp4": (storage.PREVIEW, "official"),
}


@contextlib.contextmanager
def opened(folder, keep_quantized):
    with open_manifest(folder, Options()) as (files, manifest):
        findings = Findings()
        how = {"keep_quantized": keep_quantized, "scan_weights": True}
        yield stored_parameters(files, manifest, np.dtype(np.float32), findings, **how)
        assert findings.problems == []


@pytest.fixture(scope="module", params=STORED)
def folder(request, tmp_path_factory):
    release, layout = STORED[request.param]
    made = tmp_path_factory.mktemp("boxes")
    synthetic.write_checkpoint(made / "official", CONFIG, release)
    if layout == "official":
        return made / "official"
    loaded = load_checkpoint(made / "official", Policy.of("bfloat16"))
    save_checkpoint(made / layout, CONFIG, loaded.parameters, layout=layout)
    return made / layout


@pytest.mark.parametrize("keep_quantized", [False, True])
def test_any_box_is_the_slice_of_the_whole(folder, keep_quantized):
    with opened(folder, keep_quantized) as held:
        wholes = {path: parameter.read_box(whole(parameter.shape)) for path, parameter in held.items()}

        @settings(max_examples=150, deadline=None, database=None, derandomize=True)
        @given(st.data())
        def check(data):
            path = data.draw(st.sampled_from(sorted(held, key=str)))
            parameter, box = held[path], []
            blocks = {"plain": (1, 1), "fp8": (128, 128), "fp4": (1, 32)}[parameter.format]
            units = [1] * len(parameter.shape)
            units[-2:] = blocks[-len(units) :]
            for size, unit in zip(parameter.shape, units, strict=True):
                start = data.draw(st.integers(0, -(-size // unit) - 1)) * unit
                stop = data.draw(st.integers(start // unit + 1, -(-size // unit))) * unit
                box.append(slice(start, min(stop, size)))
            found = jax.tree.leaves(parameter.read_box(tuple(box)))
            for number, (part, array) in enumerate(zip(found, jax.tree.leaves(wholes[path]), strict=True)):
                own = list(box)
                if number:  # scales
                    own = [slice(b.start // u, -(-b.stop // u)) for b, u in zip(box, units, strict=True)]
                elif parameter.format == "fp4":  # two numbers a byte
                    own[-1] = slice(box[-1].start // 2, box[-1].stop // 2)
                assert part.tobytes() == array[tuple(own)].tobytes(), (path, box)

        check()


def test_a_cut_through_a_block_is_refused(tmp_path):
    synthetic.write_checkpoint(tmp_path, CONFIG, storage.BASE)
    with opened(tmp_path, True) as held:
        parameter = held["stacks", 0, "blocks", 0, "attn", "wo_b"]
        box = (*whole(parameter.shape[:-2]), slice(64, 160), slice(0, 1))
        with pytest.raises(
            ProblemsError, match=r"2 problems(.|\n)*64 \.\. 160 cuts a quantisation block of 128"
        ):
            parameter.read_box(box)


def test_rules_that_do_not_fit_are_refused_together(tmp_path):
    synthetic.write_checkpoint(tmp_path, CONFIG, storage.BASE)
    mesh = jax.sharding.AbstractMesh((2,), ("expert",))
    with pytest.raises(ProblemsError) as refused:
        load_checkpoint(
            tmp_path, Policy.of(), weights="native", mesh=mesh, rules={"E": "expert", "V": "x", "@": "x"}
        )
    message = "\n".join(refused.value.problems)
    assert "no dim has this letter" in message and "no axis 'x'" in message
    assert "E = 3 cannot be split 2 ways" in message
    with pytest.raises(ProblemsError, match="would cut a quantisation block of 128"):
        load_checkpoint(tmp_path, Policy.of(), weights="native", mesh=mesh, rules={"F": "expert"})
    with pytest.raises(ProblemsError, match="only the first of them can be cut"):
        load_checkpoint(tmp_path, Policy.of(), weights="native", mesh=mesh, rules={"J": "expert"})


# A process of its own: the number of host devices is fixed when JAX starts.
ON_EIGHT_DEVICES = """
import pathlib, sys
import jax, numpy as np
from jax.sharding import AxisType
from dsv4_jax.checkpoint.load import load_checkpoint
from dsv4_jax.checkpoint.save import save_checkpoint
from dsv4_jax.numerics.policy import Policy

mesh = jax.make_mesh((2, 2, 2), ("expert", "tensor", "data"), axis_types=(AxisType.Auto,) * 3)
experts = {"E": "expert", "V": ("tensor", "data")}
for weights, rules in (("native", experts), ("dequantized", experts | {"G": "tensor", "D": "data"})):
    trees, saved = [], []
    for where in ({}, {"mesh": mesh, "rules": rules}):
        loaded = load_checkpoint(sys.argv[1], Policy.of("bfloat16"), weights=weights, **where)
        trees.append(loaded.parameters)
        for layout in ("official", "transformers"):
            folder = pathlib.Path(sys.argv[1]).parent / f"{weights} {len(saved)}"
            save_checkpoint(folder, loaded.config, loaded.parameters, layout=layout, stored=loaded.stored)
            saved.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert saved[:2] == saved[2:] and saved[0] != saved[1]
    one, many = map(jax.tree.leaves, trees)
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    for a, b in zip(one, many, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    print("compared", len(one), sum(not a.sharding.is_fully_replicated for a in many))
"""


def test_a_model_read_or_saved_on_a_mesh_is_as_on_one_device(tmp_path):
    folder = tmp_path / "source"
    synthetic.write_checkpoint(folder, synthetic.small_config(), storage.PREVIEW)
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    ran = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES, str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = ran.stdout.splitlines()
    assert len(lines) == 2 and all(int(line.split()[2]) > 10 for line in lines)
