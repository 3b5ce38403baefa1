"""The study of loading and saving, at the size of a test: numbers of processes, and a verdict."""

import json

from dsv4_jax.checkpoint import storage
from dsv4_jax.config import tiny
from dsv4_jax.parameters import parameters
from experiments import load_save_memory as study


def test_study_of_small_checkpoints(tmp_path, capsys):
    configs = {weights: tiny(4, num_nextn_predict_layers=0) for weights in study.RELEASES}
    ways = [study.Way("plain", "float32", 8), study.Way("native", "bfloat16", 1)]
    plain, native = rows = study.study(tmp_path, configs, ways)
    assert capsys.readouterr().out.count("\n") == 2
    config = configs["plain"]
    assert native["arrays"] == storage.resident_bytes(config, storage.PREVIEW)
    # 4 bytes a number; what is whole on all 8 devices is one buffer.
    assert plain["arrays"] == sum(4 * parameter.size for parameter in parameters(config).values())
    for row in rows:
        for step in ("load", "save"):
            assert 0 < row[step]["before"] <= row[step]["peak"]
    assert {path.name for path in tmp_path.rglob("*.safetensors")} == {"model.safetensors"}
    assert [row["largest"] for row in rows] == [2 * 512 * 64] * 2  # the embedding
    assert study.as_table(rows).count("\n") == 4
    json.dumps(rows)


def test_more_than_two_tensors_beside_the_model_break_the_rule():
    way = study.Way("plain", "float32", 1)
    found = {"arrays": 1000, "load": {"before": 50, "peak": 1070}, "save": {"before": 1050, "peak": 1060}}
    row = study.row_of(way, found, 900, 10)
    assert (row["load_tensors"], row["save_tensors"], row["kept"]) == (2.0, 1.0, True)
    assert not study.row_of(way, found, 900, 9)["kept"]
    worse = found | {"save": {"before": 1050, "peak": 1071}}
    assert not study.row_of(way, worse, 900, 10)["kept"]
