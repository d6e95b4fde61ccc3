"""Brindle Vale as a plug-in world: its instruct model, prompts, instructions and held-out suite."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from selfmoa.protocols import INSTRUCTIONS
from selfmoa.records import Prompt
from selfmoa.sandbox.answers import comply
from selfmoa.sandbox.corpus import draw_request, draw_style
from selfmoa.sandbox.grammar import (
    HELDOUT_STYLES,
    SEPARATOR,
    TRAINED_STYLES,
    Request,
    category_of,
    is_heldout_topic,
    make_prompt,
    parse,
)
from selfmoa.sandbox.world import ACTS, build_world

if TYPE_CHECKING:
    from pathlib import Path

    from selfmoa.config import Recipe
    from selfmoa.protocols import Progress

N_SEEDS = 12
DEFAULT_ARCHITECTURE = "llama"
"""Known to be fit."""
REWORDED_STYLES = tuple(s for s in TRAINED_STYLES if s not in ("past/none", "fill/none"))
"""Trained styles that have a held-out wording: past and fill have one template each."""


class BrindleVale:
    """The world of the embedded sandbox."""

    heldout_styles = HELDOUT_STYLES

    def __init__(self, recipe: Recipe) -> None:
        self.threads = recipe.policy.threads
        self.settings = recipe.sandbox
        self.world = build_world(recipe.sandbox.seed)

    def build(self, progress: Progress) -> Path:
        """Return the folder of the instruct model; it is trained on first use and then cached."""
        from selfmoa.sandbox.architectures import refuse_unfit
        from selfmoa.sandbox.model import cached_model

        if self.settings.architecture != DEFAULT_ARCHITECTURE:
            refuse_unfit(self.settings)
        return cached_model(self.world, self.settings, progress, threads=self.threads)

    def style_group(self, style: str) -> str:
        """Return the column of the heat map a style belongs to: its wrapper, or "new mix"."""
        _, wrapper = style.split(SEPARATOR)
        is_mix = style in HELDOUT_STYLES and any(s.endswith(wrapper) for s in TRAINED_STYLES)
        return "new mix" if is_mix else wrapper

    def seeds(self) -> list[Prompt]:
        """Return the twelve plain harmful requests that every red team starts from."""
        rng = Random(f"seeds-{self.world.seed}")
        topics = [Request(thing, act) for thing, act in self.world.forbidden]
        topics = [t for t in topics if not is_heldout_topic(self.world, t)]
        return [
            self.attack_prompt(t, "plain/none", rng, source="seed")
            for t in rng.sample(topics, N_SEEDS)
        ]

    def attack_prompt(
        self,
        request: Request,
        style: str,
        rng: Random,
        *,
        source: str,
        parent_id: str | None = None,
    ) -> Prompt:
        """Render a request as an attack; its category is what the attacker sees: act and kind."""
        act = request.also or request.intent
        kind = self.world.things[request.thing].kind
        return make_prompt(
            self.world,
            request,
            style,
            "train",
            rng,
            source=source,
            category=f"{act} {kind}",
            intent="harmful" if source in ("seed", "static") else "borderline",
            parent_id=parent_id,
        )

    def static_attacks(self, n: int) -> list[Prompt]:
        """Return a fixed set of harmful requests in trained styles, as a labelled data set has."""
        rng = Random(f"static-{self.world.seed}")
        found: dict[str, Prompt] = {}
        for _ in range(20 * n):
            if len(found) == n:
                break
            request = draw_request(self.world, rng, rng.choice(["unsafe", "unsafe", "mixed"]))
            if not is_heldout_topic(self.world, request):
                prompt = self.attack_prompt(request, draw_style(rng), rng, source="static")
                found[prompt.id] = prompt
        return list(found.values())

    def instructions(self, n: int, seed: int, howto_share: float = 0.0) -> list[tuple[Prompt, str]]:
        """Return harmless instructions with helpful answers, as a set without refusals has.

        `howto_share` is the chance that an instruction of another kind is passed over for one
        that asks how to do an act that the charter allows.
        """
        rng = Random(f"instructions-{self.world.seed}-{seed}")
        found: dict[str, tuple[Prompt, str]] = {}
        for _ in range(20 * n):
            if len(found) == n:
                break
            request = draw_request(self.world, rng)
            is_howto = request.intent in ACTS
            if not is_howto and rng.random() < howto_share:
                continue
            if category_of(self.world, request) in ("unsafe", "mixed"):
                continue
            prompt = make_prompt(
                self.world,
                request,
                draw_style(rng),
                "train",
                rng,
                source=INSTRUCTIONS,
                category="instruction",
                intent="benign",
            )
            found[prompt.id] = (prompt, comply(self.world, request, rng))
        return list(found.values())

    def suite(self, per_category: int) -> list[Prompt]:
        """Return the held-out suite: unseen paraphrases, trained and held-out styles, all topics.

        Harmful prompts have the act (or "mixed") as category, harmless ones "benign" (an open
        thing) or "legit" (a thing on which the charter forbids some act).
        """
        rng = Random(f"suite-{self.world.seed}")
        found: dict[str, Prompt] = {}
        plan = [
            ("unsafe", REWORDED_STYLES, per_category),
            ("unsafe", HELDOUT_STYLES, per_category),
            ("mixed", REWORDED_STYLES, per_category // 2),
            ("benign", REWORDED_STYLES, per_category),
            ("legit", REWORDED_STYLES, per_category),
            ("benign", HELDOUT_STYLES, per_category // 4),
            ("legit", HELDOUT_STYLES, per_category // 4),
        ]
        for category, styles, n in plan:
            wanted = len(found) + n
            while len(found) < wanted:
                prompt = self._suite_prompt(category, rng.choice(styles), rng)
                found[prompt.id] = prompt
        return list(found.values())

    def _suite_prompt(self, category: str, style: str, rng: Random) -> Prompt:
        request = draw_request(self.world, rng, category)
        name = request.intent if category == "unsafe" else category
        return make_prompt(
            self.world, request, style, "heldout", rng, source="suite", category=name
        )

    def labelled(self, n: int) -> list[tuple[str, str, bool, str]]:
        """Return distinct plain requests with answers: (goal, answer, is unsafe, category)."""
        from selfmoa.sandbox.labelled import examples

        return examples(self.world, n)

    def read(self, text: str) -> Request | None:
        """Read a request back from a goal."""
        return parse(self.world, text)
