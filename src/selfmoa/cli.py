"""The command line: parse, call, print. Results go to stdout, everything else to stderr.

Nothing heavy is imported before a command needs it, so `selfmoa --help` answers at once. Every
way to fail ends in one sentence and an exit code (`selfmoa.errors`), never in a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from selfmoa.commands import attacks, checks, judges, recipes, release, runs, training
from selfmoa.commands.shared import Commands, Job
from selfmoa.console.failures import explain


class Stop(KeyboardInterrupt):
    """A signal that asks us to end.

    Of its own class: CPython notes a plain KeyboardInterrupt that passes an `exec` of text, as in
    the making of a dataclass, and then dies of SIGINT at exit, whatever code we return.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    job = Job()
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    with suppress(AttributeError, ValueError):  # a stream that stands in for stdout
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
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
            job.is_over = True
            sentence, code = explain(error, job.run, job.signal, job.log_folders())
            with suppress(OSError):
                click.echo(f"selfmoa: {sentence}", err=True)
            return code
    return 0


@contextmanager
def _signals(job: Job) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the work in order, and a second one at once."""

    def stop(number: int, frame: object) -> NoReturn:
        del frame
        if job.signal or job.is_over:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the live view hides the cursor
            os._exit(128 + number)
        job.signal = number
        raise Stop

    is_main = threading.current_thread() is threading.main_thread()  # others may not set any
    both = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    # What is ignored stays so: that is how a shell starts background work.
    before = {n: signal.signal(n, stop) for n in both if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_quietly() -> int:
    """Whoever read the output has gone: say nothing, not even at exit."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 128 + 13


def _nowhere() -> Any:
    return Path(os.devnull).open("w", encoding="utf-8")


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        import selfmoa

        click.echo(f"selfmoa {selfmoa.__version__}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version and exit.",
)
def app() -> None:
    """Make a small language model safe without making it mute.

    Start with `selfmoa demo`: the whole method on a small model of its own, no network needed.
    Every command can be stopped with Ctrl-C and given again: it goes on where it was.
    """


for command in (
    runs.demo,
    recipes.init,
    checks.doctor,
    checks.plan,
    runs.run,
    training.train,
    runs.resume,
    runs.status,
    runs.report,
    runs.list_,
    recipes.recipes,
    runs.compare,
    judges.judges,
    attacks.attacks,
    release.export,
    release.merge,
    release.push,
):
    app.add_command(command)
