"""`selfmoa merge`: a run's policy, an export or any PEFT adapter becomes a whole model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from selfmoa.errors import BadInput, MissingFile
from selfmoa.release import MODEL, RECEIPT, facts
from selfmoa.release.export import export_policy, refuse_output, sign, written
from selfmoa.release.refusals import NotForRelease, OtherBase
from selfmoa.rundir import digest_tree
from selfmoa.rundir.files import parsed_json, reading
from selfmoa.training.intake import provenance
from selfmoa.training.merging import merge_adapter
from selfmoa.training.policy import (
    QUARANTINE_MARK,
    base_name,
    base_of,
    is_adapter,
    refuse_quarantined,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from selfmoa.stages.context import Listener


def merge(source: Path, out: Path, *, listen: Listener | None = None) -> dict[str, Any]:
    """Write a whole model to `out`; return what is known of it.

    Of a run or an export that is a receipt, and `out` gets a card too. Of another adapter it is
    only whether its base could be compared with what its training noted.

    Args:
        source: a run, a folder of `selfmoa export` or `selfmoa train`, or a PEFT adapter.
        out: a new or empty folder.
        listen: as in `export.export_policy`.

    Raises:
        Quarantined: the adapter, or its base, is un-aligned on purpose.
        OtherBase: the base is not the one that was recorded.
        NotForRelease: the folder is no adapter; or see `export.export_policy`.
        MissingFile: there is no such folder, or the base is not to be found.
        TrainingStopped: adapter and base do not fit together.
        OutputTaken, CannotWrite: nothing can be written to `out`.
    """
    if (source / "run.json").is_file():
        return export_policy(source, out, merged=True, listen=listen)
    refuse_output(out)
    refuse_marked(source)
    if not source.is_dir():
        raise MissingFile(source, "adapter", "check the path")
    if not is_adapter(source):
        raise NotForRelease(source, "it holds no adapter", "a whole model needs no merging")
    base, receipt = base_of(source), read_receipt(source)
    refuse_marked(base)
    is_checked = refuse_changed_base(source, base, receipt)
    with written(out) as folder:
        merge_adapter(source, folder)
        if "run" in receipt:
            return sign(folder, receipt | {"kind": MODEL})
    return {"kind": MODEL, "base": {"name": base_name(source)[0], "checked": is_checked}}


def refuse_marked(folder: Path) -> None:
    """Refuse what is quarantined, lies in a quarantined folder, or holds something quarantined.

    Raises:
        Quarantined: it does.
    """
    below = [mark.parent for mark in folder.rglob(QUARANTINE_MARK)]
    for each in (folder, *folder.resolve().parents, *below):
        refuse_quarantined(each)


def read_receipt(folder: Path) -> dict[str, Any]:
    """Return the receipt of a folder; nothing where there is none.

    Raises:
        BadInput: it is no JSON object.
        CannotRead: the disk refuses.
    """
    path = folder / RECEIPT
    if not path.is_file():
        return {}
    with reading(path, "receipt"):
        found = parsed_json(path, 1, path.read_bytes())
    if not isinstance(found, dict):
        raise BadInput(path, 1, "it is not a JSON object")
    return found


def refuse_changed_base(adapter: Path, base: Path, receipt: Mapping[str, Any]) -> bool:
    """Compare an adapter's base with what was noted of it; return whether anything was.

    An export notes each file of weights. `selfmoa train` notes the folder that it started from,
    which is the base unless it went on with an adapter.

    Raises:
        OtherBase: it is another one.
    """
    noted = receipt.get("base")
    if isinstance(noted, dict):
        found = facts.weights(provenance(base)["files"])
        for name, digest in facts.weights(noted["files"]).items():
            if found.get(name) != digest:
                raise OtherBase(base, f"{name} is {found.get(name, 'missing')}", adapter)
        return True
    settings = json.loads((adapter / "adapter_config.json").read_bytes())
    if noted is None or noted != settings["base_model_name_or_path"]:
        return False
    if digest_tree(base) != receipt["start_digest"]:
        raise OtherBase(base, f"its digest is not {receipt['start_digest']}", adapter)
    return True
