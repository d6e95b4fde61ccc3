"""How far a run on disk is: for a person as lines, for a machine as plain data.

It only looks: it takes no lock but for the moment it needs to see whether someone holds it, and
only where a file says that someone might.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from selfmoa.console.words import clean, columns, duration, readings
from selfmoa.errors import RunDamaged, SelfmoaError
from selfmoa.rundir import RESET_STAGES, ROUND_STAGES, RunDir, StageKey, stage_name

Facts = dict[str, Any]


def survey(folder: Path) -> list[Facts]:
    """Describe the run in a folder, or every run one or two levels below it.

    Raises:
        SelfmoaError: the folder itself is a run that cannot be read.
    """
    if (folder / "run.json").is_file():
        return [describe(folder)]
    below = {path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/run.json")}
    found = []
    for path in sorted(below):
        try:
            found.append(describe(path))
        except SelfmoaError as error:  # one broken run must not hide the others
            found.append({"run": str(path), "state": "unreadable", "problem": str(error)})
    return found


def describe(folder: Path) -> Facts:
    """Return how far a run is, as plain data.

    `state` is "running", "done" or "unfinished"; that of a stage "done", "current", "begun",
    "damaged" or "pending". `stopped` says why no further round came.

    Raises:
        SelfmoaError: there is no run, or it cannot be read.
    """
    run = RunDir.read(folder)
    events = run.events()
    owner = _owner(run.path)
    there = run.stages()
    stopped = _stopped(run, events, there)
    stages = [_stage(run, key, there) for key in _plan(run, events, stopped, there)]
    to_do = [each for each in stages if each["state"] != "done"]
    if owner and to_do:
        to_do[0]["state"] = "current"
    return {
        "run": str(folder),
        "state": "running" if owner else "unfinished" if to_do else "done",
        "name": run.name,
        "recipe": run.settings.get("name", run.name),
        "seed": run.seed,
        "owner": owner,
        "stages": stages,
        "next": stage_name(to_do[0]["stage"], to_do[0]["round"]) if to_do else None,
        "phases": _phases(run, events),
        "stopped": stopped,
    }


def tell(facts: Mapping[str, Any]) -> str:
    """Return a description in words."""
    if facts["state"] == "unreadable":
        return f"{clean(facts['run'])}: unreadable: {facts['problem']}"
    lines = [clean(f"{facts['run']}: {facts['state']}, {facts['recipe']}, seed {facts['seed']}")]
    if owner := facts["owner"]:
        whose = [owner.get(key, "unknown") for key in ("pid", "host", "started")]
        lines.append(f"  by {clean('process {} on {} since {}'.format(*whose))}")
    begun = [each for each in facts["stages"] if each["state"] != "pending"]
    if begun:
        head = ("stage", "state", "time", "rows")
        lines.append(columns([head, *map(_row, begun)], indent="  "))
    if facts["next"]:
        lines.append(f"  next: {facts['next']}, {len(facts['stages']) - len(begun)} not begun")
    for phase, metrics in list(facts["phases"].items())[-1:]:
        lines.append(f"  {clean(phase)}: {readings(metrics)}")
    if stopped := facts["stopped"]:
        told = f"stopped after round {stopped['round']}: {stopped['reason']}"
        lines.append(f"  {clean(told)}")
    return "\n".join(lines)


def _row(stage: Mapping[str, Any]) -> Sequence[str]:
    name, rows = stage_name(stage["stage"], stage["round"]), stage["rows"]
    spent = "" if stage["seconds"] is None else duration(stage["seconds"])
    return name, stage["state"], spent, ", ".join(f"{key} {n}" for key, n in rows.items())


def _plan(
    run: RunDir, events: Sequence[Facts], stopped: Facts | None, there: Sequence[StageKey]
) -> list[StageKey]:
    """Return the stages of the loop: as it said at its start, but for rounds that never come."""
    rounds = int(run.settings.get("rounds") or 0)
    keys: list[StageKey] = [(name, 0) for name in RESET_STAGES]
    keys += [(name, round_) for round_ in range(1, rounds + 1) for name in ROUND_STAGES]
    for event in events:
        if event.get("event") == "run_started" and event.get("stages"):
            keys = [(str(name), int(round_)) for name, round_ in event["stages"]]
    last = stopped["round"] if stopped else rounds
    keys = [key for key in keys if key[0] != "report" and (key[1] <= last or key in there)]
    return [*keys, ("report", 0)]


def _stage(run: RunDir, key: StageKey, there: Sequence[StageKey]) -> Facts:
    facts: Facts = {"stage": key[0], "round": key[1], "state": "pending", "seconds": None}
    try:
        seal = run.sealed(*key)
    except RunDamaged as error:
        return facts | {"state": "damaged", "problem": str(error), "rows": {}, "dropped": {}}
    if seal:
        facts |= {"state": "done", "seconds": seal.seconds}
    elif key in there:
        facts["state"] = "begun"
    rows = _count_rows(run.folder(*key)) if key in there else {}
    return facts | {"rows": rows, "dropped": seal.dropped if seal else {}}


def _count_rows(folder: Path) -> dict[str, int]:
    """Return the number of rows in each data file of a stage; a torn last line is none."""
    counts = {}
    for path in sorted(folder.glob("*.jsonl")):
        with suppress(OSError), path.open("rb") as file:
            counts[path.stem] = sum(1 for line in file if line.endswith(b"\n"))
    return counts


def _phases(run: RunDir, events: Sequence[Facts]) -> Facts:
    """Return the measurements that still stand: a redo removes rounds, the log keeps them."""
    phases: Facts = {}
    for event in events:
        if event.get("event") == "measured" and "phase" in event:
            phases[str(event["phase"])] = event.get("metrics") or {}
    return {name: metrics for name, metrics in phases.items() if _stands(run, name)}


def _stands(run: RunDir, phase: str) -> bool:
    word, _, number = phase.partition(" ")
    return word != "round" or not number.isdecimal() or _is_sealed(run, ("evaluate", int(number)))


def _stopped(run: RunDir, events: Sequence[Facts], there: Sequence[StageKey]) -> Facts | None:
    """Return round and reason of the stop, unless the work has gone on or back since."""
    for event in reversed(events):
        if event.get("event") == "stopped":
            round_ = int(event.get("round") or 0)
            stands = _is_sealed(run, ("evaluate", round_)) and max(n for _, n in there) <= round_
            reason = str(event.get("reason") or "")
            return {"round": round_, "reason": reason} if stands else None
    return None


def _is_sealed(run: RunDir, key: StageKey) -> bool:
    with suppress(RunDamaged):
        return run.sealed(*key) is not None
    return False


def _owner(root: Path) -> Facts | None:
    """Return who works on a run now: what the file says, if its lock is held."""
    try:
        facts = json.loads((root / "owner.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or not (root / "lock").is_file():
        return None
    try:
        with FileLock(root / "lock", timeout=0, mode=0o600):
            return None
    except Timeout:
        return facts
    except OSError:  # a folder of someone else: what the file says is all there is
        return facts
