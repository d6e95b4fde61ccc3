"""What commands share: options, what they work on, and how they show it."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from selfmoa.console import watch
from selfmoa.errors import did_you_mean

if TYPE_CHECKING:
    from selfmoa.console.views import View

# Bars and notices of libraries would tear the live view and fill a log.
HUSH = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


@dataclass
class Job:
    """What this process works on, as far as an error has to name it."""

    run: Path | None = None
    view: View | None = None
    signal: int = 0
    is_over: bool = False

    def log_folders(self) -> list[Path]:
        """Return where a log may go: the run, or in a comparison the one that runs now."""
        now = self.view.board.directory if self.view else ""
        return [folder for folder in (Path(now) if now else None, self.run) if folder]


@contextmanager
def working(job: Job, directory: Path, *, quiet: bool, plain: bool) -> Iterator[View]:
    """Show the work on a run while the block lasts. What libraries print goes to stderr."""
    os.environ.update({name: value for name, value in HUSH.items() if name not in os.environ})
    # What one library finds deprecated in another is no news to our users.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
    job.run = directory
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with watch(quiet=quiet, plain=plain) as view:
            job.view = view
            yield view
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


def print_json(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


class Commands(click.Group):
    """A group that lists its commands in the order of use, and knows what a typo meant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands as they were declared."""
        del ctx
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names."""
        if args[0] not in self.commands and not args[0].startswith("-"):
            near = did_you_mean(args[0], self.commands)
            raise click.UsageError(f"there is no command '{args[0]}'{near}", ctx)
        return super().resolve_command(ctx, args)


A_PATH = click.Path(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
at_dir = click.option("--dir", "directory", type=A_PATH, help="Folder of the run.")
at_run = click.argument("directory", metavar="DIR", type=A_PATH)
settings = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)


def shown(command: Callable[..., None]) -> Callable[..., None]:
    """Add what every command has that shows its progress."""
    quiet = click.option("--quiet", "-q", is_flag=True, help="Results and errors only.")
    plain = click.option("--plain", is_flag=True, help="Plain lines on a terminal too.")
    return quiet(plain(as_json(click.pass_obj(command))))
