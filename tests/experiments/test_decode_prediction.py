"""The parts of a predicted decode step: floors below what is expected, and shares of one device's cases."""

import json

import pytest

from experiments.decode_prediction import ATTENTION, RESULTS, STREAMS_OF_A_LAYER, job_on, parts

CASES = (*ATTENTION.values(), *STREAMS_OF_A_LAYER, "experts whole mxfp4 64", "compressor CSA 64")
CYCLES = {case: {"bound_us": 1600.0, "hbm_us": 800.0} for case in (*CASES, "indexer select decode 64 at 64K")}
STEP = {
    "topology": "v6e:4x4",
    "xla_ms": 13.0,
    "collectives": [
        {"opcode": "all-reduce", "bytes": 36_000_000, "runs": 5},
        {"opcode": "all-to-all-start", "bytes": 1000, "runs": 10},
    ],
}


def test_parts_by_hand():
    found = {part.name: part for part in parts(job_on("v6e:4x4", "expert=8,tensor=2"), CYCLES, STEP)}
    assert found["experts"].expected == pytest.approx(1.6 * 43 / 16)
    assert found["attention, csa"].expected == pytest.approx(1.6 * 21 / 16)  # 4 of 64 rows, 21 layers
    assert found["attention, csa"].floor == found["attention, csa"].expected / 2
    assert found["XLA's own operations"].expected == 13.0
    # 180 MB there and back again at 360 GB/s, and 5 us.
    assert found["all-reduce"].floor == pytest.approx(1.0)
    assert found["all-reduce"].expected == pytest.approx(1.005)
    assert found["all-to-all"].expected == pytest.approx(0.010, rel=0.01)
    assert all(part.floor <= part.expected for part in found.values())


def test_what_is_taken_over_from_another_slice_is_said():
    found = parts(job_on("v6e:4x8", "expert=8,tensor=4"), CYCLES, STEP)
    (xla,) = [part for part in found if part.name.startswith("XLA")]
    assert "for v6e:4x4, taken over: an assumption" in xla.how


def test_the_record_is_of_these_slices():
    record = json.loads((RESULTS / "decode_prediction.json").read_text())
    for each in record["slices"]:
        assert each["expected_ms"] == pytest.approx(sum(part["expected"] for part in each["parts"]))
        assert each["floor_ms"] < record["target_ms"] < each["expected_ms"]
