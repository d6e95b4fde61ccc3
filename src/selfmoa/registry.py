"""The one list of plug-ins: kind and name -> "module:attribute", imported when asked for.

A package outside adds its own with an entry point in the group `selfmoa.<kind>`. A name means
one thing: an entry point that takes a name that is already taken is an error, whoever was first.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, requires
from typing import Any

from selfmoa.errors import BrokenPlugin, MissingExtra, UnknownPlugin

PLUGINS: dict[str, dict[str, str]] = {
    "world": {
        "sandbox": "selfmoa.sandbox.vale:BrindleVale",
        "files": "selfmoa.suites.files:Files",
    },
    "generator": {
        "local": "selfmoa.generators.local:LocalGenerator",
        "classifier": "selfmoa.generators.classifier:LocalClassifier",
        "vllm": "selfmoa.generators.vllm:VLLMGenerator",
        "openai": "selfmoa.generators.openai:EndpointGenerator",
    },
    "attack": {
        "sandbox-hide": "selfmoa.sandbox.attacks:Hide",
        "sandbox-expand": "selfmoa.sandbox.attacks:Expand",
        "rewrite": "selfmoa.attacks.operators:Rewrites",
        "lm-hide": "selfmoa.attacks.language:LanguageHide",
        "lm-expand": "selfmoa.attacks.language:LanguageExpand",
    },
    "strategy": {
        "sandbox-follow-up": "selfmoa.sandbox.attacks:FollowUp",
        "follow-up": "selfmoa.attacks.turns:FollowUp",
        "lm-follow-up": "selfmoa.attacks.turns:LanguageFollowUp",
    },
    "judge": {
        "sandbox-lexical": "selfmoa.sandbox.judges:LexicalJudge",
        "sandbox-ngram": "selfmoa.sandbox.judges:NgramJudge",
        "sandbox-model": "selfmoa.sandbox.judges:ModelJudge",
        "sandbox-refusal": "selfmoa.sandbox.judges:RefusalMassJudge",
        "sandbox-helpful": "selfmoa.sandbox.judges:HelpfulJudge",
        "sandbox-refuses": "selfmoa.sandbox.judges:RefusalRule",
        "sandbox-noisy": "selfmoa.sandbox.noisy:NoisyJudge",
        "refusal-rules": "selfmoa.judges.refusal:RefusalRules",
        "fitted": "selfmoa.judges.fitted:FittedJudge",
        "sandbox-oracle-safety": "selfmoa.sandbox.oracle:SafetyOracle",
        "sandbox-oracle-helpfulness": "selfmoa.sandbox.oracle:HelpfulnessOracle",
        "sandbox-oracle-refusal": "selfmoa.sandbox.oracle:RefusalOracle",
        "qwen3guard": "selfmoa.judges.qwen3guard:SAFETY_JUDGE",
        "qwen3guard-refusal": "selfmoa.judges.qwen3guard:REFUSAL_JUDGE",
        "llamaguard3": "selfmoa.judges.llamaguard:JUDGE",
        "shieldgemma": "selfmoa.judges.shieldgemma:JUDGE",
        "wildguard": "selfmoa.judges.wildguard:SAFETY_JUDGE",
        "wildguard-refusal": "selfmoa.judges.wildguard:REFUSAL_JUDGE",
        "granite-guardian": "selfmoa.judges.granite:JUDGE",
        "granite-guardian-4": "selfmoa.judges.granite:JUDGE_4",
        "md-judge": "selfmoa.judges.mdjudge:JUDGE",
        "md-judge-v0_2": "selfmoa.judges.mdjudge:JUDGE_V0_2",
        "harmbench": "selfmoa.judges.harmbench:JUDGE",
        "strongreject": "selfmoa.judges.strongreject:FINETUNED_JUDGE",
        "strongreject-rubric": "selfmoa.judges.strongreject:RUBRIC_JUDGE",
        "helpfulness-rubric": "selfmoa.judges.helpfulness:RUBRIC_JUDGE",
        "helpfulness-pairwise": "selfmoa.judges.helpfulness:PairwiseJudge",
        "reward-model": "selfmoa.judges.classifiers:RewardModel",
        "refusal-classifier": "selfmoa.judges.classifiers:RefusalClassifier",
    },
    "loss": {
        "dpo": "selfmoa.training.losses:dpo",
        "robust": "selfmoa.training.losses:robust",
        "ipo": "selfmoa.training.losses:ipo",
        "modpo": "selfmoa.training.losses:modpo",
        "weighted_sum": "selfmoa.training.losses:weighted_sum",
        "safedpo": "selfmoa.training.losses:safedpo",
        "bfpo": "selfmoa.training.losses:bfpo",
        "simpo": "selfmoa.training.losses:simpo",
    },
    "stage": {
        "reset": "selfmoa.stages.reset:ResetStage",
        "red_team": "selfmoa.stages.red_team:RedTeamStage",
        "sample": "selfmoa.stages.sample:SampleStage",
        "judge": "selfmoa.stages.judge:JudgeStage",
        "pair": "selfmoa.stages.pair:PairStage",
        "train": "selfmoa.stages.train:TrainStage",
        "evaluate": "selfmoa.stages.evaluate:EvaluateStage",
        "report": "selfmoa.stages.report:ReportStage",
    },
}


def names(kind: str) -> list[str]:
    """Return the names of all plug-ins of a kind, sorted.

    Raises:
        UnknownPlugin: there is no such kind.
        BrokenPlugin: two plug-ins have one name.
    """
    return sorted(_table(kind))


def resolve(kind: str, name: str) -> Any:
    """Import a plug-in and return it: a class or a function, as its kind wants.

    Raises:
        UnknownPlugin: there is no such kind or name.
        MissingExtra: it needs a package that is not installed.
        BrokenPlugin: two plug-ins have one name, or it cannot be imported.
    """
    table = _table(kind)
    if name not in table:
        raise UnknownPlugin(kind, name, table)
    module, _, attribute = table[name].partition(":")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(kind, name, module, error) from error
    except ImportError as error:
        raise BrokenPlugin(kind, name, f"cannot be imported ({error})") from error
    try:
        for part in attribute.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise BrokenPlugin(kind, name, f"is not in its module ({error})") from error
    return found


def _table(kind: str) -> dict[str, str]:
    if kind not in PLUGINS:
        raise UnknownPlugin("kind of plug-in", kind, PLUGINS)
    table = dict(PLUGINS[kind])
    for point in entry_points(group=f"selfmoa.{kind}"):
        if table.get(point.name, point.value) != point.value or point.name in PLUGINS[kind]:
            raise BrokenPlugin(kind, point.name, f"is registered again by {_provider(point)}")
        table[point.name] = point.value
    return table


def _provider(point: EntryPoint) -> str:
    return f"'{point.dist.name}'" if point.dist else f"'{point.value}'"


def _missing(
    kind: str, name: str, module: str, error: ModuleNotFoundError
) -> MissingExtra | BrokenPlugin:
    """Tell a package that the user can install from a module that the plug-in got wrong."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "selfmoa", module.partition(".")[0]):
        return BrokenPlugin(kind, name, f"cannot be imported ({error})")
    return MissingExtra(kind, name, package, _requirement(package))


def _requirement(package: str) -> str:
    """Return what to ask pip for: the extra of selfmoa that has the package, or the package."""
    try:
        lines = requires("selfmoa") or []
    except PackageNotFoundError:
        lines = []
    for line in lines:
        required, _, marker = line.partition(";")
        extra = re.search(r"""extra\s*==\s*["']([\w.-]+)["']""", marker)
        match = re.match(r"[\w.-]+", required)
        if extra and match and match[0].replace("-", "_").lower() == package.lower():
            return f"selfmoa[{extra[1]}]"
    return package
