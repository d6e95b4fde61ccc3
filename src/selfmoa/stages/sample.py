"""Sample: k responses of the policy to each prompt, and some under a careful system prompt.

The careful ones are candidates to choose from, not behaviour to measure: training pairs them with
the prompt as it stands, and no evaluation uses that system prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfmoa.protocols import CAREFUL, INSTRUCTIONS, PLAIN, Draw
from selfmoa.records import Prompt
from selfmoa.rundir import read_jsonl

if TYPE_CHECKING:
    from collections.abc import Mapping

    from selfmoa.stages.context import Context


class SampleStage:
    """Writes `responses.jsonl`."""

    name = "sample"
    version = 1

    def settings(self, context: Context) -> Mapping[str, Any]:
        """Return the settings the responses depend on."""
        return {"sample": context.recipe.sample.model_dump()}

    def reads(self, context: Context) -> Mapping[str, Any]:
        """Read the prompts of this round."""
        return {"red_team": ("red_team", context.round)}

    def run(self, context: Context) -> None:
        """Draw k + k_careful responses a prompt."""
        settings = context.recipe.sample
        prompts = read_jsonl(context.path("red_team", "prompts.jsonl"), Prompt)
        policy = context.models.answering(context.policy_folder(context.round))
        for name, k, system in (
            (PLAIN, settings.k, None),
            (CAREFUL, settings.k_careful, settings.careful),
        ):
            draws = [
                Draw(p, context.seed(name, p.id, i))
                for p in prompts
                for i in range(min(k, settings.k_harmless) if p.source == INSTRUCTIONS else k)
            ]
            sampling = context.sampling(name, system=system)
            context.generate(policy, draws, sampling, "responses.jsonl")
