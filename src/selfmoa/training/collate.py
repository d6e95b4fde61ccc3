"""Conversations become token rows: rendered once through the model's own chat template.

    row = encode(tokenizer, [{"role": "user", "content": "hi"}], "hello")
    row.ids        -> template ids of the prompt, then the answer's ids, then end-of-turn
    row.n_prompt   -> how many of them are prompt; only the rest is trained on

    pad([row, longer_row], pad_id) -> ids [2, L] right-padded, mask [2, L], completion [2, L]

Left out on purpose: truncation. A row that is too long is the caller's to drop, with a reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from selfmoa.records import Message


@dataclass(frozen=True, slots=True)
class Row:
    """Token ids of one prompt and its completion; `weight` scales the row's loss."""

    ids: list[int]
    n_prompt: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded rows: ids [B, L]; mask [B, L] True at tokens; completion [B, L] True at answers.

    `weights` is [B].
    """

    ids: Tensor
    mask: Tensor
    completion: Tensor
    weights: Tensor


def encode_prompts(tokenizer: Any, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Return the template's token ids of each conversation, ready for the assistant's turn.

    The template writes its own special tokens, so none are added a second time.
    """
    texts = [
        tokenizer.apply_chat_template(list(c), tokenize=False, add_generation_prompt=True)
        for c in conversations
    ]
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return encoded


def encode(
    tokenizer: Any,
    conversations: Sequence[Sequence[Message]],
    answers: Sequence[str],
    *,
    end_of_turn: bool = True,
) -> list[Row]:
    """Return one row a conversation: the rendered prompt, the answer and the end-of-turn token."""
    prompts = encode_prompts(tokenizer, conversations)
    completions = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id] if end_of_turn else []
    return [Row(p + c + end, len(p)) for p, c in zip(prompts, completions, strict=True)]


def pad(rows: Sequence[Row], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Put rows of different lengths into one right-padded batch."""
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    completion = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        mask[i, :n] = True
        completion[i, row.n_prompt : n] = True
    weights = torch.tensor([row.weight for row in rows], dtype=torch.float32)
    return Batch(ids.to(device), mask.to(device), completion.to(device), weights.to(device))
