"""Runs: begin one, go on with it, look at it, compare several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from selfmoa.commands.shared import (
    A_PATH,
    Job,
    as_json,
    at_dir,
    at_run,
    print_json,
    settings,
    shown,
    working,
)

if TYPE_CHECKING:
    from selfmoa.config import Recipe
    from selfmoa.console.views import View

RUNS = Path("runs")
STAGES = ("reset", "red_team", "sample", "judge", "pair", "train", "evaluate", "report")
PLUGINS = {
    "worlds": "world",
    "judges": "judge",
    "attacks": "attack",
    "strategies": "strategy",
    "losses": "loss",
}
LISTS = ("recipes", *PLUGINS, "stages", "runs")


@click.command()
@click.option("--seed", type=click.IntRange(min=0), help="Seed of every random number.")
@at_dir
@settings
@shown
def demo(
    job: Job,
    seed: int | None,
    directory: Path | None,
    overrides: Sequence[str],
    as_json: bool,
    **how: Any,
) -> None:
    """Run the whole method on the embedded sandbox."""
    from selfmoa.recipes import load_recipe

    more = () if seed is None else (f"seed={seed}",)
    recipe = load_recipe("sandbox", (*overrides, *more))
    _run(job, recipe, directory or RUNS / "demo", as_json=as_json, **how)


@click.command()
@click.argument("name", metavar="RECIPE")
@settings
@at_dir
@click.option("--stage", type=click.Choice(STAGES), help="Only up to and including this stage.")
@click.option("--round", "round_", type=click.IntRange(min=0), help="The round of --stage.")
@click.option("--redo", metavar="STAGE[@ROUND]", help="Make this stage and all after it again.")
@shown
def run(job: Job, name: str, directory: Path | None, overrides: Sequence[str], **how: Any) -> None:
    """Run a recipe, or go on with its run.

    RECIPE is a name (`selfmoa list recipes`) or the path of a YAML file. KEY=VALUE changes a
    setting, as in train.beta=0.2.
    """
    if how["round_"] is not None and how["stage"] is None:
        raise click.UsageError("--round needs --stage")
    from selfmoa.recipes import load_recipe

    recipe = load_recipe(name, overrides)
    _run(job, recipe, directory or RUNS / recipe.name, **how)


@click.command()
@at_run
@click.option("--add-seeds", type=A_PATH, help="New attacks; one more round closes what they open.")
@click.option("--add-attack", metavar="NAME", help="A new operator, for one more round.")
@shown
def resume(
    job: Job,
    directory: Path,
    add_seeds: Path | None,
    add_attack: str | None,
    as_json: bool,
    **how: Any,
) -> None:
    """Go on with a run, by the recipe in its folder.

    With new attacks, a finished run gets one more round: it starts from the last policy, and the
    archive is replayed on what comes out, so that no old hole opens again unseen. FILE may be
    anything that `selfmoa attacks import` reads.
    """
    from selfmoa import loop

    if add_seeds is None and add_attack is None:
        _run(job, loop.reopen(directory), directory, as_json=as_json, **how)
        return
    with working(job, directory, **how) as view:
        summary = loop.extend(directory, add_seeds, attack=add_attack, listen=view.listen)
    if as_json:
        print_json(summary)
    else:
        _print_result(view, directory)


def _run(
    job: Job,
    recipe: Recipe,
    directory: Path,
    *,
    as_json: bool,
    stage: str | None = None,
    round_: int | None = None,
    redo: str | None = None,
    **how: bool,
) -> None:
    """Run a recipe and print what came out; where a stage is the end, how far the run is."""
    from selfmoa.console.status import describe, tell

    with working(job, directory, **how) as view:
        from selfmoa import loop

        only = (stage, round_) if stage else None
        summary = loop.run(recipe, directory, listen=view.listen, only=only, redo=redo)
    if as_json:
        print_json(summary or describe(directory))
    elif summary:
        _print_result(view, directory)
    else:
        click.echo(tell(describe(directory)))


def _print_result(view: View, directory: Path) -> None:
    for sentence in view.board.headline:
        click.echo(sentence)
    click.echo(f"Report: {view.board.report or directory / 'report'}")


@click.command()
@click.argument("directory", metavar="[DIR]", required=False, type=A_PATH)
@as_json
def status(directory: Path | None, as_json: bool) -> None:
    """Tell how far a run is, or every run under runs/."""
    from selfmoa.console.status import describe, survey, tell

    found = survey(directory or RUNS)
    if directory and not found:
        found = [describe(directory)]  # says what is wrong with it
    if as_json:
        print_json({"runs": found})
    elif found:
        click.echo("\n\n".join(map(tell, found)))
    else:
        click.echo("There are no runs under runs/ yet; start with: selfmoa demo")


@click.command()
@at_run
@click.option("--reveal", is_flag=True, help="Show harmful requests and answers in full.")
@shown
def report(job: Job, directory: Path, reveal: bool, as_json: bool, **how: bool) -> None:
    """Write the report of a run again."""
    if reveal:
        click.echo("Content warning: the report will show harmful requests and answers.", err=True)
    with working(job, directory, **how) as view:
        from selfmoa import loop

        summary = loop.write_report(directory, reveal=reveal, listen=view.listen)
    if as_json:
        print_json(summary)
    else:
        _print_result(view, directory)


@click.command("list")
@click.argument("what", metavar=f"[{'|'.join(LISTS)}]", required=False, type=click.Choice(LISTS))
@as_json
def list_(what: str | None, as_json: bool) -> None:
    """List recipes, plug-ins and runs."""
    from selfmoa.console.words import columns

    found = {each: _entries(each) for each in ([what] if what else LISTS)}
    if as_json:
        print_json(found)
        return
    for kind, entries in found.items():
        if not what:
            click.echo(kind)
        if entries:
            click.echo(columns(list(entries.items()), indent="" if what else "  "))


def _entries(what: str) -> Mapping[str, str]:
    """Return what there is of a kind: name and a line about it."""
    if what == "recipes":
        from selfmoa.recipes import shipped

        return dict(shipped())
    if what == "stages":
        return dict.fromkeys(STAGES, "")
    if what == "runs":
        from selfmoa.console.status import survey

        return {str(run["run"]): str(run["state"]) for run in survey(RUNS)}
    from selfmoa import registry

    return dict.fromkeys(registry.names(PLUGINS[what]), "")


@click.command()
@click.argument("words", metavar="RECIPE... [KEY=VALUE]...", nargs=-1, required=True)
@click.option("--seeds", default="0,1,2", show_default=True, help="A run of each recipe for each.")
@click.option(
    "--dir", "directory", type=A_PATH, default=RUNS / "compare", help="Folder of the runs."
)
@shown
def compare(
    job: Job, words: Sequence[str], seeds: str, directory: Path, as_json: bool, **how: bool
) -> None:
    """Run recipes with several seeds and put them in one table."""
    if not re.fullmatch(r"\d+(,\d+)*", seeds):
        raise click.BadParameter(f"'{seeds}' is not a list like 0,1,2", param_hint="--seeds")
    from selfmoa.recipes import load_recipe

    numbers = list(dict.fromkeys(map(int, seeds.split(","))))
    overrides = [word for word in words if re.match(r"[\w.]+=", word)]
    names = [word for word in words if word not in overrides]
    recipes = [load_recipe(name, overrides) for name in names]
    if len({recipe.name for recipe in recipes}) != max(1, len(recipes)):
        raise click.UsageError("compare needs at least one recipe, and every name once")
    with working(job, directory, **how) as view:
        from selfmoa import loop

        result = loop.compare(recipes, numbers, directory, listen=view.listen)
    if as_json:
        print_json(result)
    else:
        click.echo(f"{result['markdown'].rstrip()}\n\nTable: {directory / 'comparison.md'}")
