"""Many answers from one model in one call.

Families that keep nothing but keys and values of what they read are answered by continuous
batching (`batching`); the others by `lm.generate`, prompts padded to the longest, everything in
one batch. Both draw by the same rule (`sampling`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from selfmoa.generators.batching import can_batch, continuously
from selfmoa.generators.sampling import choose, uniforms
from selfmoa.training.packing import pad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

MAX_TOKENS = 65_536
MAX_ROWS = 256


@dataclass(frozen=True, slots=True)
class Decoding:
    """How rows are answered.

    `temperature` 0 is greedy; `max_new_tokens` >= 1, any of `stops` included; `pad` fills short
    rows. `max_tokens` bounds rows times length of what is kept at once, in tokens (so do the bytes
    of `batching.KEPT_BYTES`), `max_rows` the rows; a single row is answered whatever its length.
    """

    temperature: float
    max_new_tokens: int
    stops: tuple[int, ...]
    pad: int
    max_tokens: int = MAX_TOKENS
    max_rows: int = MAX_ROWS


@dataclass(frozen=True, slots=True)
class Decoded:
    """The tokens of an answer, the one that ended it included, if one did."""

    ids: list[int]
    is_ended: bool


def decode(
    lm: Any, prompts: Sequence[Sequence[int]], seeds: Sequence[int], how: Decoding
) -> list[Decoded]:
    """Answer every prompt; answer i depends on prompt i and seed i alone, except for rounding.

    Rounding depends on the shapes of the batches, and they on all that is given: equal calls give
    equal answers.

    Args:
        lm: a transformers causal language model in evaluation mode, with or without PEFT around it.
        prompts: token ids, none empty; equal ones are read once.
        seeds: one a prompt: of its uniform numbers, one a token.
        how: the limits, and when an answer ends.
    """
    is_greedy = how.temperature == 0
    numbers = None if is_greedy else uniforms(seeds, how.max_new_tokens, lm.device)
    engine = continuously if can_batch(lm) else _by_generate
    with torch.inference_mode():
        answers = engine(lm, prompts, numbers, how)
    return [Decoded(ids, ids[-1] in how.stops) for ids in answers]


class _Choosing(LogitsProcessor):
    """Leaves one token a row standing: the one that is chosen by that row's next number."""

    def __init__(self, numbers: Tensor, temperature: float) -> None:
        self.numbers, self.temperature, self.step = numbers, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002
        chosen = choose(scores, self.numbers[:, self.step], self.temperature)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def _by_generate(
    lm: Any, prompts: Sequence[Sequence[int]], numbers: Tensor | None, how: Decoding
) -> list[list[int]]:
    ids = pad(prompts, how.pad, lm.device, left=True)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) >= (ids.shape[1] - lengths)[:, None]
    choosing = [] if numbers is None else [_Choosing(numbers, how.temperature)]
    out = lm.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        do_sample=False,
        max_new_tokens=how.max_new_tokens,
        pad_token_id=how.pad,
        eos_token_id=list(how.stops),
        logits_processor=LogitsProcessorList(choosing),
    )
    return [_until(row, how.stops) for row in out[:, ids.shape[1] :].tolist()]


def _until(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Return the ids up to and with the first stop; what follows is padding."""
    end = next((i for i, token in enumerate(ids, 1) if token in stops), len(ids))
    return ids[:end]
