"""Whatever a crash or a full disk does to a run, the next one ends with the same files.

Run as a program (`python tests/test_rundir_crash.py FOLDER`), this file is the subject of the
kill test: it forks a worker for every hit of every kill point, lets it die there, kills the ones
that resume the work as well, runs a last one to the end and compares the files with those of a
worker that nobody killed.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfmoa.errors import CannotWrite
from selfmoa.rundir import (
    KILL_POINTS,
    Journal,
    RunDir,
    kill_point,
    kill_scope,
    write_atomic,
    write_jsonl,
)

SETTINGS, INPUTS = {"sample": {"k": 2}}, {"prompts.jsonl": "sha256:0"}


def open_run(path):
    return RunDir.open(path, SETTINGS, seed=7, name="demo", versions={})


def do_stage(run, stage):
    """Do what every stage does: take up what is there, add the rest, seal."""
    made_of = (stage, 1, 1, SETTINGS, INPUTS)
    with kill_scope(stage):
        if run.check(*made_of) is not None:
            return
        folder = run.begin(*made_of)
        journal = Journal(folder / "rows.jsonl")
        for n in range(3):
            if f"row-{n}" not in journal.keys:
                journal.append([{"id": f"row-{n}", "text": "é" * 30}])
        (folder / "policy").mkdir(exist_ok=True)
        write_atomic(folder / "policy" / "weights.bin", b"\0" * 100)
        write_jsonl(folder / "all.jsonl", journal.rows)
        run.seal(*made_of, dropped={"empty": 1}, tokens=5)


def do_run(root):
    with open_run(root) as run:
        do_stage(run, "sample")
        do_stage(run, "judge")
        run.delete_outputs("sample", 1, ["policy"])


def redo_and_run(root):
    with open_run(root) as run:
        if run.sealed("judge", 1):
            run.discard_from("sample", 1)
    do_run(root)


def snapshot(root):
    """Return every file with its bytes and mode, but for the lock and the time of creation."""
    found = {}
    for path in sorted(Path(root).rglob("*")):
        name, mode = path.relative_to(root).as_posix(), path.stat().st_mode & 0o777
        data = None if path.is_dir() else path.read_bytes()
        if name == "run.json":
            data = {**json.loads(data), "created": None}
        if name != "lock":
            found[name] = (oct(mode), data)
    return found


# --- full disks ----------------------------------------------------------------------------------


class Fault:
    """Lets the n-th call of any writing function fail, a write after half of its bytes."""

    CALLS = ("write", "fsync", "replace", "mkdir", "open", "chmod", "unlink", "ftruncate")

    def __init__(self, n, code):
        self.left, self.code, self.said = n, code, None

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.CALLS:
            self.patch.setattr(os, name, self.failing(name, getattr(os, name)))
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def failing(self, name, real):
        def call(*args, **kwargs):
            ours = "policy" not in str(args[0])  # that folder is made by the stage itself
            self.left -= ours
            if self.left == 0 and ours:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(self.code, "fault")
            return real(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_fault_at_any_write_is_named_and_the_next_run_goes_on(tmp_path, code):
    do_run(tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    unsaid = 0
    for n in range(1, 1000):
        root = tmp_path / str(n)
        with Fault(n, code) as fault:
            try:
                do_run(root)
            except CannotWrite as error:
                fault.said = str(error)
        if fault.left > 0:
            break
        unsaid += fault.said is None
        assert fault.said is None or str(root) in fault.said
        do_run(root)
        assert snapshot(root) == whole, n
    assert n > 50
    assert unsaid <= 2  # the lock's second mkdir and the removal of owner.json: nothing is lost


def test_a_journal_goes_on_after_a_full_disk(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.append([{"id": "a"}])
    with Fault(2, errno.ENOSPC), pytest.raises(CannotWrite, match="the disk is full"):
        journal.append([{"id": "b"}])
    assert journal.keys == {"a"}
    journal.append([{"id": "b"}])
    assert Journal(journal.path).rows == journal.rows == [{"id": "a"}, {"id": "b"}]


# --- kill points ---------------------------------------------------------------------------------


def test_kill_points_do_nothing_unless_asked(monkeypatch):
    kill_point("seal.before")
    monkeypatch.setenv("SELFMOA_KILL_AT", "judge:seal.before#1")
    kill_point("seal.before")
    with kill_scope("sample"):
        kill_point("seal.before")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker forks")
def test_a_run_killed_anywhere_ends_with_the_same_files(tmp_path):
    script = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    hits = json.loads(result.stdout)
    assert set(hits) == {*KILL_POINTS, "judge:journal.append.after"}
    assert min(hits.values()) >= 1
    assert hits["journal.append.torn"] == 6
    assert hits["judge:journal.append.after"] == 3


def forked(kill_at, work, root):
    """Run `work` in a process of its own; return whether it was killed."""
    pid = os.fork()
    if pid == 0:
        os.environ["SELFMOA_KILL_AT"] = kill_at
        work(root)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"{kill_at}: {status}"
    return status != 0


def kill_everywhere(folder):
    """Kill a worker at every hit of every point; return how many hits each point had."""
    os.fsync = lambda _: None  # a killed process takes nothing back from the system
    do_run(folder / "whole")
    whole, hits = snapshot(folder / "whole"), {}
    for point in (*KILL_POINTS, "judge:journal.append.after"):
        for n in range(1, 100):
            root = folder / f"{point}-{n}"
            work = do_run
            if point.startswith("discard"):
                do_run(root)
                work = redo_and_run
            if not forked(f"{point}#{n}", work, root):
                break
            hits[point] = n
            forked("journal.append.torn", do_run, root)  # the resumed run is killed, too
            forked("seal.before", do_run, root)
            do_run(root)
            assert snapshot(root) == whole, f"{point}#{n}"
    return hits


if __name__ == "__main__":
    print(json.dumps(kill_everywhere(Path(sys.argv[1]))))  # noqa: T201
