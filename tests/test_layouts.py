"""Shared prompts against separate rows, on tiny random replicas of many families."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from selfmoa.training import layouts
from selfmoa.training.layouts import LAYOUTS, choose_layout, hidden_states
from selfmoa.training.packing import split
from selfmoa.training.tokens import Row

# peft reads an attribute that transformers has renamed; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PAD, VOCAB, HIDDEN, WINDOW = 0, 64, 32, 6
TOLERANCE = 1e-4
SHARED = ("mask", "prefix", "rows")
BY_KIND = ("masks", "prefix", "rows")
CACHED = ("prefix", "rows")
ALONE = ("rows",)
MIXED = ["sliding_attention", "full_attention"]
WINDOWS = {"sliding_window": WINDOW}


@dataclass
class Family:
    """A model type, what differs from the common configuration, and the layouts that are exact."""

    kind: str
    exact: tuple[str, ...]
    options: dict = field(default_factory=dict)


FAMILIES = {
    "llama": Family("llama", SHARED),
    "qwen2": Family("qwen2", SHARED),
    "qwen2, windows in half the layers": Family(
        "qwen2", BY_KIND, {"use_sliding_window": True, "max_window_layers": 1} | WINDOWS
    ),
    "qwen3": Family("qwen3", SHARED, {"head_dim": 8}),
    "qwen3, windows in all layers": Family(
        "qwen3",
        SHARED,
        {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 0} | WINDOWS,
    ),
    "qwen3_moe": Family(
        "qwen3_moe",
        SHARED,
        {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "phi3": Family("phi3", SHARED),
    "phi3, windows": Family("phi3", SHARED, WINDOWS),
    "smollm3": Family("smollm3", SHARED),
    "mistral": Family("mistral", SHARED, {"sliding_window": None}),
    "mistral, windows": Family("mistral", SHARED, WINDOWS),
    "starcoder2, windows": Family("starcoder2", SHARED, WINDOWS),
    "granite": Family("granite", SHARED, {"logits_scaling": 2.0, "attention_multiplier": 0.3}),
    "olmo2": Family("olmo2", SHARED),
    "stablelm": Family("stablelm", SHARED),
    "gpt2": Family("gpt2", SHARED, {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4}),
    "opt": Family("opt", SHARED, {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "gpt_neox": Family("gpt_neox", SHARED),
    "falcon": Family("falcon", SHARED),
    "falcon, alibi": Family("falcon", CACHED, {"alibi": True}),
    "gemma2": Family("gemma2", BY_KIND, {"head_dim": 8, "final_logit_softcapping": 5.0} | WINDOWS),
    "gemma3_text": Family("gemma3_text", BY_KIND, {"head_dim": 8, "layer_types": MIXED} | WINDOWS),
    "cohere2": Family(
        "cohere2", BY_KIND, {"head_dim": 8, "layer_types": MIXED, "logit_scale": 1.0} | WINDOWS
    ),
    "gpt_oss": Family(
        "gpt_oss",
        BY_KIND,
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | WINDOWS,
    ),
    # Its windows are in the code of its attention, not in a mask.
    "gpt_neo": Family(
        "gpt_neo",
        CACHED,
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": WINDOW},
    ),
    "bloom": Family("bloom", CACHED, {"n_layer": 2, "n_head": 4}),
    "mpt": Family("mpt", CACHED, {"d_model": HIDDEN, "n_heads": 4, "n_layers": 2}),
    "mamba2": Family(
        "mamba2",
        ALONE,
        {"head_dim": 8, "num_heads": 8, "expand": 2, "state_size": 8, "n_groups": 1}
        | {"chunk_size": 8},
    ),
    "lfm2": Family("lfm2", ALONE, {"layer_types": ["conv", "full_attention"]}),
}
FAST = ("llama", "phi3, windows", "gemma2", "gemma3_text", "gpt_oss", "mpt", "lfm2")
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}


def build(name, attention=None, **options):
    family = FAMILIES[name]
    config = AutoConfig.for_model(family.kind, **COMMON | family.options | options)
    more = {"attn_implementation": attention} if attention else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, **more)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.3)  # the usual 0.02 would hide mistakes of attention
    return model.eval()


cached = cache(build)


def tokens(n, seed=0):
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_rows(lengths):
    """Return rows of these (prompt length, [completion lengths])."""
    return [
        Row(tokens(n, 100 * i), [tokens(m, 100 * i + j) for j, m in enumerate(ms, 1)])
        for i, (n, ms) in enumerate(lengths)
    ]


ROWS = make_rows([(12, [7, 4]), (3, [1, 9, 5]), (20, [10]), (25, [10, 12]), (1, [1, 1])])


def chosen_logps(logits, targets):
    logps = logits.float().log_softmax(-1)
    return logps.gather(-1, torch.tensor(targets)[:, None])[:, 0]


def separate_logps(model, rows):
    """Return log p of every completion token from the whole model, each row alone, unpadded."""
    found = []
    for row in split(rows):
        n, completion = len(row.prompt), row.completions[0]
        ids = torch.tensor([[*row.prompt, *completion]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        found.append(chosen_logps(logits[n - 1 : -1], completion))
    return torch.cat(found)


def shared_logps(model, rows, layout, **options):
    """Return the same from hidden states, through the head that the model itself applies."""
    hidden, batch = hidden_states(model, rows, layout, PAD, **options)
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    with head_reads(whole, hidden[None]):
        logits = whole(input_ids=batch.ids).logits[0]
    return chosen_logps(logits, batch.targets.tolist())


@contextmanager
def head_reads(model, hidden):
    """Let the whole model apply its head, and what follows it, to these hidden states."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _module, _args: (hidden,))
    try:
        yield
    finally:
        hook.remove()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Exactness, family by family


def check_family(name, attention=None):
    model, family = cached(name, attention), FAMILIES[name]
    with torch.no_grad():
        truth = separate_logps(model, ROWS)
        for layout in LAYOUTS:
            if layout in family.exact:
                assert_close(shared_logps(model, ROWS, layout), truth, atol=TOLERANCE, rtol=0)
                continue
            try:
                found = shared_logps(model, ROWS, layout)
            except layouts.FAILURES:
                continue
            assert (found - truth).abs().max() > 0.01
    choice = choose_layout(model, ROWS, PAD)
    assert choice.layout == family.exact[0]
    assert choice.differences[choice.layout] < TOLERANCE
    assert set(choice.differences) <= {*LAYOUTS[: LAYOUTS.index(choice.layout) + 1]}


@pytest.mark.parametrize("name", FAST)
def test_the_exact_layouts_of_a_family_are_known(name):
    check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(FAST)))
def test_the_exact_layouts_of_every_family_are_known(name):
    check_family(name)


@pytest.mark.parametrize("name", ["llama", "phi3, windows", "gemma3_text", "gpt2"])
def test_both_implementations_of_attention_are_exact(name):
    for attention in ("eager", "sdpa"):
        assert cached(name, attention).config._attn_implementation == attention
        check_family(name, attention)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "mpt", "phi3, windows"])
def test_gradients_of_all_parameters_are_those_of_separate_rows(name):
    model = cached(name)
    truth = separate_logps(model, ROWS)
    weights = torch.linspace(-1, 2, len(truth))
    wanted = gradients(model, (truth * weights).mean())
    assert len(wanted) >= 10
    for layout in FAMILIES[name].exact:
        found = gradients(model, (shared_logps(model, ROWS, layout) * weights).mean())
        assert found.keys() == wanted.keys()
        for parameter, gradient in wanted.items():
            assert_close(found[parameter], gradient, atol=TOLERANCE, rtol=1e-4, msg=parameter)


LENGTHS = st.lists(
    st.tuples(st.integers(1, 15), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def padded_logps(model, rows, side):
    """Return log p of every completion token from the whole model on one padded batch."""
    parts = split(rows)
    length = max(part.n_tokens for part in parts)
    ids, mask = torch.full((len(parts), length), PAD), torch.zeros(len(parts), length).long()
    spans = []
    for i, part in enumerate(parts):
        start = length - part.n_tokens if side == "left" else 0
        end = start + part.n_tokens
        ids[i, start:end] = torch.tensor([*part.prompt, *part.completions[0]])
        mask[i, start:end] = 1
        spans.append((start + len(part.prompt) - 1, end - 1))
    more = {} if model.config.model_type == "mpt" else {"position_ids": (mask.cumsum(1) - 1) * mask}
    logits = model(input_ids=ids, attention_mask=mask, **more).logits
    return torch.cat(
        [
            chosen_logps(logits[i, a:b], part.completions[0])
            for i, ((a, b), part) in enumerate(zip(spans, parts, strict=True))
        ]
    )


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mpt"])
@given(lengths=LENGTHS, side=st.sampled_from(["left", "right"]))
@settings(max_examples=25, deadline=None)
def test_lengths_padding_sides_and_batch_makeup_change_nothing(name, lengths, side):
    model, rows = cached(name), make_rows(lengths)
    with torch.no_grad():
        truth = separate_logps(model, rows)
        assert_close(padded_logps(model, rows, side), truth, atol=TOLERANCE, rtol=0)
        for layout in FAMILIES[name].exact:
            assert_close(shared_logps(model, rows, layout), truth, atol=TOLERANCE, rtol=0)


def test_prompt_tokens_have_the_same_hidden_states_in_every_layout():
    model = cached("llama")
    by_layout = {}
    for layout in SHARED:
        hidden, batch = hidden_states(model, ROWS, layout, PAD, prompt_weight=0.5)
        by_layout[layout] = (hidden.detach(), batch)
    hidden, batch = by_layout["rows"]
    assert len(hidden) == sum(row.n_tokens - 1 for row in ROWS)
    alone = model.model(input_ids=torch.tensor([ROWS[0].prompt])).last_hidden_state[0]
    for other, other_batch in by_layout.values():
        assert_close(other, hidden, atol=1e-5, rtol=1e-4)
        assert_close(other[:11], alone[:11], atol=1e-5, rtol=1e-4)
        assert torch.equal(other_batch.targets, batch.targets)
        assert torch.equal(other_batch.owners, batch.owners)
        assert torch.equal(other_batch.weights, batch.weights)


# What the model is given


def calls_of(model, rows, layout):
    """Return what the body is called with."""
    calls = []
    hook = model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    try:
        hidden_states(model, rows, layout, PAD)
    finally:
        hook.remove()
    return calls


@pytest.mark.parametrize("layout", SHARED)
def test_rows_that_share_nothing_take_the_plain_causal_path(layout):
    rows = make_rows([(5, [3]), (2, [9])])
    (call,) = calls_of(cached("llama"), rows, layout)
    assert call["input_ids"].shape == (2, 11)
    assert call["attention_mask"].shape == (2, 11)
    assert call["attention_mask"].all()


def test_a_shared_prompt_is_read_once():
    rows = make_rows([(20, [3, 4, 5])])
    sizes = {
        layout: sum(call["input_ids"].numel() for call in calls_of(cached("llama"), rows, layout))
        for layout in SHARED
    }
    assert sizes == {"mask": 20 + 12, "prefix": 20 + 3 * 5, "rows": 3 * 25}


def test_prompts_of_one_length_need_no_mask_in_front_of_a_cache():
    calls = calls_of(cached("llama"), make_rows([(5, [3, 2]), (5, [4, 4])]), "prefix")
    assert [call["attention_mask"] for call in calls] == [None, None]


def test_the_head_is_never_applied(monkeypatch):
    model = build("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda _: pytest.fail("logits were computed"))
    for layout in SHARED:
        hidden, batch = hidden_states(model, ROWS, layout, PAD)
        assert hidden.shape == (len(batch.targets), HIDDEN)


def test_padding_gives_finite_gradients():
    rows = make_rows([(15, [9, 9]), (1, [1, 1])])
    for attention in ("eager", "sdpa"):
        model = cached("gemma3_text", attention)
        for layout in BY_KIND:
            hidden, _ = hidden_states(model, rows, layout, PAD)
            found = gradients(model, hidden.square().sum())
            assert all(g.isfinite().all() for g in found.values())


def test_layouts_run_under_autocast():
    for name, attention in (("llama", "sdpa"), ("llama", "eager"), ("gemma3_text", "sdpa")):
        model = cached(name, attention)
        wanted, _ = hidden_states(model, ROWS, "rows", PAD)
        for layout in FAMILIES[name].exact:
            with torch.autocast("cpu", torch.bfloat16):
                hidden, _ = hidden_states(model, ROWS, layout, PAD)
            apart = (hidden - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
            assert 1e-4 < apart < 0.1


def test_an_adapter_is_at_work_unless_it_is_switched_off():
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    base = build("llama")
    plain = {layout: shared_logps(base, ROWS, layout) for layout in SHARED}
    model = get_peft_model(base, config)
    truth = separate_logps(model, ROWS)
    assert (truth - plain["rows"]).abs().max() > 0.01
    for layout in SHARED:
        assert_close(shared_logps(model, ROWS, layout), truth, atol=TOLERANCE, rtol=0)
        with model.disable_adapter():
            assert_close(shared_logps(model, ROWS, layout), plain[layout], atol=1e-5, rtol=0)
    assert choose_layout(model, ROWS, PAD).layout == "mask"


def test_a_layout_that_does_not_fit_says_why():
    cases = [
        ("gemma3_text", "mask", "needs 2 mask"),
        ("llama", "masks", r"needs 1 mask\(s\): full_attention"),
        ("phi3, windows", "masks", r"needs 1 mask\(s\): sliding_attention"),
        ("mpt", "mask", "takes no positions"),
        ("lfm2", "masks", "layers of the kind conv"),
        ("lfm2", "prefix", "caches more than keys and values"),
        ("mamba2", "prefix", "kept no keys and values"),
        ("llama", "Mask", "no layout 'Mask', only mask, masks, prefix, rows"),
    ]
    for name, layout, why in cases:
        with pytest.raises(ValueError, match=why):
            hidden_states(cached(name), ROWS, layout, PAD)


def test_a_cache_that_was_never_filled_is_refused():
    with pytest.raises(ValueError, match="kept no keys and values"):
        layouts._repeated(DynamicCache(), 5, torch.tensor([0, 0]))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_goes_with_masks_and_not_with_a_cache():
    model = build("llama").train()
    wanted = gradients(model, hidden_states(model, ROWS, "mask", PAD)[0].square().sum())
    model.gradient_checkpointing_enable()
    found = gradients(model, hidden_states(model, ROWS, "mask", PAD)[0].square().sum())
    for name, gradient in wanted.items():
        assert_close(found[name], gradient, atol=TOLERANCE, rtol=1e-4)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        hidden_states(model, ROWS, "prefix", PAD)


def test_a_model_without_a_body_is_refused():
    class Bare(PreTrainedModel):
        config_class = type(cached("llama").config)
        _supports_sdpa = True

    with pytest.raises(ValueError, match="Bare does not say which part of it is its body"):
        hidden_states(Bare(cached("llama").config), ROWS, "rows", PAD)


# The choice


def test_the_reason_names_what_was_passed_over():
    choice = choose_layout(cached("gpt_neo"), ROWS, PAD)
    assert choice.layout == "prefix"
    assert choice.differences["mask"] > 0.1
    assert choice.differences["prefix"] < TOLERANCE
    assert choice.reason.startswith("exact to ")
    assert "'mask' is off by" in choice.reason
    assert "'masks' fails (the model needs 1 mask(s): full_attention)" in choice.reason


def test_one_long_row_among_many_shows_a_window():
    short = make_rows([(1, [2, 2]), (3, [2, 2])] * 100)
    model = cached("gpt_neo")
    assert choose_layout(model, short, PAD).layout == "mask"
    for place in (0, 77, 200):
        rows = [*short[:place], *make_rows([(2, [2, 12])]), *short[place:]]
        assert choose_layout(model, rows, PAD).layout == "prefix"


def test_a_row_with_one_completion_does_not_hide_what_sharing_does():
    rows = make_rows([(30, [9])] * 50 + [(9, [2, 9])] + [(1, [9])] * 50)
    assert choose_layout(cached("gpt_neo"), rows, PAD).layout == "prefix"


def test_only_allowed_layouts_are_chosen():
    model = cached("gemma3_text")
    assert choose_layout(model, ROWS, PAD, allowed=("prefix", "rows")).layout == "prefix"
    assert choose_layout(model, ROWS, PAD, allowed=("rows",)).layout == "rows"
    with pytest.raises(ValueError, match=r"no layout gives .* 'mask' fails"):
        choose_layout(model, ROWS, PAD, allowed=("mask",))
    with pytest.raises(ValueError, match="no rows"):
        choose_layout(model, [], PAD)


def test_a_tolerance_can_be_given():
    assert choose_layout(cached("gpt_neo"), ROWS, PAD, tolerance=100.0).layout == "mask"
    with pytest.raises(ValueError, match="not known here"):
        choose_layout(cached("llama"), ROWS, PAD, tolerance=-1.0)


def test_the_model_is_left_as_it_was():
    model = build("llama", attention_dropout=0.5).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    choice = choose_layout(model, ROWS, PAD)
    assert (choice.layout, model.training) == ("mask", True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert not model.get_input_embeddings()._forward_hooks
    choose_layout(model.eval(), ROWS, PAD)
    assert not model.training


def test_autocast_does_not_blur_the_choice():
    with torch.autocast("cpu", torch.bfloat16):
        choice = choose_layout(cached("llama"), ROWS, PAD)
    assert choice.differences["mask"] < 1e-5


@pytest.mark.parametrize("name", ["llama", "phi3, windows", "gpt_neo", "gpt_oss", "mpt"])
def test_in_half_precision_rounding_is_told_from_mistakes(name):
    model = build(name).bfloat16()
    choice = choose_layout(model, ROWS, PAD)
    assert choice.layout == FAMILIES[name].exact[0]


def test_a_head_that_is_not_known_stops_the_choice():
    model = build("llama")

    def scaled(_module, _args, output):
        output.logits = output.logits * 1.5
        return output

    model.register_forward_hook(scaled)
    with pytest.raises(ValueError, match="LlamaForCausalLM does something to its logits"):
        choose_layout(model, ROWS, PAD)


def test_a_body_that_looks_ahead_has_no_exact_layout():
    model = build("llama", is_causal=False)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="'rows' is off by"):
        choose_layout(model, ROWS, PAD)


def test_memory_that_runs_out_is_no_property_of_a_layout(monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(layouts, "_packed", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        choose_layout(cached("llama"), ROWS, PAD)
