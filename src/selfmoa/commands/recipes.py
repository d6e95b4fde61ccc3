"""Recipes: write one for a model of one's own, look at those that are shipped."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from selfmoa.commands.shared import A_PATH, Commands, as_json, print_json, settings


@click.command()
@click.option("--model", help="A folder, or a name on the model hub.")
@click.option("--memory", type=float, help="Memory of the accelerator, in GB.")
@click.option("--seeds", multiple=True, help="A file of harmful requests; may be given again.")
@click.option("--instructions", multiple=True, help="A file of harmless ones; may be given again.")
@click.option("--endpoint", help="Address of a server that answers for judges and attackers.")
@click.option("--out", type=A_PATH, help="The recipe; without, it is named after the model.")
@as_json
def init(
    model: str | None,
    memory: float | None,
    seeds: tuple[str, ...],
    instructions: tuple[str, ...],
    endpoint: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write a recipe for a model and data of your own.

    What is not given is asked for: the model, the memory, and two files.
    """
    from selfmoa.recipes.starting import Answers, begin

    model = model or _ask("Model (a folder, or a name on the model hub)", "--model")
    memory = memory or _ask("Memory of the accelerator, in GB", "--memory", float)
    if not (seeds and instructions):
        asked = _ask(
            "Files of harmful requests and of harmless instructions, with a comma between",
            "--seeds and --instructions",
        )
        harmful, _, harmless = (part.strip() for part in asked.partition(","))
        seeds, instructions = seeds or (harmful,), instructions or (harmless,)
    found = begin(Answers(model, memory, seeds, instructions, endpoint), out)
    if as_json:
        print_json(found)
    else:
        commands = "".join(f"\n  {command}" for command in found["next"])
        click.echo(f"Recipe: {found['recipe']} (extends {found['extends']}). Next:{commands}")


def _ask(question: str, option: str, kind: Any = str) -> Any:
    """Ask whoever sits at the terminal."""
    if not sys.stdin.isatty():
        raise click.UsageError(f"give {option}: there is nobody to ask")
    return click.prompt(question, type=kind, err=True)


@click.group(cls=Commands)
def recipes() -> None:
    """Look at the recipes that are shipped."""


@recipes.command("list")
@as_json
def list_recipes(as_json: bool) -> None:
    """Name the shipped recipes, with a line about each."""
    from selfmoa.console.words import columns
    from selfmoa.recipes import shipped

    if as_json:
        print_json(dict(shipped()))
    else:
        click.echo(columns(shipped()))


@recipes.command("show")
@click.argument("name", metavar="RECIPE")
@settings
@as_json
def show_recipe(name: str, overrides: Sequence[str], as_json: bool) -> None:
    """Print every value that a recipe has, with a sentence about each.

    What is printed is a recipe itself; KEY=VALUE changes a setting.
    """
    from selfmoa.recipes import load_recipe
    from selfmoa.recipes.rendering import as_yaml

    recipe = load_recipe(name, overrides)
    if as_json:
        print_json(recipe.model_dump(mode="json"))
    else:
        click.echo(as_yaml(recipe), nl=False)


@recipes.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from selfmoa.recipes.rendering import schema

    print_json(schema())
