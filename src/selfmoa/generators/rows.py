"""What generators have in common: draws and texts to token ids, what was said to responses."""

from __future__ import annotations

from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from selfmoa.generators.limits import refuse_long
from selfmoa.records import Response
from selfmoa.training.tokens import encode, encode_prompts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfmoa.protocols import Draw, Sampling
    from selfmoa.records import Message
    from selfmoa.training.tokens import Row

Item = tuple["Sequence[Message]", str]


def prompt_rows(
    tokenizer: Any, draws: Sequence[Draw], sampling: Sampling, most: int | None
) -> list[list[int]]:
    """Return the token ids of each draw's prompt, the system prompt before it if there is one.

    Raises:
        PromptTooLong: a prompt and its answer have more than `most` tokens.
    """
    head = [{"role": "system", "content": sampling.system}] if sampling.system else []
    conversations = [[*head, *draw.prompt.messages] for draw in draws]
    rows = encode_prompts(tokenizer, conversations, sampling.template)
    refuse_long(draws, rows, sampling.max_new_tokens, most)
    return rows


def text_rows(
    tokenizer: Any, items: Sequence[Item], template: Mapping[str, Any] | None
) -> list[Row]:
    """Return the rows of (messages, text); texts that follow one another share their prompt."""
    prompts, texts = grouped(items)
    return encode(tokenizer, prompts, texts, end_of_turn=False, template=template)


def grouped(items: Sequence[Item]) -> tuple[list[Sequence[Message]], list[list[str]]]:
    """Return messages, each once where they follow one another, and the texts of each."""
    groups = [(prompt, list(group)) for prompt, group in groupby(items, key=itemgetter(0))]
    return [prompt for prompt, _ in groups], [[text for _, text in group] for _, group in groups]


def responses(
    draws: Sequence[Draw], sampling: Sampling, model: str, said: Sequence[tuple[str, str]]
) -> list[Response]:
    """Return the response to each draw; `said` has (text, finish reason), `model` the id."""
    return [
        Response(
            id=Response.make_id(draw.prompt.id, model, sampling.name, draw.seed),
            prompt_id=draw.prompt.id,
            text=text,
            model=model,
            sampling=sampling.name,
            seed=draw.seed,
            finish_reason="stop" if reason == "stop" else "length",
        )
        for draw, (text, reason) in zip(draws, said, strict=True)
    ]
