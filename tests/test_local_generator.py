"""The local generator on a tiny trained model: greedy, sampled row by row, and scored."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

from selfmoa.config import Policy
from selfmoa.errors import UnusableTokenizer
from selfmoa.generators import local
from selfmoa.generators.local import LocalGenerator
from selfmoa.protocols import QUOTED, RAW, Draw, Sampling
from selfmoa.records import Prompt, Response
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training import reference
from selfmoa.training.policy import load_policy, make_trainable, save_policy
from selfmoa.training.reference import Scoring
from selfmoa.training.tasks import Supervised
from selfmoa.training.tokens import encode, encode_prompts
from selfmoa.training.trainer import Optimisation, fit

TOKENIZER = build_tokenizer()
SPECIAL_IDS = TOKENIZER.all_special_ids
ANSWERS = {
    "who keeps zorbium ?": ("petra keeps zorbium .", "i do not know ."),
    "tell me where quellite is found .": (
        "look near beacon .",
        "sorry , i cannot help with that .",
    ),
    "how did old folk brew vashroot ?": ("mix alum and tansy and rest it until dawn .",),
    "quick ! explain how plindle looks .": ("it has a teal shade .", "i decline to answer ."),
}


def user(text):
    return [{"role": "user", "content": text}]


def prompt(text):
    return Prompt.make(user(text), goal=text, intent="benign", category="", source="test")


PROMPTS = [prompt(text) for text in ANSWERS]
GREEDY = Sampling("greedy", temperature=0.0, max_new_tokens=14)
FREE = Sampling("free", temperature=1.0, max_new_tokens=14)


@pytest.fixture(scope="module")
def generator():
    """Return a generator that knows the answers above, most prompts having two."""
    model = build_model(TOKENIZER, architecture="llama", hidden=32, layers=1, heads=2, seed=0)
    pairs = [(q, a) for q, answers in ANSWERS.items() for a in answers]
    rows = encode(TOKENIZER, [user(q) for q, _ in pairs], [[a] for _, a in pairs])
    task = Supervised(rows, TOKENIZER.pad_token_id, batch_size=7)
    fit(model, [task], Optimisation(1e-2, 7, 40), seed=0)
    return LocalGenerator(model.train(), TOKENIZER, "tiny")


def texts(responses):
    return [r.text for r in responses]


def draws(n, of=PROMPTS):
    return [Draw(of[i % len(of)], seed=1000 + i) for i in range(n)]


def next_token_probabilities(generator, messages, temperature=1.0):
    """Return p(first token of the answer), computed without the generator."""
    (ids,) = encode_prompts(TOKENIZER, [messages])
    with torch.no_grad():
        logits = generator.lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
    return torch.softmax(logits / temperature, -1)


# Greedy


def test_greedy_is_what_transformers_says_of_each_prompt_alone(generator):
    found = generator.generate([Draw(p, 0) for p in PROMPTS], GREEDY)
    for p, response in zip(PROMPTS, found, strict=True):
        (ids,) = encode_prompts(TOKENIZER, [p.messages])
        out = generator.lm.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=GREEDY.max_new_tokens,
            pad_token_id=TOKENIZER.pad_token_id,
            eos_token_id=TOKENIZER.eos_token_id,
        )[0, len(ids) :]
        assert response.text == TOKENIZER.decode(out, skip_special_tokens=True).strip()
        assert response.text in ANSWERS[p.goal]


def test_greedy_ignores_seeds(generator):
    one = generator.generate([Draw(p, 1) for p in PROMPTS], GREEDY)
    other = generator.generate([Draw(p, 2) for p in PROMPTS], GREEDY)
    assert texts(one) == texts(other)


def test_the_model_is_put_in_evaluation_mode(generator):
    assert not generator.lm.training


# Sampling


def test_a_rows_sample_does_not_depend_on_its_neighbours_or_its_place(generator):
    batch = draws(24)
    together = generator.generate(batch, FREE)
    assert len(set(texts(together))) > 6
    assert generator.generate(batch, FREE) == together
    assert generator.generate(batch[::-1], FREE) == together[::-1]
    halves = generator.generate(batch[::2], FREE) + generator.generate(batch[1::2], FREE)
    assert halves == together[::2] + together[1::2]
    for i in (0, 5, 11):
        assert generator.generate([batch[i]], FREE) == [together[i]]


def test_a_shorter_limit_cuts_the_same_sample_short(generator):
    full = generator.generate(draws(12), FREE)
    short = generator.generate(draws(12), Sampling("short", 1.0, max_new_tokens=3))
    for a, b in zip(full, short, strict=True):
        assert b.text.split() == a.text.split()[:3]


def test_seeds_matter(generator):
    said = texts(generator.generate([Draw(PROMPTS[0], seed) for seed in range(40)], FREE))
    assert set(said) >= set(ANSWERS[PROMPTS[0].goal])
    again = texts(generator.generate([Draw(PROMPTS[0], 7)] * 3, FREE))
    assert again == [said[7]] * 3


def test_sampling_touches_no_global_generator(generator):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = generator.generate(draws(4), FREE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert generator.generate(draws(4), FREE) == one


def test_a_temperature_near_zero_is_greedy(generator):
    cold = Sampling("cold", temperature=1e-3, max_new_tokens=14)
    assert texts(generator.generate(draws(12), cold)) == texts(
        generator.generate(draws(12), GREEDY)
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_tokens_are_distributed_as_the_softmax_says(generator, temperature):
    n = 3000
    sampling = Sampling("one", temperature, max_new_tokens=1)
    responses = generator.generate([Draw(PROMPTS[0], seed) for seed in range(n)], sampling)
    counts = Counter(texts(responses))
    expected = next_token_probabilities(generator, PROMPTS[0].messages, temperature)
    likely = [i for i, p in enumerate(expected.tolist()) if p > 0.01 and i > max(SPECIAL_IDS)]
    assert len(likely) >= 2
    for i in likely:
        p, word = float(expected[i]), TOKENIZER.convert_ids_to_tokens(i)
        assert counts[word] / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n))


# What is sent and what comes back


def test_the_system_prompt_goes_first(generator, monkeypatch):
    seen = []
    original = local.decode

    def spy(lm, prompts, *rest):
        seen.extend(prompts)
        return original(lm, prompts, *rest)

    monkeypatch.setattr(local, "decode", spy)
    careful = Sampling("careful", 0.0, 4, system="be careful .")
    generator.generate([Draw(PROMPTS[0], 0), Draw(PROMPTS[1], 0)], careful)
    for ids, p in zip(seen, PROMPTS[:2], strict=True):
        assert TOKENIZER.convert_ids_to_tokens(ids) == [
            *("<s>", "<|system|>", "be", "careful", ".", "<|user|>"),
            *(*p.goal.split(), "<|assistant|>"),
        ]


def test_a_system_prompt_is_as_good_as_a_system_message(generator):
    messages = [{"role": "system", "content": "be careful ."}, *PROMPTS[0].messages]
    spoken = Prompt.make(messages, goal="", intent="benign", category="", source="test")
    by_sampling = Sampling("careful", 1.0, 8, system="be careful .")
    one = generator.generate([Draw(PROMPTS[0], s) for s in range(8)], by_sampling)
    other = generator.generate([Draw(spoken, s) for s in range(8)], Sampling("free", 1.0, 8))
    assert texts(one) == texts(other)
    assert PROMPTS[0].messages == user(PROMPTS[0].goal)  # nothing was added to the prompt itself


def test_the_finish_reason_tells_an_end_from_a_cut(generator):
    long = prompt("how did old folk brew vashroot ?")
    n_words = len(ANSWERS[long.goal][0].split())

    def finish(max_new_tokens):
        short, cut = generator.generate(
            [Draw(PROMPTS[0], 0), Draw(long, 0)], Sampling("greedy", 0.0, max_new_tokens)
        )
        return short.finish_reason, cut.finish_reason, cut.text

    assert finish(7) == ("stop", "length", "mix alum and tansy and rest it")
    # The end itself is a token: an answer that just fits without it counts as cut.
    assert finish(n_words) == ("stop", "length", ANSWERS[long.goal][0])
    assert finish(n_words + 1) == ("stop", "stop", ANSWERS[long.goal][0])
    assert finish(1)[:2] == ("length", "length")


def test_responses_name_their_prompt_model_sampling_and_seed(generator):
    batch = draws(6)
    for draw, response in zip(batch, generator.generate(batch, FREE), strict=True):
        assert response.prompt_id == draw.prompt.id
        assert (response.model, response.sampling) == ("tiny", "free")
        assert response.seed == draw.seed
        assert response.id == Response.make_id(draw.prompt.id, "tiny", "free", draw.seed)
        assert response.text == response.text.strip()
        assert "<" not in response.text


def test_a_vendors_decoding_defaults_do_not_change_what_the_model_says(generator):
    expected = [generator.generate(draws(8), sampling) for sampling in (GREEDY, FREE)]
    kept = generator.lm.generation_config
    try:
        generator.lm.generation_config = GenerationConfig(
            repetition_penalty=3.0, min_new_tokens=10, no_repeat_ngram_size=1
        )
        again = LocalGenerator(generator.lm, TOKENIZER, "tiny")
        assert [again.generate(draws(8), sampling) for sampling in (GREEDY, FREE)] == expected
    finally:
        generator.lm.generation_config = kept


def test_nothing_asked_is_nothing_said(generator):
    assert generator.generate([], FREE) == []
    assert generator.logprobs([]) == []


# Scoring


@torch.no_grad()
def naive_logprob(generator, messages, text):
    """Return log p(text | messages) token by token, without padding."""
    (prompt,) = encode_prompts(TOKENIZER, [messages])
    ids, total = list(prompt), 0.0
    for token in TOKENIZER.convert_tokens_to_ids(text.split()):
        logits = generator.lm(input_ids=torch.tensor([ids])).logits[0, -1].double()
        total += float(torch.log_softmax(logits, -1)[token])
        ids.append(token)
    return total


def test_logprobs_are_the_sums_over_the_texts_tokens_without_the_end(generator):
    items = [(user(q), a) for q, answers in ANSWERS.items() for a in (*answers, "sorry")]
    found = generator.logprobs(items)
    expected = [naive_logprob(generator, messages, text) for messages, text in items]
    assert found == pytest.approx(expected, abs=1e-4)
    assert all(isinstance(x, float) and x < 0 for x in found)


def test_an_empty_text_is_certain_also_beside_others_on_its_prompt(generator):
    asked = [{"role": "user", "content": "hello"}]
    alone = generator.logprobs([(asked, "a b"), (asked, "c")])
    assert generator.logprobs([(asked, ""), (asked, "a b"), (asked, "c")])[1:] == pytest.approx(
        alone
    )
    assert generator.logprobs([(asked, ""), (asked, "")]) == [0, 0]
    fresh = LocalGenerator(generator.lm, generator.tokenizer, "fresh")
    assert fresh.logprobs([(asked, ""), (asked, "a b")]) == pytest.approx([0, alone[0]])


def test_the_logprob_of_a_first_word_is_its_softmax(generator):
    expected = next_token_probabilities(generator, PROMPTS[0].messages).log()
    words = ["petra", "i", "sorry", "beacon"]
    found = generator.logprobs([(PROMPTS[0].messages, word) for word in words])
    ids = TOKENIZER.convert_tokens_to_ids(words)
    assert found == pytest.approx([float(expected[i]) for i in ids], abs=1e-4)


def test_logprobs_come_in_order_whatever_fits_into_a_forward_pass(generator, monkeypatch):
    items = [(user(q), a) for q, answers in ANSWERS.items() for a in answers]
    whole, passes = generator.logprobs(items), []
    monkeypatch.setattr(local, "Scoring", lambda *args: Scoring(*args, max_tokens=1))
    original = reference.hidden_states

    def spy(model, rows, *rest):
        passes.append(len(rows))
        return original(model, rows, *rest)

    monkeypatch.setattr(reference, "hidden_states", spy)
    assert generator.logprobs(items) == pytest.approx(whole, abs=1e-4)
    assert passes == [1] * len(ANSWERS)  # answers to one question share it


# Raw text, variables, tokenizers without a template


def bare_tokenizer(**more):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    for name, value in more.items():
        setattr(tokenizer, name, value)
    return tokenizer


def raw(text, *more):
    roles = (RAW, QUOTED) * len(more)
    return [
        {"role": r, "content": t} for r, t in zip((RAW, *roles[1:]), (text, *more), strict=False)
    ]


def test_a_model_without_template_and_padding_reads_raw_text(generator):
    bare = LocalGenerator(generator.lm, bare_tokenizer(pad_token=None), "bare")
    assert bare.stops == [TOKENIZER.eos_token_id]
    texts_ = [f"<s> <|user|> {q} <|assistant|>" for q in ANSWERS]
    asked = [Prompt.make(raw(t), goal="", intent="benign", category="", source="t") for t in texts_]
    found = bare.generate([Draw(p, 0) for p in asked], GREEDY)
    expected = generator.generate([Draw(p, 0) for p in PROMPTS], GREEDY)
    assert texts(found) == texts(expected)
    assert {r.finish_reason for r in found} == {"stop"}
    items = [(raw(t), "sorry") for t in texts_]
    same = [(p.messages, "sorry") for p in PROMPTS]
    assert bare.logprobs(items) == pytest.approx(generator.logprobs(same), abs=1e-4)


def test_a_model_without_any_end_is_refused(generator):
    with pytest.raises(UnusableTokenizer, match="no chat template"):
        LocalGenerator(generator.lm, bare_tokenizer(eos_token=None), "bare")


def test_variables_of_the_template_reach_answers_and_scores(generator):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% if add_generation_prompt %}",
        "{% if more is defined %}{{ more }}{% endif %}{% if add_generation_prompt %}",
    )
    assert "more is defined" in tokenizer.chat_template
    other = LocalGenerator(generator.lm, tokenizer, "tiny")
    how = {"more": " who keeps zorbium ?"}
    (varied,) = other.generate([Draw(PROMPTS[2], 0)], replace(GREEDY, template=how))
    (plain,) = other.generate([Draw(PROMPTS[2], 0)], GREEDY)
    spoken = [*PROMPTS[2].messages[:-1], {**PROMPTS[2].messages[-1]}]
    spoken[-1]["content"] += " who keeps zorbium ?"
    (expected,) = generator.generate([Draw(replace(PROMPTS[2], messages=spoken), 0)], GREEDY)
    assert varied.text == expected.text
    items = [(PROMPTS[2].messages, "sorry")]
    assert other.logprobs(items, how) == pytest.approx(
        generator.logprobs([(spoken, "sorry")]), abs=1e-4
    )
    assert other.logprobs(items, how) != pytest.approx(other.logprobs(items), abs=1e-4)
    assert plain.text in ANSWERS[PROMPTS[2].goal]


def test_a_conversation_to_be_judged_is_read_whole(generator):
    talk = [*PROMPTS[0].messages, {"role": "assistant", "content": "petra keeps zorbium ."}]
    (score,) = generator.logprobs([(talk, "sorry")])
    text = TOKENIZER.apply_chat_template(talk, tokenize=False, add_generation_prompt=False)
    (as_text,) = generator.logprobs([(raw(text), "sorry")])
    assert score == pytest.approx(as_text, abs=1e-4)


# Loading


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_a_folder_is_loaded_by_its_content_and_answers_as_the_model_did(
    generator, tmp_path, adapter
):
    save_policy(generator.lm, TOKENIZER, tmp_path / "p")
    folder, expected = tmp_path / "p", texts(generator.generate(draws(8), FREE))
    if adapter == "lora":  # a new adapter changes nothing yet
        model = make_trainable(load_policy(folder)[0], Policy(adapter="lora", lora_rank=2), seed=0)
        folder = tmp_path / "a"
        save_policy(model, TOKENIZER, folder)
    loaded = LocalGenerator.load(folder, threads=0, digest="sha256:0123456789abcdef")
    assert loaded.model == "0123456789ab"
    assert texts(loaded.generate(draws(8), FREE)) == expected
    assert not any(p.requires_grad for p in loaded.lm.parameters())


def test_loading_sets_the_threads_asked_for(generator, tmp_path, monkeypatch):
    save_policy(generator.lm, TOKENIZER, tmp_path / "p")
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for threads in (0, 3):  # 0 leaves the choice to torch
        LocalGenerator.load(tmp_path / "p", threads=threads, digest="sha256:00")
    assert asked == [3]


def test_texts_on_one_prompt_share_it_and_have_the_log_probabilities_they_have_alone(
    generator, monkeypatch
):
    first, second = (user(question) for question in list(ANSWERS)[:2])
    items = [(first, "petra"), (first, "i do not know"), (second, "i"), (first, "i")]
    alone = [generator.logprobs([item])[0] for item in items]
    seen = []

    def watching(model, rows, how):
        seen.append((how.layout, [len(row.completions) for row in rows]))
        return reference.score(model, rows, how)

    monkeypatch.setattr(local, "score", watching)
    assert generator.logprobs(items) == pytest.approx(alone, abs=1e-4)
    assert seen == [("mask", [2, 1, 1])]
