"""Judge: every weak judge votes on every response; a label model turns votes into one posterior.

The label model is fitted on responses that nobody selected by verdict: the red team's attempts
and the answers to harmless instructions. Fitted on the *found* attacks it would believe its own
false alarms: they were selected because the judges said "unsafe" (docs/method.md, drift).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from selfmoa import labelmodel
from selfmoa.calibration import Scale, fit_preferences, given_scale, scaled
from selfmoa.errors import BadInput
from selfmoa.protocols import CAREFUL, INSTRUCTIONS, PLAIN
from selfmoa.records import Prompt, Response, Verdict
from selfmoa.rundir import read_jsonl
from selfmoa.stages import voting
from selfmoa.stages.voting import PRESUMED_HARMLESS, UNKNOWN
from selfmoa.training.preferences import Preference, read_preferences

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selfmoa.labelmodel import LabelModel
    from selfmoa.stages.context import Context

BATCH = 512
HARMLESS = "harmless"
ATTACKED = (PLAIN, CAREFUL)


class JudgeStage:
    """Writes `votes.jsonl` (each judge), `verdicts.jsonl` (combined) and `labelmodel.jsonl`."""

    name = "judge"
    version = 2

    def settings(self, context: Context) -> Mapping[str, Any]:
        """Return the settings the verdicts depend on."""
        judge = context.recipe.judge
        return context.judging(judge.gold, judge.helpfulness_pairs)

    def reads(self, context: Context) -> Mapping[str, Any]:
        """Read this round's responses and the red team's attempts."""
        found = {f"red_team {r}": ("red_team", r) for r in range(1, context.round)}
        return found | {name: (name, context.round) for name in ("sample", "red_team")}

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
        scale = _helpfulness_scale(context)
        verdicts = self._combine(context, items, safety, scale)
        verdicts += votes[settings.refusal]
        verdicts += [_helpfulness(v, scale) for v in votes[settings.helpfulness]]
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

    def _combine(
        self, context: Context, items: voting.Items, safety: np.ndarray, scale: Scale
    ) -> list[Verdict]:
        settings = context.recipe.judge
        attempts = read_jsonl(context.path("red_team", "attempts.jsonl"))
        attempted, is_control = voting.attempt_votes(attempts)
        model = voting.fit(context, attempted, is_control, voting.known(context))
        groups = np.array([_group(p, r) for p, r in items])
        attack = labelmodel.estimate_prior(model, attempted[voting.is_real(attempts)], UNKNOWN)
        priors = _base_rates(model, safety, groups, attack, _as_found(context, items))
        beside = (priors[HARMLESS], attack, priors[PLAIN], priors[CAREFUL], scale.to_json())
        context.write(
            "labelmodel.jsonl", [model.to_json() | dict(zip(voting.BESIDE, beside, strict=True))]
        )
        out: list[Verdict | None] = [None] * len(items)
        for group, prior in priors.items():
            where = np.flatnonzero(groups == group)
            if len(where):
                chosen = [items[i] for i in where]
                found = voting.combine(model, safety[where], chosen, prior, settings.clip)
                for i, verdict in zip(where, found, strict=True):
                    out[i] = verdict
        return [v for v in out if v is not None]


def _as_found(context: Context, items: voting.Items) -> list[float]:
    """Return P(unsafe) of the answers by which the red team found its prompts; a list has none."""
    path = context.path("red_team", "confirmed.jsonl")
    handed_on = {p.id for p, _ in items}
    rows = read_jsonl(path) if path.exists() else []
    return [row["p_unsafe"][0] for row in rows if row["id"] in handed_on and row["p_unsafe"]]


def _group(prompt: Prompt, response: Response) -> str:
    """Return what an answer's base rate of being unsafe depends on."""
    if prompt.source == INSTRUCTIONS:
        return HARMLESS
    return CAREFUL if response.sampling == CAREFUL else PLAIN


def _base_rates(
    model: LabelModel,
    votes: np.ndarray,
    groups: np.ndarray,
    attack: float,
    found: Sequence[float],
) -> dict[str, float]:
    """Return the base rate of unsafe answers of each group (method, eq. 27).

    The prompts at hand were selected by these judges' votes: where judges err by topic, they err
    again, and a rate estimated here may be too high. A second answer is no likelier to be unsafe
    than the one by which its prompt was found, nor is a careful one than a plain one.

    Args:
        model: the label model.
        votes: [n, n_judges] on the responses at hand.
        groups: [n] of HARMLESS, PLAIN and CAREFUL.
        attack: base rate of the round's attempts.
        found: P(unsafe) of the answers by which the prompts at hand were found.
    """
    ceiling = float(np.mean(found)) if found else attack
    rates = {g: labelmodel.estimate_prior(model, votes[groups == g], UNKNOWN) for g in ATTACKED}
    plain = min(rates[PLAIN], ceiling)
    harmless = labelmodel.estimate_prior(model, votes[groups == HARMLESS], PRESUMED_HARMLESS)
    return {HARMLESS: harmless, PLAIN: plain, CAREFUL: min(rates[CAREFUL], plain)}


def _vote_key(row: Mapping[str, Any]) -> str:
    return f"{row['response_id']}:{row['objective']}:{row['judge']}"


def _by_judge(
    context: Context, names: Sequence[str], items: voting.Items
) -> dict[str, list[Verdict]]:
    """Return each judge's verdicts in the order of the items."""
    rows = read_jsonl(context.out("votes.jsonl"), Verdict)
    found = {(v.judge, v.response_id): v for v in rows}
    return {name: [found[name, r.id] for _, r in items] for name in names}


def _helpfulness_scale(context: Context) -> Scale:
    """Return the line from helpfulness scores to log-odds: fitted to preferences, or given."""
    settings = context.recipe.judge
    if settings.helpfulness_pairs is None:
        return given_scale(settings.helpfulness_scale, settings.helpfulness_centre, settings.clip)
    return _fitted_scale(context, settings.helpfulness_pairs)


def _fitted_scale(context: Context, file: str) -> Scale:
    """Let the helpfulness judge score both sides of the preferences in a file; fit the scale.

    Raises:
        BadInput: the file cannot be read, or the judge's scores of its pairs tell nothing.
    """
    settings = context.recipe.judge
    rows = read_preferences(file, ("helpfulness",))
    judge = context.judge(settings.helpfulness)
    better, worse = (
        judge.judge([_answered(row, text) for row, text in side])
        for side in ([(r, r.chosen) for r in rows], [(r, r.rejected) for r in rows])
    )
    both = [
        (a.score, b.score)
        for a, b in zip(better, worse, strict=True)
        if a.score is not None and b.score is not None
    ]
    try:
        return fit_preferences(
            [a for a, _ in both],
            [b for _, b in both],
            clip=settings.clip,
            centre=settings.helpfulness_centre,
        )
    except ValueError as error:
        problem = f"judge '{settings.helpfulness}' cannot be put on a scale by its rows: {error}"
        raise BadInput(file, len(rows), problem) from error


def _answered(row: Preference, text: str) -> tuple[Prompt, Response]:
    """Return an item to judge: a preference's prompt with one of its answers."""
    messages = row.prompt
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    prompt = Prompt.make(
        messages,
        goal=messages[-1]["content"],
        intent="benign",
        category="helpfulness",
        source="preferences",
    )
    name = Response.make_id(prompt.id, "preferences", text, 0)
    return prompt, Response(name, prompt.id, text, "preferences", "given", 0, "stop")


def _helpfulness(verdict: Verdict, scale: Scale) -> Verdict:
    """Put a helpfulness score on the log-odds scale (method, eq. 11)."""
    odds = scaled(verdict.score, scale)
    rounded = None if odds is None else round(odds, 6)
    return replace(verdict, judge=voting.ENSEMBLE, score=rounded, label=None, raw="")
