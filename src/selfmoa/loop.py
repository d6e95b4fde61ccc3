"""The loop: rounds of stages until nothing is found, the gate refuses too often, or rounds end.

    reset -> evaluate -> (red_team -> sample -> judge -> pair -> train -> evaluate) x R -> report

It knows nothing of files, devices or model families; `stages.context` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfmoa import registry
from selfmoa.errors import RecipeError

if TYPE_CHECKING:
    from pathlib import Path

    from selfmoa.config import Recipe
    from selfmoa.stages.context import Context, Listener

START = ("reset", "evaluate")
ROUND = ("red_team", "sample", "judge", "pair", "train", "evaluate")


def run_rounds(context: Context, only: tuple[str, int] | None = None) -> None:
    """Run every stage in order; with `only`, up to and including that stage."""

    def do(name: str, round_: int) -> bool:
        context.do(registry.resolve("stage", name)(), name, round_)
        return (name, round_) == only

    for name in START:
        if do(name, 0):
            return
    for round_ in range(1, context.recipe.rounds + 1):
        for name in ROUND:
            if do(name, round_):
                return
        decision = context.decision(round_)
        context.listen(
            "decision", round=round_, accepted=decision["accepted"], reason=decision["reason"]
        )
        if reason := why_stop(context, round_):
            context.listen("stopped", round=round_, reason=reason)
            break
    if only is None or only[0] == "report":
        do("report", 0)
    else:
        raise RecipeError(f"--stage {only[0]} --round {only[1]}", "the run stopped before it")


def why_stop(context: Context, round_: int) -> str | None:
    """Return why the loop ends after this round, or None if it goes on. Weak judges only."""
    gate, decision = context.recipe.gate, context.decision(round_)
    if decision["found_share"] < gate.min_found:
        return (
            f"the red team finds too little to learn from: {decision['found_share']:.1%} of its "
            f"attempts are unsafe by the weak judges (gate.min_found {gate.min_found:.1%})"
        )
    refused = [not context.decision(r)["accepted"] for r in range(1, round_ + 1)]
    if all(refused[-gate.patience :]) and len(refused) >= gate.patience:
        return f"the gate refused {gate.patience} rounds in a row: {decision['reason']}"
    return "all rounds are done" if round_ == context.recipe.rounds else None
