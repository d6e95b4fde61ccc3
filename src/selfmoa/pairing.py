"""Verdicts to preference pairs: pure functions of what was judged, nothing is dropped unsaid.

Safety first: where two responses to a prompt differ clearly in P(safe), the safer one is chosen
and the difference in helpfulness travels along as MODPO's margin. Among responses that are surely
safe, the more helpful one is chosen and the difference in safety is the margin.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from selfmoa.labelmodel import flip_probability
from selfmoa.records import Objective, PreferencePair, Prompt, Response

DUPLICATE = "both responses say the same"
UNJUDGED = "a response is unjudged"
NO_CONSENSUS = "the policy's careful answers do not agree on refusing"
NO_GAP = "no clear difference"
LIKELY_FLIPPED = "too likely the wrong way round"
CROWDED_OUT = "beyond the limit of pairs a prompt"
OVER_BUDGET = "beyond the limit of pairs a round"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A response and its combined verdicts.

    Attributes:
        response: the response.
        safety: log-odds of safe, or None if no judge voted.
        helpfulness: log-odds of helpful, or None if unjudged.
        is_refusal: whether it refuses, by rule.
        is_careful: whether it was drawn under the careful system prompt.
    """

    response: Response
    safety: float | None
    helpfulness: float | None
    is_refusal: bool = False
    is_careful: bool = False


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What counts as a clear difference; see the recipe's section `pair` for the ranges."""

    min_safety_gap: float = 0.5
    max_flip: float = 0.2
    min_helpfulness_gap: float = 1.0
    min_safe: float = 0.8
    min_consensus: float = 0.75
    per_prompt: int = 2


@dataclass(frozen=True, slots=True)
class _Judged:
    """A candidate with both scores, and P(safe)."""

    response: Response
    safety: float
    helpfulness: float
    p_safe: float
    is_refusal: bool


@dataclass(frozen=True, slots=True)
class _Proposal:
    """A possible pair; larger `merit` is kept first."""

    chosen: _Judged
    rejected: _Judged
    objective: Objective
    flip: float
    merit: tuple[float, ...]


Dropped = Counter[str]


def build_pairs(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    thresholds: Thresholds,
    objectives: Sequence[Objective] = ("safety", "helpfulness"),
) -> tuple[list[PreferencePair], Dropped]:
    """Return the pairs of one prompt and how many candidates or pairs were dropped, by reason.

    Args:
        prompt: what the candidates answer.
        candidates: judged responses, at least two for any pair to come of them.
        thresholds: what counts as a clear difference.
        objectives: which objectives may be the one a pair is chosen by.
    """
    dropped: Dropped = Counter()
    judged = _distinct(candidates, dropped)
    consensus = refusal_consensus(candidates)
    pairs = []
    for objective in objectives:
        propose = _propose_safety if objective == "safety" else _propose_helpfulness
        proposals = [
            p for a, b in product(judged, repeat=2) if (p := propose(a, b, thresholds, dropped))
        ]
        n_proposed = len(proposals)
        proposals = [p for p in proposals if _has_consensus(p, consensus, thresholds)]
        dropped[NO_CONSENSUS] += n_proposed - len(proposals)
        proposals.sort(
            key=lambda p: (p.merit, p.chosen.response.id, p.rejected.response.id), reverse=True
        )
        kept = _spread(proposals, thresholds.per_prompt)
        dropped[CROWDED_OUT] += len(proposals) - len(kept)
        pairs += [_make(prompt, p) for p in kept]
    if not pairs:
        dropped[NO_GAP] += 1
    return pairs, +dropped


def refusal_consensus(candidates: Sequence[Candidate]) -> float | None:
    """Return the share of the careful draws that refuse, or None without careful draws.

    Weak judges err by topic, all k responses alike; the policy's own careful answers err in
    other ways. Where they do not agree with the verdicts, nothing is learnt from a prompt.
    """
    careful = [c.is_refusal for c in candidates if c.is_careful]
    return sum(careful) / len(careful) if careful else None


def _has_consensus(p: _Proposal, consensus: float | None, thresholds: Thresholds) -> bool:
    """Return whether careful draws back a refusal that beats, or loses to, an answer."""
    if consensus is None or p.chosen.is_refusal == p.rejected.is_refusal:
        return True
    agreement = consensus if p.chosen.is_refusal else 1 - consensus
    return agreement >= thresholds.min_consensus


def _distinct(candidates: Sequence[Candidate], dropped: Dropped) -> list[_Judged]:
    """Return judged candidates with distinct texts; one text twice teaches nothing."""
    seen: dict[str, _Judged] = {}
    for c in candidates:
        if c.safety is None or c.helpfulness is None:
            dropped[UNJUDGED] += 1
        elif c.response.text in seen:
            dropped[DUPLICATE] += 1
        else:
            p_safe = 1 / (1 + math.exp(-c.safety))
            seen[c.response.text] = _Judged(
                c.response, c.safety, c.helpfulness, p_safe, c.is_refusal
            )
    return list(seen.values())


def _propose_safety(
    a: _Judged, b: _Judged, thresholds: Thresholds, dropped: Dropped
) -> _Proposal | None:
    gap = a.p_safe - b.p_safe
    if gap <= 0 or gap < thresholds.min_safety_gap:
        return None
    flip = float(flip_probability(a.p_safe, b.p_safe))
    if flip > thresholds.max_flip:
        dropped[LIKELY_FLIPPED] += 1
        return None
    # Of equally safe answers the more helpful one: a redirect goes before a bare refusal.
    return _Proposal(a, b, "safety", flip, (round(gap, 3), a.helpfulness, b.helpfulness))


def _propose_helpfulness(
    a: _Judged, b: _Judged, thresholds: Thresholds, dropped: Dropped
) -> _Proposal | None:
    gap = a.helpfulness - b.helpfulness
    if gap <= 0 or gap < thresholds.min_helpfulness_gap:
        return None
    if min(a.p_safe, b.p_safe) < thresholds.min_safe:
        return None
    flip = 1 / (1 + math.exp(gap))
    if flip > thresholds.max_flip:
        dropped[LIKELY_FLIPPED] += 1
        return None
    return _Proposal(a, b, "helpfulness", flip, (gap, a.p_safe))


def _spread(proposals: Iterable[_Proposal], limit: int) -> list[_Proposal]:
    """Return the best `limit` proposals in which no response is rejected twice."""
    kept: list[_Proposal] = []
    for p in proposals:
        if len(kept) == limit:
            break
        if all(p.rejected is not k.rejected for k in kept):
            kept.append(p)
    return kept


def _make(prompt: Prompt, p: _Proposal) -> PreferencePair:
    return PreferencePair.make(
        prompt,
        p.chosen.response,
        p.rejected.response,
        objective=p.objective,
        margins={
            "safety": p.chosen.safety - p.rejected.safety,
            "helpfulness": p.chosen.helpfulness - p.rejected.helpfulness,
        },
        flip_probability=p.flip,
    )


def weighted_pair(
    prompt: Prompt,
    candidates: Sequence[Candidate],
    thresholds: Thresholds,
    weights: Mapping[str, float],
) -> tuple[list[PreferencePair], Dropped]:
    """Return best against worst by the weighted sum of log-odds: the single-score baseline.

    The pair counts as one of "safety" so that one loss serves it; supervised best-of-k training
    takes its chosen side.
    """
    dropped: Dropped = Counter()

    def score(c: _Judged) -> float:
        return weights["safety"] * c.safety + weights["helpfulness"] * c.helpfulness

    judged = sorted(_distinct(candidates, dropped), key=lambda c: (score(c), c.response.id))
    if len(judged) < 2 or score(judged[-1]) - score(judged[0]) < thresholds.min_helpfulness_gap:
        dropped[NO_GAP] += 1
        return [], +dropped
    best, worst = judged[-1], judged[0]
    flip = 1 / (1 + math.exp(score(best) - score(worst)))
    return [_make(prompt, _Proposal(best, worst, "safety", flip, ()))], +dropped


def within_budget(
    pairs: Sequence[PreferencePair], limit: int
) -> tuple[list[PreferencePair], Dropped]:
    """Return at most `limit` pairs, least doubtful first, objectives taking turns."""
    by_objective: dict[str, list[PreferencePair]] = {}
    for pair in sorted(pairs, key=lambda p: (p.flip_probability, p.id)):
        by_objective.setdefault(pair.objective, []).append(pair)
    kept: list[PreferencePair] = []
    queues = [by_objective[name] for name in sorted(by_objective)]
    for i in range(max(map(len, queues), default=0)):
        kept += [queue[i] for queue in queues if i < len(queue)]
    dropped = Counter({OVER_BUDGET: max(0, len(kept) - limit)})
    return kept[:limit], +dropped
