"""What the engine's status becomes in Prometheus' format."""

import jax
import numpy as np

from dsv4_jax.serving.compiles import compiles
from dsv4_jax.serving.engine import EngineStatus
from dsv4_jax.serving.http.metrics import Metrics
from dsv4_jax.serving.settings import EngineSettings
from dsv4_jax.serving.step_tokens import StepTokens


def read(metrics):
    lines = metrics.text().decode().splitlines()
    return {name: float(value) for name, value in (e.rsplit(" ", 1) for e in lines if not e.startswith("#"))}


SIZES = EngineSettings(max_length=100, num_slots=4, num_pages=10)


def test_guesses_by_place_and_shares_of_memory():
    status = EngineStatus(2, 0, 0, 0, 0, 64, 32, 0, 9, ((5, 8), (2, 5)), 16, tokens_held=60, prefix_pages=3)
    text = Metrics("m", lambda: status, lambda: SIZES).text().decode()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name, value in (
        ("spec_decode_num_drafts_total", 8),
        ("spec_decode_num_draft_tokens_total", 16),
        ("spec_decode_num_accepted_tokens_total", 7),
        ("prefix_cache_hits_total", 32),
    ):
        assert float(lines[f'dsv4:{name}{{model="m"}}']) == value
    by_place = "dsv4:spec_decode_num_accepted_tokens_per_pos_total"
    assert [float(lines[f'{by_place}{{model="m",position="{place}"}}']) for place in (0, 1)] == [5, 2]
    shares = {"swa": 0.5, "state": 0.5, "csa": 0.15, "hca": 0.15, "indexer": 0.15, "prefix": 0.3}
    for pool, share in shares.items():
        assert float(lines[f'dsv4:kv_cache_usage_perc{{model="m",pool="{pool}"}}']) == share


def test_without_an_engine_there_are_no_shares():
    text = Metrics("m", lambda: None, lambda: None).text().decode()
    assert "kv_cache_usage_perc" not in text and "time_to_first_token_seconds" in text


def test_compilations_are_counted_and_told():
    metrics, told = Metrics("m", lambda: None, lambda: None), []
    before = read(metrics)
    with compiles().watched(lambda name, seconds: told.append((name, seconds is None))):
        jax.jit(lambda x: x * 3 + 1)(np.arange(7))
    after = read(metrics)
    name = 'dsv4:compile_events_total{model="m"}'
    assert after[name] >= before[name] + 1
    seconds = 'dsv4:compile_seconds_total{model="m"}'
    assert after[seconds] > before[seconds]
    assert len(told) == 2 * sum(begins for _, begins in told) and told[0] == (told[1][0], True)
    told.clear()
    jax.jit(lambda x: x * 5 + 1)(np.arange(7))
    assert not told


def test_steps_by_their_tokens():
    steps = StepTokens()
    for tokens in (0, 1, 2, 3, 130, 10**6):
        steps.add(tokens)
    status = EngineStatus(
        0, 0, 0, 0, 0, 0, 0, 0, 5, steps_by_tokens=tuple(steps.counts), step_tokens=steps.total
    )
    found = read(Metrics("m", lambda: status, lambda: SIZES))
    name = "dsv4:iteration_tokens_total"
    for bound, count in (("1.0", 1), ("2.0", 2), ("4.0", 3), ("128.0", 3), ("256.0", 4), ("+Inf", 5)):
        assert found[f'{name}_bucket{{le="{bound}",model="m"}}'] == count
    assert found[f'{name}_count{{model="m"}}'] == 5
    assert found[f'{name}_sum{{model="m"}}'] == steps.total == 1 + 2 + 3 + 130 + 10**6
