"""One stage's folder: its place in the run, what it was made of, and whether it is whole.

Three small files stand beside the outputs: `.begun.json` (settings and inputs, before the work),
`stage.json` (the seal, after it) and `deleted.json` (outputs that went on purpose).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from selfmoa.errors import Absent, CannotWrite, MissingFile, RunChanged, RunDamaged, UnknownPlugin
from selfmoa.records import StageRecord, canonical_json, content_id
from selfmoa.rundir.files import (
    Row,
    digest_file,
    kill_point,
    list_files,
    make_folder,
    opened,
    reading,
    sync_folder,
    write_atomic,
    writing,
)

RESET_STAGES = ("reset", "evaluate")
ROUND_STAGES = ("red_team", "sample", "judge", "pair", "train", "evaluate")
SEAL, BEGUN, TOMBSTONE = "stage.json", ".begun.json", "deleted.json"
ABSENT = Absent()

StageKey = tuple[str, int]
Digests = Mapping[str, str]


def stage_name(stage: str, round_: int) -> str:
    """Return how a user names a stage, for example in `--redo sample@2`."""
    return stage if stage in ("reset", "report") else f"{stage}@{round_}"


def stage_place(stage: str, round_: int) -> tuple[int, int]:
    """Return the position of a stage in the loop, for sorting.

    Raises:
        UnknownPlugin: that round has no such stage.
    """
    if stage == "report":
        return sys.maxsize, 0
    known = RESET_STAGES if round_ == 0 else ROUND_STAGES
    if round_ < 0 or stage not in known:
        raise UnknownPlugin(f"stage of round {round_}", stage, (*known, "report"))
    return round_, known.index(stage)


def flatten(settings: Row, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as {dotted key: value}, with values as JSON would give them back."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.loads(canonical_json(value))
    return flat


def same_setting(one: object, other: object) -> bool:
    """Return whether two settings are one to a fingerprint, to which 1, 1.0 and True are three."""
    if one is ABSENT or other is ABSENT:
        return one is other
    return canonical_json(one) == canonical_json(other)


def fingerprint(stage: str, version: int, settings: Row, inputs: Digests) -> str:
    """Return the name of everything that a stage's output depends on."""
    return content_id(stage, version, flatten(settings), dict(inputs), length=32)


def draft_seal(
    stage: str, round_: int, version: int, settings: Row, inputs: Digests
) -> StageRecord:
    """Return a seal as far as it is known before the work."""
    flat = flatten(settings)
    name = fingerprint(stage, version, flat, inputs)
    code = {"stage": str(version)}
    return StageRecord(stage, round_, name, flat, dict(inputs), {}, versions=code)


def pretty_json(value: object) -> str:
    """Return JSON for files that people open."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _ingredients(record: StageRecord) -> dict[str, Any]:
    """Return all that an output depends on, under the names that an error gives them."""
    code = {f"{record.stage} code version": record.versions.get("stage", ABSENT)}
    inputs = {f"{record.stage} input {name}": digest for name, digest in record.inputs.items()}
    return {**record.settings, **code, **inputs}


class StageFolder:
    """The folder of one stage of one run, whether it exists or not.

    Raises:
        UnknownPlugin: that round has no such stage.
        CannotWrite: the folder is a link; what is behind it is none of the run's.
    """

    def __init__(self, root: Path, stage: str, round_: int) -> None:
        self.place = stage_place(stage, round_)
        self.name = stage_name(stage, round_)
        self.path = root / "report"
        if stage != "report":
            home = f"round-{round_:02d}" if round_ else "00-reset"
            self.path = root / home / f"{self.place[1] + 1}-{stage}"
        for part in (self.path.parent, self.path):
            if part != root and part.is_symlink():
                raise CannotWrite(part, "it is a symbolic link, which no folder of a run is")

    def seal(self) -> StageRecord | None:
        """Return the seal, or None if the stage is not done.

        Raises:
            RunDamaged: the seal is broken.
        """
        return self._read(SEAL)

    def made_of(self) -> StageRecord | None:
        """Return what the work that is there, sealed or begun, was made of.

        Raises:
            RunDamaged: the note about it is broken.
        """
        return self._read(SEAL) or self._read(BEGUN)

    def compare(self, run: Path, new: StageRecord) -> None:
        """Refuse to mix the work that is there with work made of something else.

        Raises:
            RunChanged: a setting, the code version or an input differs; the first is named.
            RunDamaged: the note about the old work is broken.
        """
        old = self.made_of()
        if old is None:
            return
        was, will_be = _ingredients(old), _ingredients(new)
        for key in dict.fromkeys([*was, *will_be]):
            before, after = was.get(key, ABSENT), will_be.get(key, ABSENT)
            if not same_setting(before, after):
                raise RunChanged(run, key, before, after, self.name)
        if old.fingerprint != new.fingerprint:
            raise RunDamaged(self.path, "has an altered seal", self.name)

    def begin(self, draft: StageRecord) -> None:
        """Create the folder and note what it will be made of.

        Raises:
            CannotWrite: the disk refuses.
        """
        with writing(self.path):
            make_folder(self.path)
        if self.made_of() is None:
            write_atomic(self.path / BEGUN, pretty_json(draft.to_json()))

    def finish(self, record: Mapping[str, Any]) -> StageRecord:
        """Make the outputs durable, then write the seal: `record` and their digests.

        Raises:
            CannotWrite: the disk refuses, or an output is a link; the stage is not done.
        """
        full = StageRecord.from_json({**record, "outputs": self._settle_outputs()})
        kill_point("seal.before")
        write_atomic(self.path / SEAL, pretty_json(full.to_json()))
        kill_point("seal.after")
        return full

    def verify(self) -> None:
        """Compare every output with its digest, except those deleted on purpose.

        Raises:
            RunDamaged: one is missing or altered, or the stage is not sealed.
        """
        gone = self.deleted()
        for name, digest in self._outputs().items():
            path = self.path / name
            if name in gone:
                continue
            if path.is_symlink() or not path.is_file():
                raise RunDamaged(path, "is missing", self.name)
            if digest_file(path) != digest:
                raise RunDamaged(path, "is not what was sealed", self.name)

    def delete(self, names: Iterable[str]) -> set[str]:
        """Delete outputs and say so; return all that are gone. A folder's name means all in it.

        Raises:
            ValueError: a name is not one of its outputs.
            RunDamaged: the stage is not sealed, or an output lies outside its folder.
            CannotWrite: the disk refuses.
        """
        outputs, gone = self._outputs(), self.deleted()
        for name in names:
            prefix = name.rstrip("/") + "/"
            matches = {each for each in outputs if each == name or each.startswith(prefix)}
            if not matches:
                raise ValueError(f"'{name}' is not an output of {self.name}")
            gone |= matches
        kill_point("delete.before")
        write_atomic(self.path / TOMBSTONE, pretty_json(sorted(gone)))
        kill_point("delete.after")
        self.finish_deleting()
        return gone

    def finish_deleting(self) -> None:
        """Delete what was to be deleted and still is there.

        Raises:
            RunDamaged: `deleted.json` is broken, or names a file outside the folder.
            CannotWrite: the disk refuses.
        """
        home = self.path.resolve()
        for name in sorted(self.deleted()):
            path = self.path / name
            if not path.parent.resolve().is_relative_to(home):
                raise RunDamaged(path, "is outside its stage", self.name)
            with writing(path):
                path.unlink(missing_ok=True)

    def deleted(self) -> set[str]:
        """Return the names of the outputs that went on purpose.

        Raises:
            RunDamaged: `deleted.json` is broken.
        """
        path = self.path / TOMBSTONE
        try:
            with reading(path, "list"):
                return {str(name) for name in json.loads(path.read_bytes())}
        except MissingFile:
            return set()
        except (TypeError, ValueError) as error:
            raise RunDamaged(path, "is broken", self.name) from error

    def _outputs(self) -> dict[str, str]:
        seal = self.seal()
        if seal is None:
            raise RunDamaged(self.path, "is not sealed", self.name)
        return seal.outputs

    def _read(self, name: str) -> StageRecord | None:
        path = self.path / name
        try:
            with reading(path, "seal"):
                return StageRecord.from_json(json.loads(path.read_bytes()))
        except MissingFile:
            return None
        except (AttributeError, TypeError, ValueError) as error:
            raise RunDamaged(path, "is broken", self.name) from error

    def _settle_outputs(self) -> dict[str, str]:
        """Make the outputs private and durable; return their digests."""
        digests = {}
        for name in list_files(self.path):
            path = self.path / name
            if name in (SEAL, TOMBSTONE):
                continue
            with writing(path), opened(path, os.O_RDONLY) as fd:
                path.chmod(0o600)
                os.fsync(fd)
            digests[name] = digest_file(path)
        with writing(self.path):
            for folder in {(self.path / name).parent for name in digests} | {self.path}:
                folder.chmod(0o700)
                sync_folder(folder)
        return digests
