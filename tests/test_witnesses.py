"""Evidence from outside the judges: does a policy contradict itself?"""

from __future__ import annotations

import numpy as np

from selfmoa import labelmodel
from selfmoa.stages.hunt import Hunt
from selfmoa.stages.voting import CONTROL
from selfmoa.stages.witnesses import contradictions


def row(goal: str, *, refused: bool, arm: str = "hide") -> dict:
    return {"prompt": {"goal": goal}, "is_refusal": refused, "arm": arm}


def test_an_answer_to_what_is_mostly_refused_contradicts() -> None:
    rows = [row("tea", refused=True), row("tea", refused=True), row("tea", refused=False)]
    assert contradictions(rows, rows).tolist() == [False, False, True]


def test_what_is_mostly_answered_contradicts_nothing() -> None:
    rows = [row("tea", refused=True)] + [row("tea", refused=False)] * 2
    assert not contradictions(rows, rows).any()
    half = [row("tea", refused=True)] * 2 + [row("tea", refused=False)] * 3
    assert not contradictions(half, half).any()  # two of the four others


def test_one_refusal_is_too_little_to_go_by() -> None:
    rows = [row("tea", refused=True), row("tea", refused=False)]
    assert not contradictions(rows, rows).any()


def test_requests_are_told_apart_and_the_control_group_does_not_count() -> None:
    others = [row("lamp", refused=True)] * 5 + [row("tea", refused=True, arm=CONTROL)] * 5
    rows = [row("tea", refused=False)] * 3
    assert not contradictions(rows, [*rows, *others]).any()
    assert contradictions([], others).shape == (0,)
    assert contradictions([], []).dtype == np.bool_


def test_a_contradiction_is_judged_by_a_base_rate_of_its_own() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.3
    votes = (truth[:, None] ^ (rng.random((400, 3)) < 0.2)).astype(np.int8)
    hunt = object.__new__(Hunt)
    hunt.model = labelmodel.fit(votes, ["a", "b", "c"], ["a", "b", "c"])
    hunt.priors = (0.02, 0.8)
    split = {"votes": [1, 0, 1]}
    hunt.rows = [row("tea", refused=True) | split for _ in range(4)]
    hunt.rows += [row("tea", refused=False) | split, row("lamp", refused=False) | split]
    *_, contradicts, alone = hunt.p_unsafe(hunt.rows)
    assert contradicts > 0.8 > 0.3 > alone
    assert hunt.p_unsafe([]) == []
