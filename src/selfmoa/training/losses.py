"""The preference losses: pure functions of summed log-probabilities, one value a pair.

All take `PairLogps` and `LossSettings` and return a tensor [B], so that a trainer swaps them by
name (`LOSSES`). Numbers in parentheses are the equations of docs/method.md; for one pair

    (1)  d(y) = log pi(y|x) - log ref(y|x)               summed over the tokens of the response
    (2)  u(y) = (beta d(y) - sum_k w_k m_k(x, y)) / w_0  k = 1..K-1, the other objectives
    (3)  -log sigmoid(D)                                 D = u(chosen) - u(rejected)
    (4)  [-(1 - e) log sigmoid(D) + e log sigmoid(-D)] / (1 - 2e)
    (5)  -(1 - e) log sigmoid(D) - e log sigmoid(-D)
    (6)  (h - 1 / (2 beta))^2                            h = d(chosen) - d(rejected)
    (7)  (3) on the pair as ordered by sum_k w_k m_k     k = 0..K-1, all objectives
    (8)  (h - T / beta)^2                                T = 1.5 s(chosen) - 0.5 s(rejected) - 0.5
    (26) (3) with u(y) = beta log pi(y|x) / |y|, less gamma    |y| tokens; no reference

Left out on purpose: the mean over the batch (how to weigh pairs is the trainer's business) and
SafeDPO's offset, whose place in the loss we could not establish.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Noise = Literal["none", "robust", "conservative"]

# (4) divides by 1 - 2e: 0.45 multiplies gradients by ten, 0.5 by infinity, and beyond it their
# sign turns. A pair that uncertain carries next to nothing; pairing should have dropped it.
MAX_ROBUST_FLIP = 0.45
# A certain order would be an infinite margin. 12 is the largest difference of two log-odds that
# the label model clips at 6 each.
MAX_PRIMARY_MARGIN = 12.0


@dataclass(frozen=True)
class PairLogps:
    """A batch of B preference pairs under the policy and under the frozen reference.

    The first four are log-probabilities summed over the response's tokens, [B]. `margins` [B, K-1]
    holds m_k(chosen) - m_k(rejected) of the other objectives in log-odds ([B, 0] if there are
    none). `flip_probability` [B] in [0, 1] is the chance that the two should be the other way
    round. `safety` [B, 2] tells whether chosen and rejected are safe (1) or not (0), `lengths`
    [B, 2] how many tokens they have.

    Raises:
        ValueError: a shape differs; broadcasting would turn [B] against [B, 1] into B x B pairs.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    margins: Tensor
    flip_probability: Tensor
    safety: Tensor | None = None
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        n = self.policy_chosen.numel()
        _check_shape("policy_chosen", self.policy_chosen, n)
        _check_shape("policy_rejected", self.policy_rejected, n)
        _check_shape("reference_chosen", self.reference_chosen, n)
        _check_shape("reference_rejected", self.reference_rejected, n)
        _check_shape("flip_probability", self.flip_probability, n)
        _check_shape("margins", self.margins, n, self.margins.shape[-1])
        if self.safety is not None:
            _check_shape("safety", self.safety, n, 2)
        if self.lengths is not None:
            _check_shape("lengths", self.lengths, n, 2)


@dataclass(frozen=True)
class LossSettings:
    """What the losses share.

    `beta` > 0 is the strength of the pull towards the reference. `weights` are w_0 (the objective
    the pairs are ordered by) and w_1..w_{K-1} (the columns of `PairLogps.margins`). They need not
    sum to 1: a common factor moves the optimum of MODPO as dividing beta by it would, and beta /
    w_0 scales its gradients. `noise` says what is done about `flip_probability`: nothing, (4), (5).
    `gamma` is the margin that `simpo` asks for, in log-odds.

    Raises:
        ValueError: beta is not positive.
    """

    beta: float = 0.1
    weights: tuple[float, ...] = (1.0,)
    noise: Noise = "none"
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}, it must be above 0")


Loss = Callable[[PairLogps, LossSettings], Tensor]


def dpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return the DPO loss [B] (arXiv 2305.18290): (3) with u = beta d. Margins play no part."""
    return _sigmoid_loss(settings.beta * _log_ratio_gap(pairs), pairs.flip_probability, settings)


def robust(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return robust DPO's loss [B] (arXiv 2403.00409): `dpo` with `noise` "robust", hence (4)."""
    return dpo(pairs, replace(settings, noise="robust"))


def ipo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return the IPO loss [B] (arXiv 2310.12036): log-ratios are pulled to 1 / (2 beta) apart.

    h is a difference of *sums* over tokens, as in the paper, so long responses reach the target
    with a smaller change per token. Other libraries divide by the length first: the same beta
    then asks for a gap some tens to hundreds of times wider in sums. Margins play no part.
    """
    gap, target = _log_ratio_gap(pairs), 1 / (2 * settings.beta)
    right, wrong = (gap - target) ** 2, (-gap - target) ** 2  # (6)
    return _denoise(right, wrong, pairs.flip_probability, settings)


def modpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return the MODPO loss [B] (arXiv 2310.03708) for any number of objectives.

    A chosen response that is also better on the others (margin > 0) is pushed harder, one that is
    worse less, so that at the optimum beta d is the weighted sum of all objectives. With weights
    (1, 0, ...) it is `dpo`.

    Raises:
        ValueError: not one weight an objective, or w_0 is not positive.
    """
    _check_weights(pairs, settings)
    others = pairs.margins @ pairs.margins.new_tensor(settings.weights[1:])
    gap = (settings.beta * _log_ratio_gap(pairs) - others) / settings.weights[0]  # (2)
    return _sigmoid_loss(gap, pairs.flip_probability, settings)


def weighted_sum(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return the DPO loss [B] of the pair as the weighted sum of all objectives orders it.

    The simplest rival of MODPO: add up first, then prefer. The sum needs the margin of the
    objective the pair was ordered by, which is m_0 = -logit(e): the label model's flip probability
    is a sigmoid of the difference of two log-odds, and e = 0, an order taken as certain, counts as
    `MAX_PRIMARY_MARGIN`. Where the sum is negative the pair is turned round; where it is 0 there
    is no preference, hence log 2 and no gradient. Only the sign of the sum enters, save that
    `noise` reads its size: the flip probability of the new order is sigmoid(-|sum|). With one
    objective and e < 0.5 it is `dpo`.

    Raises:
        ValueError: not one weight an objective, or w_0 is not positive.
    """
    _check_weights(pairs, settings)
    certain = torch.sigmoid(torch.tensor(-MAX_PRIMARY_MARGIN)).item()
    primary = -torch.logit(pairs.flip_probability, eps=certain)
    margins = torch.cat([primary[:, None], pairs.margins], dim=1)
    total = margins @ margins.new_tensor(settings.weights)
    gap = total.sign() * settings.beta * _log_ratio_gap(pairs)  # (7)
    return _sigmoid_loss(gap, torch.sigmoid(-total.abs()), settings)


def safedpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return DPO's loss [B] on pairs re-ordered by safety, after SafeDPO (arXiv 2505.20065).

    An unsafe chosen and a safe rejected response change places (and e becomes 1 - e); a pair of
    two unsafe ones teaches nothing: its loss is 0 without gradient, yet it counts in a batch mean.

    Raises:
        ValueError: there are no safety bits.
    """
    chosen_safe, rejected_safe = (_safety(pairs) > 0.5).unbind(dim=1)
    is_swapped = ~chosen_safe & rejected_safe
    gap, flip = settings.beta * _log_ratio_gap(pairs), pairs.flip_probability
    losses = _sigmoid_loss(
        torch.where(is_swapped, -gap, gap), torch.where(is_swapped, 1 - flip, flip), settings
    )
    return torch.where(chosen_safe | rejected_safe, losses, 0.0)


def bfpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return the BFPO loss [B] (arXiv 2408.15313): a target gap for each case of the safety bits.

    T for (chosen, rejected) safe: (1, 1) 0.5; (1, 0) 1; (0, 1) -1, that is turned round; (0, 0)
    -0.5. As in `ipo`, h is a difference of sums over tokens. Margins play no part.

    Raises:
        ValueError: there are no safety bits, or `noise` is on: the target follows the bits, not
            the order that the flip probability doubts.
    """
    if settings.noise != "none":
        raise ValueError(f"bfpo has no '{settings.noise}' form: set noise to 'none'")
    chosen_safe, rejected_safe = _safety(pairs).to(pairs.policy_chosen.dtype).unbind(dim=1)
    target = 1.5 * chosen_safe - 0.5 * rejected_safe - 0.5
    return (_log_ratio_gap(pairs) - target / settings.beta) ** 2  # (8)


def simpo(pairs: PairLogps, settings: LossSettings) -> Tensor:
    """Return the SimPO loss [B] (arXiv 2405.14734): mean log-probabilities, without a reference.

    The mean over tokens asks for a beta some ten times that of `dpo`. Margins play no part.

    Raises:
        ValueError: the responses' lengths are not known.
    """
    if pairs.lengths is None:
        raise ValueError("this loss needs to know how many tokens each response has")
    chosen, rejected = pairs.lengths.unbind(dim=1)
    gap = pairs.policy_chosen / chosen - pairs.policy_rejected / rejected
    gap = settings.beta * gap - settings.gamma  # (26)
    return _sigmoid_loss(gap, pairs.flip_probability, settings)


LOSSES: dict[str, Loss] = {
    "dpo": dpo,
    "robust": robust,
    "ipo": ipo,
    "modpo": modpo,
    "weighted_sum": weighted_sum,
    "safedpo": safedpo,
    "bfpo": bfpo,
    "simpo": simpo,
}


def implicit_rewards(pairs: PairLogps, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Return beta d of chosen and of rejected, each [B]: what the policy acts as if it valued."""
    chosen, rejected = _log_ratios(pairs)
    return settings.beta * chosen, settings.beta * rejected


def _log_ratios(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Return d of chosen and of rejected, each [B]."""
    return (
        pairs.policy_chosen - pairs.reference_chosen,  # (1)
        pairs.policy_rejected - pairs.reference_rejected,
    )


def _log_ratio_gap(pairs: PairLogps) -> Tensor:
    """Return h = d(chosen) - d(rejected), [B]."""
    chosen, rejected = _log_ratios(pairs)
    return chosen - rejected


def _sigmoid_loss(gap: Tensor, flip: Tensor, settings: LossSettings) -> Tensor:
    """Return -log sigmoid(gap) [B] with the noise of `settings` accounted for."""
    return _denoise(-logsigmoid(gap), -logsigmoid(-gap), flip, settings)  # (3)


def _denoise(right: Tensor, wrong: Tensor, flip: Tensor, settings: LossSettings) -> Tensor:
    """Combine the loss [B] of each pair as given and as turned round, by its flip probability.

    "robust" is the unbiased estimate of the loss under true labels (arXiv 2403.00409, after
    Natarajan 2013). It has no lower bound: a pair with e > 0 goes on being pushed apart at the
    rate e / (1 - 2e). "conservative" is label smoothing: its optimum is the gap logit(1 - e).
    """
    if settings.noise == "none":
        return right
    if settings.noise == "conservative":
        return (1 - flip) * right + flip * wrong  # (5)
    flip = flip.clamp(max=MAX_ROBUST_FLIP)
    return ((1 - flip) * right - flip * wrong) / (1 - 2 * flip)  # (4)


def _safety(pairs: PairLogps) -> Tensor:
    """Return the safety bits [B, 2].

    Raises:
        ValueError: there are none.
    """
    if pairs.safety is None:
        raise ValueError("this loss needs to know of each response whether it is safe")
    return pairs.safety


def _check_weights(pairs: PairLogps, settings: LossSettings) -> None:
    """Raise ValueError unless there is one weight an objective and w_0 can be divided by."""
    n_objectives = 1 + pairs.margins.shape[-1]
    if len(settings.weights) != n_objectives:
        raise ValueError(
            f"{len(settings.weights)} weights for {n_objectives} objectives: give one for the "
            "objective of the pairs and one a margin"
        )
    if not settings.weights[0] > 0:
        raise ValueError(
            f"the weight of the pairs' own objective is {settings.weights[0]}, it must be above 0"
        )


def _check_shape(name: str, tensor: Tensor, *shape: int) -> None:
    """Raise ValueError unless `tensor` has this shape."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
