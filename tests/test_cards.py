"""Cards: every rate with what it rests on, front matter that hubs read, nothing that runs away."""

from __future__ import annotations

import re

import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard
from hypothesis import given
from hypothesis import strategies as st

from receipts import estimate, receipt
from selfmoa.report.cards import BASIS, RATES, dataset_card, model_card


def results(card):
    """Return the cells of the table of results."""
    table = card.partition("## Results\n\n")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def front(card):
    return yaml.safe_load(card.removeprefix("---\n").partition("\n---\n")[0])


def test_every_rate_stands_in_a_row_with_interval_n_unjudged_and_judge():
    head, _, *rows = results(model_card(receipt()))
    assert head == list(BASIS)
    measured = [row for row in rows if row[2] != "not measured"]
    assert ["", "this model", "5.0%", "0.0–10.0", "120", "3", "other-family"] in measured
    assert ["", "change", "−1.0 points", "−6.0 to +4.0", "120", "3", "refusal-rules"] in measured
    for row in measured:
        assert len(row) == len(BASIS)
        assert all(row[2:]), row


def test_no_percentage_stands_outside_the_table_of_results():
    card = model_card(receipt())
    body = card.partition("---\n\n#")[2].replace(
        card.partition("## Results\n\n")[2].partition("\n\n")[0], ""
    )
    assert re.findall(r"\d[\d.]*\s?%", body) == ["95%"]  # of the intervals


def test_what_was_not_measured_is_said_and_is_no_zero():
    rows = results(model_card(receipt()))
    labels = [row[0] for row in rows if row[0]]
    row = rows[[r[0] for r in rows].index(RATES["helpfulness"])]
    assert set(RATES.values()) <= set(labels)
    assert row[2:] == ["not measured", "n/a", "0", "0", "none"]


def test_a_rate_that_nobody_judged_has_no_value_and_still_its_counts():
    given_ = receipt()
    given_["estimates"]["round 2"]["asr"] = estimate("asr", None, n=0, unjudged=50)
    card = model_card(given_)
    assert ["", "this model", "n/a", "n/a", "0", "50", "other-family"] in results(card)
    types = [m["type"] for m in front(card)["model-index"][0]["results"][0]["metrics"]]
    assert types == ["asr_heldout_styles", "over_refusal"]


@pytest.mark.parametrize(
    ("kind", "library", "relation"),
    [("adapter", "peft", "adapter"), ("model", "transformers", "finetune")],
)
def test_the_front_matter_is_what_a_hub_reads(kind, library, relation):
    data = ModelCard(model_card(receipt(kind=kind))).data
    assert (data.base_model, data.library_name) == ("org/base", library)
    assert data["base_model_relation"] == relation
    assert data.pipeline_tag == "text-generation"
    assert {"selfmoa", "safety"} <= set(data.tags)
    found = {r.metric_type: r for r in data.eval_results}
    assert found["over_refusal"].metric_value == 0.02
    assert found["over_refusal"].metric_args["judge"] == "refusal-rules"
    assert set(found["asr"].metric_args) == {"low", "high", "n", "n_unjudged", "judge"}


def test_a_base_of_this_machine_is_no_base_of_the_hub():
    base = receipt()["base"] | {"is_local": True, "revision": None, "name": "my-model"}
    card = model_card(receipt(base=base))
    assert "base_model" not in front(card)
    assert "my-model (a local model)" in card


def test_base_judges_rounds_and_data_are_told():
    card = model_card(receipt())
    assert "org/base at revision " + "0" * 40 in card
    assert "`sha256:33`" in card
    assert "| guard | trained it | safety | llamaguard | llama | org/guard |" in card
    assert "| other-family | graded it | safety | wildguard | mistral | org/other |" in card
    assert "1 accepted, 2 accepted, 3 refused" in card
    assert "| Round | Pairs of helpfulness | Pairs of safety | Dropped |" in card
    assert "| 2 | 0 | 8 | 0 |" in card
    assert "No label of a person was used." in card


def test_bad_news_is_told_in_front_of_the_results():
    run = receipt()["run"] | {"finished": False}
    card = model_card(receipt(run=run, drift={"alarm": True}))
    head = card.partition("## Results")[0]
    assert "not finished" in head
    assert "part ways" in head
    assert "> **" not in model_card(receipt())


def test_a_dataset_card_counts_warns_and_says_how_to_hand_it_on():
    card = dataset_card(receipt(kind="pairs"))
    data = DatasetCard(card).data
    assert data["configs"] == [{"config_name": "default", "data_files": "pairs.jsonl"}]
    assert data["size_categories"] == ["n<1K"]
    assert "extra_gated_prompt" in data.to_dict()
    body = card.partition("---\n\n#")[2]
    assert body.index("Content warning") < body.index("50 pairs")
    assert "| too close | 5 | 0 |" in body
    assert "gate it" in body


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_no_name_breaks_the_table_or_the_front_matter(name):
    given_ = receipt()
    for judge in given_["judges"]:
        judge["name"] = name
    given_["run"]["name"] = given_["recipe"]["name"] = name
    given_["estimates"]["round 2"]["asr"]["judge"] = name
    card = model_card(given_)
    assert front(card)["model-index"][0]["name"] == name
    rows = card.partition("## Results\n\n")[2].partition("\n\n")[0].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(BASIS) + 1}
    assert "<script" not in card.partition("---\n\n#")[2]
