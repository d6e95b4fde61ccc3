"""What leaves a run: exports, merged models, a push to a model hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from selfmoa.commands.shared import A_PATH, Job, as_json, print_json, shown, working

to_folder = click.option(
    "--out", type=A_PATH, required=True, help="The folder to be written; new or empty."
)


@click.command()
@click.argument("source", metavar="RUN", type=A_PATH)
@to_folder
@click.option("--merged", is_flag=True, help="A whole model in place of an adapter.")
@click.option("--pairs", is_flag=True, help="The preference pairs in place of the policy.")
@click.option("--unfinished", is_flag=True, help="Also of a run that is not finished.")
@click.option(
    "--acknowledge-harmful",
    "acknowledged",
    is_flag=True,
    help="Needed for --pairs: they hold attacks and unsafe answers.",
)
@shown
def export(
    job: Job,
    source: Path,
    out: Path,
    merged: bool,
    pairs: bool,
    unfinished: bool,
    acknowledged: bool,
    as_json: bool,
    **how: bool,
) -> None:
    """Write the policy of a run, or its pairs, for other tools: with a card and a receipt."""
    if merged and pairs:
        raise click.UsageError("--merged is for a policy, and --pairs asks for pairs")
    with working(job, out.parent, **how) as view:
        from selfmoa.release.export import export_pairs, export_policy

        if pairs:
            found = export_pairs(
                source, out, acknowledged=acknowledged, unfinished=unfinished, listen=view.listen
            )
        else:
            found = export_policy(
                source, out, merged=merged, unfinished=unfinished, listen=view.listen
            )
    _print_folder(found, out, as_json=as_json)


@click.command()
@click.argument("source", metavar="RUN|ADAPTER", type=A_PATH)
@to_folder
@shown
def merge(job: Job, source: Path, out: Path, as_json: bool, **how: bool) -> None:
    """Fold an adapter into its base: a whole model, for programs that read no adapters."""
    with working(job, out.parent, **how) as view:
        from selfmoa.release.merging import merge as fold

        found = fold(source, out, listen=view.listen)
    _print_folder(found, out, as_json=as_json)


def _print_folder(found: Mapping[str, Any], out: Path, *, as_json: bool) -> None:
    from selfmoa.console.release import merged

    if as_json:
        print_json(found)
    else:
        click.echo(f"{merged(found)}\nFolder: {out}")


@click.command()
@click.argument("folder", metavar="DIR", type=A_PATH)
@click.argument("repo", metavar="USER/NAME")
@click.option("--really", is_flag=True, help="Send it; without, only tell what would be sent.")
@click.option("--public", is_flag=True, help="For everybody to see; never of pairs.")
@as_json
def push(folder: Path, repo: str, really: bool, public: bool, as_json: bool) -> None:
    """Tell what a push of an exported folder to a model hub would send, or send it.

    The hub, the login and being off line are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN (or
    hf auth login), HF_HUB_OFFLINE.
    """
    from selfmoa.console.release import pushed
    from selfmoa.release.hub import push as send
    from selfmoa.release.refusals import NotForRelease

    plan = send(folder, repo, really=really, private=not public)
    if as_json:
        print_json(plan)
    else:
        click.echo(pushed(plan))
    if plan["refused"]:
        raise click.exceptions.Exit(NotForRelease.exit_code)
