"""Requests of OpenAI's protocol, as data.

What users, attackers and policies wrote must not pass for a control token at the server, whose
tokenizer reads them in text: such texts get a blank after their first character (`plain`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfmoa.judges.formats import CONTROL
from selfmoa.protocols import QUOTED, RAW

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfmoa.protocols import Sampling
    from selfmoa.records import Message

CHAT, TEXT = "/chat/completions", "/completions"
TOP = 20
"""First tokens that are asked for: the most that OpenAI's protocol and vLLM's default allow."""
SEEDS = 2**31
"""Seeds are sent modulo this: servers keep them in 32 bits, or as a float."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the path below the base URL, and the JSON object that is sent."""

    path: str
    body: dict[str, Any]


def plain(text: str) -> str:
    """Return a text in which nothing looks like a control token of the families in use."""
    return CONTROL.sub(lambda start: start[0] + " ", text)


def is_raw(messages: Sequence[Message]) -> bool:
    """Return whether messages are text as it stands."""
    return any(message["role"] in (RAW, QUOTED) for message in messages)


def raw_text(messages: Sequence[Message]) -> str:
    """Return raw and quoted pieces as one text.

    Raises:
        ValueError: there is a message of another role among them.
    """
    if strange := [m["role"] for m in messages if m["role"] not in (RAW, QUOTED)]:
        raise ValueError(f"a message of role '{strange[0]}' cannot stand among raw text")
    return "".join(m["content"] if m["role"] == RAW else plain(m["content"]) for m in messages)


def base(model: str, messages: Sequence[Message], template: Mapping[str, Any] | None) -> Request:
    """Return a request that only says what is read.

    `template` are further variables of the chat template, as vLLM, llama.cpp and transformers name
    them. A conversation that ends with an assistant's message is rendered whole, which vLLM and
    llama.cpp can do.
    """
    if is_raw(messages):
        return Request(TEXT, {"model": model, "prompt": raw_text(messages)})
    said = [
        {
            "role": m["role"],
            "content": m["content"] if m["role"] == "system" else plain(m["content"]),
        }
        for m in messages
    ]
    body: dict[str, Any] = {"model": model, "messages": said}
    if messages and messages[-1]["role"] == "assistant":
        body |= {"add_generation_prompt": False}
    if template:
        body |= {"chat_template_kwargs": dict(template)}
    return Request(CHAT, body)


def answering(model: str, messages: Sequence[Message], sampling: Sampling, seed: int) -> Request:
    """Return the request for an answer."""
    head = [{"role": "system", "content": sampling.system}] if sampling.system else []
    asked = base(model, [*head, *messages], sampling.template)
    drawn = {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "seed": seed % SEEDS,
    }
    return Request(asked.path, asked.body | drawn)


def first_token(
    model: str, messages: Sequence[Message], template: Mapping[str, Any] | None
) -> Request:
    """Return the request for the log-probabilities of the likeliest first tokens of an answer."""
    asked = base(model, messages, template)
    # Some servers divide by the temperature before they take logarithms.
    one = {"max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    wanted = {"logprobs": TOP} if asked.path == TEXT else {"logprobs": True, "top_logprobs": TOP}
    return Request(asked.path, asked.body | one | wanted)


def echo(model: str, prompt: str, text: str) -> Request:
    """Return the request for the log-probabilities of all tokens of a text after a prompt."""
    wanted = {"max_tokens": 1, "temperature": 1.0, "seed": 0, "echo": True, "logprobs": 1}
    return Request(TEXT, {"model": model, "prompt": prompt + text} | wanted)
