"""The command line: parse, call, print. Results go to stdout, everything else to stderr.

Nothing heavy is imported before a command needs it, so `selfmoa --help` answers at once. Every
way to fail ends in one sentence and an exit code (`selfmoa.errors`), never in a traceback.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from selfmoa.errors import (
    CannotWrite,
    Interrupted,
    MissingFile,
    SelfmoaError,
    UnknownPlugin,
    did_you_mean,
)

if TYPE_CHECKING:
    from selfmoa.config import Recipe
    from selfmoa.console import View

F = TypeVar("F", bound=Callable[..., Any])

RUNS = Path("runs")
STAGES = ("reset", "red_team", "sample", "judge", "pair", "train", "evaluate", "report")
FAMILIES = ("recipes", "worlds", "judges", "attacks", "losses", "stages", "runs")
SINGULAR = {"losses": "loss"}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Bars and notices of libraries would tear the live view and fill a log.
HUSH = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


class OutOfMemory(SelfmoaError):  # noqa: N818 - the sentence, not the suffix
    """The machine has no memory left for the work."""

    exit_code = 17

    def __init__(self, run: object) -> None:
        super().__init__(
            f"out of memory. Nothing finished is lost; free some memory, or make the batches "
            f"smaller in a new --dir, then run the same command again to go on with {run}."
        )


@dataclass
class Job:
    """What this process works on, as far as an error has to name it."""

    run: Path | None = None
    view: View | None = None
    signal: int = 0

    def __str__(self) -> str:
        return str(self.run or "it")


class Commands(click.Group):
    """A group that lists its commands in the order of use and knows what a typo meant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands as they were declared."""
        del ctx
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that the first argument names."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            near = did_you_mean(args[0], self.commands)
            raise click.UsageError(f"there is no command '{args[0]}'{near}", ctx)
        return super().resolve_command(ctx, args)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    job = Job()
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    with _signals(job):
        try:
            arguments = list(sys.argv[1:] if args is None else args)
            with app.make_context("selfmoa", arguments, obj=job) as context:
                app.invoke(context)
            sys.stdout.flush()
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except BrokenPipeError:
            return _leave_quietly()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last resort
            sentence, code = _explain(error, job)
            with suppress(OSError):
                click.echo(f"selfmoa: {_printable(sentence)}", err=True)
            return code
    return 0


def _explain(error: BaseException, job: Job) -> tuple[str, int]:
    """Return the sentence and the exit code for whatever ended the command."""
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        told = error if isinstance(error, Interrupted) else Interrupted(job)
        return str(told), 128 + (job.signal or signal.SIGINT)
    if not isinstance(error, SelfmoaError):
        error = _known_cause(error, job) or error
    if isinstance(error, SelfmoaError):
        return str(error), error.exit_code
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return f"this is a bug in selfmoa ({what}); please report it with {_save(error, job)}.", 70


def _known_cause(error: BaseException, job: Job) -> SelfmoaError | None:
    """Tell a machine without room or memory from a bug, however deep a library hid it."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, OSError) and seen.errno in NO_ROOM:
            return CannotWrite.because(seen.filename or job.run or "the output", seen)
        if "No space left on device" in text:  # safetensors wraps it in an error of its own
            return CannotWrite(job.run or "the output", "the disk is full")
        is_torch = type(seen).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
        if is_torch or isinstance(seen, MemoryError) or getattr(seen, "errno", 0) == errno.ENOMEM:
            return OutOfMemory(job)
        seen = seen.__cause__ or seen.__context__
    return None


def _save(error: BaseException, job: Job) -> str:
    """Write the traceback where the user finds it and return the path."""
    import platform
    import tempfile
    from traceback import format_exception

    import selfmoa

    python = f"Python {platform.python_version()} on {platform.platform()}"
    text = f"selfmoa {selfmoa.__version__}, {python}\n\n{''.join(format_exception(error))}"
    folder = (job.view and job.view.board.directory) or job.run
    with suppress(Exception):
        if folder and (Path(folder) / "run.json").is_file():
            from selfmoa.rundir import write_atomic

            write_atomic(Path(folder) / "crash.log", text)
            return str(Path(folder) / "crash.log")
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="selfmoa-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(text)
    except OSError:
        return "this, as no file would take it:\n" + text
    return file.name


@contextmanager
def _signals(job: Job) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the work in order, and a second one at once."""

    def stop(number: int, frame: object) -> NoReturn:
        del frame
        if job.signal:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the live view hides the cursor
            os._exit(128 + number)
        job.signal = number
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What is ignored stays so: a shell starts background work that way.
    ours = [
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = [signal.signal(number, stop) for number in ours]
    try:
        yield
    finally:
        for number, handler in zip(ours, before, strict=True):
            signal.signal(number, handler)


def _leave_quietly() -> int:
    """Whoever read the output has gone; say nothing, not even at exit."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 128 + 13


def _nowhere() -> Any:
    return Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - it stands in for a stream


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


@contextmanager
def _stdout_for_results() -> Iterator[None]:
    """Send to stderr what anyone prints inside the block, libraries in C included."""
    sys.stdout.flush()
    saved = None
    if sys.stdout is sys.__stdout__:
        with suppress(OSError):
            saved = os.dup(1)
            os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


@contextmanager
def _working(job: Job, directory: Path, *, quiet: bool, plain: bool) -> Iterator[View]:
    """Show the work on a run while the block lasts."""
    for name, value in HUSH.items():
        os.environ.setdefault(name, value)
    from selfmoa import console

    job.run = directory
    with _stdout_for_results(), console.watch(quiet=quiet, plain=plain) as view:
        job.view = view
        yield view


def _print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def _columns(rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Return rows of cells as aligned lines of plain text."""
    from selfmoa.console import clean

    cells = [[clean(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        (indent + "  ".join(map(str.ljust, row, widths))).rstrip() for row in cells
    )


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
at_dir = click.option("--dir", "directory", type=click.Path(path_type=Path), help="Folder of the run.")
at_run = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
overrides = click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)


def shown(command: F) -> F:
    """Add the options of a command that shows its progress."""
    for option in (
        as_json,
        click.option("--plain", is_flag=True, help="Plain lines on a terminal too."),
        click.option("--quiet", "-q", is_flag=True, help="Results and errors only."),
    ):
        command = option(command)
    return click.pass_obj(command)  # type: ignore[return-value]


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:  # noqa: FBT001
    if wanted:
        import selfmoa

        click.echo(f"selfmoa {selfmoa.__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Print the version and exit.",
)
def app() -> None:
    """Make a small language model safe without making it mute.

    Start with `selfmoa demo`: the whole method on a small model of its own, no network needed.
    Every command can be stopped with Ctrl-C and given again: it goes on where it was.
    """
