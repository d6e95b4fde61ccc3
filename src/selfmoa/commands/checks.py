"""Before a run: what it will take, and whether it would run here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from selfmoa.commands.shared import HUSH, as_json, at_dir, print_json, settings

if TYPE_CHECKING:
    from selfmoa.doctor import Finding

NOT_READY = 21
"""Exit code of a plan that does not fit, and of an examination that failed."""


@click.command()
@click.argument("name", metavar="RECIPE")
@settings
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), help="GB that there are.")
@as_json
@click.pass_context
def plan(
    ctx: click.Context, name: str, overrides: Sequence[str], memory: float | None, as_json: bool
) -> None:
    """Say what a run takes: calls, tokens, memory, time, money, disk.

    Nothing is loaded or fetched. With --memory, the exit code is 21 if that is too little, and
    settings are named that take less.
    """
    os.environ.update({key: value for key, value in HUSH.items() if key not in os.environ})
    from selfmoa.console.planning import planned
    from selfmoa.planning import plan as make
    from selfmoa.recipes import load_recipe

    found = make(load_recipe(name, overrides), memory)
    if as_json:
        print_json(found)
    else:
        click.echo(planned(found))
    ctx.exit(NOT_READY if found["memory"]["fits"] is False else 0)


@click.command()
@click.argument("name", metavar="RECIPE")
@settings
@at_dir
@click.option("--deep", is_flag=True, help="Also load every model and ask it a few questions.")
@as_json
@click.pass_context
def doctor(
    ctx: click.Context,
    name: str,
    overrides: Sequence[str],
    directory: Path | None,
    deep: bool,
    as_json: bool,
) -> None:
    """Look whether a recipe would run here, and say what to mend.

    The exit code is 21 if something has to be mended.
    """
    os.environ.update({key: value for key, value in HUSH.items() if key not in os.environ})
    from selfmoa.console.doctor import line, verdict
    from selfmoa.doctor import examine, is_sick
    from selfmoa.recipes import load_recipe

    def show(finding: Finding) -> None:
        if not as_json:
            click.echo(line(finding))

    where = directory or Path("runs")
    findings = examine(load_recipe(name, overrides), deep=deep, directory=where, listen=show)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        click.echo(verdict(findings))
    ctx.exit(NOT_READY if is_sick(findings) else 0)
