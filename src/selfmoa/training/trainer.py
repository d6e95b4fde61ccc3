"""The loops around the losses: supervised steps and multi-objective preference steps.

Deterministic on one machine: the order of rows comes from a seed, nothing reads the clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from selfmoa.training.collate import Batch, Row, pad
from selfmoa.training.logprobs import weighted_nll

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Optimisation:
    """Settings of the optimiser: AdamW, linear warm-up over `warmup` of the steps, cosine decay."""

    lr: float
    batch_size: int
    steps: int
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


def learning_rate(step: int, settings: Optimisation) -> float:
    """Return the learning rate at a step in [0, steps): warm-up, then cosine to a tenth."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    phase = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * phase)))


def batches_by_length(
    lengths: Sequence[int], batch_size: int, steps: int, seed: int
) -> Iterator[list[int]]:
    """Yield `steps` index batches: every row once an epoch, rows of like length together.

    Each epoch is shuffled, cut into pools of eight batches, and sorted inside a pool: nearly as
    random as a plain shuffle and with little padding.

    Raises:
        ValueError: there are no rows and more than no steps: the epochs would never end.
    """
    if steps and not lengths:
        raise ValueError(f"there are no rows for {steps} steps")
    rng = np.random.default_rng(seed)
    done = 0
    while done < steps:
        order = rng.permutation(len(lengths))
        epoch: list[list[int]] = []
        for start in range(0, len(order), 8 * batch_size):
            pool = sorted(order[start : start + 8 * batch_size].tolist(), key=lambda i: lengths[i])
            epoch += [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
        for i in rng.permutation(len(epoch)):
            if done == steps:
                return
            yield epoch[i]
            done += 1


def make_optimizer(model: Any, settings: Optimisation) -> torch.optim.Optimizer:
    """Return AdamW over the trainable parameters."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=settings.lr,
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def apply_step(
    model: Any, optimizer: Any, loss: torch.Tensor, step: int, settings: Optimisation
) -> float:
    """Take one optimiser step down `loss`; return the gradient norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.requires_grad], settings.max_grad_norm
    )
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    optimizer.step()
    return float(norm)


def fit_supervised(
    model: Any,
    rows: Sequence[Row],
    pad_id: int,
    settings: Optimisation,
    *,
    seed: int,
    prompt_weight: float = 0.0,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[float]:
    """Train on rows by maximum likelihood; return the loss of every step."""
    optimizer = make_optimizer(model, settings)
    losses = []
    model.train()
    order = batches_by_length([len(r.ids) for r in rows], settings.batch_size, settings.steps, seed)
    for step, indices in enumerate(order):
        batch: Batch = pad([rows[i] for i in indices], pad_id, model.device)
        loss = weighted_nll(model, batch, prompt_weight)
        apply_step(model, optimizer, loss, step, settings)
        losses.append(float(loss.detach()))
        if progress and (step % 10 == 9 or step + 1 == settings.steps):
            progress(step + 1, settings.steps, "step")
    model.eval()
    return losses
