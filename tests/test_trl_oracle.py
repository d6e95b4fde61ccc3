# ruff: noqa: S106  (names of special tokens are no passwords)
"""Our losses against another implementation: TRL's `DPOTrainer`, loss and every gradient.

The trainer tokenises, collates and scores a batch its own way; the test takes the token ids from
that batch, computes log-probabilities from dense logits (or, at the end, through our shared
prompts and the head fused with the log-probability) and compares what our losses make of them.
Both sides start from equal weights and differ from their reference, so that no term is zero.

IPO needs one translation. Ours is a difference of *sums* over tokens (the paper's equation 17);
TRL divides each log-ratio by the length of its completion first. So equality is shown twice: our
loss on log-probabilities that are averaged over tokens, and, for completions of one length n, our
loss on sums with beta / n, which is n^2 times TRL's because its squared distance is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from selfmoa.training import layouts, logprobs
from selfmoa.training.losses import LossSettings, PairLogps, dpo, ipo, robust
from selfmoa.training.tokens import Row

# TRL sets a training argument by the name transformers has just deprecated; neither is ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing. is deprecated:FutureWarning"
)

BETA, FLIP = 0.3, 0.1
WORDS = (
    "the a cat dog bird fish sees hears likes fears red blue green old new here there now".split()
)
PAIRS = [
    {"prompt": "the cat sees", "chosen": " a red bird here", "rejected": " the old dog"},
    {"prompt": "a dog", "chosen": " fears fish", "rejected": " likes the blue bird there now"},
    {"prompt": "the green fish hears the", "chosen": " new cat now", "rejected": " dog"},
]
EVEN_PAIRS = [
    {"prompt": "the cat", "chosen": " sees a bird", "rejected": " fears the dog"},
    {"prompt": "a blue dog here", "chosen": " hears fish now", "rejected": " likes old fish"},
]


@dataclass(frozen=True)
class Answer:
    """What TRL says of one batch: its loss, its gradients by name, the batch itself."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    batch: dict[str, torch.Tensor]


def build_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """A random llama whose logits are far from flat, so that two seeds differ by several nats."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


POLICY, REFERENCE = build_model(0), build_model(1)


def ask_trl(folder: Any, pairs: list[dict[str, str]], loss: str) -> Answer:
    settings = DPOConfig(
        output_dir=str(folder),
        loss_type=[loss],
        beta=BETA,
        label_smoothing=FLIP,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        copy.deepcopy(POLICY),
        ref_model=copy.deepcopy(REFERENCE),
        args=settings,
        train_dataset=Dataset.from_list(pairs),
        processing_class=build_tokenizer(),
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    value = trainer.compute_loss(trainer.model, batch)
    value.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    return Answer(value.detach(), gradients, batch)


@pytest.fixture(scope="module")
def trl(tmp_path_factory):
    """TRL's answers by (loss, whether all completions have one length)."""
    folder = tmp_path_factory.mktemp("trl")
    asked = [("sigmoid", PAIRS), ("robust", PAIRS), ("ipo", PAIRS), ("ipo", EVEN_PAIRS)]
    return {(loss, pairs is EVEN_PAIRS): ask_trl(folder, pairs, loss) for loss, pairs in asked}


def dense_logps(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return log p of each completion [2B], summed over its tokens, from all the logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (logps * batch["completion_mask"][:, 1:]).sum(-1)


def rows_of(batch: dict[str, torch.Tensor]) -> list[Row]:
    """Return the pairs of TRL's batch (all chosen, then all rejected) as rows of shared prompts."""
    ids, seen, trained = (batch[k] for k in ("input_ids", "attention_mask", "completion_mask"))
    completions = [ids[i][trained[i].bool()].tolist() for i in range(len(ids))]
    prompts = [ids[i][(seen[i] - trained[i]).bool()].tolist() for i in range(len(ids))]
    n = len(ids) // 2
    assert prompts[:n] == prompts[n:]
    return [Row(prompts[i], [completions[i], completions[n + i]]) for i in range(n)]


def fused_logps(model: Any, batch: dict[str, torch.Tensor], layout: str) -> torch.Tensor:
    """Return what `dense_logps` returns, each prompt read once and the logits never held."""
    hidden, packed = layouts.hidden_states(model, rows_of(batch), layout, pad_id=0)
    logps = logprobs.token_logps(hidden, packed.targets, logprobs.head_of(model))
    summed = logprobs.sum_logps(logps, packed.owners, packed.n_completions)
    return summed.reshape(-1, 2).T.reshape(-1)  # (chosen, rejected) pair by pair -> TRL's order


def lengths_of(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the number of tokens of each completion, [2B]."""
    return batch["completion_mask"].sum(-1)


def pair_logps(policy: torch.Tensor, reference: torch.Tensor) -> PairLogps:
    """Split [2B] (all chosen, then all rejected) into the record our losses read."""
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
    n = len(chosen)
    return PairLogps(
        chosen, rejected, ref_chosen, ref_rejected, torch.zeros(n, 0), torch.full((n,), FLIP)
    )


def assert_same_gradients(loss: torch.Tensor, model: Any, expected: dict[str, torch.Tensor]):
    """Compare d loss / d parameter with TRL's, relative to the largest entry of all of them."""
    loss.backward()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-2  # a batch that asks for no change would prove nothing
    found = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=0, atol=1e-5 * max(scale, 1), msg=name)


def scored(batch: dict[str, torch.Tensor], score: Any, *args: str) -> tuple[Any, torch.Tensor, Any]:
    """Return (policy, its log-probs with a graph, the reference's log-probs)."""
    policy = copy.deepcopy(POLICY)
    with torch.no_grad():
        reference = score(REFERENCE, batch, *args)
    return policy, score(policy, batch, *args), reference


OURS = {"sigmoid": dpo, "robust": robust, "ipo": ipo}


@pytest.mark.parametrize("name", ["sigmoid", "robust"])
def test_dpo_and_its_robust_form_are_trls(trl, name):
    answer = trl[name, False]
    policy, logps, reference = scored(answer.batch, dense_logps)
    loss = OURS[name](pair_logps(logps, reference), LossSettings(BETA)).mean()
    assert_close(loss.detach(), answer.loss, rtol=0, atol=1e-5)
    assert_same_gradients(loss, policy, answer.gradients)


def test_ipo_on_averages_over_tokens_is_trls(trl):
    answer = trl["ipo", False]
    lengths = lengths_of(answer.batch)
    assert len(set(lengths.tolist())) > 2
    policy, logps, reference = scored(answer.batch, dense_logps)
    loss = ipo(pair_logps(logps / lengths, reference / lengths), LossSettings(BETA)).mean()
    assert_close(loss.detach(), answer.loss, rtol=0, atol=1e-5)
    assert_same_gradients(loss, policy, answer.gradients)


def test_ipo_on_sums_is_trls_with_beta_over_the_common_length(trl):
    answer = trl["ipo", True]
    (n,) = set(lengths_of(answer.batch).tolist())
    policy, logps, reference = scored(answer.batch, dense_logps)
    loss = ipo(pair_logps(logps, reference), LossSettings(BETA / n)).mean() / n**2
    assert_close(loss.detach(), answer.loss, rtol=0, atol=1e-5)
    assert_same_gradients(loss, policy, answer.gradients)


@pytest.mark.parametrize("layout", ["mask", "prefix", "rows"])  # "masks" is for mixed windows
def test_shared_prompts_and_the_fused_head_give_trls_loss_and_gradients(trl, layout):
    answer = trl["sigmoid", False]
    policy, logps, reference = scored(answer.batch, fused_logps, layout)
    loss = dpo(pair_logps(logps, reference), LossSettings(BETA)).mean()
    assert_close(loss.detach(), answer.loss, rtol=0, atol=1e-5)
    assert_same_gradients(loss, policy, answer.gradients)


@pytest.mark.parametrize("name", ["robust", "ipo"])
def test_the_fused_path_serves_the_other_losses_too(trl, name):
    answer = trl[name, False]
    policy, logps, reference = scored(answer.batch, fused_logps, "mask")
    by = lengths_of(answer.batch) if name == "ipo" else 1
    loss = OURS[name](pair_logps(logps / by, reference / by), LossSettings(BETA)).mean()
    assert_close(loss.detach(), answer.loss, rtol=0, atol=1e-5)
    assert_same_gradients(loss, policy, answer.gradients)
