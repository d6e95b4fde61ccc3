"""Rows whose completions share a prompt become one batch in which each prompt is there once.

    Row(prompt=[1, 2, 3], completions=[[4, 5], [6]])

    ids        1  2  3  4  5  6
    segments   0  0  0  1  1  2    the prompt is 0, its completions 1, 2, ...; padding is -1
    positions  0  1  2  3  4  3    each completion goes on where the prompt ended
    sources    2  3  2             the prompt's last token predicts the first of every completion
    targets    4  5  6
    owners     0  0  1

Left out on purpose: cutting long rows. A row that is too long is the caller's to drop, with a
reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from selfmoa.training.tokens import Row


@dataclass(frozen=True, slots=True)
class Batch:
    """B packed rows. A trained token is one whose log-probability is wanted.

    The N trained tokens come row by row; within a row those of the prompt first (if prompts are
    trained on), then those of each completion in turn.
    """

    ids: Tensor  # [B, L] long
    positions: Tensor  # [B, L] long; completions restart after their prompt; 0 at padding
    segments: Tensor  # [B, L] long; -1 padding, 0 prompt, i >= 1 the i-th completion of the row
    sources: Tensor  # [N] long, index into the flattened [B * L]: the position that predicts
    targets: Tensor  # [N] long, the token's id
    owners: Tensor  # [N] long, number of the completion it belongs to, counted through the batch
    weights: Tensor  # [N] float32, row weight (times prompt_weight for prompt tokens)
    n_completions: int


def pack(
    rows: Sequence[Row],
    pad_id: int,
    device: torch.device | str = "cpu",
    *,
    prompt_weight: float = 0.0,
) -> Batch:
    """Put rows into one batch, right-padded to the longest.

    Args:
        rows: at least one; no prompt and no completion is empty.
        pad_id: token id that fills short rows.
        device: where the tensors go.
        prompt_weight: in [0, 1]; above 0 the prompt's tokens (but for the first, which nothing
            predicts) are trained tokens too, and belong to the row's first completion.

    Raises:
        ValueError: a row has an empty prompt, an empty completion or none at all.
    """
    length = max(row.n_tokens for row in rows)
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    segments: list[list[int]] = []
    sources: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    weights: list[float] = []
    owner = 0
    for b, row in enumerate(rows):
        if not row.prompt or not row.completions or not all(row.completions):
            raise ValueError(f"row {b} has an empty prompt, an empty completion or none at all")
        n, start = len(row.prompt), b * length
        ids.append([*row.prompt])
        positions.append([*range(n)])
        segments.append([0] * n)
        if prompt_weight > 0:
            sources += range(start, start + n - 1)
            targets += row.prompt[1:]
            owners += [owner] * (n - 1)
            weights += [row.weight * prompt_weight] * (n - 1)
        for segment, completion in enumerate(row.completions, 1):
            m, first = len(completion), start + len(ids[b])
            sources += [start + n - 1, *range(first, first + m - 1)]
            targets += completion
            owners += [owner] * m
            weights += [row.weight] * m
            ids[b] += completion
            positions[b] += range(n, n + m)
            segments[b] += [segment] * m
            owner += 1
    return Batch(
        pad(ids, pad_id, device),
        pad(positions, 0, device),
        pad(segments, -1, device),
        torch.tensor(sources, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(owners, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        owner,
    )


def split(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with one completion each, in the same order of completions."""
    return [replace(row, completions=[c]) for row in rows for c in row.completions]


def shared_mask(batch: Batch, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the additive mask of packed rows, [B, 1, L, L]: 0 where i sees j, else the minimum.

    A token sees the prompt and its own completion up to itself, and of these only positions less
    than `window` before its own. Padding sees padding, so that no softmax is over nothing.
    """
    segments, positions = batch.segments, batch.positions
    length = segments.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    mine, theirs = segments[:, :, None], segments[:, None, :]
    seen = seen & ((mine == theirs) | (theirs == 0))
    if window is not None:
        seen &= positions[:, :, None] - positions[:, None, :] < window
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def pad(
    sequences: Sequence[Sequence[int]],
    filler: int,
    device: torch.device | str = "cpu",
    *,
    left: bool = False,
) -> Tensor:
    """Return sequences of different lengths as one [n, longest], filled up on one side."""
    length = max(map(len, sequences))
    filled = [[filler] * (length - len(s)) for s in sequences]
    pairs = zip(filled, sequences, strict=True)
    return torch.tensor([[*f, *s] if left else [*s, *f] for f, s in pairs], device=device)
