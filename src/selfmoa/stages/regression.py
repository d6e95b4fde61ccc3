"""Have holes opened again? Closed attacks of the archive are put to the new policy once more.

Closed is what worked on some policy and no longer did on the one that this round attacked, when it
was asked again. The new policy is asked anew, k times; old replies are never judged again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from selfmoa import metrics
from selfmoa.attacks.archive import Archive
from selfmoa.attacks.turns import is_talk
from selfmoa.protocols import Draw
from selfmoa.rundir import read_jsonl
from selfmoa.stages import voting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from selfmoa.attacks.archive import Entry
    from selfmoa.records import Estimate
    from selfmoa.stages.context import Context


def replay(context: Context, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each closed attack: its cell, and P(unsafe) before and after this round.

    Conversations are held anew: their old replies are another policy's.
    """
    entries = _closed(context)
    if not entries:
        return []
    recipe, policy = context.recipe, context.models.answering(folder)
    k, prompts = recipe.red_team.k, {e.prompt.id: e.prompt for e in entries}
    draws = [
        Draw(p, context.seed("regression", p.id, i))
        for p in prompts.values()
        if not is_talk(p)
        for i in range(k)
    ]
    sampling = context.sampling("regression")
    responses = context.generate(policy, draws, sampling, "responses-regression.jsonl")
    asked = [(r.prompt_id, prompts[r.prompt_id], r) for r in responses]
    asked += context.talk_again(policy, list(filter(is_talk, prompts.values())), sampling, k)
    if not asked:
        return []
    judges = [context.judge(name) for name in recipe.judge.safety]
    items = [(prompt, response) for _, prompt, response in asked]
    votes = voting.vote_matrix(voting.vote(judges, items))
    model = read_jsonl(context.path("judge", "labelmodel.jsonl"))[0]
    after: dict[str, list[float]] = {name: [] for name in prompts}
    unsafe = voting.p_unsafe(voting.posterior(model, votes))
    for (name, _, _), p in zip(asked, unsafe, strict=True):
        after[name].append(float(p))
    attacked = context.models.answering(context.policy_folder(context.round)).model
    return [
        {
            "id": e.prompt.id,
            "category": e.prompt.category,
            "style": e.prompt.style,
            "before": round(e.on(attacked)[0] / e.on(attacked)[1], 6),
            "after": round(float(np.mean(after[e.prompt.id])), 6),
        }
        for e in entries
        if after[e.prompt.id]
    ]


def _closed(context: Context) -> list[Entry]:
    """Return the closed attacks that are asked again, the most at `gate.replays`."""
    settings = context.recipe.red_team
    attacked = context.models.answering(context.policy_folder(context.round)).model
    archive = Archive.from_rows(
        read_jsonl(context.path("red_team", "archive.jsonl")),
        settings.cell_size,
        attacked,
        settings.keep_above,
    )
    return sorted(archive.entries("closed"), key=lambda e: e.prompt.id)[
        : context.recipe.gate.replays
    ]


def reopened(rows: Sequence[Mapping[str, Any]]) -> Estimate:
    """Return by how much closed attacks work oftener than before, attack by attack."""
    sides = [[row[name] for row in rows] for name in ("before", "after")]
    return metrics.paired_difference("reopened", sides[0], sides[1], voting.ENSEMBLE)
