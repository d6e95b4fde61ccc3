"""One token a row, drawn by inversion with a number of the row's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  (the name every reader of torch code expects)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BLOCK = 512
"""Tokens of the vocabulary whose weights are summed before one of them is drawn."""


def uniforms(seeds: Sequence[int], n: int, device: torch.device | str) -> Tensor:
    """Return [seeds, n] uniform numbers in [0, 1), each row from its seed alone."""
    rows = [np.random.default_rng(seed).random(n) for seed in seeds]
    # Not every accelerator has doubles (MPS).
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.from_numpy(np.stack(rows)).to(device, dtype)


def choose(logits: Tensor, numbers: Tensor | None, temperature: float) -> Tensor:
    """Return the next token of each row: by inversion, or the likeliest where there is no number.

    A row's token is the first one whose cumulative probability reaches the row's number. Only the
    weights of the block that holds it are cumulated one by one: over a large vocabulary that is
    what a step would spend its time on.

    Args:
        logits: [rows, vocabulary].
        numbers: [rows] in [0, 1), or None. Sums have their precision, weights are fp32.
        temperature: divides the logits.
    """
    if numbers is None:
        return logits.argmax(-1)
    weights = F.pad(logits.float(), (0, -logits.shape[1] % BLOCK), value=-torch.inf)
    weights.sub_(weights.amax(-1, keepdim=True)).div_(temperature).exp_()
    blocks = weights.view(len(logits), -1, BLOCK)
    sums = blocks.sum(-1).to(numbers.dtype)
    cumulative = sums.cumsum(-1)
    target = numbers[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target)
    before = cumulative.gather(1, block) - sums.gather(1, block)
    rows = torch.arange(len(logits), device=logits.device)
    inner = blocks[rows, block.squeeze(1)].to(numbers.dtype).cumsum(-1)
    # Rounding must not carry a row out of its block, nor to a token of no weight at its end.
    within = torch.searchsorted(inner, torch.minimum(target - before, inner[:, -1:]))
    return (block * BLOCK + within).squeeze(1)
