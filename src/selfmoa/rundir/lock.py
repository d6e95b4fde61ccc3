"""Who works on a run: one process at a time.

The lock belongs to the operating system, so a process that dies lets go of it. `owner.json` only
tells a second process whom to wait for; without the lock it means nothing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from selfmoa.errors import RunBusy
from selfmoa.rundir.files import write_atomic, writing


def acquire(root: Path) -> BaseFileLock:
    """Take the lock of a run and write down who has it.

    Raises:
        RunBusy: another process has it.
        CannotWrite: the disk refuses.
    """
    lock = FileLock(root / "lock", timeout=0, mode=0o600, thread_local=False)
    with writing(root):
        try:
            lock.acquire()
        except Timeout as error:  # an OSError too, hence inside
            raise RunBusy(root, _owner(root)) from error
    try:
        write_atomic(root / "owner.json", json.dumps(_myself(), indent=2) + "\n")
    except BaseException:
        lock.release()
        raise
    return lock


def release(root: Path, lock: BaseFileLock) -> None:
    """Let go of a run."""
    with suppress(OSError):
        (root / "owner.json").unlink(missing_ok=True)
    lock.release()


def now() -> str:
    """Return the time, to the second, with its zone."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _myself() -> dict[str, object]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])  # the rest may hold secrets
    host = socket.gethostname()
    return {"pid": os.getpid(), "host": host, "started": now(), "command": command}


def _owner(root: Path) -> str:
    try:
        facts = json.loads((root / "owner.json").read_bytes())
        return f"process {facts['pid']} on {facts['host']} since {facts['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"  # it took the lock and is about to say who it is
