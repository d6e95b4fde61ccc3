"""Adapters folded into their bases, for programs that read whole models only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safetensors import safe_open
from transformers import AutoConfig

from selfmoa.errors import TrainingStopped
from selfmoa.training.policy import base_of, load_model, load_tokenizer, merged

if TYPE_CHECKING:
    from pathlib import Path

    import torch


def merge_adapter(adapter: Path, out: Path) -> None:
    """Write a whole model: the adapter folded into its base, with the adapter's tokenizer.

    W + (alpha / r) B A is added up in fp32 and rounded once, to the number format that the base is
    stored in. An adapter that was trained on a base of 4 bits a weight is folded into the full
    one: that is the usual thing to do, and not exactly what was trained.

    Args:
        adapter: a PEFT directory; its configuration says where its base is.
        out: folder of the model.

    Raises:
        MissingFile: the base is not to be found.
        TrainingStopped: adapter and base do not fit together, or the base's weights are quantised.
    """
    base = base_of(adapter)
    if getattr(AutoConfig.from_pretrained(base), "quantization_config", None):
        raise TrainingStopped(
            f"the weights of {base} are quantised, so nothing can be added to them",
            "merge into the full-precision model that it was made from",
        )
    try:
        model = load_model(adapter)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingStopped(
            f"{adapter} does not fit {base} ({reason})", "get the base it was trained on"
        ) from error
    whole = merged(model).to(stored_dtype(base))
    whole.save_pretrained(out, safe_serialization=True)
    load_tokenizer(adapter).save_pretrained(out)


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the number format of a model's weights as stored: that of its first matrix."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                if len(weights.get_slice(name).get_shape()) > 1:
                    found: torch.dtype = weights.get_tensor(name).dtype
                    return found
    raise TrainingStopped(
        f"{folder} holds no safetensors weights", "convert it, or get a revision that has them"
    )
