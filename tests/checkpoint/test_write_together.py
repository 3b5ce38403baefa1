"""FP8 and FP4 weights of which no process has all, saved by two; `test_several_processes.py` has the rest."""

import dsv4_jax
from dsv4_jax.checkpoint import storage
from dsv4_jax.checkpoint.files import open_checkpoint
from tests import processes
from tests.checkpoint import saving_process, synthetic

CONFIG = synthetic.smallest_config(n_routed_experts=4, moe_intermediate_size=256)
EXPERTS = ("experts.3", "shared_experts")


def test_torn_weights(tmp_path):
    synthetic.write_checkpoint(tmp_path / "given", CONFIG, storage.PREVIEW)
    for ended in processes.run(
        "tests.checkpoint.saving_process",
        str(tmp_path / "given"),
        str(tmp_path / "together"),
        timeout=200,
        folder=tmp_path,
    ):
        assert ended.returncode == 0, ended.err
    torn = [(tmp_path / "together" / f"torn{number}").read_text().splitlines() for number in range(2)]
    assert torn[0] == torn[1]
    of_experts = {f"layers.0.ffn.{expert}.w2.{part}" for expert in EXPERTS for part in ("weight", "scale")}
    assert of_experts <= set(torn[0])
    saving_process.saved(dsv4_jax.load(tmp_path / "given"), tmp_path / "alone")
    for layout in ("official", "transformers"):
        alone, together = tmp_path / "alone" / layout, tmp_path / "together" / layout
        with open_checkpoint(alone) as wanted, open_checkpoint(together) as got:
            assert set(got.tensors) == set(wanted.tensors) and got.warnings == []
            for name in wanted.tensors:
                assert got.read(name).dtype == wanted.read(name).dtype, name
                assert got.read(name).tobytes() == wanted.read(name).tobytes(), name
        assert (together / "config.json").read_bytes() == (alone / "config.json").read_bytes()
