"""Policies on disk: an ordinary model directory, or a PEFT adapter directory beside its base.

Only safetensors and JSON are read or written. A reset policy carries a mark that every command
which would let it out of its run must honour (`refuse_quarantined`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from selfmoa.errors import Quarantined
from selfmoa.rundir import write_atomic

logging.disable_progress_bar()

QUARANTINE_MARK = "QUARANTINED.txt"
QUARANTINE_TEXT = (
    "The safety of this model was removed on purpose, to expose its raw behaviour before it is "
    "aligned again. It is not for use: it stays inside its run and is deleted when the run ends.\n"
)


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def load_policy(folder: Path, *, trainable: bool = False) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a policy in fp32; an adapter sits on its base."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not is_adapter(folder):
        return _load_model(folder), tokenizer
    config = LoraConfig.from_pretrained(folder)
    base = _load_model(Path(str(config.base_model_name_or_path)))
    return PeftModel.from_pretrained(base, folder, is_trainable=trainable), tokenizer


def make_trainable(model: Any, adapter: str, rank: int, seed: int) -> Any:
    """Return the model ready for training: all weights, or a LoRA adapter (new or its own)."""
    if adapter == "full" or isinstance(model, PeftModel):
        return model
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def save_policy(model: Any, tokenizer: Any, folder: Path, *, quarantined: bool = False) -> None:
    """Write a policy; a quarantined one is marked before its weights are there."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if quarantined:
        write_atomic(folder / QUARANTINE_MARK, QUARANTINE_TEXT)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def refuse_quarantined(folder: Path) -> None:
    """Stop whoever wants to let a reset policy out of its run.

    Raises:
        Quarantined: the folder holds one.
    """
    if (folder / QUARANTINE_MARK).exists():
        raise Quarantined(folder)


def merged(model: Any) -> Any:
    """Return the model with its adapter folded in, for fast generation."""
    return model.merge_and_unload() if isinstance(model, PeftModel) else model


def _load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
