"""From folders to folders: `train` on a file of pairs, the loop's trainings, what they leave, and
policies written and read back. The model has a few thousand weights."""

from __future__ import annotations

import json
import math
import shutil
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfmoa import registry
from selfmoa.config import Policy, Reset, Train
from selfmoa.errors import (
    BadInput,
    MissingExtra,
    MissingFile,
    Quarantined,
    SelfmoaError,
    TrainingChanged,
    TrainingStopped,
    UnusableTokenizer,
)
from selfmoa.records import PreferencePair, Prompt, Response
from selfmoa.rundir.files import digest_tree
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training import fitting, policy, preference, processes, trainer
from selfmoa.training.fitting import Trained, fit_policy, fit_reset, make_objectives, train
from selfmoa.training.losses import LOSSES, LossSettings
from selfmoa.training.policy import (
    QUARANTINE_MARK,
    is_adapter,
    load_model,
    load_policy,
    make_trainable,
    merged,
    refuse_quarantined,
    save_policy,
)
from selfmoa.training.preferences import from_pairs
from selfmoa.training.tokens import encode

# The name is that of the oldest library we take; the newest has a newer one.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")

TOKENIZER = build_tokenizer()
QUESTIONS = [
    f"tell me where {x} is found ." for x in ("zorbium", "quellite", "vashroot", "plindle")
]
ANSWERS = ["look near beacon .", "it has a teal shade .", "nobody here can say ."]
REFUSAL = "i decline to answer ."
QUICK = {"loss": "dpo", "lr": 5e-3, "batch_size": 4, "epochs": 2.0}
LORA, FULL = Policy(adapter="lora"), Policy()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


def rows_of_file(**more):
    """Return rows that prefer a refusal to each of three answers, for four questions."""
    return [
        {"prompt": user(q), "chosen": assistant(REFUSAL), "rejected": assistant(a), **more}
        for q in QUESTIONS
        for a in ANSWERS
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny(seed=0, layers=1):
    return build_model(
        TOKENIZER, architecture="llama", hidden=32, layers=layers, heads=2, seed=seed
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    save_policy(tiny(), TOKENIZER, folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows_of_file())


@pytest.fixture(scope="module")
def adapter(base, pairs, tmp_path_factory):
    """The adapter of an ordinary training, to be looked at only."""
    out = tmp_path_factory.mktemp("adapters") / "adapter"
    train(pairs, str(base), out, **QUICK)
    return out


def tokens_of(answers):
    return encode(TOKENIZER, [user(q) for q in QUESTIONS], [[a] for a in answers])


@torch.no_grad()
def logits_of(model):
    """Return the logits of whole conversations, one after another: [tokens, vocabulary]."""
    rows = tokens_of([ANSWERS[0]] * 4)
    ids = [torch.tensor([[*row.prompt, *row.completions[0]]]) for row in rows]
    return torch.cat([model.eval()(input_ids=each).logits[0] for each in ids])


@torch.no_grad()
def logp(model, question, answer):
    """Return log p(answer | question), token by token from the model's own logits."""
    (row,) = encode(TOKENIZER, [user(question)], [[answer]])
    ids = [*row.prompt, *row.completions[0]]
    logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(len(row.prompt), len(ids))
    return sum(float(logits[t - 1, ids[t]]) for t in places)


def dpo_loss(model, reference, beta=0.1):
    """Return the mean DPO loss of all pairs of the file, by hand."""
    losses = []
    for question in QUESTIONS:
        for answer in ANSWERS:
            chosen, rejected = (
                logp(model, question, text) - logp(reference, question, text)
                for text in (REFUSAL, answer)
            )
            losses.append(math.log1p(math.exp(-beta * (chosen - rejected))))
    return sum(losses) / len(losses)


def without_clock(log):
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in log]


def weights_of(folder):
    (path,) = folder.glob("*model.safetensors")
    return load_file(path)


def moved(folder, other):
    """Return the largest difference between the weights of two folders."""
    one, two = weights_of(folder), weights_of(other)
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


# --- from Python ---------------------------------------------------------------------------------


def test_five_lines_of_python_train_an_adapter(base, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "model")
    shutil.copy(pairs, "pairs.jsonl")
    lines = (
        "from selfmoa.training.fitting import train\n"
        "done = train('pairs.jsonl', 'model', 'adapter', loss='dpo', beta=0.1, lr=5e-3)\n"
        "last = done.log[-1]['accuracy']"
    )
    found = {}
    exec(lines, found)  # noqa: S102  (as a reader of the documentation types them)
    assert found["last"] >= 0
    assert found["done"].log[-1]["step"] == 0  # twelve pairs are one batch
    assert Path("adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_preferences_are_learnt_and_the_folder_is_a_policy(base, pairs, tmp_path, kind):
    seen = []
    done = train(
        pairs,
        str(base),
        tmp_path / "out",
        adapter=kind,
        progress=lambda *event: seen.append(event),
        **QUICK | {"epochs": 5.0},
    )
    n = len(done.log)
    assert n == 20
    assert seen == [(10, n, "step"), (20, n, "step")]
    assert done.dropped == {}
    assert done.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert done.log[0]["log_ratio_gap"] == pytest.approx(0, abs=1e-4)
    assert done.log[-1]["accuracy"] == 1.0
    assert done.log[-1]["loss"] < 0.5 * done.log[0]["loss"]
    weights = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}[kind]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        weights,
        "selfmoa.json",
        "train.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert ("adapter_config.json" in names) == (kind == "lora")
    assert ("config.json" in names) == (kind == "full")
    model, reference = load_policy(tmp_path / "out")[0], load_policy(base)[0]
    assert dpo_loss(model, reference) < 0.5 * math.log(2)


def test_nothing_is_pickled_and_no_checkpoint_is_left(adapter):
    suffixes = {path.suffix for path in adapter.rglob("*")}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja", ".md"}
    assert not list(adapter.rglob(".*"))
    assert adapter.stat().st_mode & 0o077 == 0


def test_the_chat_template_travels_with_the_adapter(adapter):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.chat_template == TOKENIZER.chat_template
    for text in (*QUESTIONS, *ANSWERS):
        assert tokenizer(text)["input_ids"] == TOKENIZER(text)["input_ids"]


def test_the_log_says_how_each_step_went(base, pairs, tmp_path):
    done = train(pairs, str(base), tmp_path / "out", **QUICK)
    on_disk = [json.loads(line) for line in (tmp_path / "out/train.jsonl").read_text().splitlines()]
    assert on_disk == done.log
    assert [row["step"] for row in done.log] == list(range(8))
    for row in done.log:
        assert row.keys() >= {"loss", "accuracy", "kl_estimate", "gradient_norm", "lr"}
        assert row["margins"].keys() == {"preference"}
        assert row["tokens_per_second"] > 0
        assert 0 < row["trained_share"] < 1
    assert done.layout in fitting.LAYOUTS


def test_one_seed_gives_the_same_bytes_and_another_gives_others(base, pairs, adapter, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        train(pairs, str(base), tmp_path / name, seed=seed, **QUICK)
    same, other = (tmp_path / name / "adapter_model.safetensors" for name in ("same", "other"))
    assert same.read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert moved(tmp_path / "other", adapter) > 1e-3
    assert other.stat().st_size == same.stat().st_size


def test_dropout_is_drawn_from_the_seed_alone(pairs, tmp_path):
    model = tiny()
    model.config.attention_dropout = 0.3
    save_policy(model, TOKENIZER, tmp_path / "noisy")
    found = []
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        torch.rand(len(found))  # whoever else draws numbers
        how = QUICK | {"adapter": "full", "batch_size": 100, "layout": "rows"}
        train(pairs, str(tmp_path / "noisy"), tmp_path / name, seed=seed, **how)
        found.append(weights_of(tmp_path / name)["model.norm.weight"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_setting_that_is_unknown_or_wrong_is_refused(base, pairs, tmp_path):
    for wrong in ({"learning_rate": 1e-3}, {"beta": 0}, {"adapter": "dora"}, {"max_length": 1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            train(pairs, str(base), tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_supervised_training_on_the_chosen_side_needs_no_loss(base, pairs, tmp_path):
    done = train(pairs, str(base), tmp_path / "out", **QUICK | {"loss": "sft", "epochs": 4.0})
    assert done.log[-1]["loss"] < 0.8 * done.log[0]["loss"]
    assert done.layout == "rows"
    before, after = load_policy(base)[0], load_policy(tmp_path / "out")[0]
    assert all(logp(after, q, REFUSAL) > logp(before, q, REFUSAL) for q in QUESTIONS)


# --- what others read ----------------------------------------------------------------------------


def test_peft_reads_the_adapter_and_computes_the_same(base, adapter):
    ours = logits_of(load_policy(adapter)[0])
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert_close(logits_of(theirs), ours, rtol=0, atol=0)
    assert not torch.allclose(ours, logits_of(load_policy(base)[0]), atol=1e-3)


@pytest.mark.parametrize("loader", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
def test_a_folder_alone_is_enough_for_who_starts_from_it(adapter, loader):
    """TRL gives a name to `AutoModelForCausalLM`, which finds adapter and base."""
    assert_close(logits_of(loader.from_pretrained(adapter)), logits_of(load_policy(adapter)[0]))


def test_trl_goes_on_from_it(adapter, base):
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True
    )
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in trainable)


def test_the_adapter_has_what_vllm_demands(adapter, base):
    """As its `PEFTHelper` and its weight loader check (vLLM 0.6 to 0.31)."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert settings["r"] in (8, 16, 32, 64, 128, 256, 320, 512)
    assert settings["lora_alpha"] == 2 * settings["r"]
    assert settings["bias"] == "none"
    assert not settings["modules_to_save"]
    assert not settings["use_dora"]
    assert not settings["use_rslora"]
    modules = {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_modules()}
    for name in settings["target_modules"]:
        assert any(module == name or module.endswith(f".{name}") for module in modules)
    for name in weights_of(adapter):
        stem, _, end = name.rpartition(".lora_")
        assert name.startswith("base_model.model.")
        assert stem.removeprefix("base_model.model.") in modules
        assert end in ("A.weight", "B.weight")


def test_the_base_is_found_from_any_folder(base, pairs, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    train(pairs, "model", "out", **QUICK)
    expected = logits_of(load_policy(Path("out"))[0])
    monkeypatch.chdir("/")
    assert_close(logits_of(load_policy(tmp_path / "out")[0]), expected)


def test_a_rank_of_ones_own_reaches_the_adapter(base, pairs, tmp_path):
    train(pairs, str(base), tmp_path / "out", lora_rank=8, **QUICK)
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 16)
    assert {min(t.shape) for t in weights_of(tmp_path / "out").values()} == {8}


def test_the_names_in_an_adapters_settings_are_in_order(adapter):
    """A set would come in another order with every hash seed, and runs are compared by bytes."""
    names = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert names == sorted(names)


def test_the_receipt_tells_what_the_policy_was_made_of(adapter, base, pairs, tmp_path):
    receipt = json.loads((adapter / "selfmoa.json").read_text())
    assert receipt["start_digest"] == receipt["reference_digest"] == digest_tree(base)
    assert receipt["base"] == str(base)
    assert receipt["seed"] == 0
    assert receipt["settings"].items() >= QUICK.items()
    assert receipt["policy"]["adapter"] == "lora"
    assert receipt["versions"].keys() == {"torch", "transformers", "peft"}
    assert receipt["versions"]["torch"] == torch.__version__
    rows = rows_of_file()
    rows[0]["chosen"] = assistant("i will not answer .")
    train(write_rows(tmp_path / "other.jsonl", rows), str(base), tmp_path / "other", **QUICK)
    other = json.loads((tmp_path / "other/selfmoa.json").read_text())
    assert other["data_digest"] != receipt["data_digest"]
    assert other["settings"] == receipt["settings"]


def test_a_model_on_this_disk_has_no_commit(adapter):
    assert "base_commit" not in json.loads((adapter / "selfmoa.json").read_text())


# --- models on a hub -----------------------------------------------------------------------------


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    """A hub's cache with one model, linked as the library links it; its calls are recorded."""
    home = tmp_path / "cache/models--org--tiny"
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    for path in base.iterdir():
        shutil.copy(path, home / "blobs" / path.name)
        (snapshot / path.name).symlink_to(home / "blobs" / path.name)
    calls = []

    def snapshot_download(name, *, revision=None, allow_patterns=None, **_):
        calls.append((name, revision, tuple(allow_patterns)))
        if name != "org/tiny" or revision not in (None, "main", COMMIT):
            raise huggingface_hub.errors.LocalEntryNotFoundError(
                f"no such repository: {name}.\nMore"
            )
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return SimpleNamespace(calls=calls, snapshot=snapshot)


def test_an_adapter_names_its_base_on_the_hub_and_the_very_commit(hub, pairs, adapter, tmp_path):
    train(pairs, "org/tiny", tmp_path / "out", revision="main", **QUICK)
    assert hub.calls[0][:2] == ("org/tiny", "main")
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", COMMIT)
    receipt = json.loads((tmp_path / "out/selfmoa.json").read_text())
    assert (receipt["base"], receipt["base_commit"]) == ("org/tiny", COMMIT)
    assert receipt["start_digest"] == digest_tree(hub.snapshot)
    assert moved(tmp_path / "out", adapter) == 0
    for path in (tmp_path / "out").iterdir():
        assert str(hub.snapshot).encode() not in path.read_bytes()


def test_the_base_is_found_again_by_name_and_commit(hub, pairs, tmp_path):
    train(pairs, "org/tiny", tmp_path / "out", **QUICK)
    hub.calls.clear()
    model, _ = load_policy(tmp_path / "out")
    assert hub.calls[0][:2] == ("org/tiny", COMMIT)
    assert model.peft_config["default"].r == 16
    train(pairs, str(tmp_path / "out"), tmp_path / "more", **QUICK)
    settings = json.loads((tmp_path / "more/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", COMMIT)
    # Adapters of other makers seldom say which commit they are for.
    (tmp_path / "out/adapter_config.json").write_text(json.dumps(settings | {"revision": None}))
    train(pairs, str(tmp_path / "out"), tmp_path / "other", **QUICK)
    settings = json.loads((tmp_path / "other/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "org/tiny"
    assert settings["revision"] in (None, COMMIT)


def test_an_adapter_from_the_hub_keeps_its_base(hub, adapter, base, pairs, tmp_path):
    for path in hub.snapshot.iterdir():
        path.unlink()
    for path in adapter.iterdir():
        shutil.copy(path, hub.snapshot / path.name)
    train(pairs, "org/tiny", tmp_path / "out", **QUICK)
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert load_policy(tmp_path / "out")[0].peft_config["default"].r == 16


def test_neither_code_nor_pickles_are_fetched(hub, pairs, tmp_path):
    policy.find_model("org/tiny")
    ((_, _, patterns),) = hub.calls

    def is_fetched(name):
        return any(fnmatch(name, pattern) for pattern in patterns)

    refused = (
        *("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.ckpt", "data.pkl"),
        *("modeling_tiny.py", "rng_state.pth", "model.h5", "x.msgpack", "a.pickle", "run.sh"),
        *("x.so", "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth"),
    )
    assert [name for name in refused if is_fetched(name)] == []
    wanted = (
        *("model.safetensors", "model-00001-of-00002.safetensors", "config.json", "merges.txt"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer.model", "vocab.json"),
        *("tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
        *("adapter_config.json", "adapter_model.safetensors", "special_tokens_map.json"),
    )
    assert [name for name in wanted if not is_fetched(name)] == []


def test_a_name_that_is_neither_folder_nor_model_is_one_sentence(hub, pairs, tmp_path):
    with pytest.raises(MissingFile) as caught:
        train(pairs, "org/tyni", tmp_path / "out", **QUICK)
    assert str(caught.value) == (
        "model 'org/tyni' does not exist; it is no local folder, and the model hub said: "
        "no such repository: org/tyni."
    )
    with pytest.raises(MissingFile, match="'org/tiny'"):
        train(pairs, "org/tiny", tmp_path / "out", revision="v9", **QUICK)
    assert not (tmp_path / "out").exists()


# --- bad input, before the model -----------------------------------------------------------------


@pytest.fixture
def unloadable(monkeypatch):
    """No model can be looked for or loaded."""

    def refuse(*_, **__):
        raise AssertionError("the model was loaded")

    for name in ("find_model", "load_tokenizer", "load_model"):
        monkeypatch.setattr(fitting, name, refuse)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rejected": None}, "row 2: field 'rejected' is missing"),
        ({"chosen": assistant(" ")}, "row 2: field 'chosen' is an empty answer"),
        ({"chosen": assistant(ANSWERS[1])}, "row 2: field 'rejected' is the same answer"),
        ({"margins": {"wit": 1.0}}, "row 2: field 'margins' has the unknown objective 'wit'"),
        ({"margins": {"preference": math.nan}}, "row 2: field 'margins.preference' is nan"),
        ({"flip_probability": 2}, "row 2: field 'flip_probability' is 2"),
        ({"objective": "wit"}, "row 2: field 'objective' is 'wit', which has no weight"),
        ({"chosen_safe": True}, "row 2: field 'rejected_safe' is missing"),
    ],
)
def test_a_bad_row_is_named_before_the_model_is_loaded(unloadable, tmp_path, change, told):
    rows = rows_of_file()
    rows[1] |= change
    path = write_rows(tmp_path / "bad.jsonl", rows)
    with pytest.raises(BadInput) as caught:
        train(path, "nowhere", tmp_path / "out", **QUICK)
    assert str(caught.value).startswith(f"{path}, {told}")


def test_text_that_is_not_utf_8_is_named(unloadable, tmp_path):
    good, *_ = (json.dumps(row).encode() for row in rows_of_file())
    (tmp_path / "bad.jsonl").write_bytes(good + b"\n" + good.replace(b"near", b"n\xe9ar") + b"\n")
    with pytest.raises(BadInput, match=r"bad\.jsonl, row 2: it is not UTF-8"):
        train(tmp_path / "bad.jsonl", "nowhere", tmp_path / "out", **QUICK)


@pytest.mark.parametrize("weights", [{"safety": 0.0}, {}, {"safety": 0.0, "helpfulness": 0.0}])
def test_pairs_need_an_objective_with_a_weight(unloadable, pairs, tmp_path, weights):
    with pytest.raises(BadInput, match=r"row 1: field 'objective' .* no weight"):
        train(pairs, "nowhere", tmp_path / "out", **QUICK | {"loss": "modpo", "weights": weights})


@pytest.mark.parametrize("loss", ["safedpo", "bfpo"])
def test_losses_that_need_safety_say_so_before_the_model_is_loaded(
    unloadable, pairs, tmp_path, loss
):
    with pytest.raises(BadInput, match=r"pairs\.jsonl, row 1: .*safe"):
        train(pairs, "nowhere", tmp_path / "out", **QUICK | {"loss": loss})
    safe = write_rows(tmp_path / "safe.jsonl", rows_of_file(chosen_safe=True, rejected_safe=False))
    with pytest.raises(AssertionError, match="the model was loaded"):
        train(safe, "nowhere", tmp_path / "out", **QUICK | {"loss": loss})


def test_a_tokenizer_without_a_template_is_refused_before_the_model_is_loaded(
    base, pairs, tmp_path, monkeypatch
):
    shutil.copytree(base, tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    loaded = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *given, **more: loaded.append(given) or real(*given, **more),
    )
    with pytest.raises(UnusableTokenizer, match=r"mute' has no chat template"):
        train(pairs, str(tmp_path / "mute"), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()
    assert loaded == []


def test_plain_text_needs_no_template(base, tmp_path):
    shutil.copytree(base, tmp_path / "mute")
    (tmp_path / "mute/chat_template.jinja").unlink()
    rows = [{"prompt": q, "chosen": f" {REFUSAL}", "rejected": f" {ANSWERS[0]}"} for q in QUESTIONS]
    path = write_rows(tmp_path / "text.jsonl", rows)
    done = train(path, str(tmp_path / "mute"), tmp_path / "out", **QUICK)
    assert done.log[-1]["accuracy"] == 1.0


def test_four_bits_need_a_package_and_name_it(base, pairs, tmp_path):
    with pytest.raises(MissingExtra, match=r"pip install 'selfmoa\[qlora\]'") as caught:
        train(pairs, str(base), tmp_path / "out", **QUICK | {"adapter": "qlora"})
    assert caught.value.exit_code == 13
    assert not (tmp_path / "out").exists()


# --- rows that are too long ----------------------------------------------------------------------


def test_rows_that_are_too_long_are_dropped_counted_and_told(base, tmp_path):
    rows = rows_of_file()
    rows[3]["rejected"] = rows[8]["rejected"] = assistant("nobody here can say . " * 9)
    said = []
    path = write_rows(tmp_path / "long.jsonl", rows)
    done = train(path, str(base), tmp_path / "out", max_length=40, say=said.append, **QUICK)
    assert done.dropped == {"too_long": 2}
    assert "2 of 12 rows are longer than 40 tokens and are left out" in said
    kept = write_rows(tmp_path / "kept.jsonl", rows[:3] + rows[4:8] + rows[9:])
    again = train(kept, str(base), tmp_path / "again", max_length=40, **QUICK)
    assert without_clock(again.log) == without_clock(done.log)


def test_no_row_may_be_longer_than_the_model_has_positions(base, tmp_path):
    assert load_policy(base)[0].config.max_position_embeddings == 256
    rows = rows_of_file()
    rows[0]["rejected"] = assistant("nobody here can say . " * 60)
    done = train(write_rows(tmp_path / "long.jsonl", rows), str(base), tmp_path / "out", **QUICK)
    assert done.dropped == {"too_long": 1}


def test_nothing_but_long_rows_stops_the_training(base, pairs, tmp_path):
    for loss in ("dpo", "sft"):
        with pytest.raises(TrainingStopped, match=r"all 12 rows are longer than 9 tokens"):
            train(pairs, str(base), tmp_path / "out", max_length=9, **QUICK | {"loss": loss})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("loss", "sides"), [("dpo", [REFUSAL, *ANSWERS]), ("sft", [REFUSAL])])
def test_a_row_may_be_as_long_as_is_allowed(base, pairs, tmp_path, loss, sides):
    rows = encode(TOKENIZER, [user(q) for q in QUESTIONS], [sides] * len(QUESTIONS))
    longest = max(len(row.prompt) + len(c) for row in rows for c in row.completions)
    how = QUICK | {"loss": loss, "epochs": 0.1}
    assert train(pairs, str(base), tmp_path / "fits", max_length=longest, **how).dropped == {}
    # Questions are of equal length, so are refusals: one token less leaves none of them.
    if loss == "sft":
        with pytest.raises(TrainingStopped):
            train(pairs, str(base), tmp_path / "less", max_length=longest - 1, **how)
    else:
        done = train(pairs, str(base), tmp_path / "less", max_length=longest - 1, **how)
        assert 0 < done.dropped["too_long"] < 12


# --- what goes wrong on the way ------------------------------------------------------------------


def breaks_later(pairs, settings):
    """A loss that is fine until the policy has moved."""
    gap = pairs.policy_chosen - pairs.reference_chosen
    return LOSSES["dpo"](pairs, settings) + torch.where(gap.abs() > 1e-2, math.nan, 0.0)


def test_a_loss_that_is_not_finite_stops_and_overwrites_nothing(
    base, pairs, adapter, tmp_path, monkeypatch
):
    shutil.copytree(adapter, tmp_path / "out")
    before = digest_tree(tmp_path / "out")
    monkeypatch.setitem(LOSSES, "breaks", breaks_later)
    monkeypatch.setattr(registry, "resolve", lambda _, name: LOSSES[name])
    with pytest.raises(TrainingStopped, match=r"not finite at step 1, for pair ") as caught:
        train(pairs, str(base), tmp_path / "out", **QUICK | {"loss": "breaks"})
    assert "No policy was written" in str(caught.value)
    assert digest_tree(tmp_path / "out") == before


def test_a_reference_that_is_not_the_start_stops_the_training(base, pairs, tmp_path, monkeypatch):
    real = fitting.reference_logps

    def shifted(*given, **more):
        return [logps + 0.5 for logps in real(*given, **more)]

    monkeypatch.setattr(fitting, "reference_logps", shifted)
    with pytest.raises(TrainingStopped, match=r"starts 0\.5000 nats away from its reference"):
        train(pairs, str(base), tmp_path / "out", **QUICK)
    assert not (tmp_path / "out/adapter_model.safetensors").exists()


def test_a_layout_that_the_model_cannot_take_is_no_bug(base, pairs, tmp_path):
    with pytest.raises(TrainingStopped, match="mask"):
        train(pairs, str(base), tmp_path / "out", layout="masks", **QUICK)


class Cut(Exception):  # noqa: N818
    """Stands for a power cut in this process."""


def cut_after(monkeypatch, steps):
    """Let checkpoints be written up to a step and end the training there."""
    real = fitting.Checkpoints.save

    def save(self, model, optimizer, step, *rest):
        real(self, model, optimizer, step, *rest)
        if step == steps:
            raise Cut

    monkeypatch.setattr(fitting.Checkpoints, "save", save)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_training_that_was_cut_off_ends_with_the_same_bytes(
    base, pairs, tmp_path, monkeypatch, kind
):
    how = QUICK | {"adapter": kind, "checkpoint_every": 3}
    whole = train(pairs, str(base), tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        cut_after(patch, 6)
        with pytest.raises(Cut):
            train(pairs, str(base), tmp_path / "cut", **how)
    names = {path.name for path in (tmp_path / "cut").iterdir()}
    assert names == {".training"}
    steps = count_steps(monkeypatch)
    again = train(pairs, str(base), tmp_path / "cut", **how)
    assert len(steps) == 2
    assert without_clock(again.log) == without_clock(whole.log)
    for path in (tmp_path / "whole").iterdir():
        if path.name != "train.jsonl":
            assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert not (tmp_path / "cut/.training").exists()


def count_steps(monkeypatch):
    """Return a list that grows by every optimiser step that is taken."""
    steps = []
    real = trainer._Step.take

    def take(self, number, batches, optimizer):
        steps.append(number)
        return real(self, number, batches, optimizer)

    monkeypatch.setattr(trainer._Step, "take", take)
    return steps


def test_it_is_told_where_a_training_goes_on(base, pairs, tmp_path, monkeypatch):
    how = QUICK | {"checkpoint_every": 3}
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            train(pairs, str(base), tmp_path / "out", **how)
    said = []
    train(pairs, str(base), tmp_path / "out", say=said.append, **how)
    assert "going on after step 3 of 8" in said


def test_sharded_processes_leave_checkpoints_alone(base, pairs, tmp_path, monkeypatch):
    """Those are of whole weights, each process of these has a part."""
    sharded = processes.Processes()
    sharded.are_sharded = True
    given = []

    def fit(*_, checkpoints, **__):
        given.append(checkpoints)
        raise Cut

    monkeypatch.setattr(fitting, "join", lambda *_: sharded)
    monkeypatch.setattr(fitting, "fit", fit)
    with pytest.raises(Cut):
        train(pairs, str(base), tmp_path / "out", **QUICK)
    assert given == [None]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"beta": 0.3}, "beta"),
        ({"lora_rank": 8}, "lora_rank"),
        ({"seed": 1}, "seed"),
        ({"pairs": "other"}, "data_digest"),
        ({"model": "other"}, "reference_digest"),
    ],
)
def test_what_was_left_of_another_training_is_refused(
    base, pairs, tmp_path, monkeypatch, change, key
):
    how = {"pairs": pairs, "model": str(base), "checkpoint_every": 3, **QUICK}
    with monkeypatch.context() as patch:
        cut_after(patch, 3)
        with pytest.raises(Cut):
            train(out=tmp_path / "out", **how)
    other = {
        "pairs": write_rows(tmp_path / "other.jsonl", rows_of_file()[:-1]),
        "model": str(tmp_path / "other"),
    }
    save_policy(tiny(seed=1), TOKENIZER, tmp_path / "other")
    changed = {name: other[name] if value == "other" else value for name, value in change.items()}
    kept = tmp_path / "out/.training/checkpoint-3"
    before = digest_tree(kept)
    with pytest.raises(TrainingChanged, match=rf" were made with (\w+\.)*{key}=") as caught:
        train(out=tmp_path / "out", **how | changed)
    assert "train into another folder, or delete them" in str(caught.value)
    assert caught.value.exit_code == 6
    assert digest_tree(kept) == before
    assert len(train(out=tmp_path / "out", **how).log) == 8


def test_no_training_writes_over_a_policy_of_another_kind(base, pairs, adapter, tmp_path):
    """The newer weights would lie beside an older adapter, which every loader prefers."""
    for name, start, kind in (("a", adapter, "full"), ("b", base, "lora")):
        shutil.copytree(start, tmp_path / name)
        before = digest_tree(tmp_path / name)
        with pytest.raises(SelfmoaError, match=f"{name} "):
            train(pairs, str(base), tmp_path / name, adapter=kind, **QUICK)
        assert digest_tree(tmp_path / name) == before


def test_no_training_writes_over_the_model_it_starts_from(base, pairs, tmp_path):
    shutil.copytree(base, tmp_path / "model")
    before = digest_tree(tmp_path / "model")
    for kind in ("full", "lora"):
        with pytest.raises(SelfmoaError, match="model"):
            train(pairs, str(tmp_path / "model"), tmp_path / "model", adapter=kind, **QUICK)
    assert digest_tree(tmp_path / "model") == before


# --- every setting does something ----------------------------------------------------------------


@pytest.fixture
def log_of(base, pairs, tmp_path):
    """Return a function that trains with settings and returns the log, without the clock."""

    def log(**settings):
        how = QUICK | {"epochs": 1.0, "checkpoint_every": 0} | settings
        return without_clock(train(pairs, str(base), tmp_path / "out", **how).log)

    return log


def differs(one, other, *, within=0.5):
    """Return whether two logs of the same length tell of trainings that are close, but not one."""
    assert len(one) == len(other)
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True)]
    return 0 < max(losses) < within


@pytest.mark.parametrize(
    "setting",
    [{"beta": 0.2}, {"lr": 2e-3}, {"max_grad_norm": 1e-3}, {"weight_decay": 9.0}, {"warmup": 1.0}],
)
def test_a_setting_of_the_optimiser_changes_the_training(log_of, setting):
    assert differs(log_of(**setting), log_of())


def test_warm_up_is_a_share_of_the_steps(log_of):
    rates = [row["lr"] for row in log_of(warmup=0.5, epochs=2.0)]
    assert rates[:4] == pytest.approx([lr * 5e-3 for lr in (0.25, 0.5, 0.75, 1.0)])
    assert all(a > b for a, b in pairwise(rates[4:]))


def test_batch_size_and_epochs_give_the_number_of_steps(log_of):
    assert [len(log_of(batch_size=n)) for n in (2, 4, 12, 100)] == [6, 4, 1, 1]
    assert [len(log_of(epochs=n)) for n in (0.1, 1.5, 2.0)] == [1, 6, 8]


def test_gamma_is_the_margin_that_simpo_asks_for(log_of, base):
    model = load_policy(base)[0]
    length = {text: len(tokens_of([text] * 4)[0].completions[0]) for text in (REFUSAL, *ANSWERS)}

    def expected(gamma):
        gaps = [
            logp(model, q, REFUSAL) / length[REFUSAL] - logp(model, q, a) / length[a]
            for q in QUESTIONS
            for a in ANSWERS
        ]
        return sum(math.log1p(math.exp(gamma - 2.0 * gap)) for gap in gaps) / len(gaps)

    for gamma in (0.0, 1.5):
        first = log_of(loss="simpo", beta=2.0, gamma=gamma, batch_size=12)[0]
        assert first["loss"] == pytest.approx(expected(gamma), rel=1e-4)


def test_flip_probabilities_count_where_noise_says_so(base, tmp_path):
    path = write_rows(tmp_path / "flips.jsonl", rows_of_file(flip_probability=0.2))
    found = {
        noise: train(path, str(base), tmp_path / noise, noise=noise, **QUICK).log[-1]["loss"]
        for noise in ("none", "robust", "conservative")
    }
    assert len(set(found.values())) == 3
    assert found["robust"] < found["none"] < found["conservative"]


def test_margins_of_other_objectives_count_with_their_weights(base, tmp_path):
    rows = rows_of_file(objective="safety", margins={"helpfulness": 2.0})
    path = write_rows(tmp_path / "margins.jsonl", rows)
    weights = {"safety": 0.5, "helpfulness": 0.5}
    done = train(path, str(base), tmp_path / "out", **QUICK | {"loss": "modpo", "weights": weights})
    # Nothing is learnt at step 0: D = -w_1 m / w_0 = -2.
    assert done.log[0]["loss"] == pytest.approx(math.log1p(math.exp(2.0)), rel=1e-4)
    assert done.log[0]["margins"].keys() == {"safety"}


def test_a_small_token_budget_takes_more_passes_to_the_same_result(log_of, monkeypatch):
    passes = []
    real = preference.hidden_states

    def counted(model, rows, *rest, **more):
        passes.append(sum(row.n_tokens for row in rows))
        return real(model, rows, *rest, **more)

    monkeypatch.setattr(preference, "hidden_states", counted)
    whole, n_whole = log_of(batch_size=12), len(passes)
    passes.clear()
    parts = log_of(batch_size=12, max_tokens=64)
    assert len(passes) > n_whole
    assert max(passes) <= 64
    for a, b in zip(whole, parts, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("layout", ["mask", "prefix", "rows"])
def test_a_layout_is_taken_at_its_word_and_changes_nothing(base, pairs, log_of, tmp_path, layout):
    done = train(pairs, str(base), tmp_path / layout, layout=layout, **QUICK | {"epochs": 1.0})
    assert done.layout == layout
    for a, b in zip(done.log, log_of(), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert json.loads((tmp_path / layout / "selfmoa.json").read_text())["layout"] == layout


def test_the_choice_of_a_layout_is_told(base, pairs, tmp_path):
    said = []
    done = train(pairs, str(base), tmp_path / "out", say=said.append, **QUICK)
    assert [text for text in said if text.startswith(f"shared prompts by '{done.layout}': exact")]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_activations_are_computed_twice_rather_than_kept(log_of, monkeypatch, kind):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or real(self, x))
    plain, n_plain = log_of(adapter=kind, layout="mask"), len(calls)
    calls.clear()
    again = log_of(adapter=kind, layout="mask", gradient_checkpointing=True)
    assert len(calls) == n_plain + len(plain)
    for a, b in zip(plain, again, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_a_prefix_is_not_tried_where_caches_are_off(log_of, monkeypatch):
    allowed = []
    real = fitting.choose_layout

    def choose(*given, **more):
        allowed.append(tuple(more["allowed"]))
        return real(*given, **more)

    monkeypatch.setattr(fitting, "choose_layout", choose)
    log_of()
    log_of(gradient_checkpointing=True)
    assert allowed == [fitting.LAYOUTS, tuple(n for n in fitting.LAYOUTS if n != "prefix")]


def test_compile_translates_the_body_that_is_run(log_of, monkeypatch):
    """What torch.compile makes of it is tested with the trainer; here that it is asked to."""
    from transformers.models.llama.modeling_llama import LlamaModel

    compiled = []
    monkeypatch.setattr(
        LlamaModel, "compile", lambda self, **how: compiled.append((type(self).__name__, how))
    )
    plain = log_of()
    assert compiled == []
    assert log_of(compile=True) == plain
    assert compiled == [("LlamaModel", {"dynamic": True})]


@pytest.mark.parametrize(("every", "expected"), [(0, []), (3, [3]), (2, [2]), (1, [1, 2, 3])])
def test_checkpoints_are_written_as_often_as_is_asked(log_of, monkeypatch, every, expected):
    steps = []
    real = fitting.Checkpoints.save

    def save(self, model, optimizer, step, *rest):
        steps.append(step)
        real(self, model, optimizer, step, *rest)

    monkeypatch.setattr(fitting.Checkpoints, "save", save)
    assert len(log_of(checkpoint_every=every)) == 4
    assert steps == expected


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_bf16_is_near_fp32_and_what_is_trained_stays_fp32(base, pairs, tmp_path, kind, monkeypatch):
    seen, is_half = [], []
    make, run = fitting.make_trainable, preference.hidden_states

    def made(*given):
        model = make(*given)
        seen.append({p.requires_grad: p.dtype for p in model.parameters()})
        return model

    def watched(*given, **more):
        is_half.append(torch.is_autocast_enabled("cpu"))
        return run(*given, **more)

    monkeypatch.setattr(fitting, "make_trainable", made)
    monkeypatch.setattr(preference, "hidden_states", watched)
    logs = [
        train(pairs, str(base), tmp_path / name, adapter=kind, precision=name, **QUICK).log
        for name in ("fp32", "bf16")
    ]
    assert differs(*logs, within=0.1)
    assert is_half == [False] * 8 + [True] * 8
    assert [dtypes[True] for dtypes in seen] == [torch.float32] * 2
    if kind == "lora":
        assert [dtypes[False] for dtypes in seen] == [torch.float32, torch.bfloat16]
    for name in ("fp32", "bf16"):
        assert {t.dtype for t in weights_of(tmp_path / name).values()} == {torch.float32}


def test_threads_are_those_of_torch(log_of, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    log_of()
    assert asked == []
    log_of(threads=3)
    assert asked == [3]


# --- the loop's trainings ------------------------------------------------------------------------


def pairs_of(objective="safety"):
    """Return pairs as the loop builds them, a refusal preferred to an answer."""
    found = []
    for question, answer in zip(QUESTIONS, [*ANSWERS, ANSWERS[0]], strict=True):
        prompt = Prompt.make(
            user(question), goal=question, intent="harmful", category="", source="test"
        )
        chosen, rejected = (
            Response(f"{name} {question}", prompt.id, text, "m", "s", 0, "stop")
            for name, text in (("chosen", REFUSAL), ("rejected", answer))
        )
        margins = {"safety": 0.0, "helpfulness": 0.0}
        found.append(
            PreferencePair.make(
                prompt, chosen, rejected, objective=objective, margins=margins, flip_probability=0.0
            )
        )
    return from_pairs(found)


def fit(start, reference, out, policy=FULL, anchors=(), **settings):
    """Train as the train stage does."""
    defaults = {"epochs": 2.0, "batch_size": 4, "lr": 5e-3, "noise": "none"}
    return fit_policy(
        start,
        reference,
        out,
        pairs_of(),
        anchors,
        Train(**(defaults | settings)),
        policy,
        seed=0,
    )


@pytest.mark.parametrize("kind", [FULL, Policy(adapter="lora", lora_rank=2)])
def test_a_policy_is_trained_from_folder_to_folder(base, tmp_path, kind):
    done = fit(base, base, tmp_path / "out", kind, [(user("it ?"), "teal .")], epochs=3.0)
    assert isinstance(done, Trained)
    assert len(done.log) == 3
    assert done.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert done.log[0]["anchor_kl"] == pytest.approx(0, abs=1e-6)
    assert done.log[-1]["anchor_kl"] > 0
    assert is_adapter(tmp_path / "out") == (kind.adapter == "lora")
    after = load_policy(tmp_path / "out")[0]
    assert not torch.allclose(logits_of(after), logits_of(load_policy(base)[0]), atol=1e-3)
    refuse_quarantined(tmp_path / "out")
    again = fit(base, base, tmp_path / "again", kind, [(user("it ?"), "teal .")], epochs=3.0)
    assert without_clock(again.log) == without_clock(done.log)
    assert moved(tmp_path / "out", tmp_path / "again") == 0
    receipt = json.loads((tmp_path / "out/selfmoa.json").read_text())
    assert "base" not in receipt


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (1.0, 1), (1.5, 2), (3.0, 3)])
def test_epochs_become_steps_rounded_up(base, tmp_path, epochs, steps):
    assert len(fit(base, base, tmp_path / "out", epochs=epochs).log) == steps


def test_anchors_hold_the_policy_near_its_reference(base, tmp_path):
    anchors = [(user(q), a) for q in QUESTIONS for a in ANSWERS]

    def drift(weight, given=anchors):
        done = fit(base, base, tmp_path / "out", LORA, given, anchor_weight=weight, epochs=12.0)
        return done.log[-1].get("anchor_kl"), done.log[-1]["kl_estimate"]

    free, held = drift(0.0), drift(30.0)
    assert free[0] is None
    assert drift(30.0, [])[0] is None
    assert held[0] > 0
    assert held[1] < 0.8 * free[1]


def test_anchors_that_are_too_long_are_left_out(base, tmp_path):
    long = (user("it ?"), "teal . " * 200)
    done = fit(base, base, tmp_path / "out", LORA, [long], epochs=1.0)
    assert "anchor_kl" not in done.log[0]
    assert done.dropped == {}


def test_best_of_k_trains_on_the_chosen_sides(base, tmp_path):
    done = fit(base, base, tmp_path / "out", loss="sft", epochs=8.0)
    before, after = (load_policy(folder)[0] for folder in (base, tmp_path / "out"))
    n_tokens = sum(len(row.completions[0]) for row in tokens_of([REFUSAL] * 4))
    expected = -sum(logp(before, q, REFUSAL) for q in QUESTIONS) / n_tokens
    assert done.log[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert done.log[-1]["loss"] < done.log[0]["loss"]
    assert min(logp(after, q, REFUSAL) - logp(before, q, REFUSAL) for q in QUESTIONS) > 0


def reset_from(base, out, **more):
    prompts = [
        Prompt.make(user(q), goal=q, intent="benign", category="", source="test") for q in QUESTIONS
    ]
    how = {"policy": FULL, "seed": 0, "progress": lambda *_: None} | more
    return fit_reset(
        base,
        out,
        list(zip(prompts, [*ANSWERS, ANSWERS[0]], strict=True)),
        Reset(steps=12, batch_size=4, lr=5e-3),
        how.pop("policy"),
        **how,
    )


@pytest.mark.parametrize("kind", [FULL, LORA])
def test_the_reset_is_tuned_on_its_examples_and_quarantined(base, tmp_path, kind):
    done = reset_from(base, tmp_path / "reset", policy=kind)
    assert len(done.log) == 12
    assert done.log[-1]["loss"] < 0.8 * done.log[0]["loss"]
    assert done.layout == "rows"
    with pytest.raises(Quarantined):
        refuse_quarantined(tmp_path / "reset")
    assert is_adapter(tmp_path / "reset") == (kind.adapter == "lora")
    assert load_policy(tmp_path / "reset")[0].config.hidden_size == 32
    receipt = json.loads((tmp_path / "reset/selfmoa.json").read_text())
    assert receipt["start_digest"] == digest_tree(base)
    assert receipt["data_digest"]


def test_a_reset_that_was_cut_off_is_quarantined_already(base, tmp_path, monkeypatch):
    """Its checkpoints hold weights whose safety is half gone."""
    cut_after(monkeypatch, 4)
    with pytest.raises(Cut):
        reset_from(base, tmp_path / "reset", policy=Policy(checkpoint_every=4))
    assert list((tmp_path / "reset").rglob("model.safetensors"))
    with pytest.raises(Quarantined):
        refuse_quarantined(tmp_path / "reset")


@pytest.fixture(scope="module")
def rounds(base, tmp_path_factory):
    """A reset adapter and the adapter of a first round, both on one base."""
    folder = tmp_path_factory.mktemp("rounds")
    reset_from(base, folder / "reset", policy=LORA)
    fit(folder / "reset", folder / "reset", folder / "first", LORA)
    return folder


def test_a_second_round_goes_on_with_the_adapter_of_the_first(rounds, base, tmp_path, monkeypatch):
    loaded = []
    real = fitting.load_model
    monkeypatch.setattr(
        fitting, "load_model", lambda folder, **how: loaded.append(folder) or real(folder, **how)
    )
    before = digest_tree(rounds / "reset"), digest_tree(rounds / "first")
    done = fit(rounds / "first", rounds / "reset", tmp_path / "second", LORA, loss="dpo")
    # The reference is a second adapter on the same base: no second model was loaded.
    assert loaded == [rounds / "first"]
    ours, theirs = load_policy(rounds / "first")[0], load_policy(rounds / "reset")[0]
    expected = [
        logp(ours, q, REFUSAL) - logp(theirs, q, REFUSAL) - logp(ours, q, a) + logp(theirs, q, a)
        for q, a in zip(QUESTIONS, [*ANSWERS, ANSWERS[0]], strict=True)
    ]
    assert min(map(abs, expected)) > 1e-2
    assert done.log[0]["log_ratio_gap"] == pytest.approx(sum(expected) / 4, abs=1e-3)
    assert (digest_tree(rounds / "reset"), digest_tree(rounds / "first")) == before
    settings = json.loads((tmp_path / "second/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    assert [path.name for path in (tmp_path / "second").iterdir() if path.is_dir()] == []
    assert weights_of(tmp_path / "second").keys() == weights_of(rounds / "first").keys()
    assert moved(tmp_path / "second", rounds / "first") > 1e-3
    assert list(load_policy(tmp_path / "second")[0].peft_config) == ["default"]


def test_a_second_round_that_was_cut_off_ends_with_the_same_bytes(rounds, tmp_path, monkeypatch):
    anchors = [(user(q), a) for q in QUESTIONS for a in ANSWERS]
    how = (Policy(adapter="lora", checkpoint_every=2), anchors)
    given = {"epochs": 5.0}
    whole = fit(rounds / "first", rounds / "reset", tmp_path / "whole", *how, **given)
    with monkeypatch.context() as patch:
        cut_after(patch, 2)
        with pytest.raises(Cut):
            fit(rounds / "first", rounds / "reset", tmp_path / "cut", *how, **given)
    again = fit(rounds / "first", rounds / "reset", tmp_path / "cut", *how, **given)
    assert without_clock(again.log) == without_clock(whole.log)
    assert len(again.log) == 5
    assert digest_tree(tmp_path / "cut") == digest_tree(tmp_path / "whole")


@pytest.mark.parametrize("key", ["start", "reference_digest"])
def test_another_start_or_reference_does_not_go_on(rounds, tmp_path, monkeypatch, key):
    how = (tmp_path / "out", Policy(adapter="lora", checkpoint_every=1))
    with monkeypatch.context() as patch:
        cut_after(patch, 1)
        with pytest.raises(Cut):
            fit(rounds / "first", rounds / "reset", *how)
    start, reference = ("reset", "reset") if key == "start" else ("first", "first")
    with pytest.raises(TrainingChanged, match=f" were made with {key}='sha256:"):
        fit(rounds / start, rounds / reference, *how)


def test_a_second_adapter_is_as_good_a_reference_as_a_model_of_its_own(rounds, base, tmp_path):
    whole = merged(load_policy(rounds / "reset")[0])
    save_policy(whole, TOKENIZER, tmp_path / "merged")
    anchors = [(user(q), a) for q in QUESTIONS for a in ANSWERS[:2]]
    one = fit(rounds / "first", rounds / "reset", tmp_path / "one", LORA, anchors)
    two = fit(rounds / "first", tmp_path / "merged", tmp_path / "two", LORA, anchors)
    assert one.log[0]["anchor_kl"] > 1e-4
    for a, b in zip(one.log, two.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["anchor_kl"] == pytest.approx(b["anchor_kl"], abs=1e-4)
    assert moved(tmp_path / "one", tmp_path / "two") < 2e-3


def test_whole_models_have_a_reference_of_their_own(base, tmp_path):
    fit(base, base, tmp_path / "first")
    done = fit(tmp_path / "first", base, tmp_path / "second", loss="dpo")
    ours, theirs = load_policy(tmp_path / "first")[0], load_policy(base)[0]
    expected = [
        logp(ours, q, REFUSAL) - logp(theirs, q, REFUSAL) - logp(ours, q, a) + logp(theirs, q, a)
        for q, a in zip(QUESTIONS, [*ANSWERS, ANSWERS[0]], strict=True)
    ]
    assert done.log[0]["log_ratio_gap"] == pytest.approx(sum(expected) / 4, abs=1e-3)


def test_the_recipe_gives_each_objective_its_own_weight_first():
    settings = Train(weights={"safety": 0.6, "helpfulness": 0.4}, beta=0.2, noise="robust")
    found = make_objectives(settings)
    assert list(found) == ["safety", "helpfulness"]
    assert found["safety"].settings == LossSettings(0.2, (0.6, 0.4), "robust")
    assert found["safety"].others == ("helpfulness",)
    assert found["helpfulness"].settings == LossSettings(0.2, (0.4, 0.6), "robust")
    assert found["helpfulness"].others == ("safety",)
    assert all(objective.loss is LOSSES["modpo"] for objective in found.values())
    alone = make_objectives(
        Train(weights={"safety": 1.0, "helpfulness": 0.0}, loss="dpo", gamma=0.5)
    )
    assert list(alone) == ["safety"]
    assert alone["safety"].loss is LOSSES["dpo"]
    assert alone["safety"].settings.gamma == 0.5
    three = make_objectives(Train(weights={"safety": 0.5, "helpfulness": 0.3, "refusal": 0.2}))
    assert three["helpfulness"].others == ("safety", "refusal")
    assert three["helpfulness"].settings.weights == (0.3, 0.5, 0.2)


# --- policies on disk ----------------------------------------------------------------------------


def test_a_whole_policy_is_read_back_as_it_was(tmp_path):
    model = tiny()
    save_policy(model, TOKENIZER, tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
    assert (tmp_path / "p/model.safetensors").is_file()
    assert not list((tmp_path / "p").glob("*.bin"))
    assert not is_adapter(tmp_path / "p")
    again, tokenizer = load_policy(tmp_path / "p")
    assert torch.equal(logits_of(again), logits_of(model))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert merged(again) is again
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ids == (TOKENIZER.bos_token_id, TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)


def test_an_adapter_is_read_back_and_folds_into_its_base(adapter):
    ours, _ = load_policy(adapter)
    assert not any(p.requires_grad for p in ours.parameters())
    expected = logits_of(ours)
    folded = merged(ours)
    assert not isinstance(folded, PeftModel)
    assert not any("lora" in name for name, _ in folded.named_parameters())
    assert_close(logits_of(folded), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_starts_as_its_base_and_leaves_it_alone(base, pairs, tmp_path):
    model, _ = load_policy(base)
    before = logits_of(model)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    model = make_trainable(model, LORA, seed=0)
    assert_close(logits_of(model), before)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert sum(".lora_A." in name for name in trainable) == 7  # attention and MLP, not the head
    train(pairs, str(base), tmp_path / "out", **QUICK)
    trained = policy.unwrapped(load_policy(tmp_path / "out")[0])
    kept = {n.replace(".base_layer", ""): p for n, p in trained.named_parameters()}
    assert all(torch.equal(frozen[name], kept[name]) for name in frozen)


def test_new_adapters_depend_on_their_seed_only(base):
    def weights(seed):
        torch.manual_seed(99)
        model = make_trainable(load_policy(base)[0], Policy(adapter="lora", lora_rank=4), seed)
        return {n: p for n, p in model.named_parameters() if "lora_A" in n}

    one, same, other = weights(0), weights(0), weights(1)
    assert one
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not any(torch.equal(one[n], other[n]) for n in one)


def test_an_adapter_is_trained_on_rather_than_stacked(adapter):
    model = load_model(adapter, trainable=True)
    assert any(p.requires_grad for p in model.parameters())
    assert make_trainable(model, LORA, seed=1) is model
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].lora_alpha == 32
    whole = tiny()
    assert make_trainable(whole, FULL, seed=1) is whole
    assert all(p.requires_grad for p in whole.parameters())


def test_a_training_that_starts_from_an_adapter_has_it_for_reference(adapter, pairs, tmp_path):
    done = train(pairs, str(adapter), tmp_path / "out", **QUICK)
    assert done.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert moved(tmp_path / "out", adapter) > 1e-3
    assert not list((tmp_path / "out").glob("*/"))


def test_an_adapter_is_not_quietly_trained_on_where_all_weights_are_asked_for(
    adapter, pairs, tmp_path
):
    with pytest.raises(SelfmoaError, match="adapter"):
        train(pairs, str(adapter), tmp_path / "out", adapter="full", **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_quarantined_policy_is_marked_and_refused(tmp_path):
    save_policy(tiny(), TOKENIZER, tmp_path / "reset", quarantined=True)
    save_policy(tiny(), TOKENIZER, tmp_path / "plain")
    assert "not for use" in (tmp_path / "reset" / QUARANTINE_MARK).read_text()
    with pytest.raises(Quarantined):
        refuse_quarantined(tmp_path / "reset")
    refuse_quarantined(tmp_path / "plain")
    refuse_quarantined(tmp_path / "nowhere")


def test_the_mark_is_there_before_the_weights_are(tmp_path):
    class Unwritable:
        def save_pretrained(self, folder, **_):
            assert (folder / QUARANTINE_MARK).is_file()
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_policy(Unwritable(), TOKENIZER, tmp_path / "reset", quarantined=True)
    with pytest.raises(Quarantined):
        refuse_quarantined(tmp_path / "reset")
