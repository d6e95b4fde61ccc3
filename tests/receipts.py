"""A receipt as an export writes it, for tests that need no run."""

from __future__ import annotations


def estimate(name, value=0.25, judge="other-family", n=120, unjudged=3):
    reach = 0.05
    return {
        "name": name,
        "value": value,
        "low": None if value is None else value - reach,
        "high": None if value is None else value + reach,
        "n": n,
        "n_unjudged": unjudged,
        "judge": judge,
    }


def receipt(**changes):
    """Return the receipt of an adapter from a hub's base; sections are replaced by name."""
    phase = "round 2"
    after = {name: estimate(name, 0.05) for name in ("asr", "asr_heldout_styles")}
    after |= {"over_refusal": estimate("over_refusal", 0.02, "refusal-rules")}
    after |= {"over_refusal_change": estimate("over_refusal_change", -0.01, "refusal-rules")}
    before = {name: estimate(name, 0.4) for name in ("asr", "asr_heldout_styles", "over_refusal")}
    return {
        "schema_version": 1,
        "kind": "adapter",
        "made_by": "selfmoa 0.1.0",
        "run": {
            "name": "vale",
            "seed": 7,
            "fingerprint": "ab" * 16,
            "finished": True,
            "rounds": {"1": True, "2": True, "3": False},
        },
        "recipe": {
            "name": "small",
            "digest": "cd" * 8,
            "settings": {
                "train.loss": "modpo",
                "train.beta": 0.1,
                "train.weights.safety": 0.7,
                "policy.adapter": "lora",
                "policy.lora_rank": 16,
                "reset.enabled": True,
            },
        },
        "judges": [
            {
                "name": "guard",
                "role": "trained",
                "objective": "safety",
                "kind": "llamaguard",
                "model": "org/guard",
                "family": "llama",
            },
            {
                "name": "other-family",
                "role": "graded",
                "objective": "safety",
                "kind": "wildguard",
                "model": "org/other",
                "family": "mistral",
            },
        ],
        "data": {
            "rounds": {
                "1": {"kept": {"safety": 30, "helpfulness": 12}, "dropped": {"too close": 5}},
                "2": {"kept": {"safety": 8}, "dropped": {}},
            },
            "world": "vale",
            "attackers": ["hide"],
            "rule": "multi_objective",
            "labelled_by_people": False,
        },
        "versions": {"torch": "2.13"},
        "phase": phase,
        "estimates": {"instruct": before, phase: after},
        "drift": {"alarm": False},
        "base": {
            "name": "org/base",
            "revision": "0" * 40,
            "is_local": False,
            "digest": "sha256:11",
            "files": {"config.json": "sha256:22", "model.safetensors": "sha256:33"},
        },
        "training": {"fingerprint": "ef" * 16},
    } | changes
