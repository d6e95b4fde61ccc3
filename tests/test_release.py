"""Exports of a real run with a LoRA adapter: what peers can read, and what is not handed out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.data_utils import is_conversational

from selfmoa import loop
from selfmoa.console.release import exported, merged
from selfmoa.errors import MissingFile, OutputTaken, Quarantined, RunDamaged
from selfmoa.recipes import load_recipe
from selfmoa.release import facts
from selfmoa.release.export import export_pairs, export_policy
from selfmoa.release.hub import push
from selfmoa.release.merging import merge
from selfmoa.release.refusals import NotForRelease, OtherBase
from selfmoa.rundir import digest_file, digest_tree
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training.policy import QUARANTINE_MARK, load_policy
from selfmoa.training.preferences import read_preferences

pytestmark = [
    pytest.mark.slow,
    # TRL sets a training argument by the name transformers has just deprecated; not ours.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]
ASKED = [{"role": "user", "content": "where is quellite kept ?"}]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run whose policy is an adapter that does differ from its base."""
    adapter = ["rounds=1", "policy.adapter=lora", "policy.lora_rank=4", "train.lr=5e-3"]
    folder = tmp_path_factory.mktemp("release") / "run"
    loop.run(load_recipe("sandbox", [*tiny, *adapter]), folder)
    return folder


@pytest.fixture(scope="module")
def adapter(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "adapter"
    export_policy(run, folder)
    return folder


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run that a test may harm."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def policy_of(run):
    return run / "round-01/5-train/policy"


def logits(model, tokenizer):
    ids = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(input_ids=ids["input_ids"]).logits


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- adapters and whole models -------------------------------------------------------------------


def test_an_exported_adapter_is_the_policy_of_the_run_for_peft(run, adapter):
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert_close(logits(model, tokenizer), logits(*load_policy(policy_of(run))), rtol=0, atol=0)
    assert tokenizer.chat_template == load_policy(policy_of(run))[1].chat_template
    assert {p.name for p in adapter.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "selfmoa.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_merged_export_answers_as_the_adapter_on_its_base(run, adapter, tmp_path):
    export_policy(run, tmp_path / "whole", merged=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    policy, _ = load_policy(adapter)
    assert_close(logits(model, tokenizer), logits(policy, tokenizer), rtol=0, atol=1e-4)
    with policy.disable_adapter():
        apart = logits(model, tokenizer) - logits(policy, tokenizer)
    assert apart.abs().max() > 1e-2  # else the test could not tell
    assert not list((tmp_path / "whole").glob(".*"))
    assert not list((tmp_path / "whole").glob("adapter*"))


def test_merging_a_run_and_merging_its_export_give_the_same_folder(run, adapter, tmp_path):
    found = merge(run, tmp_path / "one")
    assert merge(adapter, tmp_path / "other") == found
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name
    assert "The policy of round 1, model" in merged(found)
    assert push(tmp_path / "one", "somebody/vale")["refused"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_merge_keeps_the_number_format_and_rounds_once(tmp_path, dtype):
    base = tiny_base(tmp_path / "base", dtype)
    tiny_adapter(tmp_path / "base", tmp_path / "adapter")
    found = merge(tmp_path / "adapter", tmp_path / "whole")
    assert found["base"]["checked"] is False
    assert "could not be compared" in merged(found)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto")
    assert {p.dtype for p in whole.parameters()} == {dtype}
    policy, _ = load_policy(tmp_path / "adapter")
    layer = policy.base_model.model.model.layers[0].self_attn.q_proj
    full = layer.base_layer.weight + layer.get_delta_weight("default")
    mine = whole.model.layers[0].self_attn.q_proj.weight
    assert_close(mine, full.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
    assert not torch.equal(mine, base.model.layers[0].self_attn.q_proj.weight)


def tiny_base(folder, dtype):
    """A random model of a hundred thousand weights, with a tokenizer."""
    tokenizer = build_tokenizer()
    shape = {"architecture": "llama", "hidden": 32, "layers": 1, "heads": 2}
    model = build_model(tokenizer, **shape, seed=0).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def tiny_adapter(base, folder):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


# --- receipts and cards --------------------------------------------------------------------------


def test_a_receipt_says_what_the_run_found_and_what_lies_in_the_folder(run, adapter):
    receipt = json.loads((adapter / "selfmoa.json").read_text())
    summary = json.loads((run / "report/summary.json").read_text())
    assert receipt["estimates"]["round 1"] == summary["final"]
    assert receipt["estimates"]["instruct"] == summary["instruct"]
    assert receipt["run"]["rounds"] == {"1": True}
    for name, digest in receipt["files"].items():
        assert digest_file(adapter / name) == digest
    base = Path(
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    )
    weights = "model.safetensors"
    assert receipt["base"]["files"][weights] == digest_file(base / weights)
    assert receipt["base"]["name"] == base.name
    trained, graded = (
        {j["family"] for j in receipt["judges"] if j["role"] == role}
        for role in ("trained", "graded")
    )
    assert trained
    assert graded
    assert not trained & graded
    kept = receipt["data"]["rounds"]["1"]["kept"]
    assert sum(kept.values()) == summary["pairs_total"]
    assert "policy of round 1, adapter" in exported(receipt)


def test_nothing_that_a_model_said_is_in_card_or_receipt(run, adapter):
    told = (adapter / "README.md").read_text() + (adapter / "selfmoa.json").read_text()
    said = [
        json.loads(line)["text"]
        for path in run.rglob("*.jsonl")
        for line in path.read_text().splitlines()
        if path.name.startswith(("responses", "evidence"))
    ]
    asked = [
        json.loads(line)["messages"][-1]["content"]
        for line in (run / "round-01/1-red_team/prompts.jsonl").read_text().splitlines()
    ]
    long = {text for text in [*said, *asked] if len(text.split()) > 3}
    assert len(long) > 20
    assert [text for text in long if text in told] == []


def test_no_path_of_this_machine_is_in_what_can_be_pushed(run, tmp_path):
    export_policy(run, tmp_path / "whole", merged=True)
    export_pairs(run, tmp_path / "pairs", acknowledged=True)
    for path in [*(tmp_path / "whole").iterdir(), *(tmp_path / "pairs").iterdir()]:
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data, path.name
        assert str(Path(tmp_path.anchor) / "tmp").encode() not in data, path.name


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/srv/models/guard", "guard"),
        ("/srv/models/guard/", "guard"),
        ("~/guard", "guard"),
        ("C:\\models\\guard", "guard"),
        ("http://10.0.0.7:8000/v1", "(an address)"),
        ("org/guard", "org/guard"),
        ("/no_think", "/no_think"),
        ("say / think / speak", "say / think / speak"),
        (["/srv/a.jsonl", 3, None], ["a.jsonl", 3, None]),
        ({"model": "/srv/a"}, {"model": "a"}),
    ],
)
def test_paths_and_addresses_stay_here(value, public):
    assert facts.local_names(value) == public


# --- what is not handed out ----------------------------------------------------------------------


def test_a_run_whose_policies_were_all_refused_has_nothing_to_export(copy, tmp_path):
    edit(copy / "round-01/6-evaluate/decision.jsonl", accepted=False, reason="too many refusals")
    with pytest.raises(NotForRelease, match="too many refusals"):
        export_policy(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_decision_that_was_changed_afterwards_is_noticed(copy, tmp_path):
    edit(copy / "round-01/6-evaluate/decision.jsonl", reason="please")
    with pytest.raises(RunDamaged, match=r"decision\.jsonl"):
        export_policy(copy, tmp_path / "out")


def test_weights_that_were_changed_afterwards_are_noticed(copy, tmp_path):
    path = policy_of(copy) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    with pytest.raises(RunDamaged, match=r"adapter_model\.safetensors"):
        export_policy(copy, tmp_path / "out")


def test_an_unfinished_run_is_exported_only_if_that_is_said(copy, tmp_path):
    (copy / "report/stage.json").unlink()
    for refused in (
        lambda: export_policy(copy, tmp_path / "out"),
        lambda: export_pairs(copy, tmp_path / "out", acknowledged=True),
        lambda: merge(copy, tmp_path / "out"),
    ):
        with pytest.raises(NotForRelease, match="not finished"):
            refused()
    assert export_policy(copy, tmp_path / "out", unfinished=True)["run"]["finished"] is False
    assert "was not finished" in (tmp_path / "out/README.md").read_text()


def test_a_quarantined_policy_is_never_exported_or_merged(copy, adapter, tmp_path):
    (policy_of(copy) / QUARANTINE_MARK).write_text("unsafe on purpose")
    shutil.copytree(adapter, tmp_path / "marked")
    (tmp_path / "marked" / QUARANTINE_MARK).write_text("unsafe on purpose")
    for refused in (
        lambda: export_policy(copy, tmp_path / "out"),
        lambda: export_policy(copy, tmp_path / "out", merged=True),
        lambda: merge(copy, tmp_path / "out"),
        lambda: merge(policy_of(copy), tmp_path / "out"),
        lambda: merge(tmp_path / "marked", tmp_path / "out"),
        lambda: push(tmp_path / "marked", "somebody/vale"),
    ):
        with pytest.raises(Quarantined):
            refused()
    assert not (tmp_path / "out").exists()


def test_an_adapter_on_a_quarantined_base_is_not_merged(tmp_path):
    tiny_base(tmp_path / "base", torch.float32)
    tiny_adapter(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "base" / QUARANTINE_MARK).write_text("unsafe on purpose")
    with pytest.raises(Quarantined):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_a_run_is_not_exported_with_another_base(run):
    context = facts.open_run(run, unfinished=False, listen=None)
    with pytest.raises(OtherBase, match="sha256:other"):
        facts.base(context, "sha256:other")


def test_an_adapter_is_not_merged_into_another_base(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "moved")
    settings = tmp_path / "moved/adapter_config.json"
    base = Path(json.loads(settings.read_text())["base_model_name_or_path"])
    shutil.copytree(base, tmp_path / "base")
    edit(settings, base_model_name_or_path=str(tmp_path / "base"))
    merge(tmp_path / "moved", tmp_path / "same")  # elsewhere, and the same weights
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(OtherBase, match=r"model\.safetensors is sha256"):
        merge(tmp_path / "moved", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("digest", ["same", "other"])
def test_the_start_that_a_training_noted_is_compared_too(tmp_path, digest):
    tiny_base(tmp_path / "base", torch.float32)
    tiny_adapter(tmp_path / "base", tmp_path / "adapter")
    noted = digest_tree(tmp_path / "base") if digest == "same" else "sha256:other"
    receipt = {"base": str(tmp_path / "base"), "start_digest": noted}
    (tmp_path / "adapter/selfmoa.json").write_text(json.dumps(receipt))
    if digest == "other":
        with pytest.raises(OtherBase, match="sha256:other"):
            merge(tmp_path / "adapter", tmp_path / "out")
    else:
        assert merge(tmp_path / "adapter", tmp_path / "out")["base"]["checked"] is True


def test_nothing_is_written_over_and_nothing_half_done_stays(run, adapter, tmp_path, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/mine.txt").write_text("mine")
    for refused in (
        lambda: export_policy(run, tmp_path / "taken"),
        lambda: export_pairs(run, tmp_path / "taken", acknowledged=True),
        lambda: merge(adapter, tmp_path / "taken"),
    ):
        with pytest.raises(OutputTaken):
            refused()
    (tmp_path / "empty").mkdir()
    export_policy(run, tmp_path / "empty")
    monkeypatch.setattr("selfmoa.release.export.model_card", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_policy(run, tmp_path / "half")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "taken"]


def test_what_is_no_adapter_is_not_merged(run, adapter, tmp_path):
    with pytest.raises(MissingFile):
        merge(tmp_path / "nothing", tmp_path / "out")
    merge(adapter, tmp_path / "whole")
    with pytest.raises(NotForRelease, match="no adapter"):
        merge(tmp_path / "whole", tmp_path / "out")


# --- pairs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "pairs"
    export_pairs(run, folder, acknowledged=True)
    return folder


def test_pairs_are_written_only_for_those_who_know_what_is_in_them(run, tmp_path):
    with pytest.raises(NotForRelease, match="--acknowledge-harmful"):
        export_pairs(run, tmp_path / "out", acknowledged=False)
    assert not (tmp_path / "out").exists()


def test_pairs_load_as_a_conversational_preference_dataset(run, pairs, tmp_path):
    data = load_dataset(str(pairs), split="train", cache_dir=str(tmp_path))  # by its card
    mine = (run / "round-01/4-pair/pairs.jsonl").read_text().splitlines()
    assert len(data) == len(mine) > 0
    assert all(is_conversational({k: row[k]}) for row in data for k in ("prompt", "chosen"))
    first = next(row for row in data if row["id"] == json.loads(mine[0])["id"])
    for key, value in json.loads(mine[0]).items():
        assert first[key] == value, key
    assert set(first["margins"]) == {"safety", "helpfulness"}
    assert (first["round"], bool(first["category"]), bool(first["style"])) == (1, True, True)


def test_trl_trains_on_exported_pairs_as_they_are(run, pairs, tmp_path):
    file = str(pairs / "pairs.jsonl")
    data = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path))
    export_policy(run, tmp_path / "whole", merged=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")  # TRL's reference is from here
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(whole, args=settings, train_dataset=data, processing_class=tokenizer)
    for row, read in zip(data, trainer.train_dataset, strict=True):
        for side in ("chosen", "rejected"):
            text = tokenizer.decode(read[f"{side}_ids"], skip_special_tokens=True)
            assert text == row[side][0]["content"]
    assert trainer.train().training_loss == pytest.approx(0.6931, abs=1e-3)  # log 2: no step yet


def test_our_own_training_reads_exported_pairs_with_their_margins(pairs):
    found = read_preferences(pairs / "pairs.jsonl", {"safety": 0.7, "helpfulness": 0.3})
    assert {p.objective for p in found} <= {"safety", "helpfulness"}
    assert all(set(p.margins) == {"safety", "helpfulness"} for p in found)


def test_the_card_of_pairs_counts_what_is_there(pairs):
    receipt = json.loads((pairs / "selfmoa.json").read_text())
    rows = (pairs / "pairs.jsonl").read_text().splitlines()
    kept = receipt["data"]["rounds"]["1"]["kept"]
    assert sum(kept.values()) == len(rows)
    assert f"{len(rows):,} pairs" in (pairs / "README.md").read_text()
    assert f"{len(rows):,} pairs, of rounds 1." in exported(receipt)
    assert push(pairs, "somebody/pairs")["refused"] == []
    for path in (pairs, *pairs.iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path.name
