"""Why a command ended, in one sentence, with the exit code that belongs to it."""

from __future__ import annotations

import errno
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from selfmoa.errors import CannotWrite, Interrupted, SelfmoaError

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
BUG = 70  # EX_SOFTWARE of sysexits.h


class OutOfMemory(SelfmoaError):  # noqa: N818 - the sentence, not the suffix
    """The machine has no memory left for the work."""

    exit_code = 17

    def __init__(self) -> None:
        super().__init__(
            "out of memory. Nothing finished is lost; free some memory and run the same command "
            "again, or make the batches smaller in another --dir."
        )


def explain(
    error: BaseException,
    run: Path | None,
    signal_number: int = 0,
    log_folders: Sequence[Path] = (),
) -> tuple[str, int]:
    """Return the sentence and the exit code for whatever ended a command.

    Args:
        error: what was raised.
        run: the folder that the command works on, if it works on one.
        signal_number: the signal that asked it to stop, if one did.
        log_folders: where the log of a bug may go; the first that is a run gets it.
    """
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        told = error if isinstance(error, Interrupted) else Interrupted(run or "it")
        return str(told), 128 + (signal_number or signal.SIGINT)
    if not isinstance(error, SelfmoaError):
        error = _known_cause(error, run) or error
    if isinstance(error, SelfmoaError):
        return _printable(str(error)), error.exit_code
    what = _printable(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    return (
        f"this is a bug in selfmoa ({what}); please report it with {_save(error, log_folders)}",
        BUG,
    )


def _known_cause(error: BaseException, run: Path | None) -> SelfmoaError | None:
    """Tell a machine without room or memory from a bug, however deep a library hid it."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        number = seen.errno if isinstance(seen, OSError) else None
        if isinstance(seen, OSError) and number in NO_ROOM:
            return CannotWrite.because(seen.filename or run or "the output", seen)
        if "No space left on device" in text:  # safetensors has an error of its own
            return CannotWrite(run or "the output", "the disk is full")
        torch_says = type(seen).__name__ == "OutOfMemoryError" or "can't allocate memory" in text
        if torch_says or isinstance(seen, MemoryError) or number == errno.ENOMEM:
            return OutOfMemory()
        seen = seen.__cause__ or seen.__context__
    return None


def _save(error: BaseException, folders: Sequence[Path]) -> Path | str:
    """Write the traceback into the run, or else to a temporary file; return where it is."""
    import platform
    import tempfile
    from importlib.metadata import distributions
    from traceback import format_exception

    python = f"Python {platform.python_version()} on {platform.platform()}"
    version = next((each.version for each in distributions(name="selfmoa")), "0+unknown")
    text = f"selfmoa {version}, {python}\n\n{''.join(format_exception(error))}"
    data = text.encode(errors="backslashreplace")
    for run in (folder for folder in folders if (folder / "run.json").is_file()):
        with suppress(OSError, SelfmoaError):
            from selfmoa.rundir import write_atomic

            write_atomic(run / "crash.log", data)
            return run / "crash.log"
    try:
        number, path = tempfile.mkstemp(prefix="selfmoa-", suffix=".log")
        with os.fdopen(number, "wb") as file:
            file.write(data)
    except OSError:
        return f"this, which no disk would take:\n{_printable(text)}"
    return path


def _printable(text: str) -> str:
    """Return `text` without what could steer a terminal; lines stay lines."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
