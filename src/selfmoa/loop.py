"""The loop: rounds of stages until nothing is found, the gate refuses too often, or rounds end.

    reset -> evaluate -> (red_team -> sample -> judge -> pair -> train -> evaluate) x R -> report

`run_rounds` reads like that box and knows nothing of files, devices or model families. The
functions below it open a run and hand it over: `run`, `reopen`, `write_report`, `compare`.
"""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfmoa import registry
from selfmoa.errors import RecipeError, UnknownPlugin, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from selfmoa.config import Attacker, JudgeModel, Recipe
    from selfmoa.rundir import RunDir
    from selfmoa.stages.context import Context, Listener

START = ("reset", "evaluate")
ROUND = ("red_team", "sample", "judge", "pair", "train", "evaluate")
OBJECTIVES = ("safety", "helpfulness", "refusal")
UNNOTED = ("progress", "building", "run_done")
"""Events that are for the moment only and enter no log."""


def run_rounds(context: Context, only: tuple[str, int | None] | None = None) -> None:
    """Run every stage in order; with `only`, up to and including that stage (its first round)."""
    for name, round_ in context.run.stages():
        context.refuse_changed(registry.resolve("stage", name)(), name, round_)
    if context.run.sealed("report", 0) is None:
        context.gather()
    for name, round_ in _stages_in_order(context):
        context.do(registry.resolve("stage", name)(), name, round_)
        if name == "evaluate":
            for phase, metrics in context.measured(round_).items():
                context.listen("measured", phase=phase, metrics=metrics)
        if only in ((name, round_), (name, None)):
            return
    if only is not None:
        raise RecipeError(
            f"--stage {only[0]} --round {only[1]}", "the run has no such stage, or stopped before"
        )


def _stages_in_order(context: Context) -> Iterator[tuple[str, int]]:
    """Yield (stage, round) to do next; what a round decided is read when the next one is due."""
    for name in START:
        yield name, 0
    for round_ in range(1, context.recipe.rounds + 1):
        for name in ROUND:
            yield name, round_
        decision = context.decision(round_)
        context.listen(
            "decision", round=round_, accepted=decision["accepted"], reason=decision["reason"]
        )
        if reason := context.why_stop(round_):
            context.listen("stopped", round=round_, reason=reason)
            break
    yield "report", 0


def run(
    recipe: Recipe,
    directory: str | Path,
    *,
    listen: Listener | None = None,
    only: tuple[str, int | None] | None = None,
    redo: str | None = None,
) -> dict[str, Any]:
    """Run a recipe in a folder, or go on where it stopped; return the summary.

    Args:
        recipe: what to run.
        directory: the run's folder; made if it is not there.
        listen: hears every event; None is silent.
        only: stop after this (stage, round); the summary is then empty. Round None is its first.
        redo: make a stage and all after it again: "sample" or "sample@2".

    Raises:
        SelfmoaError: with a sentence a user can act on; what is sealed stays.
    """
    refuse_unworkable(recipe, only)
    from selfmoa.stages.context import Context

    with _open(recipe, directory) as opened:
        if redo:
            opened.discard_from(*opened.find_stage(redo))
        heard = _noting(opened, listen)
        heard(
            "run_started",
            name=Path(directory).name,
            directory=str(directory),
            recipe=recipe.name,
            rounds=recipe.rounds,
            stages=plan(recipe),
        )
        context = Context(recipe, opened, heard)
        _make_room_for_more(context)
        run_rounds(context, only)
        if opened.sealed("report", 0) is None:
            return {}
        context.quarantine_reset()
        summary = context.summary()
        _tell_done(heard, directory, context.path("report", "", 0), summary)
        return summary


def _make_room_for_more(context: Context) -> None:
    """Let a run that was finished go on for further rounds, if its recipe asks for more by now.

    What was deleted or written at its end is made again.
    """
    done = [r for name, r in context.run.stages() if name == "evaluate"]
    last = max((r for r in done if context.run.sealed("evaluate", r)), default=0)
    if not last or context.why_stop(last) is not None:
        return
    if context.run.sealed("report", 0):
        context.run.discard_from("report", 0)
    context.restore_reset()


def extend(
    directory: str | Path,
    seeds: str | Path | None = None,
    *,
    attack: str | None = None,
    listen: Listener | None = None,
) -> dict[str, Any]:
    """Go on with a run for one more round in which new attacks join the search.

    The round starts from the last accepted policy, and the archive is replayed on the new one. The
    attacks are kept in the run's folder `seeds`; the report is written anew.

    Args:
        directory: a run that has at least one round.
        seeds: a file of attacks (`attacks.interop`).
        attack: an operator or strategy that is new to the run, from this round on.
        listen: hears every event.

    Raises:
        SelfmoaError: with a sentence a user can act on; what is sealed stays.
    """
    from selfmoa.attacks.interop import read_attacks
    from selfmoa.attacks.seeds import refuse_unreadable
    from selfmoa.rundir import write_jsonl
    from selfmoa.rundir.files import make_folder
    from selfmoa.stages.context import Context
    from selfmoa.training.policy import load_tokenizer

    recipe = reopen(directory)
    new = [entry.prompt for entry in read_attacks(Path(seeds)).entries] if seeds else []
    if attack and attack not in registry.names("strategy"):
        registry.resolve("attack", attack)
    with _open(recipe, directory) as opened:
        done = [r for name, r in opened.stages() if name == "evaluate" and opened.sealed(name, r)]
        if not any(done):
            raise RecipeError(str(directory), "the run has no round yet: let it finish one first")
        round_ = max(done) + 1
        if any(r >= round_ for _, r in opened.stages()):
            raise RecipeError(
                str(directory), f"round {round_} is not finished: selfmoa resume it first"
            )
        context = Context(recipe, opened, _noting(opened, None))
        if attack:
            context.attacker(attack)  # what it needs is there, or nothing is changed
        if new:
            refuse_unreadable(seeds, new, load_tokenizer(context.policy_folder(round_)))
        file = f"seeds/round-{round_:02}.jsonl"
        if new:
            make_folder((opened.path / file).parent)
            write_jsonl(opened.path / file, new)
        if opened.sealed("report", 0):
            opened.discard_from("report", 0)
    seeded = {**recipe.added_seeds, **({str(round_): file} if new else {})}
    operators = {**recipe.added_attacks, **({str(round_): attack} if attack else {})}
    update = {"rounds": round_, "added_seeds": seeded, "added_attacks": operators}
    return run(recipe.model_copy(update=update), directory, listen=listen)


def refuse_unworkable(recipe: Recipe, only: tuple[str, int | None] | None = None) -> None:
    """Find what would stop a run half-way, before anything is opened or built.

    Raises:
        UnknownPlugin: the recipe names a plug-in that nobody registered.
        MissingExtra: a plug-in needs a package that is not installed.
        BrokenPlugin: a plug-in does not load.
        RecipeError: the named judges or attacks cannot do the work, or `only` is never reached.
    """
    if only and not any(only in (key, (key[0], None)) for key in plan(recipe)):
        where = only[0] if only[1] is None else f"{only[0]} --round {only[1]}"
        raise RecipeError(f"--stage {where}", f"a run of {recipe.rounds} rounds has no such stage")
    world = registry.resolve("world", recipe.policy.world)
    if look := getattr(world, "refuse_unworkable", None):
        look(recipe)
    for kind, names in (
        ("attack", recipe.red_team.attacks),
        ("strategy", recipe.red_team.strategies),
    ):
        for name in names:
            _refuse_attacker(recipe, kind, name)
    if both := sorted(set(recipe.attackers_used()) & set(recipe.held_out.attacks)):
        raise RecipeError("held_out.attacks", f"'{both[0]}' is held out, and red_team uses it")
    if not recipe.red_team.attacks and not recipe.red_team.static:
        raise RecipeError("red_team.attacks", "it is empty; name one or set red_team.static")
    _refuse_judges(recipe)
    if unknown := sorted(recipe.train.weights.keys() - OBJECTIVES):
        raise RecipeError(
            "train.weights",
            f"there is no objective '{unknown[0]}'{did_you_mean(unknown[0], OBJECTIVES)}",
        )
    if recipe.train.loss != "sft":
        registry.resolve("loss", recipe.train.loss)


def _refuse_judges(recipe: Recipe) -> None:
    """Refuse unknown, missing and misplaced judges, and too few kinds of them.

    A plug-in that is a function tells objective and family only of the judge it returns: the
    stages look at those.
    """
    from selfmoa.labelmodel import MIN_FAMILIES

    weak, grades = recipe.judge, recipe.evaluate.judges
    for objective in OBJECTIVES:
        if objective not in grades:
            raise RecipeError("evaluate.judges", f"there is no judge of {objective}")
    named = [
        *(("judge.safety", "safety", name) for name in weak.safety),
        ("judge.helpfulness", "helpfulness", weak.helpfulness),
        ("judge.refusal", "refusal", weak.refusal),
        *((f"evaluate.judges.{objective}", objective, grades[objective]) for objective in grades),
    ]
    families: dict[str, dict[str, str]] = {"judge": {}, "evaluate": {}}
    for key, objective, name in named:
        judge, own = _judge_plugin(recipe, name), recipe.judges.get(name)
        judges = getattr(judge, "objective", objective)
        if judges != objective:
            raise RecipeError(key, f"judge '{name}' is of {judges}, not of {objective}")
        named_family = own.family if own else None
        family = str(named_family or getattr(judge, "family", name))
        families[key.partition(".")[0]][name] = family
    for name, family in families["evaluate"].items():
        if kin := [n for n, f in families["judge"].items() if f == family]:
            raise RecipeError(
                "evaluate.judges",
                f"'{name}' is of the family '{family}', as is '{kin[0]}', which trains: judges of "
                "one family share errors, so it would not see what training got wrong; grade with "
                "one of another family",
            )
    voters = {families["judge"][name] for name in weak.safety}
    if len(voters) < MIN_FAMILIES and weak.gold is None:
        raise RecipeError(
            "judge.safety",
            f"{len(weak.safety)} judges of {len(voters)} families "
            f"({', '.join(sorted(voters)) or 'none'}); a label model without gold labels needs "
            f"{MIN_FAMILIES} independent families: add judges of other kinds, or set judge.gold",
        )


def _refuse_attacker(recipe: Recipe, kind: str, name: str) -> None:
    """Refuse unknown attackers, and options that they do not have."""
    own = recipe.attackers.get(name)
    factory = _plugin(recipe, kind, name, own, recipe.attackers)
    if own is None:
        return
    _refuse_options(f"attackers.{name}", own, factory)
    if own.train and (own.model is None or own.endpoint is not None):
        raise RecipeError(
            f"attackers.{name}.train",
            "an attacker that is trained needs a model of its own on this machine",
        )


def _judge_plugin(recipe: Recipe, name: str) -> Any:
    """Return the plug-in of a judge, one of the recipe's own too.

    Raises:
        UnknownPlugin, MissingExtra, BrokenPlugin: as `registry.resolve`.
        RecipeError: its kind does not take the options that the recipe gives, or needs others.
    """
    own = recipe.judges.get(name)
    factory = _plugin(recipe, "judge", name, own, recipe.judges)
    if own is not None:
        _refuse_options(f"judges.{name}", own, factory)
    return factory


def _plugin(
    recipe: Recipe, kind: str, name: str, own: Attacker | JudgeModel | None, named: Iterable[str]
) -> Any:
    """Return the plug-in behind a name of the recipe's own or of the registry's.

    Raises:
        UnknownPlugin, MissingExtra, BrokenPlugin: as `registry.resolve`.
        RecipeError: it knows the embedded world alone, or needs settings that are not given.
    """
    if own is None and name not in (known := registry.names(kind)):
        raise UnknownPlugin(kind, name, {*named, *known})
    plugin = own.kind if own else name
    factory = registry.resolve(kind, plugin)
    if plugin.startswith("sandbox-") and recipe.policy.world == "files":
        raise RecipeError(
            f"recipe '{recipe.name}'",
            f"{kind} '{name}' knows the embedded sandbox alone: name another one for your own data",
        )
    given = own.options if own else {}
    for option, p in signature(factory).parameters.items():
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and option not in given:
            section = "judges" if kind == "judge" else "attackers"
            raise RecipeError(
                f"{section}.{name}.options", f"'{plugin}' needs the option '{option}'"
            )
    return factory


def _refuse_options(where: str, own: Attacker | JudgeModel, factory: Any) -> None:
    """Refuse settings of a plug-in of the recipe's own that its factory does not take.

    A factory names them by its parameters, or in an attribute `options`. One that takes any looks
    at them itself, when it builds.
    """
    known: Any = getattr(factory, "options", None) or signature(factory).parameters
    is_open = any(p.kind is p.VAR_KEYWORD for p in signature(factory).parameters.values())
    if "name" not in known and not is_open:
        raise RecipeError(f"{where}.kind", f"'{own.kind}' takes no settings: name it as it is")
    backend = getattr(factory, "backend", "local")
    if own.endpoint is not None and backend != "local":
        needs = "no model" if backend is None else f"a {backend}, which endpoints do not serve"
        raise RecipeError(f"{where}.endpoint", f"'{own.kind}' asks {needs}: leave it out")
    for option in own.options:
        is_unknown = option not in known and not (is_open and not hasattr(factory, "options"))
        if is_unknown or option in ("name", "family"):
            raise RecipeError(
                f"{where}.options",
                f"'{own.kind}' has no option '{option}'{did_you_mean(option, known)}",
            )


def plan(recipe: Recipe) -> list[tuple[str, int]]:
    """Return the (stage, round) pairs of a run that is not stopped early."""
    rounds = [(name, r) for r in range(1, recipe.rounds + 1) for name in ROUND]
    return [*((name, 0) for name in START), *rounds, ("report", 0)]


def reopen(directory: str | Path) -> Recipe:
    """Return the recipe of an existing run.

    Raises:
        MissingFile: there is no run.
        RecipeError: its config.yaml is not a recipe of this version.
    """
    from selfmoa.recipes import load_recipe
    from selfmoa.rundir import RunDir

    return load_recipe(str(RunDir.read(directory).path / "config.yaml"))


def write_report(
    directory: str | Path, *, reveal: bool = False, listen: Listener | None = None
) -> dict[str, Any]:
    """Write the report of a run as far as it is, without going on with it; return the summary.

    It goes to `report/` of a finished run and to `report-so-far/` of an unfinished one; with
    `reveal`, to `report-revealed/`, with answers that the report otherwise withholds.
    """
    from selfmoa.stages.context import Context
    from selfmoa.stages.report import write_aside

    recipe = reopen(directory)
    with _open(recipe, directory) as opened:
        heard = _noting(opened, listen)
        context = Context(recipe, opened, heard)
        is_finished = opened.sealed("report", 0) is not None
        if is_finished and not reveal:
            opened.discard_from("report", 0)
            context.do(registry.resolve("stage", "report")(), "report", 0)
            summary, folder = context.summary(), context.path("report", "", 0)
        else:
            folder = opened.path / ("report-revealed" if reveal else "report-so-far")
            summary = write_aside(context, folder, reveal=reveal)
        _tell_done(heard, directory, folder, summary)
        return summary


def compare(
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    directory: str | Path,
    *,
    listen: Listener | None = None,
) -> dict[str, Any]:
    """Run recipes over seeds, one run each, and put their final figures side by side.

    The seed is the run's and, in the sandbox, the world's too: each seed is another world.
    """
    from selfmoa.comparison import tabulate

    for recipe in recipes:
        refuse_unworkable(recipe)
    summaries: dict[str, list[dict[str, Any]]] = {}
    for recipe in recipes:
        for seed in seeds:
            world = recipe.sandbox.model_copy(update={"seed": seed})
            seeded = recipe.model_copy(update={"seed": seed, "sandbox": world})
            folder = Path(directory) / f"{recipe.name}-seed{seed}"
            summaries.setdefault(recipe.name, []).append(run(seeded, folder, listen=listen))
    return tabulate(summaries, Path(directory))


def _open(recipe: Recipe, directory: str | Path) -> RunDir:
    from selfmoa.rundir import RunDir
    from selfmoa.stages.context import installed_versions

    return RunDir.open(
        directory,
        recipe.model_dump(mode="json"),
        seed=recipe.seed,
        name=recipe.name,
        versions=installed_versions(),
    )


def _tell_done(
    heard: Listener, directory: str | Path, folder: Path, summary: dict[str, Any]
) -> None:
    report = str(folder / "report.html")
    heard("run_done", directory=str(directory), report=report, headline=summary["headline"])


def _noting(opened: Any, listen: Listener | None) -> Listener:
    """Return a listener that also writes lasting events to the run's log."""

    def heard(event: str, /, **facts: Any) -> None:
        if event not in UNNOTED:
            opened.event(event, **facts)
        if listen is not None:
            listen(event, **facts)

    return heard
