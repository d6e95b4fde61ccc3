"""From folders to folders: load a policy, train it, save it. What stages and commands call.

    from selfmoa.training.fitting import train

    done = train("pairs.jsonl", "Qwen/Qwen2.5-0.5B-Instruct", "adapter", loss="dpo", beta=0.1)
    print(done.log[-1]["accuracy"], done.dropped)

Beside the policy's files stand `selfmoa.json` (what it was made of) and, while training lasts, the
hidden folder `.training` with checkpoints and the reference's log-probabilities.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from selfmoa import registry
from selfmoa.config import ONE_TRAINING, Policy, Train
from selfmoa.errors import CannotWrite, OutputTaken, TrainingStopped
from selfmoa.records import content_id
from selfmoa.rundir.files import digest_tree, write_atomic, write_jsonl
from selfmoa.rundir.stage import flatten, pretty_json
from selfmoa.training.checkpoints import Checkpoints
from selfmoa.training.layouts import LAYOUTS, Choice, choose_layout
from selfmoa.training.losses import LossSettings
from selfmoa.training.memory import keep_freed_memory
from selfmoa.training.policy import (
    base_name,
    base_of,
    find_model,
    is_adapter,
    load_model,
    load_tokenizer,
    longest_row,
    make_trainable,
    merged,
    quarantine,
    save_policy,
)
from selfmoa.training.preference import (
    Group,
    Objective,
    Preferences,
    check_losses,
    drop_long,
    group_pairs,
)
from selfmoa.training.preferences import Preference, read_preferences
from selfmoa.training.processes import join
from selfmoa.training.reference import (
    REFERENCE_ADAPTER,
    Frozen,
    Scoring,
    adapter_off,
    check_start,
    other_model,
    reference_adapter,
    reference_logps,
)
from selfmoa.training.tasks import ALONE, Anchors, Supervised
from selfmoa.training.tokens import Row, encode
from selfmoa.training.trainer import LogRow, Optimisation, Task, fit, steps_of

if TYPE_CHECKING:
    from selfmoa.config import Reset
    from selfmoa.records import Message, Prompt

    Progress = Callable[[int, int, str], None]
    Say = Callable[[str], None]

SCRATCH = ".training"
SFT = "sft"
"""The one name in place of a loss: no pairs, the chosen sides are learnt."""
RECEIPT, LOG = "selfmoa.json", "train.jsonl"
VERSION = 2
"""Of what this module computes: checkpoints of another version are not gone on with."""


@dataclass
class Trained:
    """What came of a training: a row a step, rows that were dropped by reason, the layout."""

    log: list[LogRow]
    dropped: dict[str, int] = field(default_factory=dict)
    layout: str = ALONE


def train(
    pairs: str | Path,
    model: str,
    out: str | Path,
    *,
    revision: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    say: Say | None = None,
    **settings: Any,
) -> Trained:
    """Train a policy on a preference file; write it, `train.jsonl` and `selfmoa.json` to `out`.

    Args:
        pairs: a file in any of TRL's preference formats (`preferences`).
        model: a folder, or a name on the model hub.
        out: the folder of the adapter (or of the whole model).
        revision: of a model on the hub.
        seed: of everything random.
        progress: called as progress(done, total, "step").
        say: called with remarks.
        settings: fields of `selfmoa.config.Train` and `Policy`, by name, on top of
            `ONE_TRAINING`: a LoRA adapter and one objective unless they say otherwise.

    Raises:
        BadInput: a row of the file is unusable; found before the model is loaded.
        TrainingStopped: see `trainer.fit` and `reference.check_start`.
        pydantic.ValidationError: a setting is unknown or out of range.
    """
    given = {k: v for k, v in settings.items() if k in Policy.model_fields}
    policy = Policy(**(ONE_TRAINING["policy"] | given))
    rest = {k: v for k, v in settings.items() if k not in given}
    how = Train(**(ONE_TRAINING["train"] | rest))
    preferences = read_pairs(pairs, how)
    folder, out = find_model(model, revision), Path(out)
    done = fit_policy(
        folder,
        folder,
        out,
        preferences,
        [],
        how,
        policy,
        seed=seed,
        progress=progress,
        say=say,
        name=model,
    )
    if join(policy.device).is_main:
        write_jsonl(out / LOG, done.log)
    return done


def read_pairs(path: str | Path, settings: Train) -> list[Preference]:
    """Return the pairs of a file, if the loss can be computed of every one of them.

    Raises:
        BadInput: it cannot; names row and field.
    """
    preferences = read_preferences(path, settings.weights)
    if settings.loss != SFT:
        check_losses(make_objectives(settings), preferences, path)
    return preferences


def _chosen(preferences: Sequence[Preference]) -> list[list[str]]:
    """Return the chosen sides alone: the best-of-k baseline trains on them."""
    return [[p.chosen] for p in preferences]


def fit_reset(
    start: Path,
    out: Path,
    examples: Sequence[tuple[Prompt, str]],
    settings: Reset,
    policy: Policy,
    *,
    seed: int,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Trained:
    """Tune the policy at `start` on (instruction, answer) rows; write it, quarantined, to `out`."""
    work = _Work(start, out, policy, seed, progress, say)
    quarantine(out)  # its checkpoints are as unsafe as what comes of them
    rows = encode(work.tokenizer, [p.messages for p, _ in examples], [[a] for _, a in examples])
    tasks: list[Task] = [work.supervised(rows, settings.batch_size)]
    optimisation = Optimisation(settings.lr, settings.batch_size, settings.steps)
    data = content_id([[p.id, answer] for p, answer in examples])
    facts = {"settings": settings.model_dump(exclude={"keep"}), "data_digest": data}
    log = work.fit(tasks, optimisation, facts)
    work.save(facts, quarantined=True)
    return Trained(log, dict(work.dropped))


def fit_policy(
    start: Path,
    reference: Path,
    out: Path,
    preferences: Sequence[Preference],
    anchors: Sequence[tuple[Sequence[Message], str]],
    settings: Train,
    policy: Policy,
    *,
    seed: int,
    progress: Progress | None = None,
    say: Say | None = None,
    name: str = "",
) -> Trained:
    """Train the policy at `start` on pairs and anchors, tied to `reference`; write it to `out`.

    `name` is what others call the start, if it is a model that others have.

    Raises:
        TrainingStopped: see `trainer.fit` and `reference.check_start`; or all rows are too long.
    """
    work = _Work(start, out, policy, seed, progress, say)
    layout = ALONE
    if settings.loss == SFT:
        rows = encode(work.tokenizer, [p.prompt for p in preferences], _chosen(preferences))
        tasks: list[Task] = [work.supervised(rows, settings.batch_size)]
    else:
        objectives = make_objectives(settings)
        groups = work.groups(preferences, objectives, settings.batch_size)
        layout = work.layout(groups)
        frozen = work.frozen(reference)
        logps = work.reference(frozen, reference, groups, layout, is_start=start == reference)
        pairs = Preferences(groups, objectives, logps, layout, work.pad_id, settings.batch_size)
        tasks = [pairs, *work.anchors(anchors, frozen, settings)]
    optimisation = Optimisation(
        settings.lr,
        settings.batch_size,
        steps_of(settings.epochs, tasks[0], seed),
        warmup=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
    )
    made_of = {
        "settings": settings.model_dump(),
        "reference_digest": work.digest(reference),
        "data_digest": content_id([asdict(p) for p in preferences], list(map(list, anchors))),
        "layout": layout,
    }
    log = work.fit(tasks, optimisation, made_of)
    is_folder = Path(name).is_dir()  # named by its whole path, as adapters name it
    base = (
        {"base": str(start.resolve())} if is_folder else {"base": name, "base_commit": start.name}
    )
    work.save(made_of | (base if name else {}))
    return Trained(log, dict(work.dropped), layout)


def make_objectives(settings: Train) -> dict[str, Objective]:
    """Return, for each objective with a weight, the loss of the pairs that are ordered by it.

    w_0 belongs to the objective the pairs were ordered by, the rest to the margins of the others.
    """
    found = {}
    for name, weight in settings.weights.items():
        if weight > 0:
            others = tuple(o for o in settings.weights if o != name)
            weights = (weight, *(settings.weights[o] for o in others))
            loss = LossSettings(settings.beta, weights, settings.noise, settings.gamma)
            found[name] = Objective(registry.resolve("loss", settings.loss), loss, others)
    return found


class _Work:
    """One training: the model, where it comes from and where it goes."""

    def __init__(
        self,
        start: Path,
        out: Path,
        policy: Policy,
        seed: int,
        progress: Progress | None,
        say: Say | None,
    ) -> None:
        self._refuse_output(start, out, policy)
        self.start, self.out, self.policy = start, out, policy
        self.seed, self.progress = seed, progress
        self.processes = join(policy.device)
        self.say: Say = say if say and self.processes.is_main else lambda _: None
        self.dropped: Counter[str] = Counter()
        self._digests: dict[Path, str] = {}
        self.tokenizer = load_tokenizer(start)
        # Which id fills short rows is all the same: no trained token looks at it.
        self.pad_id = int(self.tokenizer.pad_token_id or 0)
        self.max_length = min(policy.max_length, longest_row(start) or policy.max_length)

    @staticmethod
    def _refuse_output(start: Path, out: Path, policy: Policy) -> None:
        """Refuse to write over the start, or beside a policy of another kind."""
        is_full = policy.adapter == "full"
        if is_full and is_adapter(start):
            raise TrainingStopped(
                f"{start} is an adapter, and policy.adapter is 'full'",
                "merge it into its base first, or train it on as 'lora'",
            )
        if out.resolve() in (start.resolve(), base_of(start).resolve()):
            raise OutputTaken(out, "is the model that training starts from")
        if is_adapter(out) if is_full else (out / "config.json").is_file():
            raise OutputTaken(out, "holds a policy of another kind")
        if out.exists() and not out.is_dir():
            raise CannotWrite(out, "it is a file, not a folder")

    @cached_property
    def model(self) -> Any:
        """The policy, ready for training: loaded when the rows are known to be good."""
        keep_freed_memory()
        if self.policy.threads:
            torch.set_num_threads(self.policy.threads)
        torch.manual_seed(self.seed)
        model = load_model(self.start, trainable=True, like=self.policy)
        return make_trainable(model, self.policy, self.seed).to(self.processes.device)

    def digest(self, folder: Path) -> str:
        """Return the digest of a policy; the weights are read for it once."""
        if folder not in self._digests:
            self._digests[folder] = digest_tree(folder)
        return self._digests[folder]

    def supervised(self, rows: list[Row], batch_size: int) -> Supervised:
        """Return the task of learning these rows, but for those that are too long."""
        kept = [row for row in rows if row.n_tokens <= self.max_length]
        self._drop(len(rows) - len(kept), len(rows))
        self._choose(kept, [ALONE])
        return Supervised(kept, self.pad_id, batch_size)

    def groups(
        self, preferences: Sequence[Preference], objectives: Mapping[str, Objective], most: int
    ) -> list[Group]:
        """Return the pairs as token rows, but for those that are too long."""
        groups = group_pairs(self.tokenizer, preferences, objectives, most)
        kept, dropped = drop_long(groups, self.max_length)
        self._drop(len(dropped), len(preferences))
        return kept

    def _drop(self, n: int, of: int) -> None:
        if n:
            self.dropped["too_long"] += n
            self.say(f"{n} of {of} rows are longer than {self.max_length} tokens and are left out")
        if n == of:
            raise TrainingStopped(
                f"all {of} rows are longer than {self.max_length} tokens",
                "raise policy.max_length, if the model can take it",
            )

    def layout(self, groups: Sequence[Group]) -> str:
        """Return the layout that the recipe names, or the first that is exact for this model."""
        named = self.policy.layout
        allowed: tuple[str, ...] = LAYOUTS if named == "auto" else (named,)
        if self.policy.gradient_checkpointing:  # switches caches off, which a prefix needs
            allowed = tuple(name for name in allowed if name != "prefix")
        choice = self._choose([group.row for group in groups], allowed)
        self.say(f"shared prompts by '{choice.layout}': {choice.reason}")
        return choice.layout

    def _choose(self, rows: Sequence[Row], allowed: Sequence[str]) -> Choice:
        """Compare what is trained on with the model's own logits, and layouts with separate rows.

        Raises:
            TrainingStopped: they differ.
        """
        try:
            with self.processes.autocast(self.policy.precision):
                return choose_layout(self.model, rows, self.pad_id, allowed=allowed)
        except ValueError as error:
            raise TrainingStopped(
                str(error), "set policy.layout=auto, or report this model if it is"
            ) from error

    def frozen(self, reference: Path) -> Frozen:
        """Return the reference, without a second copy of its weights where that is possible."""
        base, theirs = base_of(self.start).resolve(), base_of(reference).resolve()
        if self.policy.adapter != "full" and base == theirs:
            if not is_adapter(reference):
                return adapter_off
            self.model.load_adapter(reference, REFERENCE_ADAPTER, is_trainable=False)
            return reference_adapter
        model = merged(load_model(reference, like=self.policy))
        return other_model(model.to(self.processes.device))

    def reference(
        self, frozen: Frozen, folder: Path, groups: Sequence[Group], layout: str, *, is_start: bool
    ) -> list[torch.Tensor]:
        """Return log p of every completion under the reference, [k] a group."""
        rows = [group.row for group in groups]
        how = Scoring(
            layout, self.pad_id, self.policy.max_tokens, self.policy.precision, self.processes
        )
        found = reference_logps(
            frozen, self.model, rows, how, cache=self.out / SCRATCH, identity=self.digest(folder)
        )
        if is_start:
            check_start(self.model, rows, found, how)
        return found

    def anchors(
        self, anchors: Sequence[tuple[Sequence[Message], str]], frozen: Frozen, settings: Train
    ) -> list[Task]:
        """Return the task of holding on to these answers, if there are any: two for each pair."""
        if not anchors or not settings.anchor_weight:
            return []
        rows = encode(self.tokenizer, [m for m, _ in anchors], [[text] for _, text in anchors])
        rows = [row for row in rows if row.n_tokens <= self.max_length]
        size = min(len(rows), 2 * settings.batch_size)
        return [Anchors(rows, frozen, self.pad_id, size, settings.anchor_weight)] if rows else []

    def fit(
        self, tasks: Sequence[Task], settings: Optimisation, identity: Mapping[str, Any]
    ) -> list[LogRow]:
        """Train; go on from a checkpoint of the same training, if there is one.

        `identity` is what this training depends on beside the start, the policy's settings and
        the seed.
        """
        settings = replace(
            settings,
            max_tokens=self.policy.max_tokens,
            precision=self.policy.precision,
            checkpoint_every=self.policy.checkpoint_every,
        )
        named = {
            "start": self.digest(self.start),
            "policy": self.policy.model_dump(),
            "seed": self.seed,
            "torch": torch.__version__,
            "training code version": VERSION,
            **{"train" if key == "settings" else key: value for key, value in identity.items()},
        }
        checkpoints = Checkpoints(self.out / SCRATCH, flatten(named), self.say)
        return fit(
            self.model,
            tasks,
            settings,
            seed=self.seed,
            processes=self.processes,
            checkpoints=None if self.processes.are_sharded else checkpoints,
            progress=self.progress,
            say=self.say,
        )

    def save(self, facts: Mapping[str, Any], *, quarantined: bool = False) -> None:
        """Write the policy and its receipt; then the checkpoints have served."""
        weights = self.processes.whole_weights()
        if self.processes.is_main:
            self._name_base(facts)
            save_policy(
                self.model, self.tokenizer, self.out, quarantined=quarantined, weights=weights
            )
            receipt = {
                "made_by": f"selfmoa {version('selfmoa')}",
                "start_digest": self.digest(self.start),
                "seed": self.seed,
                "policy": self.policy.model_dump(),
                **facts,
                "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
            }
            write_atomic(self.out / RECEIPT, pretty_json(receipt))
            shutil.rmtree(self.out / SCRATCH, ignore_errors=True)
        self.processes.wait()

    def _name_base(self, facts: Mapping[str, Any]) -> None:
        """Write into an adapter where others find its base: on the hub, with the very commit."""
        if not isinstance(self.model, PeftModel):
            return
        name, revision = base_name(self.start)
        if "base_commit" in facts and not is_adapter(self.start):
            name, revision = facts["base"], facts["base_commit"]
        settings, below = self.model.peft_config["default"], self.model.get_base_model()
        settings.base_model_name_or_path, settings.revision = name, revision
        below.name_or_path = below.config.name_or_path = name  # of these, peft makes its card
