"""`selfmoa push`: an exported folder to a model hub. Nothing is sent unless it is really meant.

What was listed is what is sent: the files are looked at one by one, each of a kind that is known
to hold no code, and compared with the receipt. Where the hub is, whether it may be asked and who
asks is the hub library's to know: HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN or its login.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfmoa.errors import MissingFile
from selfmoa.release import ADAPTER, CARD, PAIRS, RECEIPT
from selfmoa.release.merging import read_receipt, refuse_marked
from selfmoa.release.refusals import HubRefused, NotForRelease
from selfmoa.rundir import digest_file
from selfmoa.training.intake import find_problems

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KNOWN = (".safetensors", ".json", ".jsonl", ".md", ".txt", ".model", ".jinja")
"""Kinds of file that hold no code. Pickles are none of them."""


def push(folder: Path, repo: str, *, really: bool = False, private: bool = True) -> dict[str, Any]:
    """Tell what a push would do, or do it.

    Args:
        folder: of `selfmoa export` or `selfmoa merge`.
        repo: "user/name" on the hub; made if it is not there.
        really: send the files.
        private: the repository is for its owner alone; if one is there already, it must be so.

    Returns:
        `target`, `kind`, `private`, `files` [{name, bytes, digest}], `refused` [sentence] and
        `commit`: its address, or None where nothing was sent.

    Raises:
        Quarantined: something in the folder is un-aligned on purpose.
        NotForRelease: something is refused, and it was really meant.
        HubRefused: the hub cannot be reached, or takes nothing.
        MissingFile, CannotRead: the folder cannot be read.
    """
    if not folder.is_dir():
        raise MissingFile(folder, "folder", "write one with selfmoa export")
    refuse_marked(folder)
    names, refused = survey(folder)
    digests = {name: digest_file(folder / name) for name in names}
    receipt = {} if refused else read_receipt(folder)
    refused += [] if refused else look(digests, receipt, private=private)
    plan: dict[str, Any] = {
        "target": repo,
        "kind": "dataset" if receipt.get("kind") == PAIRS else "model",
        "private": private,
        "files": [
            {"name": name, "bytes": (folder / name).stat().st_size, "digest": digest}
            for name, digest in digests.items()
        ],
        "refused": refused,
        "commit": None,
    }
    if really and refused:
        raise NotForRelease(folder, "; ".join(refused), "export it again")
    return plan | {"commit": _send(folder, plan)} if really else plan


def survey(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the files that could be sent, and a sentence on each of the others."""
    names, refused = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            refused.append(f"{name} is a link")
        elif path.is_dir():
            continue
        elif path.name.startswith(".") or path.suffix not in KNOWN:
            refused.append(f"{name} is not of a kind that is published ({', '.join(KNOWN)})")
        else:
            names.append(name)
    refused += [f"there is no {name}" for name in (CARD, RECEIPT) if name not in names]
    refused += find_problems(folder)
    return names, refused


def look(digests: Mapping[str, str], receipt: Mapping[str, Any], *, private: bool) -> list[str]:
    """Return what speaks against a folder of well-made files: a sentence each."""
    if not {"kind", "run", "files"} <= receipt.keys():
        return [f"{RECEIPT} is not the receipt of an export"]
    noted = receipt["files"]
    mine = {name: digest for name, digest in digests.items() if name not in (CARD, RECEIPT)}
    refused = [
        f"{name} is not what was exported"
        for name in sorted(noted.keys() | mine.keys())
        if noted.get(name) != mine.get(name)
    ]
    if receipt["kind"] == ADAPTER and receipt["base"]["is_local"]:
        refused.append("its base is a folder of this machine: export it with --merged")
    if receipt["kind"] == PAIRS and not private:
        refused.append("pairs hold unsafe answers: push them private, then gate them on the hub")
    return refused


def _send(folder: Path, plan: dict[str, Any]) -> str:
    """Make the repository and commit the files; return the address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    repo, kind = plan["target"], plan["kind"]
    if constants.HF_HUB_OFFLINE:
        raise HubRefused(repo, "HF_HUB_OFFLINE is set", "unset it to go on line")
    if get_token() is None:
        raise HubRefused(repo, "nobody is logged in", "hf auth login, or set HF_TOKEN")
    # Of whichever HTTP library the hub library is built on: its errors are no OSError.
    unreachable: Any = (OSError, HfHubHTTPError.__bases__[0])
    api = HfApi()
    files = [CommitOperationAdd(f["name"], str(folder / f["name"])) for f in plan["files"]]
    try:
        api.create_repo(repo, repo_type=kind, private=plan["private"], exist_ok=True)
        if plan["private"] and not api.repo_info(repo, repo_type=kind).private:
            raise HubRefused(repo, "it is there and public", "give another name, or --public")
        done = api.create_commit(
            repo, files, commit_message="Upload by selfmoa push", repo_type=kind
        )
    except HFValidationError as error:
        raise HubRefused(repo, str(error).splitlines()[0], "give a name like user/model") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise HubRefused(
            repo, f"the hub answered {status}", "check your rights to it, or try again later"
        ) from error
    except unreachable as error:
        raise HubRefused(repo, "the hub cannot be reached", "try again later") from error
    return str(done.commit_url)
