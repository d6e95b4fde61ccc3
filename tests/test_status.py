"""How far a run on disk is: what is told to people and to machines."""

from __future__ import annotations

import os

import pytest

from selfmoa.console.status import describe, survey, tell
from selfmoa.errors import MissingFile
from selfmoa.rundir import ROUND_STAGES, RunDir, write_atomic

SETTINGS = {"name": "sandbox", "rounds": 3}


def open_run(path):
    return RunDir.open(path, SETTINGS, seed=3, name="demo", versions={})


def make_run(path, *, sealed=("reset",), begun=(), events=()):
    with open_run(path) as run:
        for name in (*sealed, *begun):
            stage, _, round_ = name.partition("@")
            made_of = (stage, int(round_ or 0), 1, {}, {})
            folder = run.begin(*made_of)
            write_atomic(folder / "rows.jsonl", "{}\n{}\n{")
            if name in sealed:
                run.seal(*made_of, seconds=12.0, dropped={"tie": 2})
        for name, facts in events:
            run.event(name, **facts)
    return path


def test_status_tells_done_begun_and_next(tmp_path):
    rates = {"safety": {"value": 0.9, "low": 0.88, "high": 0.92}}
    events = [("measured", {"phase": name, "metrics": rates}) for name in ("reset", "round 1")]
    done = ("reset", "evaluate")
    facts = describe(make_run(tmp_path, sealed=done, begun=("red_team@1",), events=events))
    states = [stage["state"] for stage in facts["stages"]]
    assert states == ["done", "done", "begun", *["pending"] * 18]
    first = {"stage": "reset", "round": 0, "state": "done", "seconds": 12.0}
    assert facts["stages"][0] == first | {"rows": {"rows": 2}, "dropped": {"tie": 2}}
    assert (facts["next"], facts["state"], facts["owner"]) == ("red_team@1", "unfinished", None)
    assert list(facts["phases"]) == ["reset"]  # round 1 was measured once, and undone since
    assert tell(facts).splitlines()[1:] == [
        "  stage       state  time  rows",
        "  reset       done   12 s  rows 2",
        "  evaluate@0  done   12 s  rows 2",
        "  red_team@1  begun        rows 2",
        "  next: red_team@1, 18 not begun",
        "  reset: safety 90.0 % [88.0, 92.0], helpfulness n/a, over-refusal n/a",
    ]


def test_status_takes_the_plan_from_the_loop(tmp_path):
    events = [("run_started", {"stages": [["reset", 0], ["sample", 1], ["report", 0]]})]
    facts = describe(make_run(tmp_path, sealed=("reset", "sample@1", "report"), events=events))
    assert [stage["stage"] for stage in facts["stages"]] == ["reset", "sample", "report"]
    assert (facts["state"], facts["next"]) == ("done", None)


def test_status_knows_who_works_on_a_run_that_stopped(tmp_path):
    events = [("stopped", {"round": 1, "reason": "nothing \x1b[2Jfound"})]
    done = ("reset", "evaluate", *(f"{name}@1" for name in ROUND_STAGES))
    make_run(tmp_path, sealed=done, begun=("report",), events=events)
    with open_run(tmp_path):
        facts = describe(tmp_path)
    assert (facts["state"], facts["owner"]["pid"]) == ("running", os.getpid())
    assert len(facts["stages"]) == 9  # no round comes after the stop
    assert (facts["stages"][-1]["stage"], facts["stages"][-1]["state"]) == ("report", "current")
    assert f"  by process {os.getpid()} on" in tell(facts)
    assert tell(facts).endswith("  stopped after round 1: nothing [2Jfound")
    assert describe(tmp_path)["state"] == "unfinished"


def test_a_stop_is_forgotten_when_the_work_goes_on(tmp_path):
    events = [("stopped", {"round": 1, "reason": "x"})]
    make_run(tmp_path, sealed=("evaluate@1",), begun=("red_team@2",), events=events)
    assert describe(tmp_path)["stopped"] is None


def test_an_owner_that_died_is_none(tmp_path):
    make_run(tmp_path)
    (tmp_path / "owner.json").write_text('{"pid": 1}')
    assert describe(tmp_path)["owner"] is None


def test_one_broken_run_does_not_hide_the_others(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "compare" / "b")
    (tmp_path / "a" / "run.json").write_text("{}")
    a, b = survey(tmp_path)
    assert (a["state"], b["state"]) == ("unreadable", "unfinished")
    assert "run.json" in tell(a)
    seal = tmp_path / "compare" / "b" / "00-reset" / "1-reset" / "stage.json"
    seal.write_text("broken")
    facts = describe(tmp_path / "compare" / "b")
    assert (facts["stages"][0]["state"], facts["next"]) == ("damaged", "reset")
    with pytest.raises(MissingFile):
        describe(tmp_path / "compare")
