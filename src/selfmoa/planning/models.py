"""The models of a recipe, and how large they are: read where they are here, else guessed.

Nothing is fetched and no weights are loaded: a configuration tells the number of weights. Of a
model on a hub that is not on this machine the size stands in the name as a rule ("1.5B"), and the
shape of a known model of about that size stands in for its own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfmoa import registry
from selfmoa.training import estimates

if TYPE_CHECKING:
    from selfmoa.config import Attacker, JudgeModel, Recipe

POLICY, INSTRUCT = "policy", "instruct"
"""Roles: the policy as it is now, and the model that all began with."""
SIZE = re.compile(r"(?<![a-z\d.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", re.IGNORECASE)
NAMED = {
    "phi-4-mini": 3.8, "wildguard": 7.2, "strongreject": 2.5, "minos-v1": 0.4,
    "shieldgemma-2b": 2.6, "gemma-2-2b": 2.6, "granite-3": 2.5, "granite-guardian-3": 2.5,
}  # fmt: skip
"""Thousand millions of weights of models whose names do not tell, or not well."""
UNTOLD = 1.5
"""Of a model whose name tells nothing."""
SHAPES = (
    (0.135, 576, 30, 9, 3, 1536, 49152),
    (0.36, 960, 32, 15, 5, 2560, 49152),
    (0.5, 896, 24, 14, 2, 4864, 151936),
    (1.24, 2048, 16, 32, 8, 8192, 128256),
    (1.54, 1536, 28, 12, 2, 8960, 151936),
    (1.7, 2048, 24, 32, 32, 8192, 49152),
    (2.5, 2048, 40, 32, 8, 8192, 49155),
    (3.2, 3072, 28, 24, 8, 8192, 128256),
    (3.8, 3072, 32, 24, 8, 8192, 200064),
    (8.0, 4096, 32, 32, 8, 14336, 128256),
    (14.7, 5120, 48, 40, 8, 13824, 152064),
    (32.8, 5120, 64, 40, 8, 27648, 152064),
    (70.6, 8192, 80, 64, 8, 28672, 128256),
)
"""Published shapes: weights in thousand millions, width, layers, heads, of them with keys of their
own, width inside, vocabulary (SmolLM2, Qwen2.5, Llama 3, Granite 3, Phi-4-mini)."""


@dataclass(frozen=True)
class Model:
    """A model that a recipe asks: who asks it, where it answers, how large it is.

    `config` is that of transformers, or the stand-in where `guess` says what was guessed; None of
    a model behind an endpoint, which takes nothing here. `held` is how its weights are held while
    it answers.
    """

    roles: tuple[str, ...]
    name: str
    config: Any
    held: str
    endpoint: str | None = None
    guess: str = ""
    to_fetch: bool = False

    @property
    def parameters(self) -> int:
        """The number of weights; 0 where it answers elsewhere."""
        return 0 if self.config is None else estimates.parameters(self.config).total


def find_models(recipe: Recipe, *, accelerated: bool) -> list[Model]:
    """Return the models of a recipe, each once, the policy first.

    `accelerated` says whether "auto" means bf16.

    Raises:
        UnknownPlugin, MissingExtra, BrokenPlugin: a judge or attacker cannot be had.
    """
    held = recipe.policy.inference
    if held == "auto":
        held = "bf16" if accelerated else "fp32"
    policy = _policy(recipe, held)
    if recipe.policy.adapter != "full":  # adapters are switched on one base
        policy = replace(policy, roles=(POLICY, INSTRUCT))
    roles: dict[tuple[str, str | None], list[str]] = {}
    for role, own in [*_asked(recipe, "judge"), *_asked(recipe, "attack")]:
        if own.model is not None:
            roles.setdefault((own.model, own.endpoint), []).append(role)
    found = [policy]
    for (name, endpoint), by in roles.items():
        if (name, endpoint) == (policy.name, policy.endpoint):
            found[0] = replace(policy, roles=(*policy.roles, *by))
            continue
        found.append(_model(tuple(by), name, held, endpoint))
    if recipe.policy.adapter == "full":
        begun = replace(policy, roles=(INSTRUCT,), name=f"{policy.name} (instruct)", guess="")
        found.append(replace(begun, to_fetch=False))
    return found


def _asked(recipe: Recipe, kind: str) -> list[tuple[str, JudgeModel | Attacker]]:
    """Return the judges (or attackers) of the recipe's own that it uses and that ask a model."""
    found: list[tuple[str, JudgeModel | Attacker]] = []
    if kind == "judge":
        used = recipe.judges_used()
        table: dict[str, Any] = dict(recipe.judges)
    else:
        used = recipe.attackers_used()
        table = dict(recipe.attackers)
    for name in used:
        if own := table.get(name):
            is_talk = kind == "attack" and own.kind in registry.names("strategy")
            factory = registry.resolve("strategy" if is_talk else kind, own.kind)
            if getattr(factory, "backend", "local") is not None:
                found.append((name, own))
    return found


def _policy(recipe: Recipe, held: str) -> Model:
    named = recipe.model.name
    if named is not None:
        return _model((POLICY,), named, held, None)
    if recipe.policy.world == "sandbox":
        return Model((POLICY,), "the sandbox's own", _sandbox_config(recipe), held)
    stand_in, guess = _guess(recipe.policy.world)
    return Model((POLICY,), recipe.policy.world, stand_in, held, guess=guess)


def _sandbox_config(recipe: Recipe) -> Any:
    import torch

    from selfmoa.sandbox.model import build_model, build_tokenizer

    own = recipe.sandbox
    with torch.random.fork_rng([]), torch.device("meta"):
        model = build_model(
            build_tokenizer(),
            architecture=own.architecture,
            hidden=own.hidden,
            layers=own.layers,
            heads=own.heads,
            seed=own.seed,
        )
    return model.config


def _model(roles: tuple[str, ...], name: str, held: str, endpoint: str | None) -> Model:
    if endpoint is not None:
        return Model(roles, name, None, held, endpoint)
    folder = find_here(name)
    if folder is not None and (config := _read(folder)) is not None:
        return Model(roles, name, config, held)
    stand_in, guess = _guess(name)
    return Model(roles, name, stand_in, held, guess=guess, to_fetch=folder is None)


def find_here(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model that is on this machine; nothing is fetched."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(file).parent if isinstance(file, str) else None


def _read(folder: Path) -> Any:
    """Return the configuration in a folder, of an adapter that of its base; None if there is none.

    Of a classifier, the language model that it was made from has its size but for the head.
    """
    from transformers import AutoConfig

    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text()).get("base_model_name_or_path")
        below = find_here(str(base))
        return None if below is None or below == folder else _read(below)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
        estimates.parameters(config)
    except (OSError, ValueError, KeyError):
        return None  # an encoder, or a kind that this transformers does not know
    return config


def _guess(name: str) -> tuple[Any, str]:
    """Return a configuration of about the size that a name tells, and what was guessed."""
    from transformers import AutoConfig

    low = name.lower()
    billions = next((size for part, size in NAMED.items() if part in low), None)
    if billions is None and (told := SIZE.search(name.rpartition("/")[2])):
        billions = float(told[1]) * (1 if told[2] in "bB" else 1e-3)
    size = UNTOLD if billions is None else billions
    _, hidden, layers, heads, keys, inside, words = min(
        SHAPES, key=lambda shape: abs(shape[0] / size - 1) if size else shape[0]
    )
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        intermediate_size=inside,
        vocab_size=words,
        max_position_embeddings=8192,
        tie_word_embeddings=size < 5,
    )
    how = "nothing in its name tells" if billions is None else "from its name"
    return config, f"{size:g}B weights, {how}; unknown until it is here"
