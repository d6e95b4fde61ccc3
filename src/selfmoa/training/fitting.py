"""From folders to folders: load a policy, train it, save it. What the stages call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from selfmoa import registry
from selfmoa.training.collate import Row, encode
from selfmoa.training.losses import LossSettings
from selfmoa.training.policy import load_policy, make_trainable, merged, save_policy
from selfmoa.training.preference import Objective, encode_pairs, fit_preferences
from selfmoa.training.trainer import Optimisation, fit_supervised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from selfmoa.config import Policy, Reset, Train
    from selfmoa.records import Message, PreferencePair, Prompt

    Progress = Callable[[int, int, str], None]


def fit_reset(
    start: Path,
    out: Path,
    examples: Sequence[tuple[Prompt, str]],
    settings: Reset,
    policy: Policy,
    *,
    seed: int,
    progress: Progress,
) -> list[float]:
    """Tune the policy at `start` on (instruction, answer) rows; write it, quarantined, to `out`."""
    model, tokenizer = _prepare(start, policy, seed)
    rows = encode(tokenizer, [p.messages for p, _ in examples], [a for _, a in examples])
    losses = fit_supervised(
        model,
        rows,
        tokenizer.pad_token_id,
        Optimisation(settings.lr, settings.batch_size, settings.steps),
        seed=seed,
        progress=progress,
    )
    save_policy(model, tokenizer, out, quarantined=True)
    return losses


def fit_policy(
    start: Path,
    reference: Path,
    out: Path,
    pairs: Sequence[PreferencePair],
    anchors: Sequence[tuple[Sequence[Message], str]],
    settings: Train,
    policy: Policy,
    *,
    seed: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train the policy at `start` on pairs and anchors, tied to `reference`; write it to `out`."""
    model, tokenizer = _prepare(start, policy, seed)
    steps = max(1, math.ceil(settings.epochs * len(pairs) / settings.batch_size))
    optimisation = Optimisation(settings.lr, settings.batch_size, steps)
    anchor_rows = _anchor_rows(tokenizer, anchors)
    if settings.loss == "sft":
        log = _fit_chosen(model, tokenizer, pairs, optimisation, seed, progress)
    else:
        objectives = _objectives(settings)
        log = fit_preferences(
            model,
            merged(load_policy(reference)[0]),
            encode_pairs(tokenizer, pairs, objectives),
            anchor_rows,
            objectives,
            optimisation,
            pad_id=tokenizer.pad_token_id,
            seed=seed,
            anchor_weight=settings.anchor_weight,
            starts_at_reference=start == reference and policy.adapter == "full",
            progress=progress,
        )
    save_policy(model, tokenizer, out)
    return log


def _prepare(start: Path, policy: Policy, seed: int) -> tuple[Any, Any]:
    if policy.threads:
        torch.set_num_threads(policy.threads)
    torch.manual_seed(seed)
    model, tokenizer = load_policy(start, trainable=True)
    return make_trainable(model, policy.adapter, policy.lora_rank, seed), tokenizer


def _anchor_rows(tokenizer: Any, anchors: Sequence[tuple[Sequence[Message], str]]) -> list[Row]:
    return encode(tokenizer, [m for m, _ in anchors], [t for _, t in anchors]) if anchors else []


def _fit_chosen(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[PreferencePair],
    optimisation: Optimisation,
    seed: int,
    progress: Progress,
) -> list[dict[str, float]]:
    """Train on the chosen sides by maximum likelihood: the best-of-k baseline."""
    rows = encode(tokenizer, [p.prompt for p in pairs], [p.chosen[0]["content"] for p in pairs])
    losses = fit_supervised(
        model, rows, tokenizer.pad_token_id, optimisation, seed=seed, progress=progress
    )
    return [{"step": i, "loss": x} for i, x in enumerate(losses)]


def _objectives(settings: Train) -> dict[str, Objective]:
    """Return, for each objective with a weight, the loss of the pairs that are ordered by it.

    w_0 belongs to the objective the pairs were ordered by, the rest to the margins of the others.
    """
    found = {}
    for name, weight in settings.weights.items():
        if weight > 0:
            others = tuple(o for o in settings.weights if o != name)
            weights = (weight, *(settings.weights[o] for o in others))
            loss = LossSettings(settings.beta, weights, settings.noise)
            found[name] = Objective(registry.resolve("loss", settings.loss), loss, others)
    return found
