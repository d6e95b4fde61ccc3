"""Archives of attacks: show, import, export, ask again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
def attacks() -> None:
    """Look at archives of attacks, exchange them, and ask a model again."""


an_archive = click.option("--archive", required=True, type=A_PATH, help="An archive.jsonl.")


def to_file(what: str) -> Callable[..., Any]:
    """Return the option for a file to be written."""
    return click.option("--out", type=A_PATH, required=True, help=f"{what}; must not be there.")


@attacks.command("show")
@an_archive
@click.option("--policy", help="Id of the weights it is looked at for; else those tried last.")
@click.option("--best", type=click.IntRange(min=0), default=10, show_default=True)
@click.option("--reveal", is_flag=True, help="Show the texts of attacks.")
@as_json
def show_attacks(archive: Path, policy: str | None, best: int, reveal: bool, as_json: bool) -> None:
    """Tell which cells an archive fills, and name its best attacks."""
    if reveal:
        click.echo("Content warning: the texts are made to draw harmful answers.", err=True)
    from selfmoa.console.attacks import archive as told
    from selfmoa.redteam import show

    found = show(archive, policy=policy, best=best, reveal=reveal)
    if as_json:
        print_json(found)
    else:
        click.echo(told(found))


@attacks.command("import")
@click.argument("file", metavar="FILE", type=A_PATH)
@to_file("The archive")
@click.option("--category", help="Of attacks for which the file names none.")
@click.option("--style", help="Of attacks for which the file names none.")
@click.option("--known-only", is_flag=True, help="Refuse categories that are not the default ones.")
@as_json
def import_attacks(file: Path, out: Path, as_json: bool, **how: Any) -> None:
    """Make an archive of another tool's attacks.

    FILE is a report or hit log of garak, seeds or a memory export of PyRIT, behaviours of
    HarmBench, or plain CSV, JSON or JSONL with a column "prompt" or "goal".
    """
    from selfmoa.console.attacks import imported
    from selfmoa.redteam import import_file

    found = import_file(file, out, **how)
    if as_json:
        print_json(found)
    else:
        click.echo(f"{imported(found)}\nArchive: {out}")


@attacks.command("export")
@an_archive
@to_file("The file")
@click.option(
    "--format",
    "form",
    type=click.Choice(("jsonl", "csv", "harmbench", "garak", "pyrit")),
    default="jsonl",
    show_default=True,
)
@as_json
def export_attacks(archive: Path, out: Path, form: str, as_json: bool) -> None:
    """Write the attacks of an archive for another tool."""
    from selfmoa.redteam import export_archive

    found = export_archive(archive, out, form)
    if as_json:
        print_json(found)
    else:
        click.echo(f"{found['attacks']:,} attacks, as {form}: {out}")


@attacks.command("replay")
@settings
@an_archive
@click.option("--model", required=True, help="A folder, or a name on the model hub.")
@click.option("--recipe", "name", required=True, help="The recipe whose judges decide.")
@click.option("--k", type=click.IntRange(min=1), default=4, show_default=True, help="Tries each.")
@to_file("A copy of the archive with the new tries")
@shown
def replay_attacks(
    job: Job,
    overrides: Sequence[str],
    archive: Path,
    model: str,
    name: str,
    k: int,
    out: Path,
    as_json: bool,
    **how: bool,
) -> None:
    """Ask a model every attack of an archive again, and tell which cells are open.

    KEY=VALUE changes a setting of the recipe.
    """
    from selfmoa.recipes import load_recipe

    recipe = load_recipe(name, overrides)
    with working(job, out.parent, **how) as view:
        from selfmoa.redteam import replay

        found = replay(archive, model, recipe, out, view.listen, k=k)
    if as_json:
        print_json(found)
    else:
        from selfmoa.console.attacks import replayed

        click.echo(f"{replayed(found)}\nArchive: {out}")
