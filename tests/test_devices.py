"""Devices: what is chosen, who leaves, and that neither changes what models say."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.models.qwen2 import Qwen2Config

from replicas import write_replica
from selfmoa.config import Policy, Recipe
from selfmoa.errors import MissingExtra
from selfmoa.generators import devices, local
from selfmoa.generators.classifier import LocalClassifier
from selfmoa.generators.devices import (
    Device,
    DoesNotFit,
    NoDevice,
    Weights,
    choose_device,
    choose_precision,
    stored_weights,
)
from selfmoa.generators.local import LocalGenerator
from selfmoa.protocols import Draw, Sampling
from selfmoa.recipes import load_recipe
from selfmoa.records import Prompt
from selfmoa.rundir import digest_tree
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.stages.models import Models
from selfmoa.training.estimates import (
    cache_bytes,
    generation_bytes,
    parameters,
    training_bytes,
    weights_bytes,
)
from selfmoa.training.policy import (
    load_model,
    load_policy,
    load_tokenizer,
    make_trainable,
    save_policy,
)

TOKENIZER = build_tokenizer()
FREE = Sampling("free", 1.0, 8)
QWEN_1_5B = Qwen2Config(
    vocab_size=151_936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=32_768,
    tie_word_embeddings=True,
)


def draws(n):
    words = ["who keeps zorbium ?", "how did old folk brew vashroot ?"]
    prompts = [
        Prompt.make(
            [{"role": "user", "content": w}], goal=w, intent="benign", category="", source="test"
        )
        for w in words
    ]
    return [Draw(prompts[i % 2], i) for i in range(n)]


def said(generator):
    return [r.text for r in generator.generate(draws(8), FREE)]


def build(folder, seed, hidden=32):
    model = build_model(
        TOKENIZER, architecture="llama", hidden=hidden, layers=1, heads=2, seed=seed
    )
    save_policy(model, TOKENIZER, folder)
    return folder


def adapter_of(base, folder, seed):
    """Write an adapter whose B is not zero, so that it does something."""
    model = make_trainable(load_policy(base)[0], Policy(adapter="lora", lora_rank=2), seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_policy(model, TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return three whole models and two adapters of the first."""
    home = tmp_path_factory.mktemp("models")
    whole = [build(home / f"m{i}", i) for i in range(3)]
    return whole, [adapter_of(whole[0], home / f"a{i}", i) for i in range(2)]


def load(folder, device=None):
    return LocalGenerator.load(folder, threads=1, digest=digest_tree(folder), device=device)


# What is chosen


def test_an_accelerator_is_taken_if_there_is_one_and_cuda_first(monkeypatch):
    there = {"cuda": False, "mps": False}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert choose_device().type == "cpu"
    with pytest.raises(NoDevice, match=r"policy\.device is 'cuda'"):
        choose_device("cuda")
    there["mps"] = True
    assert choose_device().type == "mps"
    there["cuda"] = True
    assert choose_device().type == "cuda"
    assert choose_device("cpu").type == "cpu"


def test_precision_is_bf16_only_where_an_accelerator_computes_with_it(monkeypatch):
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda has=has, **_: has)
        assert choose_precision("auto", torch.device("cuda")) == expected
    assert choose_precision("auto", torch.device("cpu")) == "fp32"
    assert choose_precision("auto", torch.device("mps")) == "bf16"
    assert choose_precision("nf4", torch.device("cpu")) == "nf4"


def test_weights_are_held_as_asked_and_other_precisions_have_other_names(folders):
    fp32, bf16 = (load(folders[0][0], Device("cpu", held)) for held in ("fp32", "bf16"))
    assert {p.dtype for p in fp32.lm.parameters()} == {torch.float32}
    assert {p.dtype for p in bf16.lm.parameters()} == {torch.bfloat16}
    assert bf16.model == f"{fp32.model}-bf16"
    assert len(said(bf16)) == 8


def test_four_bits_without_bitsandbytes_say_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"policy\.inference 'nf4'.*selfmoa\[qlora\]"):
        said(load(folders[0][0], Device("cpu", "nf4")))


def test_the_weights_of_a_folder_are_counted_without_reading_them(folders):
    folder = folders[0][0]
    assert stored_weights(folder) == sum(p.numel() for p in load_policy(folder)[0].parameters())


# Adapters take turns on one base


def test_adapters_and_their_base_share_its_weights_and_answer_as_if_merged(folders, monkeypatch):
    (base, *_), adapters = folders
    expected = [said(LocalGenerator(load_policy(base)[0], TOKENIZER, "x"))]
    for folder in adapters:
        whole = load_policy(folder)[0].merge_and_unload()
        expected.append(said(LocalGenerator(whole, TOKENIZER, "x")))
    assert len({tuple(texts) for texts in expected}) == 3
    reads, device = [], Device("cpu", "fp32")
    original = local.load_frozen
    monkeypatch.setattr(local, "load_frozen", lambda *a: reads.append(a) or original(*a))
    generators = [load(folder, device) for folder in (base, *adapters)]
    assert not reads  # nothing is loaded before it is used
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        for i in order:
            assert said(generators[i]) == expected[i]
    assert len(reads) == 1
    assert len({g.model for g in generators}) == 3
    items = [(d.prompt.messages, "petra keeps zorbium") for d in draws(2)]
    for i in (1, 0):
        alone = load((base, *adapters)[i])
        assert generators[i].logprobs(items) == pytest.approx(alone.logprobs(items), abs=1e-5)


# Who leaves


class Fake:
    """Counts the bytes that are loaded; `peak` is the most there ever were, work included."""

    def __init__(self, device):
        self.device, self.now, self.peak, self.loads = device, 0, 0, []

    def weights(self, name, n_bytes):
        counter = self

        class Model:
            def __init__(self):
                counter.loads.append(name)
                counter.work(n_bytes)
                counter.now += n_bytes

            def __del__(self):
                counter.now -= n_bytes

        return Weights(self.device, Model, lambda: n_bytes, name)

    def work(self, n_bytes):
        self.peak = max(self.peak, self.now + n_bytes)


def test_the_least_recently_used_leave_until_model_and_work_fit():
    device = Device("cpu", budget=100)
    fake = Fake(device)
    a, b, c = (fake.weights(name, n) for name, n in (("a", 40), ("b", 30), ("c", 50)))
    for who, working in ((a, 10), (b, 25), (a, 20), (c, 10), (a, 10), (b, 60), (c, 50)):
        who.use(lambda n=working: n)
        fake.work(working)
        assert fake.peak <= 100
    # a and b fit together; c needs one to go, and b was used longer ago than a.
    assert fake.loads == ["a", "b", "c", "b", "c"]


def test_weights_that_are_too_large_for_the_empty_device_are_refused_with_both_sizes():
    device = Device("cpu", budget=2_000_000_000)
    fake = Fake(device)
    fake.weights("small", 10).use()
    with pytest.raises(DoesNotFit, match=r"huge has 3\.00 GB.*2\.00 GB"):
        fake.weights("huge", 3_000_000_000).use()
    assert fake.loads == ["small"]


def test_work_that_does_not_fit_empties_the_device_and_is_tried():
    device = Device("cpu", budget=100)
    fake = Fake(device)
    a, b = fake.weights("a", 40), fake.weights("b", 40)
    a.use()
    b.use(lambda: 500)
    assert not a.is_loaded
    assert b.is_loaded


def test_without_a_bound_nobody_leaves_and_nothing_is_estimated():
    fake = Fake(Device("cpu"))
    several = [fake.weights(str(i), 10**12) for i in range(3)]
    for weights in several * 2:
        weights.use(lambda: pytest.fail("was estimated"))
    assert fake.loads == ["0", "1", "2"]


def test_answers_on_a_device_with_room_for_one_model_are_those_on_one_without_bounds(
    folders, monkeypatch
):
    (one, two, three), (adapter, _) = folders
    order = [0, 1, 2, 3, 1, 0, 3, 2]
    free = [load(f, Device("cpu", "fp32")) for f in (one, two, three, adapter)]
    expected = [said(free[i]) for i in order]
    size = stored_weights(one) * 4
    monkeypatch.setattr(local, "working_bytes", lambda *_, **__: size // 2)
    device = Device("cpu", "fp32", budget=2 * size - 1)
    tight = [load(f, device) for f in (one, two, three, adapter)]
    found, most = [], 0
    for i in order:
        found.append(said(tight[i]))
        loaded = sum(w.n_bytes for w in device._loaded if w.is_loaded)
        most = max(most, loaded)
    assert found == expected
    assert most == size


def test_a_classifier_leaves_and_comes_back_too(tmp_path, folders):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=2,
        pad_token_id=0,
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    size = 4 * max(stored_weights(tmp_path), stored_weights(folders[0][0]))
    device = Device("cpu", "fp32", budget=size)
    judge = LocalClassifier.load(tmp_path, threads=1, digest=digest_tree(tmp_path), device=device)
    assert judge.labels == ("LABEL_0", "LABEL_1")
    first = judge.logits(["who keeps zorbium ?", "petra"])
    assert said(load(folders[0][0], device))
    assert [w.name for w in device._loaded if w.is_loaded] == [str(folders[0][0].resolve())]
    assert judge.logits(["who keeps zorbium ?", "petra"]) == first


def test_what_was_freed_is_read_again_when_it_is_used(folders):
    models = Models(Recipe(name="t", policy=Policy(device="cpu", threads=1)))
    models.free()  # of nothing yet
    generator = models.load(folders[0][0])
    assert models.load(folders[0][0]) is generator
    before = said(generator)
    models.free()
    assert not generator._seat.base.weights.is_loaded
    assert said(generator) == before


def test_cuda_counts_what_is_free_and_what_the_allocator_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (50, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10)
    device = Device("cuda", "fp32")
    assert device.is_bounded
    assert device._room() == 70


# Estimates


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_the_model_has_them(tied):
    model = build_model(TOKENIZER, architecture="llama", hidden=32, layers=2, heads=2, seed=0)
    config = model.config
    config.tie_word_embeddings = tied
    model = type(model)(config)
    counts = parameters(config)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.linear == sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    assert weights_bytes(config, "bf16") == 2 * counts.total
    assert weights_bytes(config, "nf4") < weights_bytes(config, "bf16")


def test_a_model_of_1_5_billion_weights_has_the_published_sizes():
    assert parameters(QWEN_1_5B).total == 1_543_714_304
    # 28 layers x 2 (keys, values) x 2 heads x 128 numbers x 2 bytes
    assert cache_bytes(QWEN_1_5B, "bf16", 3, 100) == 300 * 28 * 2 * 2 * 128 * 2


def test_generation_takes_weights_and_a_cache_that_grows_with_rows_and_tokens():
    config = LlamaConfig(num_hidden_layers=16, hidden_size=512, vocab_size=1000)

    def of(n_rows, new):
        return generation_bytes(config, held="bf16", n_rows=n_rows, prompt=64, new=new)

    assert of(8, 64) > weights_bytes(config, "bf16") + cache_bytes(config, "bf16", 8, 128)
    more = cache_bytes(config, "bf16", 8, 512) - cache_bytes(config, "bf16", 8, 256)
    assert of(8, 448) - of(8, 192) == pytest.approx(more, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_training_takes_less_with_adapters_checkpointing_bf16_and_fewer_tokens():
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )

    def of(length=128, **policy):
        return training_bytes(config, Policy(max_tokens=2048, **policy), length=length)

    full = of(adapter="full")
    n = parameters(config).total
    assert full > 16 * n  # weights, gradients and two averages in fp32
    assert of(adapter="full", gradient_checkpointing=True) < full
    lora = of(adapter="lora")
    assert lora < full - 10 * n
    assert of(adapter="lora", precision="bf16") < lora
    assert of(adapter="lora", gradient_checkpointing=True) < lora / 2
    assert of(adapter="qlora") < lora
    fewer = training_bytes(config, Policy(adapter="lora", max_tokens=1024), length=128)
    assert fewer < lora


def test_estimating_touches_no_random_numbers():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    config = LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, intermediate_size=64)
    training_bytes(config, Policy(adapter="lora", max_tokens=64), length=32)
    assert torch.equal(torch.get_rng_state(), before)
    assert devices.choose_device("cpu").type == "cpu"


def test_an_adapter_has_one_name_wherever_it_and_its_base_lie(tmp_path):
    """Ids of answers hold it, and the order of things follows ids."""
    named = {}
    for place, seed in (("here", 0), ("there", 0), ("elsewhere", 1)):
        base = write_replica(tmp_path / place / "base", "qwen3")
        policy = Policy(adapter="lora", lora_rank=2)
        model = make_trainable(load_model(base), policy, seed)
        save_policy(model, load_tokenizer(base), tmp_path / place / "adapter")
        named[place] = Models(load_recipe("sandbox")).digest(tmp_path / place / "adapter")
    assert named["here"] == named["there"] != named["elsewhere"]
    other = write_replica(tmp_path / "other", "qwen3", seed=5)
    config = tmp_path / "there/adapter/adapter_config.json"
    settings = json.loads(config.read_text()) | {"base_model_name_or_path": str(other)}
    config.write_text(json.dumps(settings))
    assert Models(load_recipe("sandbox")).digest(config.parent) != named["here"]
