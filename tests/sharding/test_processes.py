"""Joining processes: options that cannot be, and what is left when one of them is killed."""

import signal

import pytest

from sharding.processes import ALONE, JoinError, join, on_a_pod, option_problems
from tests import processes


def test_nothing_to_join():
    assert join() is ALONE and ALONE.is_first


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("10.0.0.1:80", None, None), ["coordinator without num_processes and process_id"]),
        ((None, 2, None), ["num_processes without coordinator and process_id"]),
        ((None, None, 0), ["process_id without coordinator and num_processes"]),
        (
            ("host", 0, -1),
            ["coordinator='host' is not host:port", "num_processes=0 must be", "process_id=-1 must be at"],
        ),
        (("host:0", 2, 2), ["is not host:port", "process_id=2 must be in 0..1"]),
        (("host:65536", 2, 1), ["is not host:port"]),
        (("a b:1", 2, 1), ["is not host:port"]),
        (
            ("auto", 2, 1),
            ["num_processes=2: coordinator='auto' asks", "process_id=1: coordinator='auto' asks"],
        ),
        (("host:1", 2, None), ["coordinator, num_processes without process_id: the three go together"]),
    ],
)
def test_options_that_cannot_be(given, said):
    with pytest.raises(JoinError) as refused:
        join(*given)
    assert len(refused.value.problems) == len(said)
    for problem, part in zip(refused.value.problems, said, strict=True):
        assert part in problem


@pytest.mark.parametrize("address", ["host:1", "10.0.0.1:65535", "[::1]:8476", "a-b.example.org:80", "auto"])
def test_addresses(address):
    rest = (None, None) if address == "auto" else (2, 1)
    assert option_problems(address, *rest) == []


def test_a_device_that_is_in_use():
    import jax

    jax.devices()
    with pytest.raises(JoinError, match="process 0 of 1, coordinator 127.0.0.1:1: .* must be called before"):
        join("127.0.0.1:1", 1, 0)


def test_a_coordinator_that_nobody_is_at():
    port = processes.free_port()
    with pytest.raises(JoinError, match=f"nobody has answered at 127.0.0.1:{port} for 1 seconds .*refused"):
        join(f"127.0.0.1:{port}", 2, 1, start_seconds=1)


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "JAX_PLATFORMS": "tpu,cpu"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, False),
    ],
)
def test_what_a_pod_is(environment, wanted):
    assert on_a_pod(environment) == wanted


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_process_ends_the_others(victim, tmp_path):
    """Process 0 coordinates: without it the others end too."""
    ended = processes.run("tests.sharding.dying_process", str(victim), timeout=75, folder=tmp_path)
    dead, other = ended[victim], ended[1 - victim]
    assert dead.returncode == -signal.SIGKILL
    assert other.returncode == -signal.SIGABRT
    assert other.seconds - dead.seconds < 60
    before, _, after = other.err.partition("\n")
    assert f"process {1 - victim} of 2 has joined; if another one dies, JAX aborts this one" in before
    assert "another task died" in after and "Traceback" not in other.err
