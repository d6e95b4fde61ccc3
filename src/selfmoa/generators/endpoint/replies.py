"""Replies of OpenAI's protocol, read with distrust: what is not as it should be is a failure."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfmoa.errors import EndpointError
from selfmoa.generators.endpoint.failures import (
    AccessRefused,
    BadReply,
    NoLogprobs,
    RequestRefused,
    ServerFailed,
    TooLong,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from selfmoa.generators.endpoint.transport import Reply

STOPS = {"stop": "stop", "length": "length", "eos": "stop", "max_tokens": "length"}
TOO_LONG = re.compile(
    r"context.{0,16}(length|size|window|limit)|(prompt|input|request).{0,24}too long"
    r"|exceed_context_size|maximum.{0,24}(length|tokens)|longer than",
    re.IGNORECASE,
)
COUNTS = (
    r'"n_prompt_tokens"\s*:\s*(\d{1,9})',
    r"(\d{1,9}) input tokens",
    r"(?:requested|resulted in)\s+(\d{1,9})",
    r"(?:request|prompt|input) \((?:length )?(\d{1,9})",
)
"""Where servers tell the tokens of a prompt (llama.cpp, vLLM, OpenAI)."""
LIMITS = (
    r'"n_ctx"\s*:\s*(\d{1,9})',
    r"maximum\D{0,40}?(\d{1,9})",
    r"(?:size|window|limit)\D{0,24}?(\d{1,9})",
)
"""Where they tell the tokens that the model reads."""
NO_LOGPS = "its log-probabilities are no numbers of 0 and less"


@dataclass(frozen=True, slots=True)
class Answer:
    """A text that a server wrote, and why it ended: "stop" or "length"."""

    text: str
    finish_reason: str


def refusal(url: str, key_env: str | None, reply: Reply, seen: str) -> EndpointError | None:
    """Return what a status other than 200 means; `seen` is what the server says, made safe."""
    status = reply.status
    if status == 200:
        return None
    if status in (408, 429) or status >= 500:
        return ServerFailed(url, status, seen, reply.retry_after)
    if status < 300:
        return BadReply(url, f"it has the status {status}")
    if status < 400:
        return AccessRefused(url, status, "a redirect", "give the url that it leads to")
    if status in (401, 402, 403):
        key = f"see that {key_env} holds a good key" if key_env else "name the key's key_env"
        return AccessRefused(url, status, seen, key)
    if status in (404, 405):
        return AccessRefused(url, status, seen, "see its url and the name of the model")
    if TOO_LONG.search(complaint(reply.data)):
        said = reply.data.decode(errors="replace")
        return TooLong(url, f"status {status}: {seen}", _first(COUNTS, said), _first(LIMITS, said))
    return RequestRefused(url, f"status {status}: {seen}")


def _first(patterns: tuple[str, ...], said: str) -> int | None:
    """Return the number that the first fitting pattern finds."""
    found = (re.search(pattern, said, re.IGNORECASE) for pattern in patterns)
    return next((int(match[1]) for match in found if match), None)


def complaint(data: bytes) -> str:
    """Return the words in which a server says what is wrong."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return "it gives no reason"
    for _ in range(4):
        if isinstance(told, list) and told:
            told = told[0]
        if isinstance(told, dict):
            told = next((told[k] for k in ("error", "message", "detail", "msg") if k in told), None)
        if isinstance(told, str):
            return told
    return "it gives no reason"


def parsed(url: str, data: bytes) -> dict[str, Any]:
    """Return the JSON object of a reply.

    Raises:
        BadReply: there is none.
    """
    try:
        found = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise BadReply(url, f"it is not UTF-8 (byte {error.start + 1})") from None
    except (ValueError, RecursionError):
        raise BadReply(url, "it is not JSON") from None
    if not isinstance(found, dict):
        raise BadReply(url, "it is not a JSON object")
    return found


def usage(reply: Mapping[str, Any], most_in: int, most_out: int) -> tuple[int, int]:
    """Return the tokens read and written that a reply tells.

    Where it tells none, `most_in` and `most_out`, in bytes, stand for them: a token has one or
    more, so that a budget ends early rather than late.
    """
    told = reply.get("usage")
    told = told if isinstance(told, dict) else {}
    found = (told.get("prompt_tokens"), told.get("completion_tokens"))
    read, written = (
        n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 10**9 else most
        for n, most in zip(found, (most_in, most_out), strict=True)
    )
    return read, written


def _choice(url: str, reply: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadReply(url, "it has no choices")
    found: dict[str, Any] = choices[0]
    return found


def answer(url: str, reply: Mapping[str, Any]) -> Answer:
    """Return the text of a reply.

    Raises:
        BadReply: there is none.
        RequestRefused: a filter of contents withheld it.
    """
    choice = _choice(url, reply)
    why = choice.get("finish_reason")
    if why == "content_filter":
        raise RequestRefused(url, "its filter of contents withheld the answer")
    if not isinstance(why, str) or why not in STOPS:
        raise BadReply(url, "its finish_reason is none of 'stop' and 'length'")
    message = choice.get("message", choice)
    text = message.get("content", message.get("text")) if isinstance(message, dict) else None
    if text is None and STOPS[why] == "length":
        text = ""  # what it thought aloud took all of max_tokens
    if not isinstance(text, str):
        raise BadReply(url, "its choice has no text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadReply(url, "its text has half a character (a lone surrogate)") from None
    return Answer(text.strip(), STOPS[why])


def top_tokens(url: str, reply: Mapping[str, Any]) -> dict[str, float]:
    """Return the log-probability of each of the likeliest first tokens.

    Raises:
        NoLogprobs: the server tells none.
        BadReply: they cannot be read.
    """
    told = _choice(url, reply).get("logprobs")
    if not isinstance(told, dict):
        raise NoLogprobs(url, "the server does not tell log-probabilities")
    content, tops = told.get("content"), told.get("top_logprobs")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        tops = [content[0].get("top_logprobs")]
    if not isinstance(tops, list) or not tops or not tops[0]:
        raise NoLogprobs(url, "the server does not tell the log-probabilities of first tokens")
    rows = tops[0].items() if isinstance(tops[0], dict) else _rows(url, tops[0])
    found: dict[str, float] = {}
    for token, logp in rows:
        if not isinstance(token, str) or not _is_logp(logp):
            raise BadReply(url, NO_LOGPS)
        found.setdefault(token, min(float(logp), 0.0))
    return found


def _rows(url: str, told: object) -> list[tuple[Any, Any]]:
    if not isinstance(told, list) or not all(isinstance(row, dict) for row in told):
        raise BadReply(url, "its top_logprobs are no list of tokens")
    return [(row.get("token"), row.get("logprob")) for row in told]


def _is_logp(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return value == -math.inf or -1e9 <= value <= 1e-3


def echoed(url: str, reply: Mapping[str, Any], start: int, end: int) -> float:
    """Return the sum of the log-probabilities of the characters [start, end) of an echo.

    Raises:
        NoLogprobs: the server tells none, or a token stands across the start.
        BadReply: they cannot be read.
    """
    told = _choice(url, reply).get("logprobs")
    names = ("text_offset", "token_logprobs")
    offsets, logps = (told.get(n) for n in names) if isinstance(told, dict) else (None, None)
    if not isinstance(offsets, list) or not isinstance(logps, list):
        raise NoLogprobs(url, "the server does not tell log-probabilities of what it is given")
    if len(offsets) != len(logps) or not all(isinstance(at, int) for at in offsets):
        raise BadReply(url, "the columns of its log-probabilities do not fit together")
    if start not in offsets:
        raise NoLogprobs(url, "a token of the server stands across the end of the prompt")
    wanted = [logp for at, logp in zip(offsets, logps, strict=True) if start <= at < end]
    if not all(map(_is_logp, wanted)):
        raise BadReply(url, NO_LOGPS)
    return float(sum(wanted))
