"""Votes of several weak safety judges turned into one calibrated log-odds of "safe".

The model is Dawid and Skene's (1979) with two classes, abstention and Beta priors. Judge j votes
"unsafe" on an unsafe response with probability sensitivity_j and "safe" on a safe one with
specificity_j; given the truth, judges of different families err independently, and whether a
judge abstains says nothing of the truth. Judges of one family (one trained on the other, the same
word list) share errors, which is met twice:

- Learning compares one judge of each family at a time (a "view") and averages over the views. Two
  copies agree whatever the truth: taken for two witnesses, they look excellent, the rest poor.
- The posterior uses every vote but tempers those of a family of m by 1 / (1 + (m - 1) rho), since
  errors counted twice make it overconfident.

Left out on purpose: learning from fewer than three families without labelled responses. Two
judges who disagree do not say who is right, so the model then keeps its priors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from math import nan
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit

from selfmoa.records import Record

UNSAFE, SAFE, ABSTAIN = 1, 0, -1
MIN_FAMILIES = 3

Floats = npt.NDArray[np.float64]
Votes = npt.NDArray[np.int8]
"""Array [n_responses, n_judges] of UNSAFE, SAFE and ABSTAIN."""
Beta = tuple[float, float]
"""(a, b) of a Beta distribution: its mean is a / (a + b), it weighs like a + b observations."""


@dataclass(frozen=True)
class LabelModel(Record):
    """What is believed of each judge and of the base rate; tuples run along `judges`.

    `n` counts the responses the parameters were learned from, 0 if they are the priors'.
    `weights` temper the votes of the posterior. Empty `families` mean one family a judge.
    """

    judges: tuple[str, ...]
    sensitivity: tuple[float, ...]
    specificity: tuple[float, ...]
    weights: tuple[float, ...]
    prior_unsafe: float
    n: int
    identifiable: bool
    iterations: int
    families: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Build the model from JSON data, whose lists become tuples again; errors as in Record."""
        return super().from_json(
            {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        )


def fit(
    votes: Votes,
    judges: Sequence[str],
    families: Sequence[str],
    *,
    accuracy_prior: Beta = (8.0, 2.0),
    class_prior: Beta = (1.0, 1.0),
    gold: Mapping[int, bool] | None = None,
    max_iterations: int = 200,
    tolerance: float = 1e-6,
    rho: float = 0.5,
) -> LabelModel:
    """Learn the judges' accuracies and the base rate by expectation maximisation.

    It starts from the weighted majority vote. Parameters are posterior means, that is (a + right
    votes) / (a + b + votes), never 0 or 1. Judges are taken to be better than chance on average
    unless gold says otherwise: a solution with the classes exchanged is turned round.

    With votes of fewer than three families only the gold rows teach; without gold all parameters
    stay at their priors' means. `identifiable` then asks for a + b voted-on gold rows of each
    class, which is what the accuracy prior itself weighs.

    Args:
        votes: [n_responses, n_judges] of 1 (unsafe), 0 (safe), -1 (abstain).
        judges: name of each column.
        families: family of each column; equal names share errors.
        accuracy_prior: Beta(a, b) of every sensitivity and specificity.
        class_prior: Beta(a, b) of the base rate of unsafe responses.
        gold: row -> "is unsafe" of responses whose truth is known; those rows are clamped.
        max_iterations: steps of EM at most, at least 1.
        tolerance: EM stops when no parameter moves further than this.
        rho: assumed correlation of errors within a family, in [0, 1].

    Raises:
        ValueError: an argument has the wrong shape or range; the sentence says which.
    """
    _check(votes, judges)
    if len(families) != len(judges) or max_iterations < 1:
        raise ValueError("fit needs one family a judge and at least one iteration")
    if not 0 < accuracy_prior[1] <= accuracy_prior[0]:
        raise ValueError(f"accuracy_prior {accuracy_prior} calls judges worse than chance")
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is {rho}, which is no correlation in [0, 1]")
    gold = gold or {}
    if any(not 0 <= row < len(votes) for row in gold):
        raise ValueError(f"gold names rows {sorted(gold)}, there are {len(votes)} responses")
    truth = np.array([float(gold[row]) if row in gold else nan for row in range(len(votes))])
    is_gold, is_voted, voters = ~np.isnan(truth), is_judged(votes), (votes != ABSTAIN).any(axis=0)
    has_families = len(set(compress(families, voters))) >= MIN_FAMILIES
    n_gold = min(int((is_voted & (truth == label)).sum()) for label in (UNSAFE, SAFE))
    rows = is_voted | is_gold if has_families else is_gold

    # The sum of m equally correlated votes is worth m / (1 + (m - 1) rho) independent ones.
    weights = np.array([1 / (1 + (families.count(family) - 1) * rho) for family in families])
    voted = np.maximum((votes != ABSTAIN) @ weights, weights.min())
    accuracies, prior, iterations = _maximise(
        votes[rows],
        truth[rows],
        ((votes == UNSAFE) @ weights / voted)[rows],
        _views(families),
        accuracy_prior,
        class_prior,
        max_iterations,
        tolerance,
    )
    if not is_gold.any() and accuracies.mean() < 0.5:
        # P(votes "unsafe" | unsafe) is P(votes "unsafe" | safe) once the classes change names.
        accuracies, prior = 1 - accuracies[::-1], 1 - prior
    return LabelModel(
        tuple(judges),
        tuple(accuracies[0].tolist()),
        tuple(accuracies[1].tolist()),
        tuple(weights.tolist()),
        prior,
        int(rows.sum()),
        has_families or n_gold >= sum(accuracy_prior),
        iterations,
        tuple(families),
    )


def is_judged(votes: Votes) -> npt.NDArray[np.bool_]:
    """Return [n_responses]: whether any judge voted. The others must be counted as unjudged."""
    return np.asarray((votes != ABSTAIN).any(axis=1))


def log_odds_safe(
    model: LabelModel, votes: Votes, prior_unsafe: float | None = None, clip: float = 6.0
) -> Floats:
    """Return the posterior log P(safe) / P(unsafe) of each response, within [-clip, clip].

    `votes` is [n, J] in the order of `model.judges`; `prior_unsafe` in (0, 1) replaces the model's
    base rate. A clip of 6 is P = 0.9975, more than weak judges can vouch for. A row of abstentions
    gets the base rate's log-odds, which is no verdict: mask it with `is_judged` before anything is
    counted or trained on.

    Raises:
        ValueError: the votes do not fit the model, or the base rate leaves (0, 1).
    """
    _check(votes, model.judges)
    prior = model.prior_unsafe if prior_unsafe is None else prior_unsafe
    if not 0 < prior < 1:
        raise ValueError(f"prior_unsafe is {prior}, which is no base rate in (0, 1)")
    evidence = _log_ratios(votes, (model.sensitivity, model.specificity)) @ np.array(model.weights)
    log_odds: Floats = np.clip(-(logit(prior) + evidence), -clip, clip)
    return log_odds


def estimate_prior(model: LabelModel, votes: Votes, class_prior: Beta = (1.0, 1.0)) -> float:
    """Return the base rate of unsafe responses in `votes`, the judges' accuracies held fixed.

    The rate falls from round to round while the judges stay the same; yesterday's rate would make
    the posterior too sure of "unsafe". EM over the views, posterior mean, so the result lies
    strictly within (0, 1). Unjudged rows are left out.

    A model that is not `identifiable`, or votes without a verdict, give back the model's own rate:
    accuracies that are only assumed would explain every alarm away as a false one.

    Raises:
        ValueError: the votes do not fit the model.
    """
    _check(votes, model.judges)
    votes = votes[is_judged(votes)]
    prior = model.prior_unsafe
    if not model.identifiable or not len(votes):
        return prior
    views = _views(model.families or model.judges)
    evidence = _log_ratios(votes, (model.sensitivity, model.specificity)) @ views.T
    for _ in range(1000):  # a slow case (weak judges, rare class) takes some hundred
        previous, prior = prior, _base_rate(expit(logit(prior) + evidence), class_prior)
        if abs(prior - previous) < 1e-8:
            break
    return prior


def flip_probability(p_safe_chosen: npt.ArrayLike, p_safe_rejected: npt.ArrayLike) -> Floats:
    """Return P(chosen is unsafe and rejected is safe | one is safe, the other is not).

    Its logit is minus the difference of the two log-odds of safe; 0.5 where the two cannot differ.
    Arguments are probabilities of one shape.

    Raises:
        ValueError: an argument leaves [0, 1].
    """
    chosen, rejected = np.asarray(p_safe_chosen, float), np.asarray(p_safe_rejected, float)
    if not all(((p >= 0) & (p <= 1)).all() for p in (chosen, rejected)):
        raise ValueError("P(safe) must lie in [0, 1]")
    wrong, right = (1 - chosen) * rejected, chosen * (1 - rejected)
    flip = np.full(wrong.shape, 0.5)
    np.divide(wrong, wrong + right, out=flip, where=wrong + right > 0)
    return flip


def krippendorff_alpha(votes: Votes) -> float:
    """Return Krippendorff's nominal alpha of the judges; abstentions are missing values.

    alpha = 1 - (N - 1) sum_u o_u / (2 N_0 N_1), o_u = 2 n_u0 n_u1 / (n_u - 1), over the responses
    u with n_u >= 2 votes; N, N_0, N_1 count the votes on those. 1 is full agreement, 0 chance; NaN
    where the votes are all alike, or none: agreeing on a constant says nothing.
    """
    paired = votes[(votes != ABSTAIN).sum(axis=1) >= 2]
    unsafe, safe = (paired == UNSAFE).sum(axis=1), (paired == SAFE).sum(axis=1)
    n_unsafe, n_safe = int(unsafe.sum()), int(safe.sum())
    if not n_unsafe or not n_safe:
        return nan
    observed = float((2 * unsafe * safe / (unsafe + safe - 1)).sum())
    return 1 - (n_unsafe + n_safe - 1) * observed / (2 * n_unsafe * n_safe)


def _maximise(
    votes: Votes,
    truth: Floats,
    majority: Floats,
    views: Floats,
    accuracy_prior: Beta,
    class_prior: Beta,
    max_iterations: int,
    tolerance: float,
) -> tuple[Floats, float, int]:
    """Run EM; return accuracies [2, J] (sensitivity, specificity), base rate, iterations used.

    `truth` [n] is 1, 0 or NaN where unknown, `majority` [n] the first guess of P(unsafe).
    """
    known, truth = ~np.isnan(truth)[:, None], truth[:, None]
    said_unsafe, said_safe = votes == UNSAFE, votes == SAFE
    unsafe = np.where(known, truth, np.repeat(majority[:, None], len(views), axis=1))  # [n, V]
    parameters, iterations, is_moving = np.zeros(2 * votes.shape[1] + 1), 0, True
    while is_moving and iterations < max_iterations:
        by_judge = unsafe @ views / views.sum(axis=0)  # [n, J]: mean over the views of judge j
        right = np.stack([by_judge * said_unsafe, (1 - by_judge) * said_safe]).sum(axis=1)
        wrong = np.stack([by_judge * said_safe, (1 - by_judge) * said_unsafe]).sum(axis=1)
        accuracies = (accuracy_prior[0] + right) / (sum(accuracy_prior) + right + wrong)
        prior = _base_rate(unsafe, class_prior)
        posterior = expit(logit(prior) + _log_ratios(votes, accuracies) @ views.T)
        unsafe = np.where(known, truth, posterior)
        previous, parameters = parameters, np.append(accuracies, prior)
        is_moving = bool(np.abs(parameters - previous).max() > tolerance)
        iterations += 1
    return accuracies, prior, iterations


def _base_rate(unsafe: Floats, class_prior: Beta) -> float:
    """Return the posterior mean of the base rate, given P(unsafe) [n, V] in each view."""
    return (class_prior[0] + float(unsafe.mean(axis=1).sum())) / (sum(class_prior) + len(unsafe))


def _log_ratios(votes: Votes, accuracies: npt.ArrayLike) -> Floats:
    """Return log P(vote | unsafe) / P(vote | safe) [n, J]; 0 for an abstention."""
    sensitivity, specificity = np.asarray(accuracies, float)
    alarm, clearance = (
        np.log(sensitivity / (1 - specificity)),
        np.log((1 - sensitivity) / specificity),
    )
    return np.where(votes == UNSAFE, alarm, np.where(votes == SAFE, clearance, 0.0))


def _views(families: Sequence[str]) -> Floats:
    """Return [V, J] of 0 and 1: each row picks one judge of each family, V the largest family.

    Families a, a, b give [[1, 0, 1], [0, 1, 1]].
    """
    size = np.array([families.count(family) for family in families])
    place = np.array([families[:j].count(family) for j, family in enumerate(families)])
    views: Floats = (np.arange(size.max())[:, None] % size == place).astype(float)
    return views


def _check(votes: Votes, judges: Sequence[str]) -> None:
    """Raise ValueError unless `votes` is [n, J] of 1, 0 and -1 for these judges."""
    if votes.ndim != 2 or votes.shape[1] != len(judges) or not judges:
        raise ValueError(f"votes have shape {votes.shape}, expected [n, {len(judges)}]")
    if not np.isin(votes, (UNSAFE, SAFE, ABSTAIN)).all():
        raise ValueError("votes hold something else than 1 (unsafe), 0 (safe) and -1 (abstain)")
