"""What an endpoint may do wrong: no hang, no crash, a typed failure, and nothing is paid twice."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from random import Random

import pytest

from endpoint_server import (
    BAD,
    FINAL,
    GREEDY,
    REFUSALS,
    STALLS,
    TRANSIENT,
    Server,
    generator,
    prompt,
)
from selfmoa.errors import EndpointError, SelfmoaError
from selfmoa.generators.endpoint.failures import (
    BadReply,
    RequestRefused,
    ServerFailed,
    TimedOut,
    Unanswered,
    Unreachable,
)
from selfmoa.protocols import Draw

TIMEOUT = 2.0
THREADS = 8
BATCH = 12


def draw(text):
    return Draw(prompt(text), 0)


def model_at(server, **limits):
    return generator(server, **{"timeout": TIMEOUT, "retries": 3} | limits)


def kind(error):
    return type(error.cause if isinstance(error, Unanswered) else error)


def expected(act):
    """Return the failure that an act is."""
    if act in STALLS:
        return TimedOut
    if act in REFUSALS:
        return RequestRefused
    if act in FINAL:
        return BadReply
    return ServerFailed if act[:3].isdigit() else Unreachable


@pytest.mark.parametrize("act", BAD)
def test_every_fault_has_its_type_and_only_some_are_tried_again(act):
    with Server() as server:
        model = model_at(server, timeout=0.2 if act in STALLS else 10.0, retries=1)
        with pytest.raises(SelfmoaError) as caught:
            model.generate([draw("moon tea fate: " + f"{act} " * 9)], GREEDY)
        assert issubclass(kind(caught.value), expected(act))
        assert server.acts == {act: 2 if act in TRANSIENT else 1}


@pytest.mark.parametrize("act", TRANSIENT)
def test_what_is_tried_again_is_answered_in_the_end(act):
    with Server() as server:
        (found,) = model_at(server, timeout=0.4).generate([draw(f"tea fate: {act}")], GREEDY)
    assert found.text == f"answer to tea fate: {act}"


def test_the_rest_of_a_miscounted_reply_answers_nobody_else():
    """The surplus of the first reply is a whole second reply, in the same connection."""
    with Server() as server:
        asked = [draw("tea fate: too-long-for-its-length")] + [draw(f"tea {i}") for i in range(30)]
        model = model_at(server, max_concurrency=1)
        with pytest.raises(Unanswered):
            model.generate(asked, GREEDY)
        found = model.generate(asked[1:], GREEDY)
    assert [r.text for r in found] == [f"answer to tea {i}" for i in range(30)]
    assert server.connections == 31, "a connection was used again"


def scripts(n, seed):
    """Return fates with `n` bad acts in all: some recover, some end in what cannot be mended."""
    random = Random(seed)
    quick = [act for act in TRANSIENT if act not in STALLS]
    found = []
    while n:
        acts = random.choices(quick, k=min(n, random.randint(1, 6)))
        if random.random() < 0.03:
            acts[0] = random.choice(STALLS)
        if random.random() < 0.5:
            acts[-1] = random.choice(FINAL)
        n -= len(acts)
        found.append(acts)
    return found


def ask_all(model, draws, failures):
    """Ask until each draw is answered, or has failed for good; return texts by draw."""
    left = list(draws)
    for _ in range(200):
        try:
            found = model.generate(left, GREEDY)
        except Unanswered as error:
            failures[kind(error).__name__] += 1
            if not error.cause.is_transient:
                left.pop(error.row - 1)
                if not left:
                    return {}
        except EndpointError as error:
            failures[kind(error).__name__] += 1
        else:
            return {d.prompt.goal: r.text for d, r in zip(left, found, strict=True)}
    raise AssertionError("it does not come to an end")


def storm(n):
    """Make `n` bad calls through several generators at once; return what became of them."""
    fates = scripts(n, seed=n)
    draws = [draw(f"tea {i} fate: {' '.join(acts)}") for i, acts in enumerate(fates)]
    answers, failures, crashes = {}, Counter(), []

    def work(some):
        try:
            model = model_at(server)
            for start in range(0, len(some), BATCH):
                answers.update(ask_all(model, some[start : start + BATCH], failures))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test must see it
            crashes.append(error)

    with Server() as server:
        threads = [threading.Thread(target=work, args=(draws[i::THREADS],)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        assert not any(thread.is_alive() for thread in threads)
    assert not crashes
    recover = {d.prompt.goal for d, acts in zip(draws, fates, strict=True) if acts[-1] not in FINAL}
    assert answers == {goal: f"answer to {goal}" for goal in recover}
    return server, failures


def check_storm(n):
    server, failures = storm(n)
    assert server.acts.total() - server.acts["good"] == n
    assert server.finished.total() == len(server.finished), "something finished was paid twice"
    for data, tries in server.tries.items():
        acts = json.loads(data)["messages"][-1]["content"].partition("fate: ")[2].split()
        assert tries == len(acts) + (acts[-1] not in FINAL)
    return server, failures


def test_hundreds_of_bad_calls():
    check_storm(600)


@pytest.mark.slow
def test_ten_thousand_bad_calls():
    server, failures = check_storm(10_000)
    assert set(server.acts) == {*BAD, "good"}
    print(dict(server.acts), dict(failures))  # noqa: T201 - figures of docs/endpoints.md


def test_a_server_that_is_gone_is_given_up_after_a_few_tries():
    with Server() as server:
        model = model_at(server, retries=2)
        model.generate([draw("tea")], GREEDY)
    with pytest.raises(Unreachable):
        model.generate([draw(f"tea {i}") for i in range(500)], GREEDY)
    assert model.budget.requests < 20


def test_a_server_that_only_stalls_is_given_up_after_a_few_tries():
    with Server(script=lambda body: ["stall"] * 99) as server:
        model = model_at(server, retries=1, timeout=0.1)
        with pytest.raises(TimedOut):
            model.generate([draw(f"tea {i}") for i in range(500)], GREEDY)
    assert len(server.bodies) < 10


def test_asking_leaves_no_loop_behind():
    with Server() as server:
        model = model_at(server)
        for i in range(3):
            model.generate([draw(f"tea {i}")], GREEDY)
    assert asyncio.run(asyncio.sleep(0, "fine")) == "fine"
