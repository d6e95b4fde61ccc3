"""Tiny random replicas, in folders, of every model that a shipped recipe names.

    overrides = on_replicas(load_recipe("qwen3-0.6b", DATA), tmp_path)

Guards have the tokenizers and templates of `test_judge_models`, chat models those of `replicas`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from replicas import write_replica
from selfmoa.config import Recipe
from test_judge_models import (
    TOKENIZERS,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    build,
    llama3_reward,
    minos,
    qwen3_reward,
)

CHAT = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "smollm2",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": "smollm2",
    "Qwen/Qwen2.5-0.5B-Instruct": "qwen2.5",
    "Qwen/Qwen2.5-1.5B-Instruct": "qwen2.5",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-1.7B": "qwen3",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2",
    "meta-llama/Llama-3.2-3B-Instruct": "llama-3.2",
    "google/gemma-3-1b-it": "gemma-3",
    "microsoft/Phi-4-mini-instruct": "phi-4-mini",
    "ibm-granite/granite-3.3-2b-instruct": "granite-3",
}
GUARDS: dict[str, tuple[str, Any, Any]] = {
    "Qwen/Qwen3Guard-Gen-0.6B": ("qwen3", Qwen3Config, Qwen3ForCausalLM),
    "meta-llama/Llama-Guard-3-1B": ("llama3", LlamaConfig, LlamaForCausalLM),
    "ibm-granite/granite-guardian-3.1-2b": ("granite", GraniteConfig, GraniteForCausalLM),
    "google/shieldgemma-2b": ("gemma", Gemma2Config, Gemma2ForCausalLM),
    "allenai/wildguard": ("wildguard", MistralConfig, MistralForCausalLM),
}
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "Skywork/Skywork-Reward-V2-Llama-3.2-1B": llama3_reward,
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": qwen3_reward,
    "NousResearch/Minos-v1": minos,
}
MODELS = {*CHAT, *GUARDS, *CLASSIFIERS}


def write_model(folder: Path, hub_name: str) -> Path:
    """Write the replica of a model, unless it is there; returns its folder."""
    folder = folder / hub_name
    if folder.exists():
        return folder
    if hub_name in CHAT:
        return write_replica(folder, CHAT[hub_name], positions=8192)
    if hub_name in GUARDS:
        tokenizer_name, config, model = GUARDS[hub_name]
        tokenizer = TOKENIZERS[tokenizer_name]()
        lm = build(tokenizer, config, model)
    else:
        made = CLASSIFIERS[hub_name]()
        tokenizer, lm = made.tokenizer, made.lm
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on_replicas(recipe: Recipe, folder: Path) -> list[str]:
    """Return the overrides that put a recipe on replicas, which are written into the folder."""
    named = {
        "model.name": recipe.model.name,
        **{f"judges.{name}.model": judge.model for name, judge in recipe.judges.items()},
        **{f"attackers.{name}.model": each.model for name, each in recipe.attackers.items()},
    }
    return [f"{key}={write_model(folder, model)}" for key, model in named.items() if model]
