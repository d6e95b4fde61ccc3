"""Train: pairs and anchors become the next policy, by multi-objective preference optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfmoa.errors import StageFailed
from selfmoa.records import PreferencePair
from selfmoa.rundir import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from selfmoa.stages.context import Context


class TrainStage:
    """Writes `policy/` and `train.jsonl`."""

    name = "train"
    version = 2

    def settings(self, context: Context) -> Mapping[str, Any]:
        """Return the settings the next policy depends on."""
        recipe = context.recipe
        return {"train": recipe.train.model_dump(), "policy": recipe.policy.model_dump()}

    def reads(self, context: Context) -> Mapping[str, Any]:
        """Read the pairs of this round (and of earlier ones, to replay) and the policies."""
        found = {"reset": ("reset", 0), "pair": ("pair", context.round)}
        for r in range(1, context.round):
            found |= {f"{name} {r}": (name, r) for name in ("pair", "train", "evaluate")}
        return found

    def run(self, context: Context) -> None:
        """Train from the last accepted policy (or the reset one) on this round's pairs."""
        from selfmoa.training import fitting
        from selfmoa.training.preferences import from_pairs

        settings = context.recipe.train
        rounds = range(1 if settings.replay else context.round, context.round + 1)
        pairs = self._pairs(context, rounds)
        anchors = [
            (row["prompt"], row["completion"][0]["content"])
            for r in rounds
            for row in read_jsonl(context.path("pair", "anchors.jsonl", r))
        ]
        if not pairs:
            raise StageFailed(
                "train",
                context.round,
                "there are no pairs to train on",
                "loosen pair.min_safety_gap or pair.max_flip, or raise red_team.calls",
            )
        context.models.free()
        done = fitting.fit_policy(
            self._policy(context, settings.start),
            self._policy(context, settings.reference),
            context.out("policy"),
            from_pairs(pairs),
            anchors,
            settings,
            context.recipe.policy,
            seed=context.seed("order"),
            progress=context.progress,
            say=context.say,
        )
        context.write_log(done.log)
        context.dropped.update(done.dropped)

    def _pairs(self, context: Context, rounds: range) -> list[PreferencePair]:
        weights = context.recipe.train.weights
        return [
            pair
            for r in rounds
            for pair in read_jsonl(context.path("pair", "pairs.jsonl", r), PreferencePair)
            if weights.get(pair.objective, 0) > 0
        ]

    def _policy(self, context: Context, which: str) -> Path:
        return context.reset_folder if which == "reset" else context.policy_folder(context.round)
