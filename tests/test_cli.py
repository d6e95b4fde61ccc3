"""The command line: what it loads, calls and prints, and how each failure ends."""

from __future__ import annotations

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import selfmoa
from selfmoa import cli, errors
from selfmoa.commands import runs
from selfmoa.console.failures import OutOfMemory
from selfmoa.errors import CannotWrite, Interrupted, SelfmoaError
from selfmoa.rundir import RunDir

HEAVY = ("torch", "transformers", "peft", "pydantic", "numpy", "rich", "yaml", "filelock")
METRICS = {
    "safety": {"value": 0.9, "low": 0.88, "high": 0.92, "n": 400, "n_unjudged": 0},
    "helpfulness": {"value": 0.95, "low": 0.93, "high": 0.97, "n": 400, "n_unjudged": 0},
}
SUMMARY = {"final": METRICS, "seed": 0}
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SelfmoaError)
]


class FakeLoop:
    """Stands for selfmoa.loop: remembers its calls, tells a short story, may fail."""

    def __init__(self):
        self.calls = []
        self.summary = SUMMARY
        self.error = None

    def run(self, recipe, directory, *, listen, only=None, redo=None):
        self.calls.append(("run", recipe.name, recipe.seed, str(directory), only, redo))
        stages = [["reset", 0], ["evaluate", 0], ["report", 0]]
        listen("run_started", name="x", directory=directory, recipe="r", rounds=1, stages=stages)
        listen("stage_started", stage="reset", round=0)
        if self.error:
            raise self.error
        listen("stage_done", stage="reset", round=0, seconds=2.0, skipped=False, note="")
        listen("measured", phase="reset", metrics=METRICS)
        report = directory / "report" / "index.html"
        listen("run_done", directory=directory, report=report, headline=["Safer.", "Not mute."])
        return self.summary

    def reopen(self, directory):
        self.calls.append(("reopen", str(directory)))
        return SimpleNamespace(name="reopened", seed=5)

    def write_report(self, directory, *, reveal, listen):
        self.calls.append(("write_report", str(directory), reveal))
        listen("run_done", directory=directory, report="there.html", headline=["Again."])
        return SUMMARY

    def compare(self, recipes, seeds, directory, *, listen):
        assert callable(listen)
        names = [(recipe.name, recipe.rounds) for recipe in recipes]
        self.calls.append(("compare", names, seeds, str(directory)))
        return {"rows": [], "markdown": "| recipe |\n|---|\n"}


@pytest.fixture
def loop(monkeypatch, tmp_path):
    fake = FakeLoop()
    monkeypatch.setitem(sys.modules, "selfmoa.loop", fake)
    monkeypatch.setattr(selfmoa, "loop", fake, raising=False)
    monkeypatch.chdir(tmp_path)
    return fake


def make_run(path):
    with RunDir.open(path, {"rounds": 1}, seed=3, name="demo", versions={}) as run:
        run.begin("reset", 0, 1, {}, {})
        run.seal("reset", 0, 1, {}, {})
    return path


def spawn(*args, fake="", cwd=None, **kwargs):
    """Start the program in a process of its own, with a loop whose `run` has the body `fake`."""
    body = "".join(f"\n    {line}" for line in (fake or "return {}").splitlines())
    code = (
        "import os, sys, time, types, selfmoa\n"
        f"def run(recipe, directory, *, listen, only=None, redo=None):{body}\n"
        "sys.modules['selfmoa.loop'] = selfmoa.loop = types.SimpleNamespace(run=run)\n"
        "from selfmoa.cli import main\nsys.exit(main())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **kwargs}
    return subprocess.Popen([sys.executable, "-c", code, *args], cwd=cwd, text=True, **pipes)


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


# What it loads


@pytest.mark.parametrize(
    "args", [["--help"], ["run", "--help"], ["train", "--help"], ["--version"], ["typo"]]
)
def test_what_needs_no_model_loads_nothing_heavy(args):
    code = (
        "import sys; from selfmoa.cli import main; main(sys.argv[1:]); import selfmoa;"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_module_and_script_are_one_program():
    command = [sys.executable, "-m", "selfmoa", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"selfmoa {selfmoa.__version__}\n"


def test_public_names_come_when_asked_for():
    from selfmoa.records import Prompt

    assert selfmoa.Prompt is Prompt
    assert set(selfmoa.__all__) <= set(dir(selfmoa))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        selfmoa.nothing  # noqa: B018


def test_help_lists_commands_in_the_order_of_use(capsys):
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].splitlines()
    names = [line.split()[0] for line in listed]
    assert names == [
        *("demo", "init", "doctor", "plan", "run", "train", "resume", "status", "report"),
        *("list", "recipes", "compare", "judges", "attacks", "export", "merge", "push"),
    ]


# What it calls and prints


def test_demo_ends_with_headline_and_report(loop, capsys):
    assert cli.main(["demo", "--seed", "7", "rounds=2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"Safer.\nNot mute.\nReport: {Path('runs/demo/report/index.html')}\n"
    assert loop.calls == [("run", "sandbox", 7, "runs/demo", None, None)]
    assert "reset: done in 2.0 s\n" in err


@pytest.mark.parametrize(
    ("args", "directory", "only", "redo"),
    [
        (["sandbox"], "runs/sandbox", None, None),
        (["sandbox", "seed=4", "--dir", "d"], "d", None, None),
        (["sandbox", "--stage", "sample", "--round", "2"], "runs/sandbox", ("sample", 2), None),
        (["sandbox", "--stage", "reset"], "runs/sandbox", ("reset", None), None),
        (["sandbox", "--redo", "sample@2"], "runs/sandbox", None, "sample@2"),
    ],
)
def test_run_passes_on_what_is_asked(loop, args, directory, only, redo):
    assert cli.main(["run", *args]) == 0
    seed = 4 if "seed=4" in args else 0
    assert loop.calls == [("run", "sandbox", seed, directory, only, redo)]


def test_run_of_one_stage_tells_how_far_it_is(loop, capsys, tmp_path):
    loop.summary = {}
    make_run(tmp_path / "r")
    assert cli.main(["run", "sandbox", "--stage", "reset", "--dir", "r", "-q"]) == 0
    out, err = capsys.readouterr()
    assert "next: evaluate@0" in out
    assert err == ""
    assert cli.main(["run", "sandbox", "--stage", "reset", "--dir", "r", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["next"] == "evaluate@0"


def test_resume_takes_the_recipe_of_the_run(loop, capsys):
    assert cli.main(["resume", "there", "--json"]) == 0
    assert loop.calls == [("reopen", "there"), ("run", "reopened", 5, "there", None, None)]
    assert json.loads(capsys.readouterr().out) == SUMMARY


def test_report_warns_before_it_reveals(loop, capsys):
    assert cli.main(["report", "there", "--reveal"]) == 0
    out, err = capsys.readouterr()
    assert (out, err[:16]) == ("Again.\nReport: there.html\n", "Content warning:")
    assert cli.main(["report", "there", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (json.loads(out), err) == (SUMMARY, "")
    assert loop.calls == [("write_report", "there", True), ("write_report", "there", False)]


def test_compare_gives_every_recipe_the_overrides(loop, capsys, tmp_path):
    (tmp_path / "b.yaml").write_text("extends: sandbox\nname: b\n")
    assert cli.main(["compare", "sandbox", "./b.yaml", "rounds=1", "--seeds", "3,1,3"]) == 0
    assert loop.calls == [("compare", [("sandbox", 1), ("b", 1)], [3, 1], "runs/compare")]
    assert capsys.readouterr().out == "| recipe |\n|---|\n\nTable: runs/compare/comparison.md\n"
    assert cli.main(["compare", "sandbox", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == []


@pytest.mark.parametrize("what", [None, "recipes", "judges", "losses", "stages", "runs"])
def test_list_names_what_there_is(loop, capsys, tmp_path, what):
    make_run(tmp_path / "runs" / "a")
    assert cli.main(["list", *([what] if what else []), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == ({what} if what else set(runs.LISTS))
    assert all(found[kind] for kind in found if kind in ("recipes", "losses", "stages"))
    if "runs" in found:
        assert found["runs"] == {"runs/a": "unfinished"}
    assert cli.main(["list", *([what] if what else [])]) == 0
    assert all(name in capsys.readouterr().out for name in [*(found.get("runs") or [])])


# How far a run is


def test_status_without_runs(loop, capsys):
    assert cli.main(["status"]) == 0
    assert "selfmoa demo" in capsys.readouterr().out
    assert cli.main(["status", "nowhere"]) == errors.MissingFile.exit_code


def test_status_is_for_people_and_for_machines(loop, capsys, tmp_path):
    make_run(tmp_path / "runs" / "a")
    assert cli.main(["status"]) == 0
    assert capsys.readouterr().out.startswith("runs/a: unfinished, demo, seed 3\n")
    assert cli.main(["status", "runs/a", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)["runs"]
    assert (facts["run"], facts["next"]) == ("runs/a", "evaluate@0")


# How it fails


@pytest.mark.parametrize("kind", KINDS)
def test_each_error_is_one_sentence_with_its_code(loop, capsys, kind):
    loop.error = kind.__new__(kind, "it is so; do this")
    assert cli.main(["run", "sandbox", "-q"]) == kind.exit_code
    assert capsys.readouterr() == ("", "selfmoa: it is so; do this\n")


def test_out_of_memory_has_a_code_of_its_own():
    assert OutOfMemory.exit_code not in {
        kind.exit_code for kind in KINDS if kind is not OutOfMemory
    }


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "weights.bin"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_full_machine_is_no_bug(loop, capsys, error, is_wrapped):
    is_disk = "space" in str(error)
    loop.error = error
    if is_wrapped:
        loop.error = RuntimeError("stream failed")
        loop.error.__cause__ = error
    assert cli.main(["demo", "-q"]) == (CannotWrite if is_disk else OutOfMemory).exit_code
    err = capsys.readouterr().err
    assert ("the disk is full" if is_disk else "out of memory") in err
    assert "Nothing finished is lost" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("has_run", [True, False])
def test_a_bug_leaves_its_traceback_in_a_file(loop, capsys, tmp_path, monkeypatch, has_run):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if has_run:
        make_run(tmp_path / "runs/demo")
    loop.error = KeyError("deep\x1b[31m")
    assert cli.main(["demo", "-q"]) == 70
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), "\x1b" in err) == ("", 1, False)
    log = tmp_path / err.rsplit(" ", 1)[1].strip()
    assert has_run == (log == tmp_path / "runs/demo/crash.log")
    assert "raise self.error\nKeyError" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["stauts"], "Did you mean 'status'?"),
        (["demo", "--sede", "1"], "--seed"),
        (["demo", "--seed", "x"], "'x' is not a valid integer"),
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "sandbox", "--stage", "smaple"], "'sample'"),
        (["run", "sandbox", "--round", "1"], "--round needs --stage"),
        (["compare", "sandbox", "--seeds", "1,b"], "'1,b' is not a list"),
        (["compare", "sandbox", "sandbox"], "every name once"),
        (["compare", "rounds=1"], "at least one recipe"),
        (["list", "judge"], "'judges'"),
    ],
)
def test_wrong_usage_is_code_2(loop, capsys, args, told):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert (out, told in err, loop.calls) == ("", True, [])


def test_errors_of_a_recipe_keep_their_lines(loop, capsys):
    assert cli.main(["run", "sandbox", "roundz=1", "seeed=2"]) == errors.RecipeError.exit_code
    err = capsys.readouterr().err
    assert "Did you mean 'rounds'?" in err
    assert err.count("\n  ") == 2


def test_interrupt_names_the_run(loop, capsys):
    loop.error = KeyboardInterrupt()
    assert cli.main(["demo", "--dir", "d", "-q"]) == 130
    assert capsys.readouterr().err == f"selfmoa: {Interrupted('d')}\n"


def test_handlers_of_signals_are_put_back(loop):
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["demo", "-q"]) == 0
    assert signal.getsignal(signal.SIGINT) == before


SLEEP = "listen('stage_started', stage='reset', round=0)\ntime.sleep(60)"
STUBBORN = (
    "try:\n    listen('stage_started', stage='reset', round=0)\n    time.sleep(60)\n"
    "finally:\n    print('saving', file=sys.stderr, flush=True)\n    time.sleep(60)"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_work_in_order(tmp_path, number):
    process = spawn("demo", fake=SLEEP, cwd=tmp_path)
    assert process.stderr.readline() == "reset: started\n"
    process.send_signal(number)
    code, out, err = finish(process)
    assert (code, out) == (128 + number, "")
    assert err == f"selfmoa: {Interrupted(Path('runs/demo'))}\n"


def test_a_second_interrupt_ends_it_at_once(tmp_path):
    process = spawn("demo", fake=STUBBORN, cwd=tmp_path)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "saving\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130
    assert time.monotonic() - started < 10


def test_a_reader_that_went_away_is_no_error():
    ours, theirs = os.pipe()
    os.close(ours)
    process = spawn("list", stdout=theirs)
    os.close(theirs)
    assert finish(process) == (141, None, "")


# Streams


def test_json_is_all_that_reaches_stdout(tmp_path):
    fake = "print('loading')\nos.write(1, b'from C')\nreturn {'seed': 0}"
    code, out, err = finish(spawn("demo", "--json", fake=fake, cwd=tmp_path))
    assert (code, json.loads(out)) == (0, {"seed": 0})
    assert "loading" in err
    assert "from C" in err
    code, out, err = finish(spawn("run", "nonesuch", "--json", cwd=tmp_path))
    assert (code, out) == (errors.UnknownPlugin.exit_code, "")


def test_a_terminal_gets_a_live_view_and_its_cursor_back(tmp_path):
    fake = (
        "listen('run_started', name='x', directory=directory, rounds=1, stages=[['reset', 0]])\n"
        "raise SystemExit(3)"
    )
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"}
    process = spawn("demo", fake=fake, cwd=tmp_path, stderr=theirs, env=env)
    os.close(theirs)
    assert finish(process)[:2] == (3, "")
    drawn = os.read(ours, 65536).decode()
    os.close(ours)
    assert "x: 1 round, in runs/demo" in drawn
    assert "evaluate" in drawn
    assert drawn.rstrip().endswith("\x1b[?25h")
