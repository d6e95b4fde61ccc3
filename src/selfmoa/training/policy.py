"""Policies on disk: an ordinary model directory, or a PEFT adapter directory beside its base.

Only safetensors and JSON are read or written. A reset policy carries a mark that every command
which would let it out of its run must honour (`refuse_quarantined`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from selfmoa.errors import MissingExtra, MissingFile, Quarantined
from selfmoa.records import content_id
from selfmoa.rundir import digest_file, write_atomic
from selfmoa.training.intake import refuse_other_base, refuse_unfit

if TYPE_CHECKING:
    from selfmoa import config

logging.disable_progress_bar()

QUARANTINE_MARK = "QUARANTINED.txt"
QUARANTINE_TEXT = (
    "The safety of this model was removed on purpose, to expose its raw behaviour before it is "
    "aligned again. It is not for use: it stays inside its run and is deleted when the run ends.\n"
)
ANSWERING = ("adapter_model", "tokenizer", "chat_template", "special_tokens")
"""Beginnings of the names of an adapter's files that decide what it answers."""
READ = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What is fetched of a model on a hub: weights, configuration, tokenizer; no code, no pickle."""


def find_model(name: str, revision: str | None = None) -> Path:
    """Return the folder of a model: a local one, or that of a hub's model on this machine.

    Raises:
        MissingFile: it is neither.
        UnfitModel: it holds what is not loaded (`intake`).
    """
    if Path(name).is_dir():
        refuse_unfit(Path(name))
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=list(READ)))
    except HFValidationError as error:
        raise MissingFile(name, "model", "check the path, or name one of the model hub") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().removeprefix("Got: ").partition("\n")[0] or "no answer"
        raise MissingFile(
            name, "model", f"it is no local folder, and the model hub said: {reason.rstrip('.')}"
        ) from error
    refuse_unfit(found)
    return found


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a PEFT adapter rather than a whole model."""
    return (folder / "adapter_config.json").is_file()


def base_of(folder: Path) -> Path:
    """Return the folder of the model that an adapter is for; of a whole model, its own."""
    refuse_unfit(folder)
    if not is_adapter(folder):
        return folder
    base = find_model(*base_name(folder))
    refuse_other_base(folder, base)
    return base


def base_name(folder: Path) -> tuple[str, str | None]:
    """Return name and revision of an adapter's base; a folder's name is its whole path."""
    if not is_adapter(folder):
        return str(folder.resolve()), None
    settings = LoraConfig.from_pretrained(folder)
    name = str(settings.base_model_name_or_path)
    return (str(Path(name).resolve()), None) if Path(name).is_dir() else (name, settings.revision)


def digest_adapter(folder: Path, base: str) -> str:
    """Return the digest of what an adapter answers by: its weights and tokenizer, and its base.

    Where that lies is no part of it, so that a run in another folder draws the same.

    Args:
        folder: of the adapter.
        base: the digest of its base.
    """
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings.pop("base_model_name_or_path", None)
    files = {p.name: digest_file(p) for p in folder.iterdir() if p.name.startswith(ANSWERING)}
    return f"sha256:{content_id(settings, files, base, length=64)}"


def load_policy(folder: Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a policy, in fp32; an adapter sits on its base."""
    return load_model(folder), load_tokenizer(folder)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a policy."""
    refuse_unfit(folder)
    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path, *, trainable: bool = False, like: config.Policy | None = None) -> Any:
    """Return the model of a policy; an adapter sits on its base.

    In fp32, unless `like` has adapters trained in bf16, or on a base of 4 bits a weight.
    """
    base = _load_base(base_of(folder), like)
    if not is_adapter(folder):
        return base
    return PeftModel.from_pretrained(base, folder, is_trainable=trainable)


def longest_row(folder: Path) -> int | None:
    """Return how many tokens the model of a policy has positions for, if it says so."""
    return positions(AutoConfig.from_pretrained(base_of(folder)))


def positions(config: Any) -> int | None:
    """Return how many tokens a model has positions for, if its config says so."""
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most


def make_trainable(model: Any, policy: config.Policy, seed: int) -> Any:
    """Return the model ready for training: all weights, or a LoRA adapter (new or its own)."""
    if policy.adapter == "qlora":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=policy.gradient_checkpointing
        )
    if policy.adapter != "full" and not isinstance(model, PeftModel):
        torch.manual_seed(seed)
        rank = policy.lora_rank
        model = get_peft_model(
            model,
            LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
    if policy.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if policy.compile:
        unwrapped(model).base_model.compile(dynamic=True)
    return model


def unwrapped(model: Any) -> Any:
    """Return the transformers model inside; the layers of an adapter stay in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def save_policy(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    quarantined: bool = False,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a policy; a quarantined one is marked before its weights are there.

    Of an adapter, `peft` writes the directory that its peers read. `weights` are those of a
    sharded model, which does not hold them itself.
    """
    if quarantined:
        quarantine(folder)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    more: dict[str, Any] = {}
    if isinstance(model, PeftModel):
        # Embeddings are never resized here, and asking whether they were may ask the hub.
        more = {"selected_adapters": ["default"], "save_embedding_layers": False}
        settings = model.peft_config["default"]
        if isinstance(settings.target_modules, set):  # whose order is another in every process
            settings.target_modules = sorted(settings.target_modules)
    model.save_pretrained(folder, safe_serialization=True, state_dict=weights, **more)
    tokenizer.save_pretrained(folder)


def quarantine(folder: Path) -> None:
    """Mark a folder before anything unsafe is in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(folder / QUARANTINE_MARK, QUARANTINE_TEXT)


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


def load_frozen(folder: Path, held: str, device: torch.device) -> Any:
    """Return a whole model that nobody trains, its weights held as "fp32", "bf16" or "nf4".

    Raises:
        MissingExtra: bitsandbytes is not installed, and "nf4" needs it.
    """
    dtype = torch.float32 if held == "fp32" else torch.bfloat16
    how: dict[str, Any] = {"dtype": dtype}
    if held == "nf4":
        how |= {"quantization_config": _four_bits(dtype, "policy.inference", "nf4")}
    if device.type != "cpu":
        how["device_map"] = {"": device}  # straight to where they compute, by no second copy
    model = _load_whole(folder, how)
    return model.eval().requires_grad_(False)


def _load_base(folder: Path, like: config.Policy | None) -> Any:
    is_full = like is None or like.adapter == "full"
    wanted = {} if is_full or like is None else _frozen_as(like)
    return _load_whole(folder, {"dtype": torch.float32} | wanted)


def _load_whole(folder: Path, how: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, use_safetensors=True, trust_remote_code=False, **how
    )


def _frozen_as(policy: config.Policy) -> dict[str, Any]:
    """Return how the weights below an adapter are held: nobody trains them, so in few bits."""
    dtype = torch.bfloat16 if policy.precision == "bf16" else torch.float32
    if policy.adapter == "lora":
        return {"dtype": dtype}
    return {"dtype": dtype, "quantization_config": _four_bits(dtype, "adapter", "qlora")}


def _four_bits(dtype: torch.dtype, kind: str, name: str) -> Any:
    """Return the settings of weights in nf4 that compute in `dtype`.

    Raises:
        MissingExtra: bitsandbytes is not installed; `kind` and `name` tell what needs it.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtra(kind, name, "bitsandbytes", "selfmoa[qlora]") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
