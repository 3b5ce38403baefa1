"""The comparison of servers: medians of ratios, and a server that ends is an error that shows its log."""

import sys

import pytest

from experiments import bench_against_serve


def row(rate, cpu, *texts):
    return {"tokens": 8, "tokens_per_second": rate, "cpu_ms_a_token": cpu, "texts": list(texts)}


def test_ratios_are_of_rounds():
    ours = [row(10.0, 1.0, "a", "b"), row(40.0, 2.0, "c", "d"), row(30.0, 1.0, "e", "f")]
    theirs = [row(5.0, 4.0, "a", "x"), row(10.0, 4.0, "c", "d"), row(10.0, 9.0, "e", "f")]
    found = bench_against_serve.summary(ours, theirs)
    assert found["times_tokens_per_second"] == 3.0 and found["times_tokens_per_second_range"] == [2.0, 4.0]
    assert found["times_cpu"] == 4.0 and found["equal_answers"] == "5 of 6"
    assert found["sides"]["dsv4 serve"]["tokens_per_second"] == 30.0


def test_a_server_that_ends_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    server = bench_against_serve.Server("ours", command, 1, "/ready", "model", tmp_path / "log")
    with pytest.raises(RuntimeError, match="ours did not start: no such model"):
        server.wait(60.0)


def test_cpu_seconds_are_of_the_process(tmp_path):
    spin = "import time\nwhile time.process_time() < 0.3: pass\ntime.sleep(60)"
    server = bench_against_serve.Server("x", [sys.executable, "-c", spin], 1, "/", "m", tmp_path / "log")
    try:
        deadline = bench_against_serve.time.monotonic() + 60
        while server.cpu_seconds() < 0.25 and bench_against_serve.time.monotonic() < deadline:
            bench_against_serve.time.sleep(0.05)
        assert 0.25 <= server.cpu_seconds() < 5
    finally:
        server.close()
    assert server.process.poll() is not None
