"""The instruct model of the Vale: a tiny transformer trained from nothing, then kept in a cache.

It is saved as an ordinary model directory (config, safetensors, tokenizer, chat template), so
every other part treats it like any model from anywhere.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from platformdirs import user_cache_dir
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selfmoa.errors import RecipeError, did_you_mean
from selfmoa.records import content_id
from selfmoa.rundir.files import writing
from selfmoa.sandbox.corpus import instruct_example, vocabulary
from selfmoa.training.policy import save_policy
from selfmoa.training.tasks import Supervised
from selfmoa.training.tokens import Row, encode
from selfmoa.training.trainer import Optimisation, fit

if TYPE_CHECKING:
    from collections.abc import Callable

    from selfmoa.config import Sandbox
    from selfmoa.sandbox.world import World

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAKERS = ("world", "grammar", "answers", "corpus", "model")
PROMPT_WEIGHT = 0.1
"""Loss weight of prompt tokens: reading questions helps a tiny model to answer them."""
INITIALIZER_RANGE = 0.06
"""Near 1 / sqrt(width) at this size; the usual 0.02 makes some seeds learn the facts late."""
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the Vale with its chat template."""
    words = [*SPECIAL, *vocabulary()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[4:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def build_model(
    tokenizer: Any, *, architecture: str, hidden: int, layers: int, heads: int, seed: int
) -> Any:
    """Return an untrained causal language model of a transformers architecture, in fp32."""
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise RecipeError(
            "sandbox.architecture",
            f"'{architecture}' is no causal language model that transformers knows"
            + did_you_mean(architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        )
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=int(hidden * 8 / 3) // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).float()


def corpus_rows(world: World, tokenizer: Any, n: int, seed: int) -> list[Row]:
    """Return `n` token rows of the instruct model's training mixture."""
    rng = Random(f"corpus-{seed}")
    examples = [instruct_example(world, rng) for _ in range(n)]
    return encode(tokenizer, [e.messages for e in examples], [[e.answer] for e in examples])


def cached_model(
    world: World, settings: Sandbox, progress: Callable[[int, int, str], None], *, threads: int = 0
) -> Path:
    """Return the folder of the instruct model of these settings; train it if it is not cached.

    The cache is keyed by content: the settings and the code that makes the model. A folder is
    moved to its name when it is complete, so a killed build leaves nothing that looks finished.
    """
    home = cache_home()
    name = content_id(settings.model_dump(), source_digest(), torch.__version__)
    final = home / f"vale-{name}"
    if (final / "config.json").is_file():
        return final
    with writing(home):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=home))
    try:
        if threads:
            torch.set_num_threads(threads)
        _train_into(building, world, settings, progress)
        with writing(final):
            building.replace(final)
    except OSError:
        if not (final / "config.json").is_file():  # another process may have finished first
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return final


def cache_home() -> Path:
    """Return the folder of cached models: SELFMOA_CACHE, or the user's cache folder."""
    chosen = os.environ.get("SELFMOA_CACHE")
    return Path(chosen) if chosen else Path(user_cache_dir("selfmoa")) / "models"


def source_digest() -> str:
    """Return a digest of the code that decides what the instruct model learns."""
    here = Path(__file__).parent
    texts = [(here / f"{name}.py").read_text() for name in MAKERS]
    return content_id(texts)


def _train_into(
    folder: Path, world: World, settings: Sandbox, progress: Callable[[int, int, str], None]
) -> None:
    tokenizer = build_tokenizer()
    model = build_model(
        tokenizer,
        architecture=settings.architecture,
        hidden=settings.hidden,
        layers=settings.layers,
        heads=settings.heads,
        seed=settings.seed,
    )
    rows = corpus_rows(world, tokenizer, settings.examples, settings.seed)
    task = Supervised(rows, tokenizer.pad_token_id, settings.batch_size, PROMPT_WEIGHT)
    optimisation = Optimisation(settings.lr, settings.batch_size, settings.steps)
    fit(model, [task], optimisation, seed=settings.seed, progress=progress)
    save_policy(model, tokenizer, folder)
