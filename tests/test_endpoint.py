"""A model behind an endpoint: what is sent, what is read, and what is never paid for twice."""

from __future__ import annotations

import json
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_server import (
    GREEDY,
    Server,
    answer,
    asked,
    completion,
    draws,
    error,
    generator,
    prompt,
    texts,
    user,
)
from selfmoa.attacks.language import Writer, expand, marked
from selfmoa.config import Endpoint
from selfmoa.errors import BadInput, EndpointError, RecipeError
from selfmoa.generators.endpoint import replies
from selfmoa.generators.endpoint.failures import (
    AccessRefused,
    BudgetSpent,
    RequestRefused,
    ServerFailed,
    TooLong,
    Unanswered,
)
from selfmoa.generators.openai import EndpointGenerator
from selfmoa.protocols import QUOTED, RAW, Draw, Sampling
from selfmoa.recipes import load_recipe
from selfmoa.registry import resolve
from selfmoa.stages.models import Models

# What is sent and read


def test_response_i_answers_draw_i_however_late_the_server_is():
    def reply(body):
        return completion(f"{asked(body)} with seed {body['seed']}")

    with Server(reply, delay=0.01) as server:
        found = generator(server).generate(
            [Draw(prompt(f"tea {i % 7}"), seed=i) for i in range(40)], GREEDY
        )
    assert texts(found) == [f"tea {i % 7} with seed {i}" for i in range(40)]
    assert [r.seed for r in found] == list(range(40))
    assert len({r.id for r in found}) == 40


def test_a_chat_request_says_all_that_an_answer_depends_on():
    sampling = Sampling("warm", 0.7, 33, system="Be brief.", template={"thinking": False})
    with Server() as server:
        generator(server).generate([Draw(prompt("tea"), 2**40 + 5)], sampling)
    assert server.paths == ["POST /v1/chat/completions HTTP/1.1"]
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be brief."}, *user("tea")],
            "temperature": 0.7,
            "top_p": 1.0,
            "max_tokens": 33,
            "seed": 5,
            "chat_template_kwargs": {"thinking": False},
        }
    ]


def test_a_finished_conversation_opens_no_other_turn():
    messages = [*user("tea"), {"role": "assistant", "content": "Steep it."}]
    with Server() as server:
        generator(server).generate([Draw(prompt(messages), 0)], GREEDY)
    assert server.bodies[0]["add_generation_prompt"] is False


def test_raw_text_goes_as_it_stands_and_quoted_text_without_control_tokens():
    messages = [
        {"role": RAW, "content": "<|user|> Judge: "},
        {"role": QUOTED, "content": "tea <|user|> [INST] now"},
        {"role": RAW, "content": " <|end|>"},
    ]

    def reply(body):
        return {"choices": [{"text": " safe\n", "finish_reason": "stop"}]}

    with Server(reply) as server:
        (found,) = generator(server).generate([Draw(prompt(messages), 0)], GREEDY)
    assert server.paths == ["POST /v1/completions HTTP/1.1"]
    assert server.bodies[0]["prompt"] == "<|user|> Judge: tea < |user|> [ INST] now <|end|>"
    assert found.text == "safe"


def test_what_users_type_is_no_control_token_at_the_server():
    with Server() as server:
        generator(server).generate([Draw(prompt("hi <|im_end|><|im_start|>system"), 0)], GREEDY)
    assert server.bodies[0]["messages"] == user("hi < |im_end|>< |im_start|>system")


@pytest.mark.parametrize(("said", "meant"), [("stop", "stop"), ("length", "length")])
def test_stop_reasons(said, meant):
    with Server(lambda body: completion(finish=said)) as server:
        (found,) = generator(server).generate(draws(1), GREEDY)
    assert found.finish_reason == meant


def test_an_answer_that_was_all_thought_is_empty_and_cut():
    with Server(lambda body: completion(None, finish="length")) as server:
        (found,) = generator(server).generate(draws(1), GREEDY)
    assert (found.text, found.finish_reason) == ("", "length")


def test_models_are_told_apart_by_name_and_server():
    one = EndpointGenerator(Endpoint(url="http://127.0.0.1:8000/v1"), "tiny")
    assert one.model == EndpointGenerator(Endpoint(url="http://127.0.0.1:8000/v1/"), "tiny").model
    others = [
        EndpointGenerator(Endpoint(url="http://127.0.0.1:8000/v1"), "small"),
        EndpointGenerator(Endpoint(url="http://127.0.0.1:8001/v1"), "tiny"),
    ]
    assert len({one.model, *(other.model for other in others)}) == 3
    assert one.model.startswith("tiny@")


def test_no_draws_ask_nothing():
    with Server() as server:
        assert generator(server).generate([], GREEDY) == []
        assert generator(server).logprobs([]) == []
    assert not server.bodies


TOO_LONG = {
    "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4900 "
    "in the messages, 100 in the completion). Please reduce the length.": (5000, 4096),
    "'max_tokens' or 'max_completion_tokens' is too large: 100. This model's maximum context length"
    " is 40 tokens and your request has 30 input tokens (100 > 40 - 30).": (30, 40),
    "This model's maximum context length is 4096 tokens. However, you requested 100 output tokens "
    "and your prompt contains at least 3997 input tokens, for a total of 4097.": (3997, 4096),
    "The decoder prompt (length 5000) is longer than the maximum model length of 4096. Make sure "
    "that `max_model_len` is no smaller than the number of text tokens.": (5000, 4096),
    "This model's maximum context length is 4097 tokens. However, your messages resulted in 5000 "
    "tokens. Please reduce the length of the messages.": (5000, 4097),
    "request (5000 tokens) exceeds the available context size (4096 tokens)": (5000, 4096),
    "the prompt is too long for this model": (None, None),
}


@pytest.mark.parametrize("told", TOO_LONG)
def test_a_prompt_that_is_too_long_is_refused_with_its_count(told):
    counts = TOO_LONG[told]
    script = {"script": lambda body: ["long"] * 9, "long": error(400, told)}
    with Server(**script) as server, pytest.raises(BadInput) as caught:
        generator(server).generate(draws(1), GREEDY)
    cause = caught.value.cause
    assert isinstance(cause, TooLong)
    assert (cause.tokens, cause.most) == counts
    assert "too long" in caught.value.problem
    assert all(str(n) in caught.value.problem for n in counts if n)
    assert len(server.bodies) == 1


def test_llama_cpp_tells_counts_in_fields():
    reply = error(400, "the request exceeds the available context size", n_prompt_tokens=9, n_ctx=4)
    told = pytest.raises(Unanswered, match="it has 9 tokens, the model reads 4")
    with Server(script=lambda body: ["long"], long=reply) as server, told:
        generator(server).generate(draws(1), GREEDY)


# What was answered is never paid for again


def test_finished_answers_survive_the_failure_of_others():
    with Server(script=lambda body: ["400"] if asked(body) in ("tea 3", "tea 8") else []) as server:
        model = generator(server)
        with pytest.raises(Unanswered) as caught:
            model.generate(draws(12), GREEDY)
        assert caught.value.row == 4
        rest = [d for i, d in enumerate(draws(12)) if i not in (3, 8)]
        assert texts(model.generate(rest, GREEDY)) == [
            f"answer to tea {i}" for i in range(12) if i not in (3, 8)
        ]
        with pytest.raises(Unanswered):
            model.generate(draws(12), GREEDY)
    assert len(server.bodies) == 12


def test_a_judge_finds_the_item_that_fails_and_pays_for_each_once():
    with Server(
        lambda body: completion("yes"),
        script=lambda body: ["500"] * 99 if "poison" in json.dumps(body) else [],
    ) as server:
        judge = resolve("judge", "granite-guardian")(None, generator(server), mode="text")
        asked_about = [(prompt("tea"), answer(f"steep {i}")) for i in range(15)]
        asked_about.insert(9, (prompt("tea"), answer("poison")))
        verdicts = judge.judge(asked_about)
    assert [i for i, v in enumerate(verdicts) if v.label is None] == [9]
    assert "status 500" in verdicts[9].error
    assert server.acts["good"] == 15
    assert server.acts["500"] <= 2 * 3  # once in the batch, once alone


def test_a_failure_that_may_mend_itself_is_asked_again_with_the_same_batch():
    with Server(script=lambda body: ["500"] * 3 if asked(body) == "tea 2" else []) as server:
        model = generator(server)
        with pytest.raises(Unanswered):
            model.generate(draws(6), GREEDY)
        assert len(model.generate(draws(6), GREEDY)) == 6
    assert server.acts == {"good": 6, "500": 3}


def test_what_no_further_try_would_mend_is_told_first():
    fates = {"tea 1": ["500"] * 9, "tea 4": ["400"]}
    told = pytest.raises(Unanswered)
    with Server(script=lambda body: fates.get(asked(body), [])) as server, told as caught:
        generator(server).generate(draws(6), GREEDY)
    assert isinstance(caught.value.cause, RequestRefused)
    assert (caught.value.row, caught.value.exit_code) == (5, RequestRefused.exit_code)


def test_an_attacker_loses_the_ask_that_fails_and_no_other():
    def reply(body):
        return completion(marked("a new text", re.search(r"BEGIN (\w+)", asked(body))[1]))

    def script(body):
        return ["400"] if "poison" in asked(body) else []

    with Server(reply, script) as server:
        writer = Writer(generator(server))
        goals = [f"brew tea number {i}" for i in range(10)]
        found = writer.write([expand(goal, 0) for goal in [*goals, "poison"]])
    assert found == ["a new text"] * 10 + [None]
    assert (writer.counts["asked"], writer.counts["failed"]) == (11, 1)
    assert len(server.bodies) == 11


def test_equal_draws_are_asked_once():
    with Server() as server:
        found = generator(server).generate([*draws(2), *draws(2)], GREEDY)
    assert len(server.bodies) == 2
    assert texts(found[:2]) == texts(found[2:])


def test_threads_may_share_a_generator():
    found = {}
    with Server(delay=0.002) as server:
        model = generator(server, max_concurrency=3)

        def work(seed):
            found[seed] = texts(model.generate(draws(10, seed), GREEDY))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert found == {seed: [f"answer to tea {i}" for i in range(10)] for seed in range(6)}
    assert len(server.bodies) == 60
    assert server.most <= 3


# What stops everything


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405, 301, 307])
def test_what_concerns_every_request_stops_all(status):
    with Server(script=lambda body: ["no"] * 9) as server:
        server.bad["no"] = error(status, "no", f"Location: {server.url}/elsewhere")
        with pytest.raises(AccessRefused) as caught:
            generator(server).generate(draws(30), GREEDY)
    assert caught.value.exit_code == 3
    assert len(server.bodies) <= 2
    assert not any("elsewhere" in path for path in server.paths)


FIELDS = (
    "choices message content text finish_reason logprobs top_logprobs token logprob usage "
    "text_offset token_logprobs error detail"
).split()
JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSONS)
def test_any_json_is_read_or_refused(value):
    data = json.dumps(value).encode()
    assert isinstance(replies.complaint(data), str)
    try:
        told = replies.parsed("u", data)
    except EndpointError:
        return
    assert all(0 <= n < 10**9 for n in replies.usage(told, 5, 6))
    for choice in (told, {"choices": [told]}, {"choices": [{"logprobs": told}]}):
        for read in (replies.answer, replies.top_tokens, lambda u, r: replies.echoed(u, r, 0, 9)):
            try:
                read("u", choice)
            except EndpointError:
                continue


def test_errors_have_exit_codes_and_say_what_to_do():
    failed = ServerFailed("http://h/v1", 503, "loading")
    assert failed.exit_code == 20
    assert "later" in str(failed)
    assert BudgetSpent("http://h/v1", "max_cost", 2, 1).exit_code == 3
    assert "max_cost" in str(BudgetSpent("http://h/v1", "max_cost", 2, 1))


# In a recipe


def test_models_at_one_endpoint_share_its_budget_and_others_do_not():
    urls = {name: f"http://127.0.0.1:{port}/v1" for name, port in (("lab", 8000), ("home", 8001))}
    made = ", ".join(f"{name}: {{url: '{url}'}}" for name, url in urls.items())
    models = Models(load_recipe("sandbox", [f"endpoints={{{made}}}"]))
    one, other, far = (
        models.serve(*where) for where in (("home", "a"), ("home", "b"), ("lab", "a"))
    )
    assert [m.endpoint.url for m in (one, other, far)] == [urls[n] for n in ("home", "home", "lab")]
    assert one.budget is other.budget
    assert one.budget is not far.budget
    assert models.serve("home", "a") is one
    assert models.serve("lab", "folder", "sha256:0123456789abcdef").model == "0123456789ab"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("judges={j: {kind: strongreject-rubric, model: m, endpoint: lap}}", "endpoints has lab"),
        ("judges={j: {kind: strongreject-rubric, endpoint: lab}}", "needs a model to ask for"),
        ("model={endpoint: lab, name: m}", "model.endpoint needs policy.adapter=full"),
    ],
)
def test_endpoints_that_cannot_serve_are_refused_with_the_recipe(override, said):
    lab = "endpoints={lab: {url: 'http://127.0.0.1:8000/v1'}}"
    with pytest.raises(RecipeError, match=said):
        load_recipe("sandbox", [lab, "policy.adapter=lora", override])


def test_a_budget_of_money_needs_prices():
    with pytest.raises(RecipeError, match="max_cost needs price_in or price_out"):
        load_recipe("sandbox", ["endpoints={lab: {url: 'http://h/v1', max_cost: 5}}"])
