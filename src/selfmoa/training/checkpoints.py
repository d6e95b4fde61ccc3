"""Checkpoints that are complete or ignored: a training goes on from the last one, bit for bit.

    FOLDER/checkpoint-N/            after N optimiser steps
        model.safetensors           the trainable parameters, by name
        optimizer.safetensors       the optimiser's tensors, as PARAMETER/KEY
        rng.safetensors             the states of torch's generators
        state.json                  step, log, facts; the optimiser's groups and plain values
        complete.json               identity, and size and SHA-256 of the others; written last

The order of writes is the design:

1. All is written into `.checkpoint-N.tmp`, each file fsynced, then `complete.json`.
2. The folder gets its name by one rename. What had that name before is `.checkpoint-N.old`
   meanwhile, and counts until the new one is in its place.
3. Older ones go after that, all but one; each leaves its name before it is deleted.

So no crash leaves half a checkpoint under its name. What people or disks do to one is found by
sizes and digests before anything of it reaches the model, and the one before is used instead.

A checkpoint is of one identity: that of all a training depends on. Another one is refused. Left out
on purpose: torch.distributed (one process saves, all restore), and what `snapshots` leaves out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from selfmoa.errors import BadInput, CannotWrite, MissingFile, TrainingChanged, plain_reason
from selfmoa.records import canonical_json, content_id
from selfmoa.rundir.files import (
    kill_point,
    make_folder,
    opened,
    reading,
    sync_folder,
    write_all,
    writing,
)
from selfmoa.rundir.stage import ABSENT, same_setting
from selfmoa.training.snapshots import (
    MODEL,
    OPTIMIZER,
    RNG,
    Snapshot,
    Unusable,
    prepare,
    safetensors_bytes,
    take,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch.nn import Module
    from torch.optim import Optimizer

STATE, MARKER = "state.json", "complete.json"
TENSORS = (MODEL, OPTIMIZER, RNG)
FILES = (*TENSORS, STATE)
NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)|\.checkpoint-(0|[1-9][0-9]*)\.old")
BROKEN = (SafetensorError, AttributeError, KeyError, RecursionError, TypeError, ValueError)
"""What reading a file raises if it is not what this program writes."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a loop finds again, beside the state of model, optimiser and generators.

    Attributes:
        step: optimiser steps done.
        log: the measurements so far, one row a step; floats are exactly those that were saved.
        facts: whatever else the loop wanted to keep.
    """

    step: int
    log: list[dict[str, Any]]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one training in `folder`; the newest two are kept.

    While one is written, there are three. One process saves; all may restore at the same time,
    before the first save. Models are given bare: a wrapper's names are not the model's.

    Args:
        folder: where `checkpoint-N` stands; `save` creates it. Other files in it are left alone.
        identity: names all that a training depends on (model, data, tokenizer, template,
            settings, code version): plain keys, JSON values.
        say: called with a sentence for every checkpoint that is passed over.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.identity: dict[str, Any] = json.loads(canonical_json(dict(identity)))
        self.say = say
        self._rejected: set[Path] = set()

    def save(
        self,
        model: Module,
        optimizer: Optimizer,
        step: int,
        log: list[dict[str, Any]],
        facts: dict[str, Any],
    ) -> None:
        """Write `checkpoint-{step}`, then delete all but it and the last complete one before.

        Args:
            model: its trainable parameters are saved.
            optimizer: over trainable parameters of that model only.
            step: optimiser steps done.
            log: JSON rows.
            facts: JSON values.

        Raises:
            BadInput: `log`, `facts` or a setting of the optimiser cannot be written as JSON.
            CannotWrite: the disk refuses; a complete checkpoint that was there still is.
            TrainingChanged: checkpoints of another training are there.
            RuntimeError: the optimiser holds a parameter that the model does not train.
        """
        snapshot = take(model, optimizer)
        state = {"step": step, "log": log, "facts": facts, "optimizer": snapshot.settings}
        files: dict[str, Iterable[bytes]] = {
            name: safetensors_bytes(tensors) for name, tensors in snapshot.tensors.items()
        }
        files[STATE] = [_json_line(self.folder / STATE, state)]
        target = self.folder / f"checkpoint-{step}"
        temp = self.folder / f".checkpoint-{step}.tmp"
        with writing(target):
            self._settle_others(discard=False)
            make_folder(self.folder)
            self._sweep()
            try:
                _write(temp, files, {"step": step, "identity": self.identity})
                kill_point("checkpoint.before_replace")
                _replace(temp, target)
            except BaseException:
                shutil.rmtree(temp, ignore_errors=True)
                raise
            kill_point("checkpoint.after_replace")
            self._rejected.discard(target)
            self._prune(target, step)

    def restore(self, model: Module, optimizer: Optimizer, *, fresh: bool = False) -> Saved | None:
        """Put the newest complete checkpoint into model, optimiser and torch's generators.

        A broken one is passed over, with a sentence. Nothing is changed before all of a
        checkpoint has been read and found in order.

        Args:
            model: as it was when the training began; its trainable parameters are overwritten.
            optimizer: of the same kind and over the same parameters as the one saved.
            fresh: delete the checkpoints of another training instead of refusing them.

        Returns:
            What the loop kept, or None if the training has to begin at its beginning.

        Raises:
            TrainingChanged: the checkpoints are of another training; the changed key is named.
            CannotRead: the folder cannot be listed.
            CannotWrite: a checkpoint of another training cannot be deleted.
        """
        self._settle_others(discard=fresh)
        self._sweep()
        passed_over: dict[Path, str] = {}
        then, saved = "starting anew", None
        for step, path in self._found():
            try:
                saved, put_back = _read(path, step, model, optimizer)
            except Unusable as why:
                passed_over[path] = str(why)
            else:
                put_back()
                then = f"going on from checkpoint-{step}"
                break
        for path, reason in passed_over.items():
            self.say(f"{path.name} cannot be used: {reason}; {then}")
        self._rejected.update(passed_over)
        return saved

    def discard(self) -> None:
        """Delete all checkpoints, the oldest first, and the folder if nothing else is in it.

        Raises:
            CannotRead: the folder cannot be listed.
            CannotWrite: the disk refuses.
        """
        with writing(self.folder):
            for _, path in reversed(self._found()):
                if _is_ours(path):
                    _remove(path)
            self._sweep()
            with suppress(OSError):  # it holds something else, or never was
                self.folder.rmdir()

    def _found(self) -> list[tuple[int, Path]]:
        """Return (step, path) of whatever has the name of a checkpoint, the newest first."""
        names: list[str] = []
        with suppress(MissingFile), reading(self.folder, "folder"):
            names = [path.name for path in self.folder.iterdir()]
        steps = [(int(m[1] or m[2]), m[0]) for m in map(NAME.fullmatch, names) if m]
        # Of two with one step, the one in its place comes first.
        steps.sort(key=lambda each: (-each[0], each[1].startswith(".")))
        return [(step, self.folder / name) for step, name in steps]

    def _settle_others(self, *, discard: bool) -> None:
        """Refuse checkpoints of another training, or delete them."""
        for _, path in self._found():
            with suppress(Unusable):
                old = _read_marker(path)["identity"]
                change = _first_change(old, self.identity)
                if change and not discard:
                    raise TrainingChanged(self.folder, *change)
                if change:
                    with writing(path):
                        _remove(path)

    def _sweep(self) -> None:
        """Delete what a crash left half written or half deleted."""
        for rest in self.folder.glob(".checkpoint-*.tmp"):
            shutil.rmtree(rest, ignore_errors=True)

    def _prune(self, newest: Path, step: int) -> None:
        """Delete all but the newest and the one before it.

        Later ones go as well: `restore` has passed them over, or this training would have
        begun after them.
        """
        before = None
        for each, path in self._found():
            if path == newest or not _is_ours(path):
                continue
            if before is None and each < step and self._looks_complete(path):
                before = path
            else:
                _remove(path)

    def _looks_complete(self, path: Path) -> bool:
        """Return whether a checkpoint is complete, as far as can be told without reading it all."""
        try:
            marker = _read_marker(path)
            for name in FILES:
                _check_size(path / name, marker)
        except Unusable:
            return False
        return path not in self._rejected


def _write(folder: Path, files: Mapping[str, Iterable[bytes]], facts: dict[str, Any]) -> None:
    """Make a folder of these files, and of the marker after them; all of it is durable."""
    folder.mkdir(mode=0o700)
    marker = {**facts, "files": {name: _write_file(folder / name, files[name]) for name in files}}
    sync_folder(folder)
    kill_point("checkpoint.unmarked")
    whole = {**marker, "digest": content_id(marker, length=64)}
    _write_file(folder / MARKER, [canonical_json(whole).encode() + b"\n"])
    sync_folder(folder)


def _write_file(path: Path, parts: Iterable[bytes]) -> dict[str, Any]:
    """Write a new file durably; return its size in bytes and its SHA-256."""
    size, total = 0, hashlib.sha256()
    with writing(path), opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
        for part in parts:
            kill_point("checkpoint.torn", partial(_write_half, fd, part))
            write_all(fd, part)
            size += len(part)
            total.update(part)
        os.fsync(fd)
    return {"size": size, "sha256": total.hexdigest()}


def _write_half(fd: int, data: bytes) -> None:
    write_all(fd, data[: len(data) // 2])


def _json_line(path: Path, value: Any) -> bytes:
    """Return JSON with its keys in their order: a resumed log should look like any other."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise BadInput(path, 1, f"it cannot be written as JSON: {error}") from error


def _replace(temp: Path, target: Path) -> None:
    """Give a complete folder its name; what has that name now counts until then."""
    if os.path.lexists(target):
        if not _is_ours(target):
            raise CannotWrite(target, "something that is not a checkpoint has that name")
        old = target.with_name(f".{target.name}.old")
        _remove(old)
        target.replace(old)
        kill_point("checkpoint.aside")
    temp.replace(target)
    sync_folder(target.parent)


def _is_ours(path: Path) -> bool:
    """Return whether a path is a checkpoint of this program, however broken.

    Other trainers call their checkpoints `checkpoint-N` too; nothing of theirs is ever deleted.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    return MARKER in names or names <= set(FILES)


def _remove(path: Path) -> None:
    """Delete a checkpoint: by one rename it is none any more, and what is left is swept later."""
    gone = path.with_name(f".{path.name.lstrip('.')}.tmp")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):  # a fellow process was first
        path.replace(gone)
        kill_point("checkpoint.removing")
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def _usable(name: str) -> Iterator[None]:
    """Turn whatever is wrong with a file into Unusable."""
    try:
        yield
    except FileNotFoundError:
        raise Unusable(f"{name} is missing") from None
    except OSError as error:
        raise Unusable(f"{name} cannot be read: {plain_reason(error)}") from error
    except BROKEN as error:
        raise Unusable(f"{name} is broken") from error


def _read(
    path: Path, step: int, model: Module, optimizer: Optimizer
) -> tuple[Saved, Callable[[], None]]:
    """Return what a checkpoint holds for the loop, and how to put back the rest.

    Raises:
        Unusable: it is not complete, not whole, or does not fit.
    """
    marker = _read_marker(path)
    if marker["step"] != step:
        raise Unusable(f"it is checkpoint-{marker['step']} under another name")
    for name in FILES:
        _check_size(path / name, marker)
    for name in FILES:
        with _usable(name), (path / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != marker["files"][name]["sha256"]:
                raise Unusable(f"{name} is not what was written")
    tensors = {}
    for name in TENSORS:
        with _usable(name):
            tensors[name] = load_file(path / name)
    with _usable(STATE):
        state = json.loads((path / STATE).read_bytes())
        saved = Saved(step, state["log"], state["facts"])
        return saved, prepare(Snapshot(tensors, state["optimizer"]), model, optimizer)


def _read_marker(folder: Path) -> dict[str, Any]:
    """Return the marker of a checkpoint: step, identity, and size and digest of its files."""
    if folder.is_symlink() or not folder.is_dir():
        raise Unusable("it is not a folder")
    with _usable(MARKER):
        marker: dict[str, Any] = json.loads((folder / MARKER).read_bytes())
        if marker.pop("digest") != content_id(marker, length=64):
            raise Unusable(f"{MARKER} is broken")
    return marker


def _check_size(path: Path, marker: Mapping[str, Any]) -> None:
    with _usable(path.name):
        size, wanted = path.stat().st_size, marker["files"][path.name]["size"]
    if size != wanted:
        raise Unusable(f"{path.name} has {size} bytes instead of {wanted}")


def _first_change(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[str, object, object] | None:
    """Return the first key whose value differs, with both values; 1 and 1.0 differ."""
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if not same_setting(before, after):
            return key, before, after
    return None
