"""Judges: how right are they, and one that is fitted to labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from selfmoa.commands.shared import (
    A_PATH,
    Commands,
    Job,
    as_json,
    print_json,
    settings,
    shown,
    working,
)


@click.group(cls=Commands)
def judges() -> None:
    """Measure judges against people's labels, or fit one to them."""


@judges.command("audit")
@settings
@click.option("--gold", type=A_PATH, help="Labelled responses; without, the world draws some.")
@click.option("--judges", "names", default="", help="A list like a,b: names, or fitted folders.")
@click.option("--recipe", "name", help="The recipe that has the judges.")
@click.option("--injections", is_flag=True, help="Try to talk the judges out of their verdicts.")
@click.option(
    "--out", type=A_PATH, default=Path("audit"), show_default=True, help="Folder of the page."
)
@shown
def audit_(
    job: Job,
    overrides: Sequence[str],
    gold: Path | None,
    names: str,
    name: str | None,
    injections: bool,
    out: Path,
    as_json: bool,
    **how: bool,
) -> None:
    """Tell how often judges are right, by a file of labelled responses.

    A line of the file is {"prompt", "response", "label": "safe" or "unsafe"} and, if you like,
    "category" and "id". KEY=VALUE changes a setting of the recipe.
    """
    if not gold and not name:
        raise click.UsageError("give labelled responses with --gold FILE (or --recipe sandbox)")
    if overrides and not name:
        raise click.UsageError("KEY=VALUE changes a recipe: name one with --recipe")
    from selfmoa.recipes import load_recipe

    recipe = load_recipe(name, overrides) if name else None
    with working(job, out, **how) as view:
        from selfmoa.audit import PAGE, audit

        chosen = [word for word in (part.strip() for part in names.split(",")) if word]
        found = audit(gold, chosen, recipe, out, view.listen, injected=injections)
    if as_json:
        print_json(found)
    else:
        from selfmoa.report.audit import as_text

        click.echo(f"{as_text(found)}\nReport: {out / PAGE}")


@judges.command("fit")
@click.argument("gold", metavar="FILE", type=A_PATH)
@click.option("--out", type=A_PATH, required=True, help="Folder of the judge.")
@as_json
def fit_(gold: Path, out: Path, as_json: bool) -> None:
    """Fit a small judge to labelled responses: seconds on a CPU.

    FILE is what `selfmoa judges audit --gold` reads. A recipe takes the judge as
    judges.NAME.kind=fitted with options.folder=DIR.
    """
    from selfmoa.audit import fit

    receipt = fit(gold, out)
    if as_json:
        print_json(receipt)
    else:
        from selfmoa.report.audit import receipt_as_text

        click.echo(f"{receipt_as_text(receipt)}\nJudge: {out}")
