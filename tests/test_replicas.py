"""The replicas are what they say: they load as policies and speak their family's chat format."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from replicas import FAMILIES, make_tokenizer, write_replica
from selfmoa.generators.local import LocalGenerator
from selfmoa.protocols import Draw, Sampling
from selfmoa.records import Prompt
from selfmoa.training.policy import load_policy
from selfmoa.training.tokens import encode, encode_prompts

EVERY = pytest.mark.parametrize("family", FAMILIES)
ASKED = [{"role": "user", "content": "Which of these numbers is the largest?"}]
TOLD = [{"role": "system", "content": "Be kind."}, *ASKED]
PROMPTS = {
    "smollm2": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "qwen2.5": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "qwen3": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama-3.2": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma-3": "<bos><start_of_turn>user\nBe kind.\n\n{}<end_of_turn>\n<start_of_turn>model\n",
    "phi-4-mini": "<|system|>Be kind.<|end|><|user|>{}<|end|><|assistant|>",
    "granite-3": "<|start_of_role|>system<|end_of_role|>Be kind.<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>{}<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>",
}
ENDS = {
    "smollm2": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama-3.2": "<|eot_id|>",
    "gemma-3": "<end_of_turn>",
    "phi-4-mini": "<|end|>",
    "granite-3": "<|end_of_text|>",
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folders = {f: write_replica(tmp_path_factory.mktemp(f) / "model", f) for f in FAMILIES}
    return {family: (folder, *load_policy(folder)) for family, folder in folders.items()}


@EVERY
def test_a_chat_is_written_as_the_family_publishes_it(loaded, family):
    _, _, tokenizer = loaded[family]
    (ids,) = encode_prompts(tokenizer, [TOLD])
    assert tokenizer.decode(ids) == PROMPTS[family].format(ASKED[0]["content"])


@EVERY
def test_bos_stands_once_where_the_family_has_it_and_the_turn_ends_as_it_says(loaded, family):
    _, _, tokenizer = loaded[family]
    (row,) = encode(tokenizer, [ASKED], [["Fine."]])
    first = FAMILIES[family].bos if FAMILIES[family].adds_bos else None
    starts = [i for i, token in enumerate(row.prompt) if token == tokenizer.bos_token_id]
    if first:
        assert starts == [0]
    elif tokenizer.bos_token is not None:  # a token of turns: it is there because a turn is
        assert len(starts) == tokenizer.decode(row.prompt).count(tokenizer.bos_token)
    assert tokenizer.convert_ids_to_tokens(row.completions[0][-1]) == ENDS[family]


@EVERY
def test_the_loaded_tokenizer_is_the_written_one_and_knows_every_text(loaded, family):
    _, _, tokenizer = loaded[family]
    text = "The lighthouse: naïve café, 12,345 € — 東京 🦊\n\n\tdone  "
    assert tokenizer(text)["input_ids"] == make_tokenizer(FAMILIES[family])(text)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode())  # some merges are in use


@EVERY
def test_the_default_system_prompt_is_the_familys_own(loaded, family):
    _, _, tokenizer = loaded[family]
    (ids,) = encode_prompts(tokenizer, [ASKED])
    text = tokenizer.decode(ids)
    own = {"smollm2": "named SmolLM", "qwen2.5": "You are Qwen", "granite-3": "You are Granite"}
    assert own.get(family, "") in text
    assert ("system" in text) == (family in (*own, "llama-3.2"))


def test_qwen3_thinks_unless_told_not_to_and_its_answers_carry_an_empty_thought(loaded):
    _, _, tokenizer = loaded["qwen3"]
    (open_,) = encode_prompts(tokenizer, [ASKED])
    (shut,) = encode_prompts(tokenizer, [ASKED], {"enable_thinking": False})
    assert tokenizer.decode(shut[len(open_) :]) == "<think>\n\n</think>\n\n"
    (row,) = encode(tokenizer, [ASKED], [["Fine."]])
    assert tokenizer.decode(row.completions[0]) == "<think>\n\n</think>\n\nFine.<|im_end|>"


@EVERY
def test_a_folder_has_what_a_hub_has_and_no_pickle(loaded, family):
    folder, model, tokenizer = loaded[family]
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jinja", ".safetensors"}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == FAMILIES[family].model_type
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    stops = stops if isinstance(stops, list) else [stops]
    assert tokenizer.convert_tokens_to_ids(ENDS[family]) in stops
    assert model.get_input_embeddings().num_embeddings == 512 >= len(tokenizer)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert all(weights.get_tensor(k).dtype == torch.float32 for k in weights.keys())  # noqa: SIM118


@EVERY
def test_a_replica_answers_to_the_letter_again(loaded, family):
    _, model, tokenizer = loaded[family]
    prompt = Prompt.make(ASKED, goal="", intent="benign", category="plain", source="test")
    (one,), (other,) = (
        LocalGenerator(model, tokenizer, "tiny").generate(
            [Draw(prompt, 7)], Sampling("plain", max_new_tokens=6)
        )
        for _ in range(2)
    )
    assert one.text == other.text
    assert one.text


def test_equal_arguments_give_equal_bytes_and_seeds_other_weights(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_replica(tmp_path / name, "gemma-3", seed=seed, layers=3, hidden=64, vocab=400)

    def read(name, file):
        return (tmp_path / name / file).read_bytes()

    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert read("a", file) == read("b", file)
    assert read("a", "model.safetensors") != read("c", "model.safetensors")
    config = json.loads(read("a", "config.json"))
    assert (config["num_hidden_layers"], config["hidden_size"]) == (3, 64)
    assert config["vocab_size"] == 400
    assert len(set(config["layer_types"])) == 2
