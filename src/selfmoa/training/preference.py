"""The multi-objective preference step: pairs, a frozen reference, and anchors.

One step minimises  mean loss(pairs) + anchor_weight * KL(reference || policy on anchors)
(method, eq. 10). The reference's log-probabilities are computed once, before the first step; if
the policy starts as the reference, its margins at step 0 must be 0, or the run stops.
Left out on purpose: shared prompts and chunked log-probabilities (plain and correct first).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from selfmoa.training.collate import Row, encode, pad
from selfmoa.training.logprobs import completion_logps, forward_kl, forward_logits
from selfmoa.training.losses import Loss, LossSettings, PairLogps
from selfmoa.training.trainer import Optimisation, apply_step, batches_by_length, make_optimizer

if TYPE_CHECKING:
    from selfmoa.records import PreferencePair

SCORING_BATCH = 128
MARGIN_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Objective:
    """How pairs of one objective are trained on: their loss, and the order of other margins."""

    loss: Loss
    settings: LossSettings
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PairRows:
    """Token rows of one pair, and what the loss needs beside log-probabilities."""

    chosen: Row
    rejected: Row
    objective: str
    margins: tuple[float, ...]
    flip_probability: float
    safety: tuple[float, float]


def encode_pairs(
    tokenizer: Any, pairs: Sequence[PreferencePair], objectives: dict[str, Objective]
) -> list[PairRows]:
    """Return token rows of pairs, with margins in the order their objective's weights have."""
    prompts = [p.prompt for p in pairs]
    chosen = encode(tokenizer, prompts, [p.chosen[0]["content"] for p in pairs])
    rejected = encode(tokenizer, prompts, [p.rejected[0]["content"] for p in pairs])
    return [
        PairRows(
            c,
            r,
            p.objective,
            tuple(p.margins[name] for name in objectives[p.objective].others),
            p.flip_probability,
            (1.0, 0.0 if p.objective == "safety" else 1.0),
        )
        for p, c, r in zip(pairs, chosen, rejected, strict=True)
    ]


@torch.no_grad()
def reference_logps(
    reference: Any, rows: Sequence[PairRows], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reference's log p(chosen), log p(rejected) of every pair, each [N]."""
    chosen, rejected = [], []
    for start in range(0, len(rows), SCORING_BATCH):
        part = rows[start : start + SCORING_BATCH]
        both = pad([r.chosen for r in part] + [r.rejected for r in part], pad_id, reference.device)
        c, r = completion_logps(reference, both).chunk(2)
        chosen.append(c)
        rejected.append(r)
    return torch.cat(chosen), torch.cat(rejected)


def fit_preferences(
    model: Any,
    reference: Any,
    rows: Sequence[PairRows],
    anchors: Sequence[Row],
    objectives: dict[str, Objective],
    settings: Optimisation,
    *,
    pad_id: int,
    seed: int,
    anchor_weight: float,
    starts_at_reference: bool,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[str, float]]:
    """Train `model` on pairs; return one row of measurements a step.

    Args:
        model: the policy; its trainable parameters are changed in place.
        reference: the frozen policy of the loss and of the anchors.
        rows: encoded pairs, at least one.
        anchors: rows whose completions a policy of this run drew itself; may be empty.
        objectives: per objective name, how its pairs are trained on.
        settings: the optimiser's.
        pad_id: token id that fills short rows.
        seed: of the order of pairs and anchors.
        anchor_weight: weight of the forward KL; 0 leaves the anchors out.
        starts_at_reference: check that every margin is 0 before the first step.
        progress: called as progress(done, total, "step").

    Raises:
        ValueError: the policy should equal the reference at the start, and does not.
        FloatingPointError: the loss is not finite; the message names the pairs' positions.
    """
    reference = reference.eval()
    ref_chosen, ref_rejected = reference_logps(reference, rows, pad_id)
    optimizer = make_optimizer(model, settings)
    lengths = [len(r.chosen.ids) + len(r.rejected.ids) for r in rows]
    order = batches_by_length(lengths, settings.batch_size, settings.steps, seed)
    n_anchors = min(len(anchors), 2 * settings.batch_size) if anchor_weight else 0
    anchor_order = batches_by_length(
        [len(a.ids) for a in anchors], n_anchors, settings.steps if n_anchors else 0, seed + 1
    )
    log: list[dict[str, float]] = []
    model.train()
    for step, indices in enumerate(order):
        part = [rows[i] for i in indices]
        both = pad([r.chosen for r in part] + [r.rejected for r in part], pad_id, model.device)
        chosen, rejected = completion_logps(model, both).chunk(2)
        logps = PairLogps(
            chosen,
            rejected,
            ref_chosen[indices],
            ref_rejected[indices],
            chosen.new_zeros(len(part), 0),
            chosen.new_tensor([r.flip_probability for r in part]),
            chosen.new_tensor([r.safety for r in part]),
        )
        if step == 0 and starts_at_reference:
            _check_start(logps)
        losses = _losses(logps, part, objectives)
        loss = losses.mean()
        kl = losses.new_zeros(())
        if n_anchors:
            kl = _anchor_kl(model, reference, [anchors[i] for i in next(anchor_order)], pad_id)
            loss = loss + anchor_weight * kl
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is not finite at step {step}, pairs {indices}")
        norm = apply_step(model, optimizer, loss, step, settings)
        log.append(_measure(step, logps, losses, kl, norm))
        if progress and (step % 5 == 4 or step + 1 == settings.steps):
            progress(step + 1, settings.steps, "step")
    model.eval()
    return log


def _losses(
    logps: PairLogps, part: Sequence[PairRows], objectives: dict[str, Objective]
) -> torch.Tensor:
    """Return the loss of each pair [B]; pairs of different objectives weigh margins differently."""
    out = logps.policy_chosen.new_zeros(len(part))
    for name, objective in objectives.items():
        where = [i for i, r in enumerate(part) if r.objective == name]
        if where:
            out[where] = objective.loss(_select(logps, part, where), objective.settings)
    return out


def _select(logps: PairLogps, part: Sequence[PairRows], where: list[int]) -> PairLogps:
    rows = [part[i].margins for i in where]
    margins = logps.policy_chosen.new_tensor(rows).reshape(len(where), -1)
    safety = logps.safety
    return PairLogps(
        logps.policy_chosen[where],
        logps.policy_rejected[where],
        logps.reference_chosen[where],
        logps.reference_rejected[where],
        margins,
        logps.flip_probability[where],
        None if safety is None else safety[where],
    )


def _anchor_kl(model: Any, reference: Any, rows: Sequence[Row], pad_id: int) -> torch.Tensor:
    batch = pad(rows, pad_id, model.device)
    with torch.no_grad():
        reference_logits = forward_logits(reference, batch)
    return forward_kl(forward_logits(model, batch), reference_logits, batch)


def _check_start(logps: PairLogps) -> None:
    gap = logps.policy_chosen - logps.reference_chosen - logps.policy_rejected
    worst = float((gap + logps.reference_rejected).detach().abs().max())
    if worst > MARGIN_TOLERANCE:
        raise ValueError(
            f"the policy starts {worst:.4f} nats away from its reference; they should be equal"
        )


def _measure(
    step: int, logps: PairLogps, losses: torch.Tensor, kl: torch.Tensor, norm: float
) -> dict[str, float]:
    with torch.no_grad():
        gap = logps.policy_chosen - logps.reference_chosen
        gap = gap - (logps.policy_rejected - logps.reference_rejected)
        return {
            "step": step,
            "loss": float(losses.mean()),
            "anchor_kl": float(kl),
            "log_ratio_gap": float(gap.mean()),
            "accuracy": float((gap > 0).float().mean()),
            "gradient_norm": norm,
        }
