"""The run directory: its lock, its seals, and what a changed recipe or a redo does to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfmoa.errors import (
    BadInput,
    CannotWrite,
    MissingFile,
    NewerRun,
    NotARun,
    RunBusy,
    RunChanged,
    RunDamaged,
    UnknownPlugin,
)
from selfmoa.rundir import RunDir, fingerprint, stage_name, write_atomic

RECIPE = {"sample": {"k": 2, "sampling": {"temperature": 1.0}}, "judges": ["a", "b"], "pair": {}}
SETTINGS = {"sample": RECIPE["sample"], "judges": ["a", "b"]}
INPUTS = {"prompts.jsonl": "sha256:0"}
STAGE = ("sample", 1, 1, SETTINGS, INPUTS)


def open_run(path, recipe=RECIPE, seed=7):
    return RunDir.open(path, recipe, seed=seed, name="demo", versions={"selfmoa": "0"})


def do_stage(run, stage, round_):
    made_of = (stage, round_, 1, SETTINGS, INPUTS)
    folder = run.begin(*made_of)
    write_atomic(folder / "rows.jsonl", '{"id":"a"}\n' * 5)
    write_atomic(folder / "all.jsonl", '{"id":"a"}\n' * 5)
    write_atomic(_made(folder / "policy" / "weights.bin"), "w")
    return run.seal(*made_of)


def _made(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path / "run") as run:
        yield run


@pytest.fixture
def done(run):
    """A run with one sealed stage."""
    do_stage(run, "sample", 1)
    return run


# --- the run and its lock ------------------------------------------------------------------------


def test_a_new_run_has_its_head_files_and_is_private(run):
    facts = json.loads((run.path / "run.json").read_text())
    assert facts.pop("created").startswith("20")
    expected = {"schema_version": 1, "name": "demo", "seed": 7, "versions": {"selfmoa": "0"}}
    assert facts == expected
    owner = json.loads((run.path / "owner.json").read_text())
    assert owner["pid"] == os.getpid()
    assert run.path.stat().st_mode & 0o777 == 0o700
    for name in ("lock", "owner.json", "run.json", "config.yaml"):
        assert (run.path / name).stat().st_mode & 0o777 == 0o600
    look = RunDir.read(run.path)
    assert (look.settings, look.seed, look.name) == (RECIPE, 7, "demo")
    with pytest.raises(RuntimeError, match="looking only"):
        look.discard_from("sample", 1)


def test_stages_have_their_places_in_order(run):
    places = {
        ("reset", 0): "00-reset/1-reset",
        ("evaluate", 0): "00-reset/2-evaluate",
        ("red_team", 1): "round-01/1-red_team",
        ("evaluate", 1): "round-01/6-evaluate",
        ("sample", 2): "round-02/2-sample",
        ("pair", 100): "round-100/4-pair",
        ("report", 0): "report",
    }
    for key, place in reversed(places.items()):
        assert run.begin(*key, 1, {}, {}) == run.path / place
    assert run.stages() == list(places)
    assert run.find_stage("sample") == run.find_stage("sample@2") == ("sample", 2)
    assert run.find_stage("evaluate") == ("evaluate", 0)
    assert [run.find_stage(stage_name(*key)) for key in places] == list(places)
    with pytest.raises(UnknownPlugin, match="Did you mean 'sample@2'"):
        run.find_stage("samples@2")


@pytest.mark.parametrize(
    ("stage", "round_"),
    [
        *((name, 1) for name in ("../../etc", "sample/../..", "/etc", "sample\0", "", ".")),
        *((name, 1) for name in ("stage.json", "Sample", "reset", "sample ", "2-sample")),
        *(("sample", 0), ("sample", -1), ("reset", -1)),
    ],
)
def test_hostile_stage_names_are_refused(run, stage, round_):
    for act in (run.folder, run.discard_from, run.sealed):
        with pytest.raises(UnknownPlugin):
            act(stage, round_)


def test_another_folder_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(NotARun, match=r"thesis\.tex"):
        open_run(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(MissingFile, match=r"run '.*none' does not exist"):
        RunDir.read(tmp_path / "none")


def test_a_run_of_a_later_version_is_refused(run):
    facts = json.loads((run.path / "run.json").read_text())
    write_atomic(run.path / "run.json", json.dumps(facts | {"schema_version": 2}))
    run.close()
    for again in (open_run, RunDir.read):
        with pytest.raises(NewerRun, match="schema_version 2"):
            again(run.path)
    assert not (run.path / "owner.json").exists()
    write_atomic(run.path / "run.json", "{}")
    with pytest.raises(BadInput, match=r"run.json, row 1"):
        RunDir.read(run.path)


HOLDER = """
import sys
from selfmoa.rundir import RunDir
run = RunDir.open(sys.argv[1], {}, seed=1, name="x", versions={})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match=f"process {holder.pid} on .+ since 20"):
            open_run(tmp_path / "run")
        assert RunDir.read(tmp_path / "run").stages() == []
        holder.kill()
    assert (tmp_path / "run" / "owner.json").is_file()
    open_run(tmp_path / "run").close()
    assert not (tmp_path / "run" / "owner.json").exists()


def test_one_process_cannot_open_a_run_twice(run):
    with pytest.raises(RunBusy, match=f"process {os.getpid()}"):
        open_run(run.path)
    write_atomic(run.path / "owner.json", "torn {")
    with pytest.raises(RunBusy, match="another process"):
        open_run(run.path)
    run.close()
    run.close()


def test_events_outlive_a_torn_line(run):
    run.event("stage.start", stage="sample", path=Path("x"))
    with (run.path / "events.jsonl").open("a") as file:
        file.write('{"event": "torn')
    run.event("stage.done", time="ignored")
    assert [event["event"] for event in run.events()] == ["stage.start", "stage.done"]
    assert run.events()[0]["stage"] == "sample"
    assert run.events()[1]["time"].startswith("20")


# --- seals ---------------------------------------------------------------------------------------


def test_a_sealed_stage_is_found_again(run):
    assert run.check(*STAGE) is None
    folder = run.begin(*STAGE)
    assert run.sealed("sample", 1) is None
    for name in ("rows.jsonl", "a/b.bin", "half.tmp", ".cache"):
        _made(folder / name).write_text("1")
    record = run.seal(*STAGE, dropped={"empty": 2}, seconds=1.5, tokens=3, versions={"torch": "2"})
    assert list(record.outputs) == ["a/b.bin", "rows.jsonl"]
    assert record.settings["sample.sampling.temperature"] == 1.0
    assert record.settings["seed"] == 7
    assert record.versions == {"torch": "2", "stage": "1"}
    assert run.check(*STAGE) == run.sealed("sample", 1) == record
    assert (folder / "a" / "b.bin").stat().st_mode & 0o777 == 0o600
    assert record.fingerprint == fingerprint("sample", 1, {**SETTINGS, "seed": 7}, INPUTS)


def test_everything_is_durable_before_the_seal_is(run, monkeypatch):
    folder, steps, replace = run.begin(*STAGE), [], os.replace
    for name in ("a.bin", "sub/b.bin"):
        _made(folder / name).write_text("")  # as a library would, without fsync
    monkeypatch.setattr(os, "fsync", lambda fd: steps.append(os.fstat(fd).st_ino))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append(0), replace(*names)))
    run.seal(*STAGE)
    before = steps[: steps.index(0)]
    for name in ("a.bin", "sub/b.bin", "sub", ".", "stage.json"):
        assert (folder / name).stat().st_ino in before
    assert steps[-1] == folder.stat().st_ino


CHANGES = [
    ({"settings": {"sample": {"k": 3, "sampling": {"temperature": 1.0}}}}, "sample.k", 2, 3),
    ({"settings": {"sample": {"k": 2, "sampling": {"temperature": 0}}}}, "temperature", 1.0, 0),
    ({"settings": {"sample": {**SETTINGS["sample"], "new": None}}}, "new", "(absent)", None),
    ({"settings": {"sample": {**SETTINGS["sample"], "k": True}}}, "sample.k", 2, True),
    ({"settings": {"sample": {**SETTINGS["sample"], "k": 2.0}}}, "sample.k", 2, 2.0),
    ({"settings": {"judges": ["b", "a"]}}, "judges", ["a", "b"], ["b", "a"]),
    ({"version": 2}, "sample code version", "1", "2"),
    ({"inputs": {"prompts.jsonl": "sha256:1"}}, "input prompts.jsonl", "sha256:0", "sha256:1"),
    ({"inputs": {}}, "sample input prompts.jsonl", "sha256:0", "(absent)"),
    ({"inputs": {**INPUTS, "x": "sha256:2"}}, "sample input x", "(absent)", "sha256:2"),
]


@pytest.mark.parametrize("begun_only", [False, True])
@pytest.mark.parametrize(("change", "key", "old", "new"), CHANGES)
def test_work_of_another_recipe_is_not_mixed_in(run, begun_only, change, key, old, new):
    if begun_only:
        run.begin(*STAGE)
    else:
        do_stage(run, "sample", 1)
    change = {"version": 1, "settings": {}, "inputs": INPUTS} | change
    change["settings"] = {**SETTINGS, **change["settings"]}
    for act in (run.check, run.begin):
        with pytest.raises(RunChanged) as caught:
            act("sample", 1, **change)
        assert caught.value.key.endswith(key)
        assert (str(caught.value.old), str(caught.value.new)) == (str(old), str(new))
        assert "--redo sample@1" in str(caught.value)


def test_a_removed_setting_and_another_seed_are_changes(done):
    with pytest.raises(RunChanged, match=r"judges=\['a', 'b'\], now it is judges=\(absent\)"):
        done.check("sample", 1, 1, {"sample": SETTINGS["sample"]}, INPUTS)
    done.close()
    with open_run(done.path, seed=8) as again, pytest.raises(RunChanged, match=r"seed=7, now .*=8"):
        again.check(*STAGE)


def test_the_recipe_on_disk_is_that_of_the_work_on_disk(done):
    done.close()
    other = {**RECIPE, "sample": {"k": 9}}
    with open_run(done.path, other, seed=8) as run:
        assert (RunDir.read(run.path).settings, RunDir.read(run.path).seed) == (RECIPE, 7)
        run.discard_from("sample", 1)
        assert (RunDir.read(run.path).settings, RunDir.read(run.path).seed) == (other, 8)
    with open_run(done.path, {**other, "pair": {"later": 1}}, seed=8):
        assert RunDir.read(done.path).settings["pair"] == {"later": 1}


def test_damage_to_outputs_is_named(done):
    folder = done.folder("sample", 1)
    whole = (folder / "rows.jsonl").read_bytes()
    for position in range(0, len(whole), 17):
        flipped = bytearray(whole)
        flipped[position] ^= 1
        (folder / "rows.jsonl").write_bytes(flipped)
        with pytest.raises(RunDamaged, match=r"rows.jsonl is not what was sealed; .*sample@1"):
            done.check(*STAGE)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(RunDamaged, match=r"rows.jsonl is missing"):
        done.verify("sample", 1)
    (folder / "rows.jsonl").symlink_to("all.jsonl")
    with pytest.raises(RunDamaged, match=r"rows.jsonl is missing"):
        done.verify("sample", 1)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "sample"}', "\udcff"])
def test_a_broken_seal_is_named_and_can_be_redone(done, text):
    seal = done.folder("sample", 1) / "stage.json"
    seal.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunDamaged, match=r"stage.json is broken"):
        done.check(*STAGE)
    done.close()
    with open_run(done.path) as run:
        assert run.discard_from("sample", 1) == [("sample", 1)]


def test_an_altered_seal_is_noticed(done):
    seal = done.folder("sample", 1) / "stage.json"
    seal.write_text(seal.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    with pytest.raises(RunDamaged, match="altered seal"):
        done.check(*STAGE)


@pytest.mark.parametrize("target", [".", "run.json"])
def test_links_are_no_outputs(run, target):
    (run.begin(*STAGE) / "link").symlink_to(run.path / target)
    with pytest.raises(CannotWrite, match="it is a symbolic link"):
        run.seal(*STAGE)
    assert run.sealed("sample", 1) is None


def test_outputs_deleted_on_purpose_are_no_damage(done):
    folder = done.folder("sample", 1)
    assert done.delete_outputs("sample", 1, ["policy"]) == ["policy/weights.bin"]
    assert not (folder / "policy" / "weights.bin").exists()
    assert done.check(*STAGE) is not None
    assert done.delete_outputs("sample", 1, ["all.jsonl"]) == ["all.jsonl", "policy/weights.bin"]
    (folder / "rows.jsonl").unlink()
    with pytest.raises(RunDamaged, match=r"rows.jsonl is missing"):
        done.verify("sample", 1)
    with pytest.raises(ValueError, match="'pol' is not an output of sample@1"):
        done.delete_outputs("sample", 1, ["pol"])
    (folder / "deleted.json").write_text("{")
    with pytest.raises(RunDamaged, match=r"deleted.json is broken"):
        done.verify("sample", 1)


def test_deleting_that_was_interrupted_is_finished_by_the_next_run(done):
    write_atomic(done.folder("sample", 1) / "deleted.json", '["policy/weights.bin"]')
    done.close()
    open_run(done.path).close()
    assert not (done.folder("sample", 1) / "policy" / "weights.bin").exists()


def test_deleting_stays_inside_the_stage(done, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = done.folder("sample", 1)
    (folder / "way").symlink_to(tmp_path)
    for hostile in ("../../../victim", str(victim), "way/victim"):
        seal = json.loads((folder / "stage.json").read_text())
        write_atomic(folder / "stage.json", json.dumps(seal | {"outputs": {hostile: "x"}}))
        with pytest.raises(RunDamaged, match="outside its stage"):
            done.delete_outputs("sample", 1, [hostile])
        (folder / "deleted.json").unlink()
    assert victim.read_text() == "mine"


# --- redo ----------------------------------------------------------------------------------------

ALL = [
    ("reset", 0),
    ("evaluate", 0),
    ("sample", 1),
    ("evaluate", 1),
    ("red_team", 2),
    ("report", 0),
]


@pytest.mark.parametrize("first", range(len(ALL)))
def test_redo_removes_a_stage_and_all_later_ones(run, first):
    for key in ALL:
        do_stage(run, *key)
    assert run.discard_from(*ALL[first]) == ALL[first:]
    assert run.stages() == ALL[:first]
    for key in ALL[:first]:
        run.verify(*key)
    assert run.discard_from(*ALL[first]) == []
    assert (run.path / "round-02").exists() == (first > 4)
    assert not list(run.path.glob(".discarded*"))


def test_redo_unseals_the_latest_first(run, monkeypatch):
    for key in ALL:
        do_stage(run, *key)
    order = []
    unlink = Path.unlink

    def note(path, **options):
        if path.name == "stage.json":
            assert all(run.folder(*key).is_dir() for key in ALL)
            order.append(path.parent)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", note)
    run.discard_from("reset")
    assert order == [run.folder(*key) for key in reversed(ALL)]


def test_redo_follows_no_links(done, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "stage.json").write_text("mine")
    (done.path / "round-01" / "3-judge").symlink_to(outside)
    with pytest.raises(CannotWrite, match="3-judge: it is a symbolic link"):
        done.discard_from("sample", 1)
    (done.path / "round-01" / "3-judge").unlink()
    (done.folder("sample", 1) / "way").symlink_to(outside)
    done.discard_from("sample", 1)
    assert (outside / "stage.json").read_text() == "mine"
