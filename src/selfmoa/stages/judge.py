"""Judge: every weak judge votes on every response; a label model turns votes into one posterior.

The label model is fitted on responses that nobody selected by verdict: the red team's attempts
and the answers to harmless instructions. Fitted on the *found* attacks it would believe its own
false alarms: they were selected because the judges said "unsafe" (docs/method.md, drift).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from selfmoa import labelmodel
from selfmoa.protocols import INSTRUCTIONS
from selfmoa.records import Prompt, Response, Verdict
from selfmoa.rundir import read_jsonl
from selfmoa.stages import voting
from selfmoa.stages.voting import PRESUMED_HARMLESS, UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfmoa.stages.context import Context

BATCH = 512


class JudgeStage:
    """Writes `votes.jsonl` (each judge), `verdicts.jsonl` (combined) and `labelmodel.jsonl`."""

    name = "judge"
    version = 1

    def settings(self, context: Context) -> Mapping[str, Any]:
        """Return the settings the verdicts depend on."""
        return {"judge": context.recipe.judge.model_dump()}

    def reads(self, context: Context) -> Mapping[str, Any]:
        """Read this round's responses and the red team's attempts."""
        return {"sample": ("sample", context.round), "red_team": ("red_team", context.round)}

    def run(self, context: Context) -> None:
        """Vote, fit the label model, combine."""
        settings = context.recipe.judge
        prompts = {p.id: p for p in read_jsonl(context.path("red_team", "prompts.jsonl"), Prompt)}
        responses = read_jsonl(context.path("sample", "responses.jsonl"), Response)
        items = [(prompts[r.prompt_id], r) for r in responses]
        names = (*settings.safety, settings.helpfulness, settings.refusal)
        self._vote(context, names, items)
        votes = _by_judge(context, names, items)
        safety = voting.vote_matrix([votes[name] for name in settings.safety])
        verdicts = self._combine(context, items, safety)
        verdicts += votes[settings.refusal]
        verdicts += [
            _helpfulness(v, settings.helpfulness_scale) for v in votes[settings.helpfulness]
        ]
        context.write("verdicts.jsonl", verdicts)

    def _vote(self, context: Context, names: Sequence[str], items: voting.Items) -> None:
        """Journal every judge's verdicts, batch by batch; finished batches are not judged again."""
        journal = context.journal("votes.jsonl", _vote_key)
        judges = [context.judge(name) for name in names]
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            for judge in judges:
                last = f"{batch[-1][1].id}:{judge.objective}:{judge.name}"
                if last not in journal.keys:
                    journal.append(judge.judge(batch))
            context.progress(min(start + BATCH, len(items)), len(items), "response")

    def _combine(self, context: Context, items: voting.Items, safety: np.ndarray) -> list[Verdict]:
        settings = context.recipe.judge
        judges = [context.judge(name) for name in settings.safety]
        attempts = read_jsonl(context.path("red_team", "attempts.jsonl"))
        attempted, is_control = voting.attempt_votes(attempts)
        harmless = np.array([p.source == INSTRUCTIONS for p, _ in items])
        model = voting.fit(judges, attempted, is_control, settings)
        priors = {
            True: labelmodel.estimate_prior(model, safety[harmless], PRESUMED_HARMLESS),
            False: labelmodel.estimate_prior(model, attempted[~is_control], UNKNOWN),
        }
        context.write(
            "labelmodel.jsonl",
            [model.to_json() | {"prior_harmless": priors[True], "prior_attack": priors[False]}],
        )
        out: list[Verdict | None] = [None] * len(items)
        for group in (True, False):
            where = np.flatnonzero(harmless == group)
            if len(where):
                chosen = [items[i] for i in where]
                found = voting.combine(model, safety[where], chosen, priors[group], settings.clip)
                for i, verdict in zip(where, found, strict=True):
                    out[i] = verdict
        return [v for v in out if v is not None]


def _vote_key(row: Mapping[str, Any]) -> str:
    return f"{row['response_id']}:{row['objective']}:{row['judge']}"


def _by_judge(
    context: Context, names: Sequence[str], items: voting.Items
) -> dict[str, list[Verdict]]:
    """Return each judge's verdicts in the order of the items."""
    rows = read_jsonl(context.out("votes.jsonl"), Verdict)
    found = {(v.judge, v.response_id): v for v in rows}
    return {name: [found[name, r.id] for _, r in items] for name in names}


def _helpfulness(verdict: Verdict, scale: float) -> Verdict:
    """Put a helpfulness score in [0, 1] on the log-odds scale (method, eq. 11)."""
    if verdict.score is None:
        return Verdict(
            verdict.response_id, "helpfulness", voting.ENSEMBLE, None, None, "", verdict.error
        )
    odds = scale * (verdict.score - 0.5)
    return Verdict(
        verdict.response_id, "helpfulness", voting.ENSEMBLE, round(odds, 6), None, "", None
    )
