"""A plan: what it counts is what runs, what it says fits does, and nothing is loaded for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from replicas import write_replica
from selfmoa import loop
from selfmoa.commands.checks import plan as command
from selfmoa.console.planning import planned
from selfmoa.planning import costs, plan
from selfmoa.planning.models import find_models
from selfmoa.planning.work import Work
from selfmoa.recipes import load_recipe
from selfmoa.rundir import RunDir, read_jsonl
from selfmoa.training import estimates

ACTS = ("brew", "sing", "bury", "wake", "bind", "melt", "ride", "feed", "paint", "carve")
THINGS = ("moon tea", "star dust", "a fog bell", "the old tide", "an ember owl", "a glass eel")


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_replica(folder / "model", "llama-3.2", hidden=64, layers=3, vocab=700)
    wishes = [(act, thing) for act in ACTS for thing in THINGS]
    write(folder / "seeds.jsonl", [{"prompt": f"how to {a} {t}"} for a, t in wishes])
    tame = [{"prompt": f"a song on {t} that we {a}", "response": "La."} for a, t in wishes]
    write(folder / "tame.jsonl", tame)
    return folder


def on_replica(home: Path, *more: str) -> list[str]:
    return [
        "rounds=1",
        "policy.world=files",
        "policy.adapter=lora",
        f"model.name={home / 'model'}",
        f"data.seeds=[{home / 'seeds.jsonl'}]",
        f"data.instructions=[{home / 'tame.jsonl'}]",
        "red_team.attacks=[rewrite]",
        *more,
    ]


def lines(found: dict, round_: int) -> dict[str, dict]:
    return {line["stage"]: line for line in found["stages"] if line["round"] == round_}


def of(line: dict, what: str) -> dict:
    (found,) = [w for w in line["work"] if w["what"] == what]
    return found


# --- calls ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_planned_calls_are_those_of_a_run(
    tiny: list[str], model_cache: Path, tmp_path: Path
) -> None:
    recipe = load_recipe("sandbox", [*tiny, "rounds=1"])
    found = plan(recipe)
    loop.run(recipe, tmp_path / "run")

    opened = RunDir.read(tmp_path / "run")

    def rows(stage: str, round_: int, file: str) -> list[dict]:
        return [row for f in opened.folder(stage, round_).glob(file) for row in read_jsonl(f)]

    start, first = lines(found, 0), lines(found, 1)
    attempts = Counter(row["batch"] == 0 for row in rows("red_team", 1, "attempts.jsonl"))
    assert of(first["red_team"], "control group")["calls"] == attempts[True]
    assert of(first["red_team"], "attacks")["calls"] == attempts[False]
    again = len(rows("red_team", 1, "responses.jsonl"))
    assert again <= of(first["red_team"], "attacks, again")["calls"] <= 2 * again + 24
    for round_, line in ((0, start["evaluate"]), (1, first["evaluate"])):
        graded = rows("evaluate", round_, "evidence-*.jsonl")
        assert of(line, "suite")["calls"] == len(graded) > 0
        assert of(line, "probes")["calls"] == len(rows("evaluate", round_, "probes.jsonl"))
    responses = len(rows("sample", 1, "responses.jsonl"))
    handed_on = len(rows("red_team", 1, "prompts.jsonl"))
    others = of(first["sample"], "answers to others")["calls"]
    attacked = of(first["sample"], "answers to attacks")["calls"]
    assert responses == others + (handed_on - 24) * 4
    assert attacked >= responses - others
    assert first["judge"]["verdicts"] >= len(rows("judge", 1, "votes.jsonl")) >= 6 * others
    steps = len(rows("train", 1, "train.jsonl"))
    pairs = len(rows("pair", 1, "pairs.jsonl"))
    assert steps <= first["train"]["steps"]
    bound = load_recipe("sandbox", [*tiny, "rounds=1", f"pair.max_pairs={pairs}"])
    assert abs(lines(plan(bound), 1)["train"]["steps"] - steps) <= 2
    size = sum(p.stat().st_size for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert size / 3 < found["disk"]["run"] < 6 * size


def test_a_plan_of_the_shipped_sandbox_is_read_in_seconds_and_shown() -> None:
    found = plan(load_recipe("sandbox"))
    text = planned(found)
    assert found["memory"]["fits"] is None
    assert "3 rounds at most" in text
    assert f"{found['totals']['generations']:,} answers" in text
    assert [line["stage"] for line in found["stages"][:2]] == ["reset", "evaluate"]
    assert len(found["stages"]) == len(loop.plan(load_recipe("sandbox")))
    stages = [(line["stage"], line["round"]) for line in found["stages"]]
    assert stages == loop.plan(load_recipe("sandbox"))
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("override", "stage", "key"),
    [
        ("red_team.calls=600", "red_team", "generations"),
        ("red_team.checks=0", "red_team", "generations"),
        ("sample.k=2", "sample", "generations"),
        ("evaluate.per_category=50", "evaluate", "generations"),
        ("evaluate.probes=10", "evaluate", "generations"),
        ("pair.max_pairs=100", "train", "steps"),
        ("train.epochs=1", "train", "steps"),
        ("judge.safety=[sandbox-lexical, sandbox-ngram, sandbox-model]", "judge", "verdicts"),
        ("red_team.static=50", "red_team", "generations"),
    ],
)
def test_every_budget_counts(override: str, stage: str, key: str) -> None:
    before, after = (plan(load_recipe("sandbox", more)) for more in ([], [override]))
    assert lines(after, 1)[stage][key] < lines(before, 1)[stage][key]


# --- memory --------------------------------------------------------------------------------------


def test_a_models_own_shape_is_planned_with(home: Path) -> None:
    found = plan(load_recipe("sandbox", on_replica(home)))
    (policy,) = [m for m in found["models"] if "policy" in m["roles"]]
    from transformers import AutoModelForCausalLM

    real = AutoModelForCausalLM.from_pretrained(home / "model").num_parameters()
    assert (policy["parameters"], policy["guess"]) == (real, "")
    assert found["tokens_by"] == "the policy's tokenizer"
    evaluate = lines(found, 0)["evaluate"]
    assert evaluate["memory_bytes"] > 4 * real
    assert lines(found, 1)["train"]["memory_bytes"] > 4 * real


@pytest.mark.parametrize("batch_size", [8, 32])
def test_planned_memory_is_what_answering_takes(
    home: Path, tmp_path: Path, batch_size: int
) -> None:
    from selfmoa.generators.devices import Device
    from selfmoa.generators.local import LocalGenerator
    from selfmoa.protocols import Draw, Sampling
    from selfmoa.registry import resolve
    from selfmoa.training.estimates import LiveBytes

    large = write_replica(tmp_path / "large", "qwen2.5", hidden=256, layers=4, vocab=800)
    more = [
        *on_replica(home),
        f"model.name={large}",
        f"sample.batch_size={batch_size}",
        "sample.max_new_tokens=48",
        "data.styles=[plain]",
    ]
    recipe = load_recipe("sandbox", more)
    line = lines(plan(recipe), 0)["evaluate"]
    suite = resolve("world", "files")(recipe).suite(300)[:batch_size]
    model = LocalGenerator.load(large, threads=1, digest="sha256:00", device=Device("cpu", "fp32"))
    model.stops = [model.pad]  # as good as never said: answers are as long as they may be
    weights = sum(p.numel() * p.element_size() for p in model.lm.parameters())
    with LiveBytes() as live:
        model.generate([Draw(p, 0) for p in suite], Sampling("graded", 1.0, 48))
    assert line["memory_bytes"] == pytest.approx(weights + live.peak, rel=0.15)


def test_what_does_not_fit_is_told_with_settings_that_do(home: Path) -> None:
    more = on_replica(home, "policy.adapter=full", "policy.precision=fp32")
    whole = plan(load_recipe("sandbox", more))
    limit = costs.with_overhead(0) + (whole["memory"]["peak_gb"] - costs.with_overhead(0)) / 2
    found = plan(load_recipe("sandbox", more), limit)["memory"]
    assert found["fits"] is False
    assert found["overrides"]
    again = plan(load_recipe("sandbox", [*more, *found["overrides"]]), limit)["memory"]
    assert again["fits"] is True, (found, again)
    assert again["overrides"] == []
    hopeless = plan(load_recipe("sandbox", more), 0.1)["memory"]
    assert "take a smaller model" in hopeless["remedy"]


def test_models_that_fit_alone_take_turns(home: Path, tmp_path: Path) -> None:
    other = write_replica(tmp_path / "judge", "qwen2.5", hidden=64, layers=3)
    more = [
        *on_replica(home),
        f"judges.own={{kind: llamaguard3, model: {other}}}",
        "judge.safety=[own, sandbox-lexical, sandbox-ngram, sandbox-refusal]",
    ]
    found = plan(load_recipe("sandbox", more))
    line = lines(found, 1)["red_team"]
    assert line["memory_together_bytes"] > line["memory_bytes"]
    assert {"policy", "own"} <= {role for m in found["models"] for role in m["roles"]}


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.135),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54),
        ("meta-llama/Llama-3.2-3B-Instruct", 3.2),
        ("microsoft/Phi-4-mini-instruct", 3.8),
        ("someone/small-model", 1.54),
        ("Qwen2.5-0.5B/of-7B", 8.0),
    ],
)
def test_the_size_of_a_model_that_is_not_here_is_guessed_and_said_to_be(
    home: Path, name: str, billions: float
) -> None:
    recipe = load_recipe("sandbox", [*on_replica(home), f"model.name={name}"])
    policy = find_models(recipe, accelerated=True)[0]
    assert policy.parameters / 1e9 == pytest.approx(billions, rel=0.1)
    assert "unknown until it is here" in policy.guess
    assert (policy.to_fetch, policy.held) == (True, "bf16")


# --- money and time ------------------------------------------------------------------------------


def test_prices_of_an_endpoint_are_reckoned_by_hand(home: Path) -> None:
    more = [
        *on_replica(home),
        "endpoints.far.url=http://127.0.0.1:9/v1",
        "endpoints.far.price_in=2.0",
        "endpoints.far.price_out=10.0",
        "endpoints.far.max_requests=5",
        "judges.own={kind: llamaguard3, model: guard, endpoint: far}",
        "judge.safety=[own, sandbox-lexical, sandbox-ngram, sandbox-refusal]",
    ]
    recipe = load_recipe("sandbox", more)
    found = plan(recipe)
    works = [Work("verdicts", "own", 10, 100, 5, is_verdict=True)]
    models = find_models(recipe, accelerated=False)
    (line,) = costs.costs_of(recipe, works, models).values()
    assert line == {"calls": 10, "tokens": 1050, "cost": pytest.approx((1000 * 2 + 50 * 10) / 1e6)}
    assert found["endpoints"]["far"]["cost"] > 0
    assert any("max_requests" in remark for remark in found["remarks"])
    assert "by its prices" in planned(found)


@given(st.integers(1, 4000), st.integers(1, 2000), st.integers(1, 500))
def test_more_work_takes_more_time(calls: int, prompt: int, answer: int) -> None:
    recipe = load_recipe("sandbox")
    (model, *_) = find_models(recipe, accelerated=False)
    work = Work("suite", "policy", calls, prompt, answer)
    for device in costs.DEVICES:
        once, twice = (costs._answering(work, model, device, rows) for rows in (32, 16))
        assert 0 < once <= twice


def test_no_weights_are_loaded_and_no_hub_is_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for module in ("AutoModelForCausalLM",):
        monkeypatch.setattr(f"transformers.{module}.from_pretrained", refuse)
    found = plan(load_recipe("sandbox", [*on_replica(home), "model.name=someone/some-1B"]), 200)
    assert found["memory"]["fits"] is True
    assert found["disk"]["to_fetch"] > 2e9
    assert estimates.parameters(find_models(load_recipe("sandbox"), accelerated=False)[0].config)


def test_the_command_tells_by_its_exit_code_whether_it_fits(home: Path) -> None:
    def run(*more: str) -> Result:
        return CliRunner().invoke(command, ["sandbox", *on_replica(home), *more])

    assert run("--memory", "64").exit_code == 0
    small = run("--memory", "0.52")
    assert small.exit_code == 21
    assert "does not fit in 0.52 GB" in small.stdout
    assert json.loads(run("--json").stdout)["memory"]["fits"] is None
