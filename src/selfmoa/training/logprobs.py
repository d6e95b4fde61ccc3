"""Log-probabilities of completions: pure functions of logits and tokens, with shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812  (the name every reader of torch code expects)

if TYPE_CHECKING:
    from torch import Tensor

    from selfmoa.training.collate import Batch


def token_logps(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log p(ids[t] | ids[<t]) for t >= 1.

    Args:
        logits: [B, L, V], position t predicts token t + 1.
        ids: [B, L].

    Returns:
        [B, L - 1]; entry t belongs to token t + 1.
    """
    return torch.gather(
        F.log_softmax(logits[:, :-1].float(), dim=-1), 2, ids[:, 1:].unsqueeze(-1)
    ).squeeze(-1)


def forward_logits(model: Any, batch: Batch) -> Tensor:
    """Return the logits [B, L, V] of a right-padded batch."""
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
    return logits


def completion_logps(model: Any, batch: Batch) -> Tensor:
    """Return log p(completion | prompt) of each row, summed over tokens: [B] (method, eq. 1)."""
    logps = token_logps(forward_logits(model, batch), batch.ids)
    return (logps * batch.completion[:, 1:]).sum(-1)


def weighted_nll(model: Any, batch: Batch, prompt_weight: float = 0.0) -> Tensor:
    """Return the supervised loss: mean negative log-likelihood over trained tokens, a scalar.

    Prompt tokens count `prompt_weight` (in [0, 1]); rows count their own weight.
    """
    nll = -token_logps(forward_logits(model, batch), batch.ids)
    completion = batch.completion[:, 1:]
    prompt = batch.mask[:, 1:] & ~completion
    weights = (completion + prompt_weight * prompt) * batch.weights[:, None]
    return (nll * weights).sum() / weights.sum()


def forward_kl(logits: Tensor, reference_logits: Tensor, batch: Batch) -> Tensor:
    """Return KL(reference || policy), mean over completion tokens, a scalar >= 0 (method, eq. 9).

    Args:
        logits: [B, L, V] of the policy.
        reference_logits: [B, L, V] of the frozen reference, without gradient.
        batch: the rows both were computed on.
    """
    policy = F.log_softmax(logits[:, :-1].float(), dim=-1)
    reference = F.log_softmax(reference_logits[:, :-1].float(), dim=-1)
    divergence = (reference.exp() * (reference - policy)).sum(-1)
    where = batch.completion[:, 1:]
    return (divergence * where).sum() / where.sum()
