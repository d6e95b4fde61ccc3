"""Within which limits an endpoint is asked: budgets, and how many requests at once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_server import (
    GREEDY,
    Server,
    asked,
    completion,
    draws,
    error,
    generator,
    texts,
)
from selfmoa.generators.endpoint.failures import (
    BudgetSpent,
)
from selfmoa.generators.endpoint.schedule import Pace


@pytest.mark.parametrize(
    ("limit", "most"),
    [
        ({"max_requests": 10}, 10),
        ({"max_tokens": 100}, 10 + 3),  # ten tokens a request, and those under way
        ({"max_cost": 0.001, "price_in": 10.0, "price_out": 10.0}, 10 + 3),
    ],
)
def test_a_budget_stops_within_what_is_under_way_and_keeps_answers(limit, most):
    with Server(delay=0.002) as server:
        model = generator(server, max_concurrency=4, **limit)
        with pytest.raises(BudgetSpent, match=next(iter(limit))):
            model.generate(draws(50), GREEDY)
        n = len(server.bodies)
        assert 10 <= n <= most
        answered = [int(asked(body).removeprefix("tea ")) for body in server.bodies]
        again = [draws(50)[i] for i in answered]
        assert texts(model.generate(again, GREEDY)) == [f"answer to tea {i}" for i in answered]
        with pytest.raises(BudgetSpent):
            model.generate(draws(1, seed=9), GREEDY)
        assert len(server.bodies) == n


def test_tries_count_as_requests():
    with Server(script=lambda body: ["500"] * 99) as server, pytest.raises(BudgetSpent):
        generator(server, max_requests=3, retries=9).generate(draws(1), GREEDY)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("usage", [None, (-5, 3), ("7", 3), (7.5, 3), (True, 3), (10**400, 3)])
def test_a_server_that_does_not_count_is_counted_in_bytes(usage):
    with Server(lambda body: completion(usage=usage)) as server:
        model = generator(server)
        model.generate(draws(1), GREEDY)
    assert model.budget.tokens_in >= len(json.dumps(server.bodies[0], separators=(",", ":")))
    assert model.budget.cost == 0


def test_cost_is_that_of_the_tokens_told():
    with Server(lambda body: completion(usage=(1000, 200))) as server:
        model = generator(server, price_in=0.5, price_out=2.0)
        model.generate(draws(5), GREEDY)
    assert (model.budget.tokens_in, model.budget.tokens_out) == (5000, 1000)
    assert model.budget.cost == pytest.approx(5000 * 0.5e-6 + 1000 * 2e-6)


def test_the_number_at_once_grows_with_success_and_never_beyond_its_limit():
    with Server(delay=0.005) as server:
        model = generator(server, max_concurrency=6)
        model.generate(draws(6), GREEDY)
        first = server.most
        model.generate(draws(80, seed=1), GREEDY)
    assert first <= 4
    assert server.most == 6
    assert model.pace.limit == 6


def test_a_busy_server_is_asked_less_at_once():
    class Busy(Server):
        """Takes three requests at once."""

        def act(self, *_):
            return "429" if self.now >= 3 else "good"

    with Busy(delay=0.01) as server:
        model = generator(server, max_concurrency=64, retries=30)
        found = model.generate(draws(150), GREEDY)
    assert texts(found) == [f"answer to tea {i}" for i in range(150)]
    assert server.acts["429"] < 100
    assert 3 < server.most <= 10
    assert model.pace.limit < 8


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 40))
def test_the_limit_stays_between_one_and_the_most(outcomes, most):
    pace = Pace(most)
    for now, is_good in enumerate(outcomes):
        before = pace.limit
        if is_good:
            pace.succeeded()
            assert before <= pace.limit <= before + 1
        else:
            pace.overloaded(started=now, now=now + 0.5)
            assert pace.limit == max(before / 2, 1)
        assert 1 <= pace.limit <= most


def test_a_burst_of_late_requests_halves_the_limit_once():
    pace = Pace(64)
    for _ in range(200):
        pace.succeeded()
    before = pace.limit
    for _ in range(20):
        pace.overloaded(started=1.0, now=2.0)
    assert pace.limit == before / 2


def test_retry_after_holds_back_every_request():
    def script(body):
        return ["wait"] if asked(body) == "tea 0" else []

    with Server(script=script, wait=error(429, "wait", "Retry-After: 0.5")) as server:
        generator(server, max_concurrency=1).generate(draws(3), GREEDY)
    moments = server.moments
    assert moments[1] - moments[0] >= 0.5
