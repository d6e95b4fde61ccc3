"""Red team: find prompts on which this policy is unsafe, cell by cell, and keep them.

Batches of rewrites are put to the policy once each. The weak judges vote on (original intent,
response); a label model fitted on all attempts so far, chosen by nobody, gives P(unsafe); what
exceeds the threshold enters the archive. Attacks of earlier rounds are replayed first: the target
is asked again, and what no longer works is closed. What is to be handed on, and what was replayed,
is then asked k times in all: training gets the hard ones first, those that work in few of k.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from selfmoa.stages import voting
from selfmoa.stages.hunt import STATIC, Hunt, Shot, joined

if TYPE_CHECKING:
    from collections.abc import Mapping

    from selfmoa.stages.context import Context


IDLE = 3
"""Batches in a row that bring nothing new, after which the search ends."""


class RedTeamStage:
    """Writes `attempts.jsonl`, `confirmed.jsonl`, `archive.jsonl`, `search.json`, `prompts.jsonl`.

    `responses.jsonl` holds the answers that confirm.
    """

    name = "red_team"
    version = 3

    def settings(self, context: Context) -> Mapping[str, Any]:
        """Return the settings the attacks depend on."""
        recipe = context.recipe
        sampling = recipe.sample
        added: dict[str, dict[str, Any]] = {
            "attackers": {name: own.model_dump() for name, own in recipe.attackers.items()},
            "added_seeds": joined(context, recipe.added_seeds),
            "added_attacks": joined(context, recipe.added_attacks),
        }
        return {
            "red_team": recipe.red_team.model_dump(),
            "held_out": recipe.held_out.model_dump(),
            **{name: found for name, found in added.items() if found},
            **context.judging(recipe.judge.gold),
            "sample": {
                "careful": sampling.careful,
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_new_tokens,
            },
        }

    def reads(self, context: Context) -> Mapping[str, Any]:
        """Read the policy under attack and what earlier rounds found."""
        found = {"reset": ("reset", 0)}
        for r in range(1, context.round):
            found[f"train {r}"] = ("train", r)
            found[f"evaluate {r}"] = ("evaluate", r)
            found[f"red_team {r}"] = ("red_team", r)
        return found

    def run(self, context: Context) -> None:
        """Search in batches, ask again what was found, hand it on with harmless instructions."""
        hunt = Hunt(context)
        hunt.ask([Shot(voting.CONTROL, p) for p in hunt.harmless], 0)
        settings = context.recipe.red_team
        if settings.static:
            fixed = context.world.static_attacks(settings.static)
            hunt.ask([Shot(STATIC, p) for p in fixed], 1)
            context.write("archive.jsonl", [])
            context.write("prompts.jsonl", fixed + hunt.harmless)
            return
        search, started, idle = hunt.search, time.monotonic(), 0
        for n, shots in enumerate(hunt.batches(started), 1):
            rows = hunt.ask(shots, n)
            if rows:
                hunt.learn(rows, shots)
            idle = 0 if rows else idle + 1
            if idle == IDLE:
                break
            context.progress(min(hunt.calls, settings.calls), settings.calls, "call")
        hunt.review()
        confirmed = hunt.confirm()
        context.write("confirmed.jsonl", confirmed)
        hunt.train_attackers(confirmed)
        context.write("archive.jsonl", search.archive.to_rows())
        context.write_text("search.json", json.dumps(hunt.figures(confirmed), indent=1) + "\n")
        context.write("prompts.jsonl", hunt.hand_on())
