"""What a receipt says of a run: base, judges, data, estimates. Plain JSON, no text of any model.

Paths of this machine stay on it: a local folder or file goes by its last name.
"""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from selfmoa import registry
from selfmoa.errors import RunDamaged
from selfmoa.recipes import load_recipe
from selfmoa.records import PreferencePair, content_id
from selfmoa.release import CARD, RECEIPT
from selfmoa.release.refusals import NotForRelease, OtherBase
from selfmoa.rundir import RunDir, digest_file, read_jsonl
from selfmoa.rundir.stage import flatten
from selfmoa.stages.context import Context
from selfmoa.training.intake import provenance

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from selfmoa.records import StageRecord
    from selfmoa.stages.context import Listener


def open_run(directory: str | Path, *, unfinished: bool, listen: Listener | None) -> Context:
    """Return a run for looking only.

    Raises:
        MissingFile, NewerRun, BadInput, RecipeError: it cannot be read.
        NotForRelease: it is not finished, and `unfinished` is false.
    """
    run = RunDir.read(directory)
    if not unfinished and run.sealed("report", 0) is None:
        raise NotForRelease(
            directory, "the run is not finished", "selfmoa resume it first, or give --unfinished"
        )
    recipe = load_recipe(str(run.path / "config.yaml"))
    return Context(recipe, run, listen or (lambda _, /, **__: None))


def decided_rounds(context: Context) -> list[int]:
    """Return the rounds in which the gate has spoken."""
    run = context.run
    return [r for name, r in run.stages() if name == "evaluate" and r and run.sealed(name, r)]


def last_accepted(context: Context) -> int:
    """Return the round whose policy is the result of the run.

    Raises:
        NotForRelease: the gate accepted none.
    """
    rounds = decided_rounds(context)
    accepted = context.accepted_rounds(max(rounds, default=0) + 1)
    if not accepted:
        why = context.decision(rounds[-1])["reason"] if rounds else "no round is done"
        raise NotForRelease(
            context.run.path,
            f"the gate accepted no policy ({why})",
            "see its report and change the recipe",
        )
    return accepted[-1]


def seal_of(context: Context, stage: str, round_: int) -> StageRecord:
    """Return the seal of a stage whose files are what was sealed.

    Raises:
        RunDamaged: they are not.
    """
    context.run.verify(stage, round_)
    seal = context.run.sealed(stage, round_)
    if seal is None:
        raise RunDamaged(context.run.folder(stage, round_), "is not sealed", f"{stage}@{round_}")
    return seal


def about_run(context: Context, kind: str) -> dict[str, Any]:
    """Return the part of a receipt that models and pairs have in common."""
    run, recipe = context.run, context.recipe
    rounds = decided_rounds(context)
    seals = {f"{n}@{r}": seal.fingerprint for n, r in run.stages() if (seal := run.sealed(n, r))}
    settings = local_names(flatten(recipe.model_dump(mode="json", exclude={"description"})))
    return {
        "schema_version": 1,
        "kind": kind,
        "made_by": f"selfmoa {version('selfmoa')}",
        "run": {
            "name": run.name,
            "seed": recipe.seed,
            "fingerprint": content_id(seals, length=32),
            "finished": run.sealed("report", 0) is not None,
            "rounds": {str(r): bool(context.decision(r)["accepted"]) for r in rounds},
        },
        "recipe": {"name": recipe.name, "digest": content_id(settings), "settings": settings},
        "judges": judges(context),
        "data": data(context),
        "versions": dict(run.versions),
    }


def measured(context: Context, round_: int) -> dict[str, Any]:
    """Return the estimates of the instruct model and of a round's policy, and the drift check."""
    for r in (0, round_):
        seal_of(context, "evaluate", r)
    phase = f"round {round_}"
    return {
        "phase": phase,
        "estimates": {
            "instruct": context.measured(0)["instruct"],
            phase: context.measured(round_)[phase],
        },
        "drift": context.decision(round_)["drift"],
    }


def base(context: Context, sealed_digest: str) -> dict[str, Any]:
    """Return what a policy was made from: name, revision, digest of each file that is loaded.

    Raises:
        OtherBase: the model that is there is not the one that the run was made with.
    """
    folder = context.instruct_folder
    digest = context.models.digest(folder)
    if digest != sealed_digest:
        raise OtherBase(folder, f"its digest is {digest}, not {sealed_digest}", context.run.path)
    found = provenance(folder)
    name = local_names(found["name"])
    return found | {"name": name, "is_local": found["revision"] is None, "digest": digest}


def weights(files: Mapping[str, str]) -> dict[str, str]:
    """Return the digests of the files of weights among those of a model."""
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def judges(context: Context) -> list[dict[str, Any]]:
    """Return all judges: what each did in the run, on what, its kind, model and family."""
    weak, grades = context.recipe.judge, context.recipe.evaluate.judges
    roles = [
        *(("trained", "safety", name) for name in weak.safety),
        ("trained", "helpfulness", weak.helpfulness),
        ("trained", "refusal", weak.refusal),
        *(("graded", str(objective), name) for objective, name in grades.items()),
    ]
    return [_judge(context, *role) for role in roles]


def _judge(context: Context, role: str, objective: str, name: str) -> dict[str, Any]:
    own = context.recipe.judges.get(name)
    kind = own.kind if own else name
    family = own.family if own else None
    return {
        "name": name,
        "role": role,
        "objective": objective,
        "kind": kind,
        "model": local_names(own.model) if own else None,
        "family": family or getattr(registry.resolve("judge", kind), "family", name),
    }


def data(context: Context) -> dict[str, Any]:
    """Return where the pairs of a run come from, and how many of each objective a round has."""
    recipe, run = context.recipe, context.run
    rounds = [r for name, r in run.stages() if name == "pair" and run.sealed(name, r)]
    found = {}
    for r in rounds:
        seal = seal_of(context, "pair", r)
        pairs = read_jsonl(context.path("pair", "pairs.jsonl", r), PreferencePair)
        n = Counter(pair.objective for pair in pairs)
        found[str(r)] = {"kept": dict(sorted(n.items())), "dropped": dict(seal.dropped)}
    return {
        "rounds": found,
        "world": recipe.policy.world,
        "attackers": list(recipe.attackers_used()),
        "rule": recipe.pair.rule,
        "labelled_by_people": bool(recipe.judge.gold or recipe.judge.helpfulness_pairs),
    }


def local_names(value: Any) -> Any:
    """Return JSON data in which a path of this machine is its last name, and an address is none.

    A word with one slash in front, such as a switch in a system prompt, is no path.
    """
    if isinstance(value, str):
        if re.match(r"[a-z]+://", value):
            return "(an address)"
        parts = re.match(r"(?:~|/|[A-Za-z]:\\).*[/\\]([^/\\]+)[/\\]*$", value)
        return parts[1] if parts and " " not in value else value
    if isinstance(value, list):
        return [local_names(each) for each in value]
    if isinstance(value, dict):
        return {key: local_names(each) for key, each in value.items()}
    return value


def digests(folder: Path) -> Mapping[str, str]:
    """Return the digest of each file that lies in a folder, but for the card and the receipt."""
    names = sorted(path.name for path in folder.iterdir())
    return {n: digest_file(folder / n) for n in names if n not in (CARD, RECEIPT)}
