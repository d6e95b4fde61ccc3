"""The multi-objective preference task: groups of pairs that share a prompt, and their losses.

The mean loss of the pairs is one term of a step (method, eq. 10). The reference's log-probabilities
are known before the first step (`reference`); the policy's come from rows in which a prompt is
read once for all its responses (`layouts`), without ever making the logits (`logprobs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from selfmoa.errors import BadInput
from selfmoa.training.layouts import hidden_states
from selfmoa.training.logprobs import head_of, sum_logps, token_logps
from selfmoa.training.losses import Loss, LossSettings, PairLogps
from selfmoa.training.tokens import Row, encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from selfmoa.training.preferences import Preference


@dataclass(frozen=True, slots=True)
class Objective:
    """How pairs of one objective are trained on: their loss, and the order of other margins."""

    loss: Loss
    settings: LossSettings
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair of its group's completions, and what the loss needs beside log-probabilities."""

    id: str
    chosen: int
    rejected: int
    objective: str
    margins: tuple[float, ...]
    flip_probability: float
    safety: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt with its distinct completions, and the pairs between them."""

    row: Row
    pairs: tuple[Pair, ...]


def group_pairs(
    tokenizer: Any,
    preferences: Sequence[Preference],
    objectives: Mapping[str, Objective],
    most: int,
) -> list[Group]:
    """Return the pairs as token rows, those of one prompt together but at most `most` a group.

    A response that is in several pairs of a group is in its row once.
    """
    open_groups: dict[str, list[Preference]] = {}
    groups: list[list[Preference]] = []
    for each in preferences:
        members = open_groups.get(repr(each.prompt))
        if members is None or len(members) == most:
            groups.append(members := [])
            open_groups[repr(each.prompt)] = members
        members.append(each)
    texts = [list(dict.fromkeys(t for p in g for t in (p.chosen, p.rejected))) for g in groups]
    rows = encode(tokenizer, [g[0].prompt for g in groups], texts)
    return [
        Group(row, tuple(_pair(p, which, objectives) for p in g))
        for g, which, row in zip(groups, texts, rows, strict=True)
    ]


def check_losses(
    objectives: Mapping[str, Objective], preferences: Sequence[Preference], path: object
) -> None:
    """Compute the loss of every pair once, of made-up log-probabilities: no model is needed.

    Raises:
        BadInput: it cannot be computed, or it is not finite; the first such row is named.
    """
    zero = torch.zeros(1)
    for row, each in enumerate(preferences, 1):
        pair = _pair(each, [each.chosen, each.rejected], objectives)
        logps = PairLogps(
            *(zero, zero, zero, zero, torch.zeros(1, 0)),
            torch.tensor([pair.flip_probability]),
            None,
            torch.ones(1, 2),
        )
        try:
            loss = float(pair_losses(logps, [pair], objectives))
        except ValueError as error:
            raise BadInput(path, row, str(error)) from error
        if not math.isfinite(loss):
            raise BadInput(path, row, f"its loss is {loss} whatever the model says")


def _pair(each: Preference, texts: list[str], objectives: Mapping[str, Objective]) -> Pair:
    others = objectives[each.objective].others
    return Pair(
        each.id,
        texts.index(each.chosen),
        texts.index(each.rejected),
        each.objective,
        tuple(each.margins.get(name, 0.0) for name in others),
        each.flip_probability,
        each.safety,
    )


def drop_long(groups: Sequence[Group], most: int) -> tuple[list[Group], list[str]]:
    """Return the groups without pairs longer than `most` tokens, and the ids of those pairs."""
    kept, dropped = [], []
    for group in groups:
        room = most - len(group.row.prompt)
        fits = [len(tokens) <= room for tokens in group.row.completions]
        good = tuple(p for p in group.pairs if fits[p.chosen] and fits[p.rejected])
        dropped += [p.id for p in group.pairs if p not in good]
        if good:
            kept.append(_without(group, good) if len(good) < len(group.pairs) else group)
    return kept, dropped


def _without(group: Group, pairs: Sequence[Pair]) -> Group:
    """Return the group with these pairs only, and the completions that they use."""
    used = sorted({i for p in pairs for i in (p.chosen, p.rejected)})
    place = {old: new for new, old in enumerate(used)}
    row = Row(group.row.prompt, [group.row.completions[i] for i in used], group.row.weight)
    return Group(
        row,
        tuple(replace(p, chosen=place[p.chosen], rejected=place[p.rejected]) for p in pairs),
    )


@dataclass
class Preferences:
    """Preference pairs, by group; `reference` has log p of each group's completions, [k] each."""

    groups: Sequence[Group]
    objectives: Mapping[str, Objective]
    reference: Sequence[Tensor]
    layout: str
    pad_id: int
    batch_size: int
    weight: float = 1.0
    counted: tuple[str, ...] = field(init=False)
    sizes: list[int] = field(init=False)
    costs: list[int] = field(init=False)
    trained: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [len(group.pairs) for group in self.groups]
        self.costs = [group.row.n_tokens for group in self.groups]
        self.trained = [group.row.n_tokens - len(group.row.prompt) for group in self.groups]
        names = [f"{what} {name}" for name in self.objectives for what in ("pairs", "margin")]
        self.counted = ("loss", "gap", "correct", "squares", *names)

    def total(self, items: Sequence[int]) -> float:
        """Return the number of pairs."""
        return sum(self.sizes[i] for i in items)

    def losses(self, model: Any, items: Sequence[int]) -> tuple[Tensor, Mapping[str, float]]:
        """Return the loss of each pair of these groups, [n]."""
        groups = [self.groups[i] for i in items]
        hidden, batch = hidden_states(model, [g.row for g in groups], self.layout, self.pad_id)
        logps = token_logps(hidden, batch.targets, head_of(model))
        policy = sum_logps(logps, batch.owners, batch.n_completions)
        reference = torch.cat([self.reference[i] for i in items]).to(policy)
        pairs, logps_of_pairs = pair_logps(groups, policy, reference)
        losses = pair_losses(logps_of_pairs, pairs, self.objectives)
        with torch.no_grad():
            return losses, self._sums(logps_of_pairs, pairs, losses)

    def names(self, items: Sequence[int]) -> list[str]:
        """Return the pairs' ids."""
        return [f"pair {pair.id}" for i in items for pair in self.groups[i].pairs]

    def _sums(self, logps: PairLogps, pairs: Sequence[Pair], losses: Tensor) -> Mapping[str, float]:
        chosen = logps.policy_chosen - logps.reference_chosen
        rejected = logps.policy_rejected - logps.reference_rejected
        gaps = chosen - rejected
        sums = dict.fromkeys(self.counted, 0.0) | {
            "loss": float(losses.sum()),
            "gap": float(gaps.sum()),
            "correct": float((gaps > 0).sum()),
            "squares": float((chosen**2 + rejected**2).sum()),
        }
        for pair, gap in zip(pairs, gaps.tolist(), strict=True):
            sums[f"pairs {pair.objective}"] += 1
            sums[f"margin {pair.objective}"] += self.objectives[pair.objective].settings.beta * gap
        return sums

    def summary(self, sums: Mapping[str, float], total: float) -> dict[str, Any]:
        """Return means over the pairs of a step.

        `log_ratio_gap` is h in nats, `margins` the implicit reward margin beta h of the pairs of
        each objective, `kl_estimate` half the mean squared log-ratio of a response: an estimate of
        KL(reference || policy) in nats as far as the reference drew the responses.
        """
        return {
            "loss": sums["loss"] / total,
            "accuracy": sums["correct"] / total,
            "log_ratio_gap": sums["gap"] / total,
            "margins": {
                name: sums[f"margin {name}"] / sums[f"pairs {name}"]
                for name in self.objectives
                if sums[f"pairs {name}"]
            },
            "kl_estimate": sums["squares"] / (4 * total),
        }


def pair_logps(
    groups: Sequence[Group], policy: Tensor, reference: Tensor
) -> tuple[list[Pair], PairLogps]:
    """Return the pairs of some groups and their log-probabilities, without margins and safety.

    Args:
        groups: in the order of the tensors.
        policy: [n] log p of all their completions.
        reference: [n] the same under the reference.
    """
    pairs: list[Pair] = []
    chosen: list[int] = []
    rejected: list[int] = []
    lengths: list[int] = []
    for group in groups:
        pairs += group.pairs
        chosen += [len(lengths) + p.chosen for p in group.pairs]
        rejected += [len(lengths) + p.rejected for p in group.pairs]
        lengths += [len(tokens) for tokens in group.row.completions]
    return pairs, PairLogps(
        policy[chosen],
        policy[rejected],
        reference[chosen],
        reference[rejected],
        policy.new_zeros(len(pairs), 0),
        policy.new_tensor([p.flip_probability for p in pairs]),
        None,
        policy.new_tensor(lengths)[torch.tensor([chosen, rejected]).T],
    )


def pair_losses(
    logps: PairLogps, pairs: Sequence[Pair], objectives: Mapping[str, Objective]
) -> Tensor:
    """Return the loss of each pair [B]; pairs of different objectives weigh margins differently."""
    out = logps.policy_chosen.new_zeros(len(pairs))
    for name, objective in objectives.items():
        where = [i for i, pair in enumerate(pairs) if pair.objective == name]
        if where:
            out[where] = objective.loss(_select(logps, pairs, where), objective.settings)
    return out


def _select(logps: PairLogps, pairs: Sequence[Pair], where: list[int]) -> PairLogps:
    """Return the pairs of one objective, with their margins, and safety bits if all have them."""
    margins = [pairs[i].margins for i in where]
    safety = [pairs[i].safety for i in where]
    return PairLogps(
        logps.policy_chosen[where],
        logps.policy_rejected[where],
        logps.reference_chosen[where],
        logps.reference_rejected[where],
        logps.policy_chosen.new_tensor(margins).reshape(len(where), -1),
        logps.flip_probability[where],
        None if None in safety else logps.policy_chosen.new_tensor(safety),
        None if logps.lengths is None else logps.lengths[where],
    )
