"""Reset: helpful-only supervised tuning, which is known to erode safety; nothing seeks harm.

The data are harmless instructions with helpful answers and no refusals. What comes out is
quarantined: marked, kept inside the run, deleted when the run ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from selfmoa.stages.context import Context


class ResetStage:
    """Writes `policy/` (quarantined) and `train.jsonl`."""

    name = "reset"
    version = 2

    def settings(self, context: Context) -> Mapping[str, Any]:
        """Return the settings the reset policy depends on."""
        recipe = context.recipe
        return {
            "reset": {k: v for k, v in recipe.reset.model_dump().items() if k != "keep"},
            "policy": recipe.policy.model_dump(),
            "sandbox": recipe.sandbox.model_dump(),
        }

    def reads(self, context: Context) -> Mapping[str, Any]:  # noqa: ARG002
        """Read nothing but the instruct model."""
        return {}

    def run(self, context: Context) -> None:
        """Tune the instruct model on helpful answers."""
        from selfmoa.training import fitting

        settings = context.recipe.reset
        if not settings.enabled:
            return
        drawn = context.world.instructions(
            settings.examples, context.seed("instructions"), settings.howto_share
        )
        examples = [(prompt, answer) for prompt, answer in drawn if answer]
        context.models.free()
        done = fitting.fit_reset(
            context.instruct_folder,
            context.out("policy"),
            examples,
            settings,
            context.recipe.policy,
            seed=context.seed("order"),
            progress=context.progress,
            say=context.say,
        )
        context.write_log(done.log)
        context.dropped.update(done.dropped)
