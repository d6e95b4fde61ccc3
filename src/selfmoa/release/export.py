"""Exports of a run: the accepted policy, as adapter or whole model, or its preference pairs.

A folder appears whole, by one rename, or not at all.
"""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfmoa.errors import OutputTaken
from selfmoa.records import PreferencePair, Prompt
from selfmoa.release import ADAPTER, CARD, MODEL, PAIRS, RECEIPT, facts
from selfmoa.release.refusals import NotForRelease
from selfmoa.report.cards import dataset_card, model_card
from selfmoa.rundir import read_jsonl, write_atomic, write_jsonl
from selfmoa.rundir.files import make_folder, writing
from selfmoa.rundir.stage import pretty_json
from selfmoa.training.merging import merge_adapter
from selfmoa.training.policy import READ, is_adapter, refuse_quarantined

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selfmoa.stages.context import Context, Listener

PAIRS_FILE = "pairs.jsonl"


def export_policy(
    run: str | Path,
    out: Path,
    *,
    merged: bool = False,
    unfinished: bool = False,
    listen: Listener | None = None,
) -> dict[str, Any]:
    """Write the last accepted policy of a run with its card and receipt; return the receipt.

    Args:
        run: a run's folder; nothing in it is changed.
        out: a new or empty folder.
        merged: fold an adapter into its base.
        unfinished: also of a run that is not finished.
        listen: hears that the base model is being built, where a world builds its own.

    Raises:
        NotForRelease: the gate accepted no policy, or the run is not finished.
        Quarantined: the policy is un-aligned on purpose.
        OtherBase: the base that is there is not that of the run.
        RunDamaged, MissingFile, RecipeError: the run cannot be used.
        OutputTaken, CannotWrite: nothing can be written to `out`.
    """
    refuse_output(out)
    context = facts.open_run(run, unfinished=unfinished, listen=listen)
    round_ = facts.last_accepted(context)
    seal = facts.seal_of(context, "train", round_)
    policy = context.path("train", "policy", round_)
    refuse_quarantined(policy)
    kind = ADAPTER if is_adapter(policy) and not merged else MODEL
    base = facts.base(context, seal.inputs["instruct"])
    receipt = facts.about_run(context, kind) | facts.measured(context, round_)
    receipt |= {"base": base, "training": {"fingerprint": seal.fingerprint}}
    with written(out) as folder:
        home = folder / ".adapter" if merged and is_adapter(policy) else folder
        _copy(policy, home)
        if is_adapter(home):
            _name_base(home, context, base)
        if home != folder:
            merge_adapter(home, folder)
            shutil.rmtree(home)
        return sign(folder, receipt)


def export_pairs(
    run: str | Path,
    out: Path,
    *,
    acknowledged: bool,
    unfinished: bool = False,
    listen: Listener | None = None,
) -> dict[str, Any]:
    """Write the preference pairs of all rounds with their card and receipt; return the receipt.

    A row is a `PreferencePair` with the round it is from and its prompt's category, style and
    source. `prompt`, `chosen` and `rejected` are TRL's conversational columns.

    Args:
        run: a run's folder; nothing in it is changed.
        out: a new or empty folder.
        acknowledged: whoever asks knows that rejected answers may be unsafe.
        unfinished: also of a run that is not finished.
        listen: as in `export_policy`.

    Raises:
        NotForRelease: nobody acknowledged what is in there, the run is not finished, or it has no
            pairs.
        RunDamaged, MissingFile, RecipeError: the run cannot be used.
        OutputTaken, CannotWrite: nothing can be written to `out`.
    """
    refuse_output(out)
    if not acknowledged:
        raise NotForRelease(
            run,
            "its pairs hold attacks and unsafe answers in plain text",
            "give --acknowledge-harmful if that is what you want",
        )
    context = facts.open_run(run, unfinished=unfinished, listen=listen)
    receipt = facts.about_run(context, PAIRS)
    rows = [row for r in receipt["data"]["rounds"] for row in _rows(context, int(r))]
    if not rows:
        raise NotForRelease(run, "it has no preference pairs", "see its report for why")
    with written(out) as folder:
        write_jsonl(folder / PAIRS_FILE, rows)
        return sign(folder, receipt)


def _rows(context: Context, round_: int) -> Iterator[dict[str, Any]]:
    prompts = {
        p.id: p for p in read_jsonl(context.path("red_team", "prompts.jsonl", round_), Prompt)
    }
    for pair in read_jsonl(context.path("pair", PAIRS_FILE, round_), PreferencePair):
        prompt = prompts[pair.prompt_id]
        origin = {name: getattr(prompt, name) for name in ("category", "style", "source")}
        yield {**pair.to_json(), "round": round_, **origin}


def _copy(policy: Path, folder: Path) -> None:
    """Copy weights, configuration and tokenizer: what stands on the list of readable files."""
    make_folder(folder)
    for path in sorted(policy.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in READ):
            shutil.copyfile(path, folder / path.name)


def _name_base(adapter: Path, context: Context, base: dict[str, Any]) -> None:
    """Say in an adapter's configuration where its base is: on the hub, or here."""
    path = adapter / "adapter_config.json"
    here = str(context.instruct_folder.resolve())
    name, revision = (here, None) if base["is_local"] else (base["name"], base["revision"])
    settings = json.loads(path.read_bytes())
    settings |= {"base_model_name_or_path": name, "revision": revision}
    write_atomic(path, pretty_json(settings))


# --- folders -------------------------------------------------------------------------------------


def refuse_output(out: Path) -> None:
    """Refuse to write over anything.

    Raises:
        OutputTaken: something is there.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputTaken(out, "is there and is no folder")
    if out.is_dir() and any(out.iterdir()):
        raise OutputTaken(out, "is not empty")


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """Give a hidden folder to fill, which becomes `out` when the block ends well.

    Raises:
        CannotWrite: the disk refuses.
    """
    temp = out.with_name(f".{out.name}.tmp")
    with writing(out):
        shutil.rmtree(temp, ignore_errors=True)
        make_folder(temp)
        try:
            yield temp
            if out.is_dir():
                out.rmdir()
            temp.rename(out)
        except BaseException:
            shutil.rmtree(temp, ignore_errors=True)
            raise


def sign(folder: Path, receipt: dict[str, Any]) -> dict[str, Any]:
    """Write receipt and card of a folder that holds all else; return the receipt."""
    receipt = receipt | {"files": facts.digests(folder)}
    write_atomic(folder / RECEIPT, pretty_json(receipt))
    card = dataset_card(receipt) if receipt["kind"] == PAIRS else model_card(receipt)
    write_atomic(folder / CARD, card)
    return receipt
