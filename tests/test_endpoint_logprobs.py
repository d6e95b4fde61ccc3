"""Log-probabilities at an endpoint, as judges ask for them."""

from __future__ import annotations

import math

import pytest

from endpoint_server import (
    Server,
    answer,
    completion,
    generator,
    prompt,
    user,
)
from selfmoa.generators.endpoint.failures import (
    NoLogprobs,
)
from selfmoa.protocols import RAW
from selfmoa.registry import resolve


def chat_top(**probabilities):
    rows = [{"token": t, "logprob": math.log(p)} for t, p in probabilities.items()]
    return completion(logprobs={"content": [{"token": "x", "top_logprobs": rows}]})


def test_labels_of_one_token_are_scored_in_one_request_a_prompt():
    with Server(lambda body: chat_top(Yes=0.7, No=0.2, Maybe=0.06)) as server:
        found = generator(server).logprobs(
            [(user("tea"), "Yes"), (user("tea"), "No"), (user("tea"), ""), (user("milk"), "no")],
            {"guardian_config": {"risk": "harm"}},
        )
    assert found[:3] == pytest.approx([math.log(0.7), math.log(0.2), 0.0])
    assert found[3] == pytest.approx(math.log(0.04))  # what is left for all the others
    assert len(server.bodies) == 2
    assert (
        server.bodies[0] | {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}
        == (server.bodies[0])
    )
    assert server.bodies[0]["chat_template_kwargs"] == {"guardian_config": {"risk": "harm"}}


@pytest.mark.parametrize("kind", ["granite-guardian", "shieldgemma"])
def test_judges_score_their_answers_through_an_endpoint(kind):
    p = {"Yes": 0.9, "No": 0.08} | {f"word {i}": 0.0005 for i in range(18)}

    def reply(body):
        if "messages" in body:
            return chat_top(**p)
        top = {t: math.log(x) for t, x in p.items()}
        return {
            "choices": [
                {"text": "Yes", "finish_reason": "length", "logprobs": {"top_logprobs": [top]}}
            ]
        }

    with Server(reply) as server:
        judge = resolve("judge", kind)(None, generator(server), name="guard", mode="logprobs")
        (verdict,) = judge.judge([(prompt("tea"), answer("Steep it."))])
    assert verdict.label == "unsafe"
    assert verdict.score == pytest.approx(math.log(0.08 / 0.9), abs=0.02)


def echoing(body):
    """Echo a prompt in tokens of four characters; a character has the log-probability -1."""
    if "echo" not in body:
        top = {"Safe": math.log(0.6), "Unsa": math.log(0.3)}
        return {"choices": [{"text": "Safe", "logprobs": {"top_logprobs": [top]}}]}
    text = body["prompt"] + "more"
    at = list(range(0, len(text), 4))
    return {
        "choices": [
            {
                "text": text,
                "logprobs": {
                    "text_offset": at,
                    "token_logprobs": [None] + [-float(len(text[i : i + 4])) for i in at[1:]],
                },
            }
        ]
    }


def test_answers_of_several_tokens_are_scored_where_raw_text_is_echoed():
    raw = [{"role": RAW, "content": "Judge this: tea.Safety: "}]  # 24 characters
    with Server(echoing) as server:
        found = generator(server).logprobs([(raw, "Safe"), (raw, "Unsafely"), (raw, "Safe and so")])
    assert found[0] == pytest.approx(math.log(0.6))
    assert found[1] == -8.0


def test_a_token_across_the_end_of_the_prompt_is_no_part_of_an_answer():
    raw = [{"role": RAW, "content": "Judge this: tea. Safety: "}]  # 25 characters
    with Server(echoing) as server, pytest.raises(NoLogprobs, match="across the end"):
        generator(server).logprobs([(raw, "Unsafely")])


def test_an_answer_of_several_tokens_in_a_chat_is_a_matter_of_the_other_mode():
    told = pytest.raises(NoLogprobs, match=r"options\.mode.*'text'")
    with Server(lambda body: chat_top(un=0.6, safe=0.3)) as server, told:
        generator(server).logprobs([(user("tea"), "safe"), (user("tea"), "unsafe")])


@pytest.mark.parametrize("act", ["none", "400", "422", "null", "empty"])
def test_a_server_without_logprobs_says_which_option_to_set(act):
    replies_ = {"null": completion(logprobs=None), "empty": completion(logprobs={"content": []})}
    with (
        Server(
            lambda body: replies_.get(act, completion()),
            script=lambda body: [act] if act.isdigit() else [],
        ) as server,
        pytest.raises(NoLogprobs, match=r"options\.mode") as caught,
    ):
        generator(server).logprobs([(user("tea"), "Yes")])
    assert caught.value.exit_code == 3
