"""Cards of what is handed out: of a model and of preference pairs, from their receipts alone.

A card holds numbers, names and settings and never text of a model: whoever opens it on a hub has
asked for no such thing. Each rate stands in a row with its interval, n, unjudged and judge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from selfmoa.report.page import Table, environment
from selfmoa.report.words import basis, bounds, markdown, percent, reading

Receipt = Mapping[str, Any]

RATES = {
    "asr": "Attack success (ASR)",
    "asr_trained_styles": "ASR, trained styles",
    "asr_heldout_styles": "ASR, held-out styles",
    "safety": "Safety",
    "over_refusal": "Over-refusal",
    "over_refusal_legit": "Over-refusal, requests that only look harmful",
    "helpfulness": "Helpfulness",
}
CHANGE = "change"
BASIS = ("Measure", "Of", "Value", "95% interval", "n", "Unjudged", "Judge")
RELATIONS = {"adapter": "adapter", "model": "finetune"}
GATE = (
    "The prompts are attacks and rejected answers may be harmful. Say who you are and what you "
    "want them for: training, or research on safety."
)


def model_card(receipt: Receipt) -> str:
    """Return the card of a policy, with the front matter that hubs read."""
    phase, base = receipt["phase"], receipt["base"]
    name = f"{receipt['run']['name']}, {phase}"
    called = base["name"] + (f" at revision {base['revision']}" if base["revision"] else "")
    return _card(
        "model_card.md.j2",
        model_front(receipt),
        receipt,
        title=f"{name}, aligned by selfmoa",
        lead=f"{_form(receipt)} of {called}: trained to be safe without being mute, by "
        "multi-objective preference optimisation on its own answers.",
        remarks=_remarks(receipt),
        results=Table("", BASIS, _results(receipt)),
        base=Table("", ("Base", ""), _base(base)),
        made=Table("", ("Setting", ""), _made(receipt)),
        kind=receipt["kind"],
    )


def dataset_card(receipt: Receipt) -> str:
    """Return the card of a file of pairs, with the front matter that hubs read."""
    rounds = receipt["data"]["rounds"]
    n = sum(sum(r["kept"].values()) for r in rounds.values())
    reasons = sorted({reason for r in rounds.values() for reason in r["dropped"]})
    dropped = [
        (reason, *(r["dropped"].get(reason, 0) for r in rounds.values())) for reason in reasons
    ]
    return _card(
        "dataset_card.md.j2",
        dataset_front(receipt, n),
        receipt,
        title=f"Preference pairs of {receipt['run']['name']}",
        lead=f"{n:,} pairs of answers to one prompt, in TRL's conversational preference format.",
        dropped=Table("", ("Reason", *(f"Round {r}" for r in rounds)), dropped or [("none",)]),
    )


def model_front(receipt: Receipt) -> dict[str, Any]:
    """Return what a hub reads of a model: base, library, tags, and the rates as a model-index."""
    is_adapter = receipt["kind"] == "adapter"
    base = receipt["base"]
    front: dict[str, Any] = {}
    if not base["is_local"]:
        front = {"base_model": base["name"], "base_model_relation": RELATIONS[receipt["kind"]]}
    final = receipt["estimates"][receipt["phase"]]
    suite = {"type": "selfmoa", "name": f"held-out suite of {receipt['data']['world']}"}
    return front | {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["selfmoa", "safety", "alignment", "dpo"] + (["lora"] if is_adapter else []),
        "model-index": [
            {
                "name": receipt["run"]["name"],
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": suite,
                        "metrics": [
                            _metric(final[name], label)
                            for name, label in RATES.items()
                            if bounds(final.get(name))
                        ],
                    }
                ],
            }
        ],
    }


def dataset_front(receipt: Receipt, n: int) -> dict[str, Any]:
    """Return what a hub reads of `n` pairs."""
    sizes = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    size = next((size for most, size in sizes.items() if n < most), "1M<n<10M")
    return {
        "pretty_name": f"Preference pairs of {receipt['run']['name']}",
        "tags": ["selfmoa", "preference", "dpo", "trl", "safety", "not-for-all-audiences"],
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "configs": [{"config_name": "default", "data_files": "pairs.jsonl"}],
        "extra_gated_prompt": GATE,
    }


def _card(template: str, front: Mapping[str, Any], receipt: Receipt, **more: Any) -> str:
    head = yaml.safe_dump(dict(front), sort_keys=False)
    text = (
        environment(markdown)
        .get_template(template)
        .render(
            pairs=_pairs(receipt["data"]["rounds"]),
            judges=_judges(receipt["judges"]),
            provenance=_provenance(receipt["data"]),
            **more,
        )
    )
    return f"---\n{head}---\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _metric(estimate: Mapping[str, Any], label: str) -> dict[str, Any]:
    args = {key: estimate[key] for key in ("low", "high", "n", "n_unjudged", "judge")}
    name = f"{label}, judge {estimate['judge']}"
    return {"type": estimate["name"], "name": name, "value": estimate["value"], "args": args}


def _form(receipt: Receipt) -> str:
    return "A LoRA adapter" if receipt["kind"] == "adapter" else "A fine-tuned model"


def _remarks(receipt: Receipt) -> list[str]:
    found = []
    if not receipt["run"]["finished"]:
        found.append("This policy is from a run that was not finished when it was exported.")
    if receipt["drift"]["alarm"]:
        found.append(
            "The judges that trained it and the judge that graded it part ways: it may have learnt "
            "to please the former."
        )
    return found


def _results(receipt: Receipt) -> list[tuple[Any, ...]]:
    phase = receipt["phase"]
    before, after = (receipt["estimates"][name] for name in ("instruct", phase))
    rows = []
    for name, label in RATES.items():
        rows += [
            (label, "base", *_row(before.get(name))),
            ("", "this model", *_row(after.get(name))),
        ]
        if change := after.get(f"{name}_change"):
            rows.append(("", CHANGE, *_row(change, is_change=True)))
    return rows


def _row(estimate: Mapping[str, Any] | None, *, is_change: bool = False) -> tuple[str, ...]:
    """Return value, interval, n, unjudged and judge in words."""
    if not estimate:
        return "not measured", "n/a", "0", "0", "none"
    found = bounds(estimate)
    if not is_change or found is None:
        return (*reading(estimate), *basis(estimate))
    value, low, high = (percent(v) if v is None or v < 0 else f"+{percent(v)}" for v in found)
    return f"{value} points", f"{low} to {high}", *basis(estimate)


def _base(base: Mapping[str, Any]) -> list[tuple[str, str]]:
    where = "a local model" if base["is_local"] else "a model of the hub"
    rows = [("Name", f"{base['name']} ({where})"), ("Revision", base["revision"] or "none")]
    weights = [name for name in base["files"] if name.endswith(".safetensors")]
    return rows + [(name, _code(base["files"][name])) for name in weights]


def _made(receipt: Receipt) -> list[tuple[str, str]]:
    recipe, run = receipt["recipe"], receipt["run"]
    told = {True: "accepted", False: "refused"}
    rounds = (f"{r} {told[accepted]}" for r, accepted in run["rounds"].items())
    keys = ("train.loss", "train.beta", "policy.adapter", "policy.lora_rank", "reset.enabled")
    weights = [key for key in recipe["settings"] if key.startswith("train.weights.")]
    return [
        ("Recipe", f"{recipe['name']}, seed {run['seed']}"),
        ("Rounds", ", ".join(rounds)),
        *((key, str(recipe["settings"][key])) for key in (*keys, *weights)),
        ("Fingerprint of the run", _code(run["fingerprint"])),
        ("Made by", receipt["made_by"]),
        ("Versions", ", ".join(f"{name} {v}" for name, v in receipt["versions"].items())),
    ]


def _pairs(rounds: Mapping[str, Any]) -> Table:
    objectives = sorted({objective for r in rounds.values() for objective in r["kept"]})
    rows: Sequence[Sequence[Any]] = [
        (r, *(found["kept"].get(o, 0) for o in objectives), sum(found["dropped"].values()))
        for r, found in rounds.items()
    ]
    return Table("", ("Round", *(f"Pairs of {o}" for o in objectives), "Dropped"), rows)


def _judges(judges: Sequence[Mapping[str, Any]]) -> Table:
    roles = {"trained": "trained it", "graded": "graded it"}
    rows = [
        (j["name"], roles[j["role"]], j["objective"], j["kind"], j["family"], j["model"] or "none")
        for j in judges
    ]
    return Table("", ("Judge", "Role", "Of", "Kind", "Family", "Model"), rows)


def _provenance(data: Mapping[str, Any]) -> str:
    attackers = ", ".join(data["attackers"]) or "none"
    labels = (
        "Some labels of people told how far to trust the judges."
        if data["labelled_by_people"]
        else "No label of a person was used."
    )
    return (
        f"Prompts are those of the world {data['world']} and what a red team made of them "
        f"(attackers: {attackers}). Both answers of a pair are the policy's own. Which one is "
        f"better was voted on by the judges that trained it (rule: {data['rule']}). {labels}"
    )


def _code(text: str) -> Markup:
    return Markup("`{}`").format(text)
