"""Log-probabilities by tiles against dense ones: values, gradients, memory, and families' heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from selfmoa.training import logprobs
from selfmoa.training.logprobs import Head, head_of, sum_logps, token_kl, token_logps

# peft reads an attribute that transformers has renamed; neither is ours.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SHAPES = {
    "plain": {},
    "scaled": {"scale": 0.4},
    "capped": {"softcap": 3.0},
    "scaled and capped": {"scale": 2.5, "softcap": 4.0},
}


def dense_logits(hidden, head):
    z = hidden @ head.weight.t()
    z = (z if head.bias is None else z + head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def dense_logps(hidden, targets, head):
    return dense_logits(hidden, head).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def dense_kl(hidden, head, reference_hidden, reference_head):
    p = dense_logits(hidden, head).log_softmax(-1)
    q = dense_logits(reference_hidden, reference_head).log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def make(
    n=9, v=50, h=6, *, dtype=torch.float32, bias=True, trained=True, seed=0, size=2.0, **shape
):
    """Return hidden states, targets and a head whose logits have about this size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    hidden = draw(n, h).to(dtype).requires_grad_()
    weight = (draw(v, h) * size / h**0.5).to(dtype).requires_grad_(trained)
    offset = draw(v).to(dtype).requires_grad_(trained) if bias else None
    targets = torch.randint(v, (n,), generator=generator)
    return hidden, targets, Head(weight, offset, **shape)


def leaves(hidden, head):
    return [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]


def exactly(hidden, head):
    """Return fp64 copies that gather gradients of their own."""

    def copy(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return copy(hidden), replace(head, weight=copy(head.weight), bias=copy(head.bias))


def factors(like, seed=1):
    """Return what a loss may send back: of both signs, and different for every token."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def assert_right(hidden, targets, head, *, atol, gradient_atol=None):
    """Compare values and gradients with dense ones in fp64; gradients relative to the largest."""
    found = token_logps(hidden, targets, head)
    given_back = torch.autograd.grad(found, leaves(hidden, head), factors(found))
    hidden64, head64 = exactly(hidden, head)
    truth = dense_logps(hidden64, targets, head64)
    wanted = torch.autograd.grad(truth, leaves(hidden64, head64), factors(found).double())
    assert_close(found.double(), truth, atol=atol, rtol=0)
    for ours, theirs, leaf in zip(given_back, wanted, leaves(hidden, head), strict=True):
        assert ours.dtype == leaf.dtype
        size = theirs.abs().max().clamp(min=0.1)
        assert_close(ours.double() / size, theirs / size, atol=gradient_atol or atol, rtol=0)


class Watch(TorchDispatchMode):
    """Notes every matrix product, and the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest, self.n_products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.n_products += func.overloadpacket is torch.ops.aten.mm
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


# Values and gradients


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_tiles_give_what_dense_logits_give(monkeypatch, shape, bias, trained):
    monkeypatch.setattr(logprobs, "TILE", 16)
    assert_right(*make(bias=bias, trained=trained, **shape), atol=1e-5)


@given(
    n=st.integers(1, 12),
    v=st.integers(1, 40),
    h=st.integers(1, 9),
    tile=st.integers(1, 48),
    block=st.sampled_from([1, 20, 2**18]),
    keep=st.sampled_from([0, 300, 2**28]),
    bias=st.booleans(),
    shape=st.sampled_from(list(SHAPES.values())),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_shape_or_constant_matters(n, v, h, tile, block, keep, bias, shape, seed):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"TILE": tile, "BLOCK": block, "KEEP_BYTES": keep}.items():
            patch.setattr(logprobs, name, value)
        assert_right(*make(n, v, h, bias=bias, seed=seed, **shape), atol=1e-5, gradient_atol=1e-4)


@pytest.mark.parametrize("keep_bytes", [0, 2**9, 2**28], ids=["none kept", "some", "all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_finite_differences(monkeypatch, shape, keep_bytes):
    monkeypatch.setattr(logprobs, "TILE", 8)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_bytes)
    hidden, targets, head = make(4, 19, 3, dtype=torch.float64, **shape)

    def run(hidden, weight, bias):
        return token_logps(hidden, targets, replace(head, weight=weight, bias=bias))

    assert torch.autograd.gradcheck(run, (hidden, head.weight, head.bias))


def test_a_repeated_target_counts_every_time():
    hidden, targets, head = make()
    assert_right(hidden, torch.full_like(targets, 7), head, atol=1e-5)


def test_a_head_trains_on_frozen_hidden_states():
    hidden, targets, head = make()
    assert_right(hidden.detach(), targets, head, atol=1e-5)


def test_a_bias_may_train_alone():
    hidden, targets, head = make()
    head = replace(head, weight=head.weight.detach())
    assert_right(hidden.detach(), targets, head, atol=1e-5)


def test_huge_logits_stay_finite(monkeypatch):
    monkeypatch.setattr(logprobs, "TILE", 16)
    hidden, targets, head = make(size=3e3)
    found = token_logps(hidden, targets, head)
    assert found.min() < -1e3
    assert_close(found, dense_logps(hidden, targets, head), atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 8), (torch.bfloat16, 8), (torch.bfloat16, 600)]
)
def test_memory_layout_does_not_matter(dtype, width):
    """The attention kernel reads other numbers where rows are not contiguous, and says nothing."""
    hidden, targets, head = make(20, 90, width, dtype=dtype)
    spread = torch.stack([hidden, hidden], dim=2)[:, :, 0]
    turned = replace(head, weight=head.weight.t().contiguous().t())
    assert not spread.is_contiguous()
    assert not turned.weight.is_contiguous()
    found, wanted = token_logps(spread, targets, turned), token_logps(hidden, targets, head)
    assert torch.equal(found, wanted)
    ours = torch.autograd.grad(found, leaves(hidden, head), factors(found))
    assert_close(ours, torch.autograd.grad(wanted, leaves(hidden, head), factors(found)))


def test_the_same_hidden_states_serve_twice():
    hidden, targets, head = make()
    once = torch.autograd.grad(token_logps(hidden, targets, head).sum(), leaves(hidden, head))
    both = token_logps(hidden, targets, head).sum() + token_logps(hidden, targets, head).sum()
    twice = torch.autograd.grad(both, leaves(hidden, head))
    assert_close(twice, tuple(2 * g for g in once))


def test_backward_runs_twice_on_a_retained_graph():
    hidden, targets, head = make()
    total = token_logps(hidden, targets, head).sum()
    first = torch.autograd.grad(total, leaves(hidden, head), retain_graph=True)
    assert_close(torch.autograd.grad(total, leaves(hidden, head)), first)


def test_second_derivatives_are_refused_instead_of_wrong():
    hidden, targets, head = make()
    total = token_logps(hidden, targets, head).square().sum()
    (first,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_give_an_empty_result_with_a_graph(dtype):
    hidden, targets, head = make(0, dtype=dtype)
    found = token_logps(hidden, targets, head)
    assert found.shape == (0,)
    found.sum().backward()
    assert_close(head.weight.grad, torch.zeros_like(head.weight))


def test_targets_that_are_not_one_a_token_are_refused():
    hidden, targets, head = make()
    with pytest.raises(ValueError, match=r"\[8\] targets for \[9, 6\] hidden states"):
        token_logps(hidden, targets[:-1], head)
    with pytest.raises(ValueError, match=r"\[9, 1\] targets"):
        token_logps(hidden, targets[:, None], head)


# Sixteen bits. H = 600 takes separate products, H = 8 the attention kernel.


@pytest.mark.parametrize("width", [8, 600])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_as_good_as_their_rounding(monkeypatch, width, shape, dtype):
    monkeypatch.setattr(logprobs, "TILE", 128)
    hidden, targets, head = make(30, 500, width, dtype=dtype, **shape)
    logits = dense_logits(*exactly(hidden, head))
    targets[::2] = logits.argmax(-1)[::2]  # likely words and others
    rounding = logits.abs().max().item() * torch.finfo(dtype).eps / 2
    assert_right(hidden, targets, head, atol=rounding, gradient_atol=3e-2)


def test_many_small_gradients_of_one_word_add_up_in_sixteen_bits():
    hidden = torch.ones(3000, 8, dtype=torch.bfloat16)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.full((3000,), 2)
    token_logps(hidden, targets, Head(weight, bias)).sum().backward()
    wanted = torch.tensor([-750.0, -750.0, 2250.0, -750.0]).bfloat16()
    assert_close(bias.grad, wanted)
    assert_close(weight.grad, wanted[:, None].expand(4, 8))


def test_attention_rounds_no_logits():
    hidden, targets, head = make(30, 500, 64, dtype=torch.bfloat16, trained=False, size=6.0)
    found = token_logps(hidden, targets, head)
    hidden64, head64 = exactly(hidden, head)
    truth = dense_logps(hidden64, targets, head64)
    assert_close(found.double(), truth, atol=2e-4, rtol=0)
    rounded = dense_logps(hidden, targets, head)
    assert (rounded.double() - truth).abs().max() > 1e-2


@pytest.mark.parametrize("width", [8, 600])
def test_a_certain_token_is_certain_in_sixteen_bits_too(width):
    """Its logit is 24.07, in bf16 24.125: rounded only in the sum, log p would be 0.05 off."""
    hidden = torch.zeros(2, width, dtype=torch.bfloat16)
    hidden[:, 0] = torch.tensor([4.90625, -4.90625])
    weight = torch.zeros(40, width, dtype=torch.bfloat16)
    weight[3, 0], weight[5, 0] = 4.90625, -4.90625
    found = token_logps(hidden, torch.tensor([3, 5]), Head(weight))
    assert_close(found, torch.zeros(2), atol=1e-3, rtol=0)


@pytest.mark.parametrize("width", [8, 600])
def test_autocast_computes_in_sixteen_bits_and_gives_gradients_in_thirty_two(width):
    hidden, targets, head = make(20, 90, width)
    rounded = replace(head, weight=head.weight.bfloat16(), bias=head.bias)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logps(hidden, targets, head)
        inside = torch.autograd.grad(found, leaves(hidden, head), factors(found), retain_graph=True)
    outside = torch.autograd.grad(found, leaves(hidden, head), factors(found))
    assert_close(found, token_logps(hidden, targets, rounded), atol=1e-6, rtol=0)
    assert found.dtype == torch.float32
    assert {g.dtype for g in outside} == {torch.float32}
    assert_close(inside, outside)


def test_products_are_in_the_heads_dtype():
    hidden, targets, head = make(dtype=torch.bfloat16)
    wide = Head(head.weight.float(), head.bias.float())
    expected = token_logps(hidden.float(), targets, wide)
    assert_close(token_logps(hidden, targets, wide), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_are_at_least_thirty_two_bits(dtype):
    hidden, targets, head = make(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert token_logps(hidden, targets, head).dtype == wide
    assert token_kl(hidden, head, hidden, head).dtype == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 600])
def test_values_are_the_same_without_gradients(dtype, width):
    """So that a policy that starts as its reference is at distance 0, not at rounding errors."""
    hidden, targets, head = make(20, 300, width, dtype=dtype)
    with_gradients = token_logps(hidden, targets, replace(head, weight=head.weight.detach()))
    with torch.no_grad():
        without = token_logps(hidden, targets, head)
    assert not without.requires_grad
    assert torch.equal(with_gradients, without)


# Memory and work


def watched(hidden, targets, head, function=token_logps):
    """Return what forward and backward did, and the size of all that forward saved."""
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks, Watch() as forward:
        found = function(hidden, targets, head)
    with Watch() as backward:
        torch.autograd.grad(found.sum(), leaves(hidden, head))
    known = {t.data_ptr() for t in (hidden, head.weight, head.bias) if t is not None}
    return forward, backward, sum(t.nbytes for t in saved if t.data_ptr() not in known)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 8), (torch.bfloat16, 600)])
def test_a_frozen_head_costs_two_products_and_no_logits(monkeypatch, dtype, width):
    n, v, tile = 64, 4000, 256
    monkeypatch.setattr(logprobs, "TILE", tile)
    case = make(n, v, width, dtype=dtype, bias=False, trained=False)
    forward, backward, saved = watched(*case)
    assert forward.n_products == 2 * -(-v // tile)
    assert backward.n_products == 0
    assert max(forward.largest, backward.largest) <= max(n * tile, v * width)
    assert saved < 3 * n * (width + 3) * 4


@pytest.mark.parametrize(("keep_tiles", "products"), [(0, 2), (16, 1)])
def test_a_trained_head_costs_one_product_more_for_tiles_that_were_not_kept(
    monkeypatch, keep_tiles, products
):
    n, v, tile = 64, 4096, 256
    monkeypatch.setattr(logprobs, "TILE", tile)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_tiles * n * tile * 4)
    forward, backward, saved = watched(*make(n, v, 8, bias=False))
    assert forward.n_products == 2 * 16
    assert backward.n_products == products * 16
    assert max(forward.largest, backward.largest) <= max(n * tile, v * 8)
    assert saved <= keep_tiles * n * tile * 4 + 20_000


def test_the_attention_kernel_never_makes_logits():
    n, v = 64, 9000
    forward, backward, saved = watched(
        *make(n, v, 16, dtype=torch.bfloat16, bias=False, trained=False)
    )
    assert forward.n_products == backward.n_products == 0
    assert max(forward.largest, backward.largest) <= v * 16
    assert saved < 3 * n * 16 * 4


def test_without_gradients_one_product_is_enough_and_nothing_is_kept():
    hidden, targets, head = make(64, 9000, 8)
    with torch.no_grad(), Watch() as watch:
        token_logps(hidden, targets, head)
    assert watch.n_products == 3
    with torch.no_grad(), Watch() as watch:
        token_logps(hidden.detach(), targets, Head(head.weight.detach()))
    assert watch.n_products == 3


def test_the_divergence_never_makes_logits(monkeypatch):
    monkeypatch.setattr(logprobs, "TILE", 256)

    def run(hidden, targets, head):
        return token_kl(hidden, head, hidden.detach() + 1, head)

    forward, backward, saved = watched(*make(64, 4000, 8), run)
    assert max(forward.largest, backward.largest) <= 4000 * 8
    assert saved < 6 * 64 * 10 * 4


# Divergence


def assert_kl_right(hidden, head, q_hidden, q_head, *, atol):
    found = token_kl(hidden, head, q_hidden, q_head)
    ours = torch.autograd.grad(found, leaves(hidden, head), factors(found))
    (hidden64, head64), (q64, q_head64) = exactly(hidden, head), exactly(q_hidden, q_head)
    truth = dense_kl(hidden64, head64, q64, q_head64)
    wanted = torch.autograd.grad(truth, leaves(hidden64, head64), factors(found).double())
    assert_close(found.double(), truth, atol=atol, rtol=1e-5)
    for one, other in zip(ours, wanted, strict=True):
        assert_close(one.double(), other, atol=atol * 10, rtol=1e-4)


@given(
    n=st.integers(1, 9),
    v=st.integers(1, 30),
    tile=st.integers(1, 40),
    block=st.sampled_from([1, 2**18]),
    shape=st.sampled_from(list(SHAPES.values())),
    q_shape=st.sampled_from(list(SHAPES.values())),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_the_divergence_is_the_dense_one(n, v, tile, block, shape, q_shape, bias, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "TILE", tile)
        patch.setattr(logprobs, "BLOCK", block)
        hidden, _, head = make(n, v, 5, bias=bias, seed=seed, **shape)
        q_hidden, _, q_head = make(n, v, 7, bias=not bias, seed=seed + 1, **q_shape)
        assert_kl_right(hidden, head, q_hidden, q_head, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_divergences_gradients_are_finite_differences(monkeypatch, shape):
    monkeypatch.setattr(logprobs, "TILE", 8)
    hidden, _, head = make(4, 19, 3, dtype=torch.float64, **shape)
    q_hidden, _, q_head = make(4, 19, 3, dtype=torch.float64, seed=5)

    def run(hidden, weight, bias):
        return token_kl(hidden, replace(head, weight=weight, bias=bias), q_hidden, q_head)

    assert torch.autograd.gradcheck(run, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_is_at_distance_zero_from_itself_with_no_pull(dtype):
    hidden, _, head = make(20, 9000, 8, dtype=dtype, softcap=5.0)
    found = token_kl(hidden, head, hidden, head)
    assert torch.equal(found, torch.zeros(20))
    found.sum().backward()
    assert hidden.grad.abs().max() == 0


def test_the_reference_gets_no_gradient():
    hidden, _, head = make()
    q_hidden, _, q_head = make(seed=1)
    token_kl(hidden, head, q_hidden, q_head).sum().backward()
    assert hidden.grad is not None
    assert q_hidden.grad is q_head.weight.grad is q_head.bias.grad is None


@pytest.mark.parametrize("width", [8, 600])
def test_the_divergence_in_sixteen_bits_is_as_good_as_its_rounding(width):
    hidden, _, head = make(20, 500, width, dtype=torch.bfloat16)
    q_hidden = hidden.detach() + 0.1 * factors(hidden)
    found = token_kl(hidden, head, q_hidden, head)
    (hidden64, head64), (q64, q_head64) = exactly(hidden, head), exactly(q_hidden, head)
    assert_close(found.double(), dense_kl(hidden64, head64, q64, q_head64), atol=4e-3, rtol=2e-2)
    assert found.min() > 0


def test_the_divergence_under_autocast_is_that_of_rounded_weights():
    hidden, _, head = make(20, 90, 8, bias=False)
    q_hidden, _, q_head = make(20, 90, 8, bias=False, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_kl(hidden, head, q_hidden, q_head)
    rounded = (hidden.bfloat16(), Head(head.weight.bfloat16()))
    fixed = (q_hidden.bfloat16(), Head(q_head.weight.bfloat16()))
    assert_close(found, token_kl(*rounded, *fixed), atol=1e-6, rtol=0)
    found.sum().backward()
    assert head.weight.grad.dtype == torch.float32


def test_a_reference_of_another_size_is_refused():
    hidden, _, head = make(9, 50)
    shorter, _, _ = make(8, 50)
    _, _, smaller = make(9, 49)
    with pytest.raises(ValueError, match=r"\(9, 50\) and \(8, 50\)"):
        token_kl(hidden, head, shorter, head)
    with pytest.raises(ValueError, match=r"\(9, 50\) and \(9, 49\)"):
        token_kl(hidden, head, hidden, smaller)


# Sums


def test_sums_go_to_their_owners_and_gradients_come_back():
    logps = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    found = sum_logps(logps, torch.tensor([2, 0, 2, 0]), 4)
    assert found.tolist() == [-10.0, 0.0, -5.0, 0.0]
    found.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert logps.grad.tolist() == [3.0, 1.0, 3.0, 1.0]


# Heads of families

VOCAB, HIDDEN = 96, 32
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": HIDDEN, "n_layer": 1, "n_head": 4}
FAMILIES = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "gpt2": ("gpt2", GPT2),
    "gemma2": ("gemma2", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "gemma3_text": ("gemma3_text", {"head_dim": 8}),
    "gemma3_text, capped": ("gemma3_text", {"head_dim": 8, "final_logit_softcapping": 5.0}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "hyperclovax": ("hyperclovax", {"logits_scaling": 0.25}),
    "minicpm3": ("minicpm3", {"dim_model_base": 8, "num_key_value_heads": 4}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "head_dim": 8}),
    "mpt": ("mpt", {"d_model": HIDDEN, "n_layers": 1, "n_heads": 4, "logit_scale": 0.25}),
    "phi": ("phi", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN}),
    "falcon": ("falcon", {}),
    "bloom": ("bloom", {"n_layer": 1, "n_head": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 5.0}),
}


def replica(kind, **options):
    """Return a random model whose logits are large enough for scales and caps to show."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(COMMON | options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.normal_(std=1.0)
    return model


def assert_head_right(model, atol=1e-5):
    ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        hidden = inner.base_model(input_ids=ids).last_hidden_state
        found = token_logps(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), head_of(model))
    wanted = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).flatten()
    assert wanted.min() < -6  # else a scale of 1 would do as well
    assert_close(found, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize(("kind", "options"), FAMILIES.values(), ids=FAMILIES)
def test_a_familys_head_is_read_from_its_config(kind, options):
    assert_head_right(replica(kind, **options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.5}, (0.5, None)),
        ({"model_type": "recurrent_gemma", "logits_soft_cap": 30.0}, (1.0, 30.0)),
        ({"model_type": "xlstm", "output_logit_soft_cap": 30.0}, (1.0, 30.0)),
        ({"model_type": "muse_spark", "output_multiplier": 0.5}, (0.5, None)),
        ({"model_type": "cohere", "logit_scale": None}, (1.0, None)),
    ],
)
def test_names_of_scales_and_caps_in_families_too_large_to_build(options, expected):
    class Config:
        def get_text_config(self):
            return self

    config = Config()
    vars(config).update(options)
    assert logprobs._shape_of_logits(config) == expected


def adapted(targets="all-linear", **options):
    model = replica("llama", tie_word_embeddings=False)
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(model, lora).eval()


def test_adapters_on_the_body_leave_the_head_alone():
    model = adapted()
    assert_head_right(model)
    assert head_of(model).weight is model.get_base_model().lm_head.weight


def test_an_adapter_on_the_head_is_part_of_it_while_it_is_active():
    model = adapted(["q_proj", "lm_head"], lora_alpha=8)
    assert_head_right(model)
    with model.disable_adapter():
        assert_head_right(model)
        assert torch.equal(head_of(model).weight, model.get_base_model().lm_head.weight)
    model.merge_adapter()
    assert_head_right(model)


def test_an_adapter_on_the_head_gets_the_gradients_of_dense_logits():
    model = adapted(["lm_head"])
    layer = model.get_base_model().lm_head
    hidden, targets, _ = make(9, VOCAB, HIDDEN)
    pair = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    ours = torch.autograd.grad(token_logps(hidden, targets, head_of(model)).sum(), pair)
    logps = layer(hidden).log_softmax(-1).gather(1, targets[:, None])
    assert_close(ours, torch.autograd.grad(logps.sum(), pair), atol=1e-4, rtol=1e-4)


def test_only_the_active_adapter_counts():
    model = adapted(["lm_head"])
    model.add_adapter("other", LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False))
    for name in ("other", "default"):
        model.set_adapter(name)
        assert_head_right(model)


def test_a_saved_copy_of_the_head_takes_its_place():
    model = adapted(["q_proj"], modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    with torch.no_grad():
        wrapper.modules_to_save["default"].weight.mul_(1.5)
    assert_head_right(model)
    assert head_of(model).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert_head_right(model)
        assert head_of(model).weight is wrapper.original_module.weight


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"targets": ["lm_head"], "use_dora": True}, "no plain LoRA"),
        ({"trainable_token_indices": {"lm_head": [3]}}, "single rows"),
    ],
)
def test_an_adapter_that_is_no_addition_to_the_head_is_refused(options, words):
    model = adapted(**options)
    with pytest.raises(ValueError, match=words):
        head_of(model)


def test_a_head_that_is_no_matrix_is_refused():
    model = replica("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match="LlamaForCausalLM is no plain matrix"):
        head_of(model)
    packed = torch.nn.Linear(2, 2)
    packed.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    model.get_output_embeddings = lambda: packed
    with pytest.raises(ValueError, match="is no plain matrix"):
        head_of(model)
