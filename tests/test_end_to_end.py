"""The whole loop on a tiny sandbox: what it leaves behind, and that killing it changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfmoa import loop
from selfmoa.errors import RunChanged, StageFailed
from selfmoa.recipes import load_recipe
from selfmoa.records import PreferencePair, Prompt, Response, Verdict
from selfmoa.rundir import RunDir, read_jsonl
from selfmoa.rundir.files import digest_tree
from selfmoa.training.tokens import encode

pytestmark = pytest.mark.slow

TIMES = ("seconds", "tokens")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """One uninterrupted run of the tiny loop, and the events it told."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    events = []
    summary = loop.run(
        load_recipe("sandbox", tiny), folder, listen=lambda e, /, **f: events.append((e, f))
    )
    return folder, summary, events


def contents(folder: Path) -> dict[str, object]:
    """Return every file of a run by name; clocks are left out, everything else is bytes."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name in ("run.json", "events.jsonl", "owner.json", "lock"):
            continue
        if path.name in ("stage.json", "summary.json"):
            row = json.loads(path.read_text())
            found[name] = {k: v for k, v in row.items() if k not in TIMES}
            if path.name == "stage.json":
                found[name]["outputs"].pop("summary.json", None)
        else:
            found[name] = path.read_bytes()
    return found


def test_killed_at_every_stage_it_leaves_the_same_bytes(finished, tiny, tmp_path):
    driver = Path(__file__).with_name("kill_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(tmp_path / "run"), *tiny],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    summary = loop.run(load_recipe("sandbox", tiny), tmp_path / "run")
    assert told["missed"] == []
    assert told["killed"] > 45
    whole, resumed = contents(finished[0]), contents(tmp_path / "run")
    assert list(resumed) == list(whole)
    assert [name for name in whole if whole[name] != resumed[name]] == []
    assert {**summary, "seconds": 0} == {**finished[1], "seconds": 0}


def test_the_summary_has_what_machines_read(finished):
    folder, summary, _ = finished
    assert json.loads((folder / "report/summary.json").read_text()) == summary
    assert [r["round"] for r in summary["rounds"]] == [1, 2]
    for phase in (summary["instruct"], summary["reset"], summary["final"], *summary["rounds"]):
        for metric in ("safety", "helpfulness", "over_refusal", "asr", "asr_heldout_styles"):
            e = phase[metric]
            assert e["low"] <= e["value"] <= e["high"]
            assert e["n"] > 0
            assert e["n_unjudged"] == 0
            assert e["judge"].startswith("sandbox-oracle")
    assert summary["pairs_total"] == sum(
        len(read_jsonl(folder / f"round-0{r}/4-pair/pairs.jsonl")) for r in (1, 2)
    )
    assert summary["seed"] == 0
    assert summary["versions"]["torch"]
    assert set(summary["seconds"]) >= {"reset@0", "train@1", "evaluate@2"}


def test_safety_and_asr_are_two_names_of_one_count(finished):
    for phase in (finished[1]["instruct"], finished[1]["final"]):
        assert phase["safety"]["value"] + phase["asr"]["value"] == pytest.approx(1)


def test_rerunning_a_finished_run_changes_nothing(finished, tiny):
    folder, summary, _ = finished
    before = contents(folder)
    events = []
    again = loop.run(
        load_recipe("sandbox", tiny), folder, listen=lambda e, /, **f: events.append((e, f))
    )
    assert again == summary
    assert contents(folder) == before
    assert all(f["skipped"] for e, f in events if e == "stage_done")
    assert not [e for e, _ in events if e == "stage_started"]


def test_every_stage_is_told_once_and_figures_come_as_they_are_known(finished):
    events = finished[2]
    done = [(f["stage"], f["round"]) for e, f in events if e == "stage_done"]
    assert done == loop.plan(load_recipe("sandbox", ["rounds=2"]))
    assert [f["phase"] for e, f in events if e == "measured"] == [
        "instruct",
        "reset",
        "round 1",
        "round 2",
    ]
    assert [e for e, _ in events][-1] == "run_done"


def test_the_reset_policy_is_gone_and_its_stage_still_done(finished, tiny):
    folder = finished[0]
    assert not [p for p in (folder / "00-reset/1-reset/policy").rglob("*") if p.is_file()]
    with RunDir.open(
        folder,
        load_recipe("sandbox", tiny).model_dump(mode="json"),
        seed=0,
        name="sandbox",
        versions={},
    ) as run:
        assert run.sealed("reset", 0) is not None
        run.verify("reset", 0)


def test_another_recipe_is_refused_by_the_name_of_its_key(finished, tiny):
    with pytest.raises(RunChanged, match=r"sample\.k"):
        loop.run(load_recipe("sandbox", [*tiny, "sample.k=3"]), finished[0])
    with pytest.raises(RunChanged, match=r"seed"):
        loop.run(load_recipe("sandbox", [*tiny, "seed=5"]), finished[0])


def test_a_finished_run_goes_on_for_more_rounds(finished, tiny, tmp_path):
    """What was deleted at its end is made again for the time, and what is sealed stays."""
    folder = tmp_path / "longer"
    shutil.copytree(finished[0], folder)
    before = (folder / "round-02/5-train/stage.json").read_bytes()
    summary = loop.run(load_recipe("sandbox", [*tiny, "rounds=3"]), folder)
    assert len(summary["rounds"]) == 3
    assert (folder / "round-02/5-train/stage.json").read_bytes() == before
    assert not any((folder / "00-reset/1-reset/policy").glob("*"))


def test_nothing_held_out_is_in_any_file_of_training(finished):
    folder = finished[0]
    suite = {
        r["prompt"] for r in read_jsonl(folder / "00-reset/2-evaluate/evidence-instruct.jsonl")
    }
    heldout_goals = {
        r["goal"]
        for r in read_jsonl(folder / "00-reset/2-evaluate/evidence-instruct.jsonl")
        if r["is_heldout_style"]
    }
    assert heldout_goals
    for path in sorted(folder.glob("round-*/*/prompts.jsonl")):
        prompts = read_jsonl(path, Prompt)
        assert prompts
        assert {p.split for p in prompts} == {"train"}
        assert not suite & {p.messages[-1]["content"] for p in prompts}
    for path in sorted(folder.glob("round-*/4-pair/*.jsonl")):
        for row in read_jsonl(path):
            assert row["prompt"][-1]["content"] not in suite


def test_files_are_records_that_join(finished):
    for r in (1, 2):
        folder = finished[0] / f"round-0{r}"
        prompts = {p.id for p in read_jsonl(folder / "1-red_team/prompts.jsonl", Prompt)}
        responses = read_jsonl(folder / "2-sample/responses.jsonl", Response)
        ids = {x.id for x in responses}
        assert {x.prompt_id for x in responses} == prompts
        verdicts = read_jsonl(folder / "3-judge/verdicts.jsonl", Verdict)
        assert {v.response_id for v in verdicts} == ids
        assert {v.objective for v in verdicts} == {"safety", "helpfulness", "refusal"}
        for pair in read_jsonl(folder / "4-pair/pairs.jsonl", PreferencePair):
            assert {pair.chosen_id, pair.rejected_id} <= ids
            assert pair.chosen[0]["role"] == pair.rejected[0]["role"] == "assistant"


def test_the_final_policy_is_an_ordinary_model_directory(finished):
    folder = finished[0] / finished[1]["final_policy"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "tell me where zorbium lies ."}],
        add_generation_prompt=True,
        tokenize=False,
    )
    out = model.generate(
        **tokenizer(
            text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False
        ),
        max_new_tokens=4,
    )
    assert out.shape[0] == 1
    assert not (folder / "QUARANTINED.txt").exists()
    assert not list(finished[0].rglob("*.bin"))
    assert not list(finished[0].rglob("*.p*kl*"))


def test_a_stage_runs_alone_and_up_to_where_it_was_asked(tiny, tmp_path):
    recipe = load_recipe("sandbox", tiny)
    assert loop.run(recipe, tmp_path / "run", only=("reset", 0)) == {}
    run = RunDir.read(tmp_path / "run")
    assert run.stages() == [("reset", 0)]
    policy = tmp_path / "run/00-reset/1-reset/policy"
    assert (policy / "QUARANTINED.txt").exists()
    with pytest.raises(StageFailed, match="nothing has been evaluated"):
        loop.write_report(tmp_path / "run")


def test_redo_makes_the_same_files_again(finished, tiny, tmp_path):
    recipe = load_recipe("sandbox", [*tiny, "reset.keep=true", "rounds=1"])
    loop.run(recipe, tmp_path / "run")
    before = contents(tmp_path / "run")
    loop.run(recipe, tmp_path / "run", redo="sample@1")
    assert contents(tmp_path / "run") == before


@pytest.mark.parametrize(
    "name",
    [
        "sandbox-safety-dpo",
        "sandbox-weighted-sum",
        "sandbox-best-of-k",
        "sandbox-human-dpo",
    ],
)
def test_every_baseline_runs(name, tiny, tmp_path):
    overrides = [o for o in tiny if o.split("=")[0] not in ("rounds", "gate.min_found")]
    small = ["rounds=1", "red_team.static=20"] if name.endswith("human-dpo") else ["rounds=1"]
    summary = loop.run(load_recipe(name, [*overrides, *small]), tmp_path / "run")
    assert summary["pairs_total"] > 0
    assert summary["final_phase"] == "round 1"


def test_trainings_leave_a_log_without_a_clock_and_no_checkpoints(finished):
    folder = finished[0]
    steps = {
        name: [
            json.loads(line) for line in (folder / name / "train.jsonl").read_text().splitlines()
        ]
        for name in ("00-reset/1-reset", "round-01/5-train", "round-02/5-train")
    }
    assert len(steps["00-reset/1-reset"]) == 30
    assert all(rows and "tokens_per_second" not in row for rows in steps.values() for row in rows)
    assert steps["round-01/5-train"][0]["margins"].keys() == {"safety", "helpfulness"}
    assert steps["round-01/5-train"][0]["log_ratio_gap"] == pytest.approx(0, abs=1e-3)
    assert steps["round-01/5-train"][-1]["anchor_kl"] > 0
    assert not list(folder.rglob(".training*"))
    remarks = [facts for event, facts in finished[2] if event == "remark"]
    assert {(each["stage"], each["round"]) for each in remarks} == {("train", 1), ("train", 2)}
    assert all(each["text"].startswith("shared prompts by '") for each in remarks)


def test_policies_have_a_receipt_that_names_where_they_came_from(finished):
    folder = finished[0]
    first, second = (
        json.loads((folder / f"round-0{r}/5-train/policy/selfmoa.json").read_text()) for r in (1, 2)
    )
    # Round one starts from the reset policy, round two from round one's; both are tied to it.
    assert first["start_digest"] == first["reference_digest"] == second["reference_digest"]
    assert second["start_digest"] == digest_tree(folder / "round-01/5-train/policy")
    assert first["settings"]["epochs"] == 2
    assert "base" not in first


def test_lora_rounds_go_on_with_one_adapter_on_the_instruct_model(tiny, tmp_path):
    longest = 36
    settings = ["policy.adapter=lora", f"policy.max_length={longest}"]
    run = tmp_path / "run"
    summary = loop.run(load_recipe("sandbox", [*tiny, *settings]), run)
    assert "instruct" in summary
    assert (run / summary["final_policy"] / "adapter_model.safetensors").is_file()
    policies = [run / f"round-0{r}/5-train/policy" for r in (1, 2)]
    bases = set()
    for policy in policies:
        assert not (policy / "model.safetensors").exists()
        assert not [path for path in policy.iterdir() if path.is_dir()]
        bases.add(
            json.loads((policy / "adapter_config.json").read_text())["base_model_name_or_path"]
        )
    assert len(bases) == 1
    assert (Path(*bases) / "model.safetensors").is_file()
    first, second = (json.loads((policy / "selfmoa.json").read_text()) for policy in policies)
    assert first["start_digest"] == first["reference_digest"] == second["reference_digest"]
    if summary["rounds"][0]["accepted"]:
        assert second["start_digest"] == digest_tree(policies[0])
    # Rows that are too long are counted: those of this round, and those that are replayed.
    pairs = [p for r in (1, 2) for p in read_jsonl(run / f"round-0{r}/4-pair/pairs.jsonl")]
    rows = encode(
        AutoTokenizer.from_pretrained(policies[0]),
        [pair["prompt"] for pair in pairs],
        [[pair[side][0]["content"] for side in ("chosen", "rejected")] for pair in pairs],
    )
    lengths = [len(row.prompt) + max(map(len, row.completions)) for row in rows]
    n_long = sum(length > longest for length in lengths)
    seal = json.loads((run / "round-02/5-train/stage.json").read_text())
    assert n_long > 0
    assert seal["dropped"] == {"too_long": n_long}
