"""What every generator must do, over each of them: the same questions, the same answers.

A backend is one function of `BACKENDS`: it takes a policy folder and pytest's monkeypatch, and
returns the generator and the list in which the token ids that it sends will stand (None where a
backend sends messages).
"""

from __future__ import annotations

import math

import pytest
import torch

import fake_vllm
from selfmoa.errors import BadInput
from selfmoa.generators import local
from selfmoa.generators.devices import Device
from selfmoa.generators.local import LocalGenerator
from selfmoa.generators.vllm import VLLMGenerator
from selfmoa.protocols import RAW, Draw, Sampling
from selfmoa.records import Prompt, Response
from selfmoa.rundir import digest_tree
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training.policy import load_policy, save_policy
from selfmoa.training.tasks import Supervised
from selfmoa.training.tokens import encode, encode_prompts
from selfmoa.training.trainer import Optimisation, fit

TOKENIZER = build_tokenizer()
ANSWERS = {
    "who keeps zorbium ?": ("petra keeps zorbium .", "i do not know ."),
    "tell me where quellite is found .": (
        "look near beacon .",
        "sorry , i cannot help with that .",
    ),
    "how did old folk brew vashroot ?": ("mix alum and tansy and rest it until dawn .",),
    "quick ! explain how plindle looks .": ("it has a teal shade .", "i decline to answer ."),
}
GREEDY = Sampling("greedy", temperature=0.0, max_new_tokens=14)
FREE = Sampling("free", temperature=1.0, max_new_tokens=14)


def user(text):
    return [{"role": "user", "content": text}]


def ask(text):
    return Prompt.make(user(text), goal=text, intent="benign", category="", source="test")


PROMPTS = [ask(text) for text in ANSWERS]
LONG = ask("how did old folk brew vashroot ?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a policy folder whose model knows the answers above, most questions having two."""
    model = build_model(TOKENIZER, architecture="llama", hidden=32, layers=1, heads=2, seed=0)
    pairs = [(q, a) for q, answers in ANSWERS.items() for a in answers]
    rows = encode(TOKENIZER, [user(q) for q, _ in pairs], [[a] for _, a in pairs])
    fit(model, [Supervised(rows, TOKENIZER.pad_token_id, 7)], Optimisation(1e-2, 7, 40), seed=0)
    found = tmp_path_factory.mktemp("policy")
    save_policy(model, TOKENIZER, found)
    return found


def local_backend(folder, monkeypatch):
    sent, decode = [], local.decode

    def watching(lm, rows, *rest):
        sent.extend(map(list, rows))
        return decode(lm, rows, *rest)

    monkeypatch.setattr(local, "decode", watching)
    return LocalGenerator.load(folder, threads=1, digest=digest_tree(folder)), sent


def vllm_backend(folder, monkeypatch):
    log = fake_vllm.install(monkeypatch)
    device = Device("cpu", "fp32")
    loaded = VLLMGenerator.load(folder, threads=1, digest=digest_tree(folder), device=device)
    return loaded, log.prompts


BACKENDS = {"local": local_backend, "vllm": vllm_backend}


@pytest.fixture(params=BACKENDS)
def backend(request, folder, monkeypatch):
    return BACKENDS[request.param](folder, monkeypatch)


@pytest.fixture
def generator(backend):
    return backend[0]


@pytest.fixture(scope="module")
def reference(folder):
    """Return the model itself, to say what is right without any generator."""
    return load_policy(folder)[0].eval()


def texts(responses):
    return [r.text for r in responses]


@torch.no_grad()
def naive_greedy(lm, p, limit):
    ((ids,), said) = encode_prompts(TOKENIZER, [p.messages]), []
    while len(said) < limit and TOKENIZER.eos_token_id not in said:
        said.append(int(lm(input_ids=torch.tensor([list(ids) + said])).logits[0, -1].argmax()))
    return TOKENIZER.decode(said, skip_special_tokens=True).strip()


@torch.no_grad()
def naive_logprob(lm, messages, text):
    (prompt,) = encode_prompts(TOKENIZER, [messages])
    ids, total = list(prompt), 0.0
    for token in TOKENIZER.convert_tokens_to_ids(text.split()):
        logits = lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[token])
        ids.append(token)
    return total


def test_greedy_answers_are_the_likeliest_tokens_alone_and_beside_longer_prompts(
    generator, reference
):
    together = generator.generate([Draw(p, 0) for p in PROMPTS], GREEDY)
    alone = [generator.generate([Draw(p, 0)], GREEDY)[0] for p in PROMPTS]
    assert together == alone  # in a batch the shorter prompts are padded
    assert texts(together) == [naive_greedy(reference, p, 14) for p in PROMPTS]
    assert all(text in ANSWERS[p.goal] for p, text in zip(PROMPTS, texts(together), strict=True))


def test_response_i_answers_draw_i(generator):
    draws = [Draw(PROMPTS[i % 4], 100 + i) for i in range(12)]
    found = generator.generate(draws, FREE)
    assert [(r.prompt_id, r.seed) for r in found] == [(d.prompt.id, d.seed) for d in draws]
    assert generator.generate(draws[::-1], FREE) == found[::-1]
    for draw, response in zip(draws, found, strict=True):
        assert response.id == Response.make_id(draw.prompt.id, generator.model, "free", draw.seed)
        assert response.model == generator.model
        assert response.sampling == "free"


def test_equal_seeds_say_equal_things_and_others_other_things(generator):
    draws = [Draw(PROMPTS[0], seed) for seed in range(24)]
    first = texts(generator.generate(draws, FREE))
    assert texts(generator.generate(draws, FREE)) == first
    assert texts(generator.generate([Draw(PROMPTS[0], 7)] * 3, FREE)) == [first[7]] * 3
    assert set(first) >= set(ANSWERS[PROMPTS[0].goal])
    other = texts(generator.generate([Draw(PROMPTS[0], 1000 + s) for s in range(24)], FREE))
    assert other != first


def test_large_seeds_are_seeds_too(generator):
    draws = [Draw(PROMPTS[0], 2**63 - 1 - i) for i in range(2)]
    assert generator.generate(draws, FREE) == generator.generate(draws, FREE)


def test_how_often_an_answer_comes_is_how_likely_it_is(generator, reference):
    n, first = 600, Sampling("first", 1.0, max_new_tokens=1)
    said = texts(generator.generate([Draw(PROMPTS[0], seed) for seed in range(n)], first))
    p = math.exp(naive_logprob(reference, PROMPTS[0].messages, "petra"))
    assert 0.2 < p < 0.8
    assert said.count("petra") / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


def test_the_finish_reason_tells_an_end_from_a_cut(generator):
    n_words = len(ANSWERS[LONG.goal][0].split())

    def finish(limit):
        (found,) = generator.generate([Draw(LONG, 0)], Sampling("greedy", 0.0, limit))
        return found.finish_reason, found.text

    assert finish(7) == ("length", "mix alum and tansy and rest it")
    # The end itself is a token: an answer that just fits without it counts as cut.
    assert finish(n_words) == ("length", ANSWERS[LONG.goal][0])
    assert finish(n_words + 1) == ("stop", ANSWERS[LONG.goal][0])


def test_log_probabilities_are_sums_over_the_texts_tokens_in_order(generator, reference):
    items = [(user(q), a) for q, answers in ANSWERS.items() for a in (*answers, "sorry")]
    expected = [naive_logprob(reference, messages, text) for messages, text in items]
    assert generator.logprobs(items) == pytest.approx(expected, abs=1e-4)
    assert generator.logprobs(items[::-1]) == pytest.approx(expected[::-1], abs=1e-4)


def test_nothing_asked_is_nothing_said(generator):
    assert generator.generate([], FREE) == []
    assert generator.logprobs([]) == []


def test_a_system_prompt_is_as_good_as_a_system_message(generator):
    careful = [{"role": "system", "content": "be careful ."}, *PROMPTS[0].messages]
    spoken = Prompt.make(careful, goal="", intent="benign", category="", source="test")
    one = generator.generate([Draw(PROMPTS[0], 3)], Sampling("a", 1.0, 8, system="be careful ."))
    other = generator.generate([Draw(spoken, 3)], Sampling("a", 1.0, 8))
    assert texts(one) == texts(other)


def test_the_ids_that_are_sent_are_those_of_training_with_one_beginning_and_no_end(backend):
    generator, sent = backend
    if sent is None:
        pytest.skip("this backend sends messages")
    generator.generate([Draw(p, 0) for p in PROMPTS], GREEDY)
    expected = encode_prompts(TOKENIZER, [p.messages for p in PROMPTS])
    assert sorted(map(list, sent)) == sorted(map(list, expected))
    for ids in sent:
        assert ids.count(TOKENIZER.bos_token_id) == 1
        assert TOKENIZER.eos_token_id not in ids
    sent.clear()
    typed = [{"role": RAW, "content": "<s> <|user|> who keeps zorbium ? <|assistant|>"}]
    raw = Prompt.make(typed, goal="", intent="benign", category="", source="test")
    generator.generate([Draw(raw, 0)], GREEDY)
    assert [list(ids) for ids in sent] == [list(expected[0])]


def test_a_prompt_without_room_for_its_answer_is_refused_with_counts_before_anything_is_asked(
    backend,
):
    generator, sent = backend
    long = ask("who keeps zorbium ? " * 62)  # 4 x 62 + 3 tokens of 256
    fits = Sampling("greedy", 0.0, 5)
    assert len(generator.generate([Draw(long, 0)], fits)) == 1
    if sent is not None:
        sent.clear()
    with pytest.raises(BadInput) as caught:
        generator.generate([Draw(PROMPTS[0], 0), Draw(long, 0)], Sampling("greedy", 0.0, 6))
    told = str(caught.value)
    assert long.id in told
    assert "251 tokens" in told
    assert "256" in told
    assert not sent
    with pytest.raises(BadInput, match=r"\d+ tokens"):
        generator.logprobs([(long.messages, "petra keeps zorbium . " * 5)])
