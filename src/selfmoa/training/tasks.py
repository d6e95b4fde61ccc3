"""The supervised tasks: answers to be learnt, and anchors that hold a policy near its reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from selfmoa.training.layouts import hidden_states
from selfmoa.training.logprobs import head_of, sum_logps, token_kl, token_logps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from selfmoa.training.reference import Frozen
    from selfmoa.training.tokens import Row

# One completion a row: there is no prompt to be shared.
ALONE = "rows"


@dataclass
class Supervised:
    """Maximum likelihood of the completions (method, eq. 12); each row has one.

    Prompt tokens count `prompt_weight` (in [0, 1]) beside 1 for the completion's; rows count their
    own weight.
    """

    rows: Sequence[Row]
    pad_id: int
    batch_size: int
    prompt_weight: float = 0.0
    weight: float = 1.0
    counted: tuple[str, ...] = ("loss",)
    sizes: list[int] = field(init=False)
    costs: list[int] = field(init=False)
    trained: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [1] * len(self.rows)
        self.costs = [row.n_tokens for row in self.rows]
        self.trained = [
            row.n_tokens - 1 if self.prompt_weight else len(row.completions[0]) for row in self.rows
        ]

    def total(self, items: Sequence[int]) -> float:
        """Return the summed weights of the trained tokens."""
        return sum(
            row.weight * (len(row.completions[0]) + self.prompt_weight * (len(row.prompt) - 1))
            for row in (self.rows[i] for i in items)
        )

    def losses(self, model: Any, items: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return each row's weighted negative log-likelihood, [n]."""
        rows = [self.rows[i] for i in items]
        hidden, batch = hidden_states(
            model, rows, ALONE, self.pad_id, prompt_weight=self.prompt_weight
        )
        logps = token_logps(hidden, batch.targets, head_of(model)) * batch.weights
        losses = -sum_logps(logps, batch.owners, len(rows))
        return losses, {"loss": float(losses.detach().sum())}

    def names(self, items: Sequence[int]) -> list[str]:
        """Return the rows' numbers."""
        return [f"row {i}" for i in items]

    def summary(self, sums: Mapping[str, float], total: float) -> dict[str, Any]:
        """Return the mean negative log-likelihood of a token, in nats."""
        return {"loss": sums["loss"] / total}


@dataclass
class Anchors:
    """KL(reference || policy), mean over the completions' tokens (method, eq. 9)."""

    rows: Sequence[Row]
    frozen: Frozen
    pad_id: int
    batch_size: int
    weight: float
    counted: tuple[str, ...] = ("anchor_kl",)
    sizes: list[int] = field(init=False)
    costs: list[int] = field(init=False)
    trained: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [1] * len(self.rows)
        self.costs = [row.n_tokens for row in self.rows]
        self.trained = [len(row.completions[0]) for row in self.rows]

    def total(self, items: Sequence[int]) -> float:
        """Return the number of completion tokens."""
        return sum(self.trained[i] for i in items)

    def losses(self, model: Any, items: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the divergence of each row, summed over its tokens, [n]."""
        rows = [self.rows[i] for i in items]
        with torch.no_grad(), self.frozen(model) as reference:
            there, _ = hidden_states(reference, rows, ALONE, self.pad_id)
            head = head_of(reference)
        here, batch = hidden_states(model, rows, ALONE, self.pad_id)
        divergence = token_kl(here, head_of(model), there, head)
        losses = sum_logps(divergence, batch.owners, len(rows))
        return losses, {"anchor_kl": float(losses.detach().sum())}

    def names(self, items: Sequence[int]) -> list[str]:
        """Return the anchors' numbers."""
        return [f"anchor {i}" for i in items]

    def summary(self, sums: Mapping[str, float], total: float) -> dict[str, Any]:
        """Return the mean divergence of a token, in nats."""
        return {"anchor_kl": sums["anchor_kl"] / total}
