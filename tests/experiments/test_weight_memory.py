"""The memory study, at the size of a test: the arrays are the file, and its numbers come from a process."""

from dsv4_jax.config import tiny
from experiments import weight_memory


def test_study_of_a_small_checkpoint(tmp_path):
    weight_memory.write_random(tmp_path, tiny(4))
    found = weight_memory.study(tmp_path)
    native, full = found["ways"]["native"], found["ways"]["dequantized"]
    assert native["arrays"] < 1.01 * found["disk"] < full["arrays"]
    for way in (native, full):
        assert 0 < way["before"] <= way["peak"] and way["after"] <= way["peak"]
