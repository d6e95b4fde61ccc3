"""One run's folder: its lock, its recipe, its stages in order, and how work is undone.

A stage is named by (stage, round); the report belongs to no round and has round 0.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import BaseFileLock

from selfmoa.errors import (
    BadInput,
    MissingFile,
    NewerRun,
    NotARun,
    RunDamaged,
    UnknownPlugin,
)
from selfmoa.records import StageRecord
from selfmoa.rundir.files import (
    Row,
    from_line,
    kill_point,
    make_folder,
    opened,
    reading,
    sync_folder,
    write_all,
    write_atomic,
    writing,
)
from selfmoa.rundir.lock import acquire, now, release
from selfmoa.rundir.stage import (
    RESET_STAGES,
    ROUND_STAGES,
    SEAL,
    Digests,
    StageFolder,
    StageKey,
    draft_seal,
    flatten,
    pretty_json,
    same_setting,
    stage_place,
)

SCHEMA_VERSION = 1
ROUND_FOLDER = re.compile(r"00-reset|round-(\d{2,9})")


class RunDir:
    """One run's folder. `open` takes the lock and may write; `read` only looks.

    The seed of the run counts as a setting of every stage.
    """

    def __init__(self, path: Path, settings: Row, seed: int, name: str, versions: Digests) -> None:
        self.path = path
        self.settings = settings
        self.seed = seed
        self.name = name
        self.versions = versions
        self._lock: BaseFileLock | None = None

    @classmethod
    def open(
        cls, path: str | Path, settings: Row, *, seed: int, name: str, versions: Digests
    ) -> Self:
        """Create or reopen a run under an exclusive lock; `settings` is the resolved recipe.

        A recipe that contradicts the work already there is let in, so that `discard_from` can
        follow; `check` refuses to go on with it, and config.yaml stays that of the work.

        Raises:
            RunBusy: another process holds the run.
            NotARun: the folder holds something else.
            NewerRun: a later version of the program wrote it.
            CannotWrite: the folder cannot be made or written.
        """
        root = Path(path).expanduser()
        with writing(root):
            make_folder(root)
            root = root.resolve()
            _refuse_strangers(root)
        run = cls(root, settings, seed, name, versions)
        run._lock = acquire(root)
        try:
            run._take_over()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Return a view of an existing run, for looking only, without the lock.

        Raises:
            MissingFile: there is no run.
            NewerRun: a later version of the program wrote it.
            BadInput: run.json or config.yaml is broken.
        """
        root = Path(path).expanduser().resolve()
        facts = _read_facts(root)
        if facts is None:
            raise MissingFile(root, "run", "start it with selfmoa run, or check --dir")
        config = root / "config.yaml"
        try:
            settings = yaml.safe_load(config.read_bytes()) if config.is_file() else {}
        except (yaml.YAMLError, ValueError) as error:
            raise BadInput(config, 1, "it is not YAML") from error
        return cls(root, settings, facts["seed"], facts["name"], facts["versions"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the run. A second call does nothing."""
        if self._lock is not None:
            release(self.path, self._lock)
            self._lock = None

    def folder(self, stage: str, round_: int = 0) -> Path:
        """Return the folder of a stage, whether it exists or not; `begin` creates it.

        Raises:
            UnknownPlugin: that round has no such stage.
            CannotWrite: the folder is a link.
        """
        return self._at(stage, round_).path

    def stages(self) -> list[StageKey]:
        """Return the stages that have a folder, in the order of the loop."""
        rounds = [ROUND_FOLDER.fullmatch(entry.name) for entry in self.path.iterdir()]
        found: list[StageKey] = [("report", 0)]
        for round_ in (int(match[1] or 0) for match in rounds if match):
            found += [(each, round_) for each in (ROUND_STAGES if round_ else RESET_STAGES)]
        there = [key for key in found if self.folder(*key).is_dir()]
        return sorted(there, key=lambda key: stage_place(*key))

    def find_stage(self, name: str) -> StageKey:
        """Return the stage that a user names: "sample@2", or "sample" for the first on disk.

        Raises:
            UnknownPlugin: no stage with a folder has that name.
        """
        there = self.stages()
        for stage, round_ in there:
            if name in (stage, f"{stage}@{round_}"):
                return stage, round_
        raise UnknownPlugin("stage in this run", name, [self._at(*key).name for key in there])

    @property
    def is_open(self) -> bool:
        """Whether this process may write to the run."""
        return self._lock is not None

    def sealed(self, stage: str, round_: int = 0) -> StageRecord | None:
        """Return the seal of a stage, or None if it is not done.

        Raises:
            RunDamaged: the seal is broken.
        """
        return self._at(stage, round_).seal()

    def made_of(self, stage: str, round_: int = 0) -> StageRecord | None:
        """Return what the work of a stage, sealed or begun, is made of; None if there is none.

        Raises:
            RunDamaged: the note about it is broken.
        """
        return self._at(stage, round_).made_of()

    def check(
        self, stage: str, round_: int, version: int, settings: Row, inputs: Digests
    ) -> StageRecord | None:
        """Return the seal of a stage that was made of exactly this, or None if it is to be done.

        Work that was begun and not sealed has to match too: half of it is of that recipe.

        Raises:
            RunChanged: it was made with another setting, code version or input; the first one
                is named.
            RunDamaged: the seal or a sealed file is missing or altered.
        """
        at = self._at(stage, round_)
        at.compare(self.path, self._draft(stage, round_, version, settings, inputs))
        seal = at.seal()
        if seal is not None:
            at.verify()
        return seal

    def begin(self, stage: str, round_: int, version: int, settings: Row, inputs: Digests) -> Path:
        """Create the folder of a stage, note what it will be made of, and return it.

        Raises:
            RunChanged: work is there that was made of something else.
            CannotWrite: the disk refuses.
        """
        self._must_hold()
        at = self._at(stage, round_)
        draft = self._draft(stage, round_, version, settings, inputs)
        at.compare(self.path, draft)
        at.begin(draft)
        return at.path

    def seal(
        self,
        stage: str,
        round_: int,
        version: int,
        settings: Row,
        inputs: Digests,
        *,
        dropped: Mapping[str, int] | None = None,
        seconds: float = 0.0,
        tokens: int = 0,
        versions: Digests | None = None,
    ) -> StageRecord:
        """Mark a stage as done: digest and fsync its files, then write `stage.json`.

        Hidden files and names that end in ".tmp" are no outputs.

        Raises:
            CannotWrite: the disk refuses, or an output is a link; the stage is not done.
        """
        self._must_hold()
        record = self._draft(stage, round_, version, settings, inputs).to_json()
        record["versions"] = {**(versions or {}), **record["versions"]}
        record |= {"dropped": dict(dropped or {}), "seconds": seconds, "tokens": tokens}
        return self._at(stage, round_).finish(record)

    def verify(self, stage: str, round_: int = 0) -> None:
        """Compare every output of a sealed stage with its digest, except those deleted on purpose.

        Raises:
            RunDamaged: one is missing or altered, or the stage is not sealed.
        """
        self._at(stage, round_).verify()

    def delete_outputs(self, stage: str, round_: int, names: Iterable[str]) -> list[str]:
        """Delete outputs of a sealed stage on purpose and return all that are gone; it stays done.

        The name of a folder means all in it. What a crash leaves goes when the run is next opened.

        Raises:
            ValueError: a name is not one of its outputs.
            RunDamaged: the stage is not sealed, or an output lies outside its folder.
            CannotWrite: the disk refuses.
        """
        self._must_hold()
        return sorted(self._at(stage, round_).delete(names))

    def discard_from(self, stage: str, round_: int = 0) -> list[StageKey]:
        """Remove the work of a stage and of all that come after it; return which those were.

        Raises:
            UnknownPlugin: that round has no such stage.
            CannotWrite: the disk refuses, or a folder is a link; what is left is unsealed.
        """
        self._must_hold()
        first = stage_place(stage, round_)
        doomed = [key for key in self.stages() if stage_place(*key) >= first]
        folders = [self.folder(*key) for key in reversed(doomed)]
        with writing(self.path):
            for folder in folders:
                (folder / SEAL).unlink(missing_ok=True)
                sync_folder(folder)
                kill_point("discard.unsealed")
            for folder in folders:
                self._remove(folder)
        self._write_recipe()
        return doomed

    def event(self, name: str, /, **facts: Any) -> None:
        """Add a line to events.jsonl.

        Raises:
            CannotWrite: the disk refuses.
        """
        self._must_hold()
        row = {**facts, "time": now(), "event": name}
        line = json.dumps(row, default=str).encode() + b"\n"
        path = self.path / "events.jsonl"
        with writing(path), opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd:
            if os.fstat(fd).st_size:
                os.lseek(fd, -1, os.SEEK_END)
                if os.read(fd, 1) != b"\n":  # what a crash tore stays alone on its line
                    line = b"\n" + line
            write_all(fd, line)

    def events(self) -> list[dict[str, Any]]:
        """Return the events in order; torn lines are passed over."""
        path = self.path / "events.jsonl"
        lines: list[bytes] = []
        with suppress(MissingFile), reading(path, "events"):
            lines = path.read_bytes().split(b"\n")
        found = []
        for n, line in enumerate(lines, 1):
            with suppress(BadInput):
                found.append(from_line(path, n, line))
        return found

    def _at(self, stage: str, round_: int) -> StageFolder:
        return StageFolder(self.path, stage, round_)

    def _must_hold(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path} is open for looking only")

    def _draft(
        self, stage: str, round_: int, version: int, settings: Row, inputs: Digests
    ) -> StageRecord:
        return draft_seal(stage, round_, version, {**settings, "seed": self.seed}, inputs)

    def _take_over(self) -> None:
        """Finish what a crash left half undone, then write the recipe."""
        with writing(self.path):
            for rest in self.path.glob(".discarded-*"):
                shutil.rmtree(rest)
        for key in self.stages():
            with suppress(RunDamaged):  # `check` says it, at a time when a redo is possible
                self._at(*key).finish_deleting()
        self._write_recipe()

    def _write_recipe(self) -> None:
        """Write run.json and config.yaml, unless the work there was made with another recipe."""
        facts = _read_facts(self.path)
        if facts is not None and self._contradicted():
            return
        if facts is None or facts["seed"] != self.seed:
            head = {"schema_version": SCHEMA_VERSION, "name": self.name, "seed": self.seed}
            created = facts["created"] if facts else now()
            facts = {**head, "created": created, "versions": dict(self.versions)}
            write_atomic(self.path / "run.json", pretty_json(facts))
        config = self.path / "config.yaml"
        text = yaml.safe_dump(dict(self.settings), sort_keys=False, allow_unicode=True)
        if not config.is_file() or config.read_bytes() != text.encode():
            write_atomic(config, text)

    def _contradicted(self) -> bool:
        new = flatten({**self.settings, "seed": self.seed})
        for key in self.stages():
            try:
                made = self._at(*key).made_of()
            except RunDamaged:
                return True
            old = made.settings if made else {}
            if not all(same_setting(new[name], old[name]) for name in new.keys() & old.keys()):
                return True
        return False

    def _remove(self, folder: Path) -> None:
        trash = self.path / f".discarded-{folder.parent.name}-{folder.name}"
        folder.replace(trash)
        sync_folder(folder.parent)
        kill_point("discard.moved")
        shutil.rmtree(trash)
        if folder.parent != self.path:
            with suppress(OSError):  # a round that has earlier stages left
                folder.parent.rmdir()


def _refuse_strangers(root: Path) -> None:
    ours = {"lock", "owner.json", ".owner.json.tmp", ".run.json.tmp"}
    strangers = sorted({entry.name for entry in root.iterdir()} - ours)
    if strangers and not (root / "run.json").is_file():
        raise NotARun(root, f"'{strangers[0]}'")


def _read_facts(root: Path) -> dict[str, Any] | None:
    path = root / "run.json"
    try:
        with reading(path, "run"):
            facts = from_line(path, 1, path.read_bytes())
    except MissingFile:
        return None
    version = facts.get("schema_version")
    if not isinstance(version, int) or not {"name", "seed", "created", "versions"} <= facts.keys():
        raise BadInput(path, 1, "it is not what this program writes there")
    if version > SCHEMA_VERSION:
        raise NewerRun(root, version, SCHEMA_VERSION)
    return facts
