"""The vLLM backend, against a stand-in with the same names: engines, adapters, refusals."""

from __future__ import annotations

import sys

import pytest
import torch

import fake_vllm
from selfmoa.config import Policy
from selfmoa.errors import MissingExtra, RecipeError
from selfmoa.generators.devices import Device, Weights
from selfmoa.generators.local import LocalGenerator
from selfmoa.generators.vllm import VLLMGenerator
from selfmoa.protocols import Draw, Sampling
from selfmoa.records import Prompt
from selfmoa.rundir import digest_tree
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training.policy import load_policy, make_trainable, save_policy

TOKENIZER = build_tokenizer()
GREEDY = Sampling("greedy", 0.0, 8)
PROMPT = Prompt.make(
    [{"role": "user", "content": "who keeps zorbium ?"}],
    goal="",
    intent="benign",
    category="",
    source="test",
)
ITEMS = [(PROMPT.messages, "petra keeps zorbium"), (PROMPT.messages, "look near beacon")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a whole model, and adapters of it of ranks 2, 12 and 2."""
    home = tmp_path_factory.mktemp("models")
    model = build_model(TOKENIZER, architecture="llama", hidden=32, layers=1, heads=2, seed=0)
    save_policy(model, TOKENIZER, home / "base")
    for i, rank in enumerate((2, 12, 2)):
        how = Policy(adapter="lora", lora_rank=rank)
        trained = make_trainable(load_policy(home / "base")[0], how, seed=i)
        torch.manual_seed(i)
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        save_policy(trained, TOKENIZER, home / "rounds" / str(i) / "policy")
    return [home / "base", *(home / "rounds" / str(i) / "policy" for i in range(3))]


@pytest.fixture
def log(monkeypatch):
    return fake_vllm.install(monkeypatch)


def load(folder, device):
    return VLLMGenerator.load(folder, threads=1, digest=digest_tree(folder), device=device)


def test_a_base_and_its_adapters_share_an_engine_and_score_as_the_local_backend(folders, log):
    device = Device("cpu", "fp32")
    ours = [load(folder, device) for folder in folders]
    theirs = [
        LocalGenerator.load(folder, threads=1, digest=digest_tree(folder)) for folder in folders
    ]
    assert not log.engines  # an engine takes the GPU: it starts when it is asked
    for i in (1, 0, 3, 2, 0, 1):
        assert ours[i].logprobs(ITEMS) == pytest.approx(theirs[i].logprobs(ITEMS), abs=1e-4)
        assert [r.text for r in ours[i].generate([Draw(PROMPT, 0)], GREEDY)] == [
            r.text for r in theirs[i].generate([Draw(PROMPT, 0)], GREEDY)
        ]
        assert ours[i].model == theirs[i].model
    assert len(log.engines) == 1
    assert len({tuple(theirs[i].logprobs(ITEMS)) for i in range(4)}) == 4


def test_an_engine_prepares_for_the_ranks_it_is_asked_for_and_for_none_if_there_are_none(
    folders, log
):
    device = Device("cpu", "fp32")
    base = load(folders[0], device)
    base.generate([Draw(PROMPT, 0)], GREEDY)
    load(folders[1], device).generate([Draw(PROMPT, 0)], GREEDY)
    load(folders[3], device).generate([Draw(PROMPT, 0)], GREEDY)
    load(folders[2], device).generate([Draw(PROMPT, 0)], GREEDY)
    base.generate([Draw(PROMPT, 0)], GREEDY)
    assert [(e["enable_lora"], e["max_lora_rank"]) for e in log.engines] == [
        (False, 16),
        (True, 8),
        (True, 16),
    ]
    assert all(e["enable_prefix_caching"] and not e["trust_remote_code"] for e in log.engines)


@pytest.mark.parametrize(
    ("held", "dtype", "quantization"),
    [("fp32", "float32", None), ("bf16", "bfloat16", None), ("nf4", "bfloat16", "bitsandbytes")],
)
def test_the_engine_holds_weights_as_the_recipe_says(folders, log, held, dtype, quantization):
    load(folders[0], Device("cpu", held)).logprobs(ITEMS)
    assert (log.engines[0]["dtype"], log.engines[0]["quantization"]) == (dtype, quantization)


def test_an_engine_and_other_models_take_turns_on_the_device(folders, log, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 1000))
    device = Device("cpu", "fp32", budget=1000)
    other = Weights(device, object, lambda: 200, "other")
    other.use()
    engine = load(folders[0], device)
    engine.logprobs(ITEMS)
    assert not other.is_loaded
    other.use()
    assert not engine.engine.weights.is_loaded
    engine.logprobs(ITEMS)
    assert len(log.engines) == 2


def test_without_vllm_it_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"selfmoa\[vllm\]"):
        load(folders[0], Device("cpu"))


def test_a_temperature_beyond_what_vllm_takes_is_refused_by_name(folders, log):
    generator = load(folders[0], Device("cpu"))
    with pytest.raises(RecipeError, match=r"temperature.*2\.5"):
        generator.generate([Draw(PROMPT, 0)], Sampling("hot", 2.5, 4))
    assert not log.prompts
