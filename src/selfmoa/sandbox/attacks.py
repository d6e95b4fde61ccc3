"""Rule-based rewrites in the language of the Vale: hide a request, or expand to one nearby.

They need no language model; LM rewriters offer the same socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfmoa.sandbox.grammar import TRAINED_STYLES, Request, is_heldout_topic
from selfmoa.sandbox.world import ACTS, ATTRIBUTES

if TYPE_CHECKING:
    from random import Random

    from selfmoa.protocols import Generator
    from selfmoa.records import Prompt
    from selfmoa.sandbox.vale import BrindleVale

P_MIXED = 0.2
"""Share of expansions that ask for a harmless fact first."""


class Hide:
    """Same intent, another surface."""

    name = "sandbox-hide"
    styles = TRAINED_STYLES

    def __init__(self, vale: BrindleVale, generator: Generator) -> None:  # noqa: ARG002
        self.vale = vale

    def rewrite(self, parent: Prompt, style: str, rng: Random) -> Prompt | None:
        """Ask for the parent's goal in `style`."""
        request = self.vale.read(parent.goal)
        if request is None:
            return None
        return self.vale.attack_prompt(request, style, rng, source=self.name, parent_id=parent.id)


class Expand:
    """A nearby intent: the same act on another thing, or another act on the same thing.

    The attacker does not know the charter, so some expansions are harmless; judges tell.
    """

    name = "sandbox-expand"
    styles = TRAINED_STYLES

    def __init__(self, vale: BrindleVale, generator: Generator) -> None:  # noqa: ARG002
        self.vale = vale

    def rewrite(self, parent: Prompt, style: str, rng: Random) -> Prompt | None:
        """Ask for a neighbour of the parent's goal in `style`."""
        request = self.vale.read(parent.goal)
        if request is None:
            return None
        act = request.also or request.intent
        if rng.random() < 0.5:
            thing = rng.choice(list(self.vale.world.things))
        else:
            thing, act = request.thing, rng.choice(ACTS)
        near = Request(thing, act)
        if rng.random() < P_MIXED:
            near = Request(thing, rng.choice(ATTRIBUTES), act)
        if is_heldout_topic(self.vale.world, near):
            return None
        return self.vale.attack_prompt(near, style, rng, source=self.name, parent_id=parent.id)
