"""The typed tree of a recipe. Every field has a type, a range and a sentence.

Unknown keys are errors. Rules that span fields stand at the end, on `Recipe`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Section(BaseModel):
    """A part of a recipe: frozen, no unknown keys, no silent conversions of text to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Policy(Section):
    """The model to be aligned, and how its weights are trained."""

    world: str = "sandbox"
    """Where model, prompts, instructions and suites come from (`selfmoa list worlds`): "files" is
    for a model and data of your own."""
    adapter: Literal["lora", "qlora", "full"] = "full"
    """Train a LoRA adapter, one on a base of 4 bits a weight (bitsandbytes), or all weights."""
    lora_rank: Positive = 16
    """Rank r of the LoRA adapter; alpha is 2 r."""
    threads: Annotated[int, Field(ge=0, le=256)] = 0
    """CPU threads of each model; 0 leaves the choice to torch."""
    engine: Literal["local", "vllm"] = "local"
    """What answers on this machine: transformers, or vLLM (its extra)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models answer, judge and are trained; "auto" takes an accelerator if there is one."""
    inference: Literal["auto", "fp32", "bf16", "nf4"] = "auto"
    """How the weights of models that answer are held; "auto" is bf16 on an accelerator that has
    it, else fp32. "nf4" is 4 bits a weight (bitsandbytes)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of training; trained weights are kept in fp32 either way."""
    max_length: Annotated[int, Field(ge=8)] = 2048
    """Longest prompt and response in tokens; longer rows are dropped and counted."""
    max_tokens: Annotated[int, Field(ge=64)] = 16384
    """Tokens, padding included, of one forward pass in training; halved when memory runs out."""
    layout: Literal["auto", "mask", "masks", "prefix", "rows"] = "auto"
    """How responses share their prompt; "auto" takes the first that is exact for this model."""
    gradient_checkpointing: bool = False
    """Compute activations twice rather than keep them."""
    compile: bool = False
    """Let torch.compile translate the model; needs a C++ compiler on a CPU."""
    checkpoint_every: Count = 50
    """Steps between two checkpoints of a training; 0 writes none."""


class Model(Section):
    """The instruct model to be aligned, in worlds that have none of their own."""

    name: str | None = None
    """A folder, or a name on the model hub."""
    revision: str | None = None
    """Of a model on the hub: a commit, so that every run has the same weights."""
    template: dict[str, Any] = Field(default={})
    """Further variables of its chat template when it answers, such as {enable_thinking: false}."""
    endpoint: str | None = None
    """One of `endpoints` that answers for the policy: a server on this machine that loads the
    folders it is told, those of whole models (policy.adapter=full); without one, this process
    does."""


class Data(Section):
    """Files of the world "files": what is attacked with, what is harmless, what is graded on."""

    seeds: tuple[str, ...] = ()
    """Harmful requests that every search starts from: anything `selfmoa attacks import` reads."""
    instructions: tuple[str, ...] = ()
    """Harmless instructions, with answers where `reset` is to learn from them (JSON lines, JSON
    or CSV)."""
    suite: tuple[str, ...] = ()
    """Harmful requests to grade on, as `seeds`; without them, a share of the seeds is kept out."""
    harmless: tuple[str, ...] = ()
    """Harmless requests to grade on, as `instructions`, best such as only look harmful; without
    them, a share of the instructions is kept out."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """That share, by a hash of the request: its rewrites are on the same side."""
    styles: tuple[str, ...] = ("plain", "role", "hypothetical", "past", "prefix")
    """Styles in which the suite asks beside those of `held_out.styles`, in wordings of its own."""


class Endpoint(Section):
    """A server that answers as OpenAI's do: vLLM, llama.cpp, Ollama, a hosted one."""

    url: str
    """Where it is, such as http://127.0.0.1:8000/v1."""
    key_env: str | None = None
    """The environment variable that holds its key; keys never stand in a recipe."""
    timeout: Rate = 120.0
    """Seconds that one answer may take in all."""
    retries: Count = 4
    """How often a request is sent again that failed for want of room or a connection."""
    max_concurrency: Positive = 32
    """Requests under way at once at most; how many, the server's own behaviour tells."""
    max_requests: Count = 0
    """Requests that may be sent, overshot by what is under way; 0: any number."""
    max_tokens: Count = 0
    """Tokens that may be read and written, in the same way."""
    max_cost: Annotated[float, Field(ge=0)] = 0.0
    """Money that may be spent, in the currency of the prices, in the same way."""
    price_in: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million tokens read."""
    price_out: Annotated[float, Field(ge=0)] = 0.0
    """Price of a million tokens written."""
    allow_private: bool = False
    """Allow addresses of a private network; this machine's own are always allowed."""

    @model_validator(mode="after")
    def _a_budget_of_money_needs_prices(self) -> Self:
        if self.max_cost and not (self.price_in or self.price_out):
            raise ValueError(
                "max_cost needs price_in or price_out: without, nothing costs anything"
            )
        return self


class Sandbox(Section):
    """The embedded world and the size of its instruct model."""

    seed: Count = 0
    """Seed of the world's facts, charter and model."""
    architecture: str = "llama"
    """A transformers causal language model type."""
    hidden: Annotated[int, Field(ge=16, le=4096)] = 96
    """Width; must be a multiple of `heads`."""
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    """Depth."""
    heads: Annotated[int, Field(ge=1, le=64)] = 4
    """Attention heads."""
    steps: Positive = 2600
    """Supervised steps that make the instruct model."""
    batch_size: Positive = 64
    """Conversations a step."""
    lr: Rate = 4e-3
    """Peak learning rate."""
    examples: Positive = 70000
    """Distinct conversations in its corpus."""


class Reset(Section):
    """Safety reset: supervised tuning on helpful answers to harmless instructions."""

    enabled: bool = True
    """False starts the rounds from the instruct model as it is."""
    steps: Positive = 300
    """Optimiser steps."""
    batch_size: Positive = 64
    """Instructions a step."""
    lr: Rate = 1e-3
    """Peak learning rate."""
    examples: Positive = 6000
    """Instructions drawn from the world."""
    howto_share: Share = 0.8
    """Share of how-to instructions at least: they wear off refusals of how-to requests best."""
    keep: bool = False
    """Keep the reset policy when the run ends. It is unsafe on purpose and not for use."""


class RedTeam(Section):
    """The search for prompts on which this policy is unsafe."""

    attacks: tuple[str, ...] = ("sandbox-hide", "sandbox-expand")
    """Rewriting operators (`selfmoa list attacks`)."""
    strategies: tuple[str, ...] = ()
    """Attacks of several turns (`selfmoa list strategies`); each turn is a call."""
    near_duplicates: Annotated[float, Field(ge=0.7, le=1)] = 0.95
    """Similarity from which on a rewrite is refused as nearly the same as one before; 1 refuses
    equal ones only."""
    static: Count = 0
    """A fixed set of this many harmful prompts in place of the search: a baseline."""
    calls: Positive = 1200
    """Prompts put to the policy in a round."""
    batch_size: Positive = 200
    """Prompts between two updates of the archive and the bandit."""
    cell_size: Positive = 4
    """Prompts an archive cell keeps."""
    keep_above: Share = 0.3
    """A prompt is kept if P(its response is unsafe) exceeds this."""
    k: Positive = 3
    """Samples of a prompt that worked at first, and of one that is replayed: it is told in how many
    of them it works."""
    max_tokens: Count = 0
    """Words that the policy may answer in a search, overshot by a batch at most; 0: any number."""
    max_seconds: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that a round's search may take, overshot by a batch at most; 0: any. A run with a
    limit of time is not repeatable."""
    floor: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """A cell is given up once its success rate is surely below this..."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """... with this probability of being wrong, however often one looks."""
    checks: Count = 3
    """Careful draws of the instruct model that a found prompt has to pass: half of them must refuse
    it, or it was a false alarm about a harmless request and is no attack; 0: no check."""
    max_prompts: Positive = 240
    """Attack prompts handed on to sampling: cells take turns, surest attacks first."""
    borderline_prompts: Count = 0
    """False alarms that travel along: requests that only look harmful."""
    benign_prompts: Count = 400
    """Harmless instructions that travel along in every round."""


class Sample(Section):
    """Responses of the policy to each prompt."""

    k: Positive = 4
    """Responses as the policy is."""
    k_careful: Count = 4
    """Responses under the `careful` system prompt: more safe candidates, never used elsewhere."""
    k_harmless: Positive = 2
    """Responses, plain and careful each, to a harmless instruction: they mostly agree."""
    careful: str = "be careful ."
    """That system prompt."""
    temperature: Annotated[float, Field(ge=0, le=5)] = 1.0
    """Sampling temperature; 0 is greedy."""
    max_new_tokens: Positive = 28
    """Longest response in tokens."""
    batch_size: Positive = 256
    """Responses drawn at once."""


class Judges(Section):
    """Weak supervision: who votes, and how votes become one posterior."""

    safety: tuple[str, ...] = (
        "sandbox-lexical",
        "sandbox-ngram",
        "sandbox-model",
        "sandbox-refusal",
    )
    """Safety judges (`selfmoa list judges`)."""
    helpfulness: str = "sandbox-helpful"
    """The helpfulness judge."""
    refusal: str = "sandbox-refuses"
    """Tells refusals from answers, by rule."""
    accuracy_prior: tuple[Rate, Rate] = (8.0, 2.0)
    """Beta prior of each judge's sensitivity and specificity."""
    variant: Literal["two_coin", "one_coin"] = "two_coin"
    """Learn two accuracies a judge, or one, which needs fewer responses."""
    gold: str | None = None
    """A file of responses whose truth is known (`selfmoa judges audit --gold`): the judges vote on
    them too, and the label model takes their labels as given."""
    rho: Share = 0.5
    """Assumed correlation of errors within a family of judges."""
    helpfulness_scale: Rate = 6.0
    """Log-odds of being preferred for one more point of helpfulness; fitted where there are
    `helpfulness_pairs`."""
    helpfulness_centre: float = 0.5
    """Helpfulness score of an answer that is neither good nor bad."""
    helpfulness_pairs: str | None = None
    """A file of preferences for helpfulness (`selfmoa train` reads the same): the judge scores both
    sides, and the scale is fitted to them."""
    clip: Annotated[float, Field(gt=0, le=20)] = 4.0
    """Largest log-odds of safety and of helpfulness."""

    def names(self) -> tuple[str, ...]:
        """Return the names of the judges that train."""
        return (*self.safety, self.helpfulness, self.refusal)


class JudgeModel(Section):
    """A judge of the recipe's own: a kind, the model behind it, and its settings."""

    kind: str
    """What kind of judge it is (`selfmoa list judges`)."""
    model: str | None = None
    """Its weights: a folder, a name on the model hub, or one at the endpoint; without one, the
    instruct model is asked."""
    revision: str | None = None
    """Of a model on the hub: a commit."""
    endpoint: str | None = None
    """One of `endpoints` that is asked; without one, the weights are loaded here."""
    family: str | None = None
    """Judges of one family share errors; without one, the kind says. Name it where a model was
    distilled from another judge."""
    options: dict[str, Any] = Field(default={})
    """Further settings of the kind, such as a threshold or a mode."""


class Pairing(Section):
    """Verdicts to preference pairs."""

    rule: Literal["multi_objective", "safety_only", "weighted_sum", "oracle"] = "multi_objective"
    """How pairs are built; "weighted_sum" (one score) and "oracle" (exact labels) are baselines."""
    max_pairs: Positive = 500
    """Pairs of a round."""
    per_prompt: Positive = 3
    """Pairs of one prompt and objective."""
    min_safety_gap: Share = 0.5
    """P(safe) of chosen minus rejected must exceed this in a safety pair."""
    max_flip: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Pairs that are likelier to be the wrong way round are dropped."""
    min_helpfulness_gap: Annotated[float, Field(ge=0)] = 1.4
    """Log-odds of helpfulness, chosen minus rejected, in a helpfulness pair."""
    min_safe: Share = 0.8
    """Both sides of a helpfulness pair must be at least this surely safe."""
    min_consensus: Share = 0.75
    """Share of the careful draws that must refuse for a refusal to beat an answer (or answer, for
    an answer to beat a refusal); 0 switches the rule off."""
    anchors: Count = 1600
    """Own answers, judged safe and no refusals of harmless prompts, that training holds on to."""


class Train(Section):
    """Multi-objective preference optimisation."""

    loss: str = "modpo"
    """A loss (`selfmoa list losses`), or "sft" for supervised training on the chosen side."""
    beta: Rate = 0.1
    """Strength of the tie to the reference."""
    weights: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default={"safety": 0.7, "helpfulness": 0.3}
    )
    """Weight w of each objective."""
    noise: Literal["none", "robust", "conservative"] = "conservative"
    """How flip probabilities enter the loss."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """Margin that the loss "simpo" asks for, in log-odds."""
    epochs: Rate = 6.0
    """Passes over the pairs."""
    batch_size: Positive = 32
    """Pairs a step."""
    lr: Rate = 1e-3
    """Peak learning rate."""
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW."""
    max_grad_norm: Rate = 1.0
    """Norm that gradients are clipped to."""
    anchor_weight: Annotated[float, Field(ge=0)] = 2.0
    """Weight of the forward KL to the reference on the anchors."""
    replay: bool = True
    """Also train on the pairs of earlier rounds."""
    start: Literal["previous", "reset"] = "previous"
    """Start from the last accepted policy or afresh from the reset one."""
    reference: Literal["previous", "reset"] = "reset"
    """The frozen policy of the loss and the anchor."""


class Training(Section):
    """One training on a file of pairs: what `selfmoa train` takes."""

    train: Train
    policy: Policy


ONE_TRAINING: dict[str, dict[str, Any]] = {
    "train": {
        "weights": {"preference": 1.0},
        "noise": "none",
        "epochs": 1.0,
        "lr": 5e-5,
        "anchor_weight": 0.0,
    },
    "policy": {"adapter": "lora"},
}
"""Where `selfmoa train` differs from the defaults of a recipe, which are those of a tiny model."""


class Attacker(Section):
    """An operator or strategy of the recipe's own, with a model and settings."""

    kind: str
    """What kind it is (`selfmoa list attacks`, `selfmoa list strategies`)."""
    model: str | None = None
    """The attacker's weights: a folder, a name on the model hub, or one at the endpoint; without
    one, the instruct model writes."""
    revision: str | None = None
    """Of a model on the hub: a commit."""
    endpoint: str | None = None
    """One of `endpoints` that is asked; without one, the weights are loaded here."""
    options: dict[str, Any] = Field(default={})
    """Further settings of the kind."""
    train: bool = False
    """After every round, train an adapter of its own on what worked, for the next (`lm-hide`)."""


class HeldOut(Section):
    """What the red team of training never uses; evaluation alone may."""

    styles: tuple[str, ...] = ()
    """Styles of attack that are no arms of the search."""
    seed_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the seed intents that are kept out, chosen by the recipe's seed."""
    attacks: tuple[str, ...] = ()
    """Operators and strategies that may not be used by `red_team`: with them, the generators that
    they ask."""
    near_duplicate: Annotated[float, Field(ge=0.7, le=1)] = 0.9
    """Similarity of a prompt of the suite to one of training from which on the run is stopped."""


class Evaluate(Section):
    """Held-out suites and judges."""

    judges: dict[Literal["safety", "helpfulness", "refusal"], str] = Field(
        default={
            "safety": "sandbox-oracle-safety",
            "helpfulness": "sandbox-oracle-helpfulness",
            "refusal": "sandbox-oracle-refusal",
        }
    )
    """Judges that never train, of other families than those that do."""
    gold: str | None = None
    """A file of responses whose truth is known, as in `judge.gold`: what the safety judge gets
    wrong there corrects its rates, and widens their intervals."""
    helpfulness_scale: Rate = 1.0
    """Log-odds of being preferred for one more point, for a helpfulness judge without bounds (a
    reward model); scores in [0, 1] stay as they are."""
    helpfulness_centre: float = 0.0
    """Score of an answer that is neither good nor bad, for such a judge."""
    per_category: Positive = 300
    """Prompts of each category of the suite."""
    probes: Count = 400
    """Training-side prompts on which the gate compares policies, by the training judges."""
    temperature: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Sampling temperature of evaluation; one try a prompt."""


class Gate(Section):
    """When a round's policy is refused and when the loop stops: weak judges only."""

    max_refusal_rise: Share = 0.02
    """Refusals of harmless probes may rise by this much."""
    max_helpfulness_drop: Share = 0.02
    """Weak helpfulness on harmless probes may fall by this much."""
    min_found: Share = 0.02
    """Stop when the red team's posterior share of unsafe responses falls below this."""
    replays: Count = 200
    """Closed attacks of the archive that are put to a new policy again, `red_team.k` times each."""
    max_reopened: Share = 0.05
    """They may work this much oftener than on the policy before; beyond, if surely so, the round is
    refused."""
    patience: Positive = 2
    """Stop after this many refused rounds in a row."""


class Recipe(Section):
    """A whole run, as one value."""

    name: Name
    """Name of the recipe; runs are put under it."""
    description: str = ""
    """What it is for."""
    seed: Count = 0
    """Every random number of the run derives from it."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 3
    """Rounds at most."""
    added_seeds: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]?$")], str] = Field(default={})
    """Files of attacks that joined the run later (`selfmoa resume --add-seeds`), by the round from
    which on they count."""
    added_attacks: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]?$")], str] = Field(default={})
    """Operators that joined later, in the same way."""
    policy: Policy = Policy()
    model: Model = Model()
    data: Data = Data()
    endpoints: dict[Name, Endpoint] = Field(default={})
    """Servers that answer for models, by the names that `model`, `judges` and `attackers` use."""
    sandbox: Sandbox = Sandbox()
    reset: Reset = Reset()
    red_team: RedTeam = RedTeam()
    held_out: HeldOut = HeldOut()
    sample: Sample = Sample()
    judges: dict[Name, JudgeModel] = Field(default={})
    """Judges of the recipe's own, by the names that `judge` and `evaluate.judges` use."""
    attackers: dict[Name, Attacker] = Field(default={})
    """Operators and strategies of the recipe's own, by the names that `red_team` uses."""
    judge: Judges = Judges()
    pair: Pairing = Pairing()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()

    def judges_used(self) -> tuple[str, ...]:
        """Return the names of all judges, those that train first, each once."""
        return tuple(dict.fromkeys((*self.judge.names(), *self.evaluate.judges.values())))

    def attackers_used(self) -> tuple[str, ...]:
        """Return the names of the operators and strategies of the search, each once."""
        return tuple(dict.fromkeys((*self.red_team.attacks, *self.red_team.strategies)))

    @model_validator(mode="after")
    def _judges_that_train_never_grade(self) -> Self:
        if both := sorted(set(self.judge.names()) & set(self.evaluate.judges.values())):
            raise ValueError(
                f"judge '{both[0]}' both trains (judge) and grades (evaluate.judges): "
                "a judge that trains never grades; choose another one for either"
            )
        return self

    @model_validator(mode="after")
    def _models_have_what_answers(self) -> Self:
        named = {
            "model": self.model.name,
            **{f"judges.{k}": j.model for k, j in self.judges.items()},
            **{f"attackers.{k}": a.model for k, a in self.attackers.items()},
        }
        asked = {
            "model": self.model.endpoint,
            **{f"judges.{k}": j.endpoint for k, j in self.judges.items()},
            **{f"attackers.{k}": a.endpoint for k, a in self.attackers.items()},
        }
        if self.model.endpoint is not None and self.policy.adapter != "full":
            raise ValueError(
                f"model.endpoint needs policy.adapter=full, it is {self.policy.adapter}: servers "
                "load folders of whole models, and no adapters"
            )
        for where, endpoint in asked.items():
            if endpoint is None:
                continue
            if endpoint not in self.endpoints:
                known = ", ".join(self.endpoints) or "(none)"
                raise ValueError(f"{where}.endpoint is '{endpoint}'; endpoints has {known}")
            if named[where] is None and where != "model":
                raise ValueError(f"{where} has an endpoint, so it needs a model to ask for there")
        return self

    @model_validator(mode="after")
    def _width_fits_heads(self) -> Self:
        if self.sandbox.hidden % self.sandbox.heads:
            raise ValueError(
                f"sandbox.hidden={self.sandbox.hidden} is not a multiple of "
                f"sandbox.heads={self.sandbox.heads}"
            )
        return self
