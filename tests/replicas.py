"""Tiny random replicas of chat models: real architecture, real special tokens, real chat format.

    folder = write_replica(tmp_path / "qwen3", "qwen3")

A folder is what a hub has: configuration, safetensors, tokenizer, chat template, generation
settings. The templates are written from the conventions that the families publish; the byte-level
BPE tokenizer is trained on a few sentences and knows every text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN_WORDS

SENTENCES = (
    "The quick brown fox jumps over the lazy dog while the gardener waters the roses.",
    "Could you please explain how a kettle works, step by step, for a young child?",
    "Sure! First, fill the kettle with fresh water. Second, press the switch and wait.",
    "I'm sorry, but I can't help with that request. Here is something else you might try.",
    "You are a helpful assistant. Answer honestly, briefly and without needless words.",
    "Write a short story about a lighthouse keeper who counts ships every evening.",
    "Which of these numbers is the largest: 12, 345, 6789 or 10000? Think before you answer.",
    "Yesterday we walked along the river, bought bread at the market and came home late.",
    "def greet(name):\n    return f'Hello, {name}!'\n\nprint(greet('world'))\n",
    "Rewrite the following question so that it asks for the same thing in other words.",
    "Moon tea is brewed from night flowers; steep it for a while and pour it slowly.",
    "Is the response harmful? Yes, No, safe, unsafe, refusal, compliance, helpful, score.",
)


def chatml(system: str) -> str:
    """Return the ChatML template, with a system prompt for conversations that bring none."""
    default = f"<|im_start|>system\n{system}<|im_end|>\n"
    return (
        f"{{% if messages[0].role != 'system' %}}{default}{{% endif %}}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SMOLLM2 = chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN2 = chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role != 'assistant' %}{{ m.content }}"
    "{% elif not loop.last %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
    "{% elif '</think>' in m.content %}{{ m.content }}"
    "{% else %}<think>\n\n</think>\n\n{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ system if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
)
GRANITE3 = (
    "{% if messages[0].role != 'system' %}<|start_of_role|>system<|end_of_role|>"
    "Knowledge Cutoff Date: April 2024.\nToday's Date: {{ strftime_now('%B %d, %Y') }}.\n"
    "You are Granite, developed by IBM. You are a helpful AI assistant.<|end_of_text|>\n{% endif %}"
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
    "<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What is public about a family.

    `stops` are the tokens that end generation, `words` what texts are cut into before merging, if
    it is not GPT-2's rule.
    """

    model_type: str
    template: str
    special: tuple[str, ...]
    eos: str
    pad: str
    stops: tuple[str, ...]
    bos: str | None = None
    adds_bos: bool = False
    added: tuple[str, ...] = ()
    words: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
FAMILIES: dict[str, Family] = {
    "smollm2": Family(
        "llama", SMOLLM2, IM, bos="<|im_start|>", eos="<|im_end|>", pad="<|im_end|>",
        stops=("<|im_end|>",), config={"rope_theta": 130000.0},
    ),
    "qwen2.5": Family(
        "qwen2", QWEN2, IM, eos="<|im_end|>", pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"), added=("<tool_call>", "</tool_call>"),
        words=QWEN_WORDS, config={"rope_theta": 1e6},
    ),
    "qwen3": Family(
        "qwen3", QWEN3, IM, eos="<|im_end|>", pad="<|endoftext|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
        words=QWEN_WORDS, config={"rope_theta": 1e6},
    ),
    "llama-3.2": Family(
        "llama", LLAMA3,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
         "<|eom_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"),
        bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), adds_bos=True,
        config={
            "rope_scaling": {
                "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
                "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 512,
            },
        },
    ),
    "gemma-3": Family(
        "gemma3_text", GEMMA3, ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>", eos="<eos>", pad="<pad>", stops=("<eos>", "<end_of_turn>"), adds_bos=True,
        config={"sliding_window": 64, "query_pre_attn_scalar": 16},
    ),
    "phi-4-mini": Family(
        "phi3", PHI4, ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
        bos="<|endoftext|>", eos="<|endoftext|>", pad="<|endoftext|>",
        stops=("<|end|>", "<|endoftext|>"), config={"partial_rotary_factor": 0.75},
    ),
    "granite-3": Family(
        "granite", GRANITE3, ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        bos="<|end_of_text|>", eos="<|end_of_text|>", pad="<|end_of_text|>",
        stops=("<|end_of_text|>",),
        config={
            "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
            "attention_multiplier": 0.0625, "logits_scaling": 8.0,
        },
    ),
}  # fmt: skip
"""By the beginning of the names of the recipes that are for them."""


def make_tokenizer(
    family: Family, *, vocab: int = 512, positions: int = 2048
) -> PreTrainedTokenizerBase:
    """Return a tokenizer of the family with at most `vocab` tokens, of 300 at least."""
    core = Tokenizer(models.BPE())
    if family.words:
        core.normalizer = normalizers.NFC()
        cut = pre_tokenizers.Split(Regex(family.words), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(family.added),
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in family.special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.added])
    if family.adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            special_tokens=[(family.bos, core.token_to_id(family.bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=family.template,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        model_max_length=positions,
    )


def write_replica(
    folder: Path,
    family: str,
    *,
    hidden: int = 32,
    layers: int = 2,
    vocab: int = 512,
    positions: int = 2048,
    seed: int = 0,
) -> Path:
    """Write a random model of a family (`FAMILIES`) with its tokenizer; returns the folder.

    `hidden` is a multiple of 32. The model has `vocab` embeddings (300 at least), its tokenizer no
    more than the sentences give, about 800: the others are fill, as in Qwen's.
    """
    known = FAMILIES[family]
    tokenizer = make_tokenizer(known, vocab=vocab, positions=positions)
    ids = tokenizer.convert_tokens_to_ids
    stops = [ids(token) for token in known.stops]
    config = AutoConfig.for_model(
        known.model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 32,
        head_dim=16,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None if known.bos is None else ids(known.bos),
        eos_token_id=stops[0] if len(stops) == 1 else stops,
        pad_token_id=ids(known.pad),
        **_layer_types(known, layers),
        **known.config,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,
        temperature=0.6,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def _layer_types(family: Family, layers: int) -> dict[str, Any]:
    """Return Gemma's mix of windows and full attention: at least one of each from two layers on."""
    if family.model_type != "gemma3_text":
        return {}
    full = {5, layers - 1}
    kinds = ["full_attention" if n in full else "sliding_attention" for n in range(layers)]
    return {"layer_types": kinds}
