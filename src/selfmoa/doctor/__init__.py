"""Would this recipe run here? Looked at in a minute, before hours are spent.

    for finding in examine(recipe):
        print(finding.check, finding.level, finding.seen, finding.remedy)

Each check looks at one thing and says what to do about it. Nothing is fetched or loaded but
tokenizers; `deep` loads every model in turn and asks it a few questions.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfmoa import loop, registry
from selfmoa.doctor import machine, models
from selfmoa.doctor.findings import Finding, Level, fail, ok, warn
from selfmoa.errors import SelfmoaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from selfmoa.config import Recipe

    Listen = Callable[[Finding], None]


def examine(
    recipe: Recipe,
    *,
    deep: bool = False,
    directory: str | Path = ".",
    listen: Listen | None = None,
) -> list[Finding]:
    """Return what the checks find, in order; one that breaks is a finding too.

    Args:
        recipe: what would be run.
        deep: also load the models, and try padding and judges.
        directory: where the run would be, whose disk is looked at.
        listen: hears each finding as it is made.
    """
    where = Path(directory)
    found: list[Finding] = []

    def add(findings: Iterable[Finding]) -> None:
        for finding in findings:
            found.append(finding)
            if listen:
                listen(finding)

    add(machine.packages(recipe))
    add(machine.device(recipe))
    add([_recipe(recipe)])
    add([_data(recipe)])
    add(models.sources(recipe))
    add(models.templates(recipe))
    add(models.lengths(recipe))
    add(machine.endpoints(recipe))
    if all(f.level != "fail" for f in found if f.check in ("recipe", "data")):
        add(machine.room(recipe, where))
        if deep and not is_sick(found):
            add(_deep(recipe, where))
    return found


def is_sick(findings: Iterable[Finding]) -> bool:
    """Return whether a check failed."""
    return any(f.level == "fail" for f in findings)


def _recipe(recipe: Recipe) -> Finding:
    try:
        loop.refuse_unworkable(recipe)
    except SelfmoaError as error:
        where, _, problem = str(error).partition(": ")
        return fail("recipe", str(error), f"mend {where}" if problem else "mend the recipe")
    return ok("recipe", f"{recipe.name}: its parts are there and fit together")


def _data(recipe: Recipe) -> Finding:
    """Let the world read its files: a bad row is told here."""
    try:
        world: Any = registry.resolve("world", recipe.policy.world)(recipe)
        n = len(world.seeds()), len(world.suite(recipe.evaluate.per_category))
    except SelfmoaError as error:
        return fail("data", str(error), "mend the file or the key that is named")
    return ok("data", f"{n[0]:,} seeds to attack with, {n[1]:,} prompts to grade on")


def _deep(recipe: Recipe, directory: Path) -> Iterable[Finding]:
    from selfmoa.doctor import trials

    context = trials.context_of(recipe, directory)
    if not recipe.model.endpoint:
        yield from trials.padding(context)
    yield from trials.judges(context)


__all__ = ["Finding", "Level", "examine", "fail", "is_sick", "ok", "warn"]
