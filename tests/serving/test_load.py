"""A load: what is sent, what is seen, and what is refused."""

import pytest

from dsv4_jax.errors import ProblemsError
from dsv4_jax.serving.load import Load, Seen, run, summary
from tests.serving.test_engine import engine, lm  # noqa: F401 - the fixtures

SMALL = Load(num_requests=6, prompt_tokens=8, answer_tokens=5, at_once=3)


def test_every_client_gets_its_whole_answer(engine):  # noqa: F811
    seen, seconds = run(engine, SMALL)
    assert [len(one.arrived) for one in seen] == [5] * 6
    assert all(one.sent <= one.arrived[0] <= one.arrived[-1] <= seconds for one in seen)
    assert all(4 <= one.prompt_tokens <= 12 for one in seen)
    found = summary(seen, seconds)
    assert found["requests"] == 6 and found["left_early"] == 0
    assert found["output_tokens_per_second"] == pytest.approx(30 / seconds)


def test_arrivals_by_chance_and_clients_who_leave(engine):  # noqa: F811
    seen, seconds = run(
        engine, Load(8, 8, 5, at_once=None, per_second=200.0, cancelled=0.5, shared_tokens=16)
    )
    left = [one for one in seen if one.finish_reason is None]
    assert 0 < len(left) < 8 and summary(seen, seconds)["left_early"] == len(left)
    assert len({one.sent for one in seen}) == 8


def test_numbers_of_a_summary():
    seen = [
        Seen(1.0, (1.5, 1.7), 10, 4, "length"),
        Seen(2.0, (2.1,), 6, 0, None),
        Seen(0.0, (), 4, 0, "error"),
    ]
    found = summary(seen, 3.0)
    assert found["output_tokens_per_second"] == 1.0 and found["prefix_hit_share"] == 0.2
    assert found["first_token_ms_p50"] == pytest.approx(300) and found["token_gap_ms_p99"] == pytest.approx(
        200
    )
    assert found["whole_answer_ms_p50"] == pytest.approx(700)


@pytest.mark.parametrize(
    "load, words",
    [
        (Load(num_requests=0, cancelled=2.0), ["num_requests=0", "cancelled=2.0"]),
        (Load(per_second=1.0), ["at_once=8 and per_second=1.0"]),
        (Load(at_once=None), ["at_once=None"]),
        (Load(at_once=-1), ["above 0"]),
        (Load(prompt_tokens=60), ["123 tokens", "64"]),
    ],
)
def test_refusals_name_every_problem(engine, load, words):  # noqa: F811
    with pytest.raises(ProblemsError) as refused:
        run(engine, load)
    assert all(word in str(refused.value) for word in words)
