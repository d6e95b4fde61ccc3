"""Which architectures the sandbox's instruct model can have: found out before it is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from selfmoa.errors import RecipeError
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training.policy import load_tokenizer, save_policy

if TYPE_CHECKING:
    from selfmoa.config import Sandbox

SAID = "tell me who keeps the lamp ."


@torch.no_grad()
def refuse_unfit(settings: Sandbox) -> None:
    """Refuse an architecture that reads what comes later, or that brings its own tokenizer.

    Raises:
        RecipeError: says which.
    """
    name, tokenizer = settings.architecture, build_tokenizer()
    sizes = {"hidden": settings.hidden, "layers": settings.layers, "heads": settings.heads}
    model = build_model(tokenizer, architecture=name, seed=settings.seed, **sizes).eval()
    ids = torch.tensor([tokenizer(SAID)["input_ids"]])
    whole, beginning = model(input_ids=ids).logits[:, :-1], model(input_ids=ids[:, :-1]).logits
    if not torch.allclose(whole, beginning, atol=1e-4):
        problem = f"'{name}' reads what comes after a word, so it cannot answer: take a decoder"
        raise RecipeError("sandbox.architecture", problem)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(model, tokenizer, Path(folder))
        again = load_tokenizer(Path(folder))
    if again(SAID)["input_ids"] != tokenizer(SAID)["input_ids"]:
        raise RecipeError(
            "sandbox.architecture",
            f"transformers gives every '{name}' a tokenizer of its own, which does not know the "
            "sandbox's words: take a newer one of the family, or llama",
        )
