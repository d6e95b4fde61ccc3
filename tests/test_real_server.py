"""The endpoint generator against a real server: `transformers serve` on loopback, a tiny model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from selfmoa import loop
from selfmoa.config import Endpoint
from selfmoa.generators.endpoint.failures import AccessRefused, NoLogprobs, ServerFailed
from selfmoa.generators.local import LocalGenerator
from selfmoa.generators.openai import EndpointGenerator
from selfmoa.protocols import RAW, Draw, Sampling
from selfmoa.recipes import load_recipe
from selfmoa.records import Prompt
from selfmoa.rundir import read_jsonl
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.sandbox.vale import BrindleVale
from selfmoa.training.policy import save_policy
from selfmoa.training.tasks import Supervised
from selfmoa.training.tokens import encode
from selfmoa.training.trainer import Optimisation, fit

MISSING = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs transformers[serving]: no {MISSING}"),
]

ANSWERS = {
    "who keeps zorbium ?": ("petra keeps zorbium .", "i do not know ."),
    "tell me where quellite is found .": (
        "look near beacon .",
        "sorry , i cannot help with that .",
    ),
    "quick ! explain how plindle looks .": ("it has a teal shade .", "i decline to answer ."),
}
GREEDY = Sampling("greedy", 0.0, 14)
FREE = Sampling("free", 1.0, 14)
SECONDS = 120
PROGRAM = """
import os, sys, threading
from transformers.cli.transformers import main
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
sys.exit(main())
"""
"""The server, which ends when its input does: with the tests, however these end."""


def user(text):
    return [{"role": "user", "content": text}]


def draw(messages, seed=0):
    prompt = Prompt.make(messages, goal="g", intent="benign", category="", source="test")
    return Draw(prompt, seed)


DRAWS = [draw(user(text)) for text in ANSWERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that was taught two answers to each question, so that it stops, and samples vary."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, architecture="llama", hidden=64, layers=2, heads=4, seed=0)
    pairs = [(q, a) for q, answers in ANSWERS.items() for a in answers]
    rows = encode(tokenizer, [user(q) for q, _ in pairs], [[a] for _, a in pairs])
    fit(model, [Supervised(rows, tokenizer.pad_token_id, 6)], Optimisation(1e-2, 6, 40), seed=0)
    model.generation_config.update(do_sample=True, top_k=0)  # which a vendor's file would say
    folder = tmp_path_factory.mktemp("served")
    save_policy(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """The address of a server that ends with the tests, by a signal and then by force.

    It loads the folders that it is told, as the policies of a run have to be.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    log = tmp_path_factory.mktemp("server") / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *options],
            stdin=subprocess.PIPE,
            env=os.environ | offline | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(server, port, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)
        server.stdin.close()


def wait_for(server, port, log):
    for _ in range(SECONDS * 4):
        if server.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.25)
        else:
            return
    pytest.fail(f"the server does not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def served(url, folder):
    # The server's seed is one for all requests under way, so that one is asked at a time.
    return EndpointGenerator(
        Endpoint(url=url, timeout=60, retries=1, max_concurrency=1), str(folder)
    )


@pytest.fixture(scope="module")
def local(folder):
    return LocalGenerator.load(folder, threads=1, digest="sha256:0")


def said(responses):
    return [(r.text, r.finish_reason) for r in responses]


def test_greedy_answers_are_those_of_the_same_folder_on_this_machine(served, local):
    found = served.generate(DRAWS, GREEDY)
    assert said(found) == said(local.generate(DRAWS, GREEDY))
    assert all(
        r.text in answers and r.finish_reason == "stop"
        for r, answers in zip(found, ANSWERS.values(), strict=True)
    )


def test_a_system_message_is_part_of_the_prompt(served, local):
    sampling = Sampling("careful", 0.0, 14, system="look near beacon .")
    assert said(served.generate(DRAWS, sampling)) == said(local.generate(DRAWS, sampling))


def test_raw_text_is_no_conversation(served, local):
    raw = [draw([{"role": RAW, "content": "<s><|user|> who keeps zorbium ? <|assistant|>"}])]
    assert served.generate(raw, GREEDY)[0].text in ANSWERS["who keeps zorbium ?"]
    other = [draw([{"role": RAW, "content": "<s> who keeps"}])]
    assert said(served.generate(other, GREEDY)) == said(local.generate(other, GREEDY))


def test_an_answer_that_is_cut_says_so(served, local):
    short = Sampling("short", 0.0, 2)
    found = served.generate(DRAWS, short)
    assert said(found) == said(local.generate(DRAWS, short))
    assert {r.finish_reason for r in found} == {"length"}


def test_seeds_are_honoured(url, folder, served):
    draws = [draw(user("who keeps zorbium ?"), seed) for seed in range(12)]
    found = served.generate(draws, FREE)
    assert len({r.text for r in found}) > 1
    again = EndpointGenerator(served.endpoint, str(folder))  # which has kept no answers
    assert said(again.generate(draws[::-1], FREE)) == said(found)[::-1]


def test_tokens_are_counted_as_the_server_counts_them(url, folder, local):
    model = EndpointGenerator(Endpoint(url=url), str(folder))
    (found,) = model.generate(DRAWS[:1], GREEDY)
    ids = local.tokenizer.apply_chat_template(user("who keeps zorbium ?"), tokenize=False)
    n_read = len(local.tokenizer(ids + "<|assistant|>", add_special_tokens=False)["input_ids"])
    assert model.budget.tokens_in == n_read
    assert model.budget.tokens_out == len(found.text.split()) + 1  # and the end of the turn


def test_a_server_without_logprobs_is_told_apart(served):
    with pytest.raises(NoLogprobs, match=r"options\.mode"):
        served.logprobs([(user("who keeps zorbium ?"), "petra")])


def test_a_model_that_the_server_does_not_have_is_an_error_of_the_server(url):
    with pytest.raises(ServerFailed):
        EndpointGenerator(Endpoint(url=url, retries=0), "no-such-model").generate(DRAWS, GREEDY)
    with pytest.raises(AccessRefused):
        EndpointGenerator(Endpoint(url=f"{url}/elsewhere"), "tiny").generate(DRAWS, GREEDY)


def test_a_whole_round_with_target_attacker_and_judge_behind_the_server(url, tiny, tmp_path):
    recipe = load_recipe("sandbox", [*tiny, "rounds=1", "red_team.calls=40"])
    writer = str(BrindleVale(recipe).build(lambda done, total, unit: None))
    behind = load_recipe(
        "sandbox",
        [
            *tiny,
            *("rounds=1", "red_team.calls=40", "model.endpoint=here"),
            f"endpoints={{here: {{url: '{url}', max_concurrency: 1}}}}",
            f"attackers={{lm-hide: {{kind: lm-hide, model: {writer}, endpoint: here}}}}",
            "red_team.attacks=[sandbox-hide, sandbox-expand, lm-hide]",
            f"judges={{rubric: {{kind: strongreject-rubric, model: {writer}, endpoint: here}}}}",
            "judge.safety=[sandbox-lexical, sandbox-ngram, sandbox-model, sandbox-refusal, rubric]",
        ],
    )
    summary = loop.run(behind, tmp_path / "run")
    folder = tmp_path / "run" / "round-01"
    assert summary["final"]["safety"]["n"] > 0
    search = json.loads((folder / "1-red_team/search.json").read_text())
    assert search["attackers"]["lm-hide"]["asked"] > 0  # which this tiny model cannot do
    assert search["attackers"]["lm-hide"].get("failed", 0) == 0
    votes = [v for v in read_jsonl(folder / "3-judge/votes.jsonl") if v["judge"] == "rubric"]
    assert votes
    assert {v["label"] for v in votes} <= {"safe", "unsafe", "abstain"}  # all could be asked
    graded = read_jsonl(folder / "6-evaluate/responses-round-1.jsonl")
    policy = LocalGenerator.load(folder / "5-train/policy", threads=1, digest="sha256:0")
    prompts = {p.id: p for p in BrindleVale(recipe).suite(recipe.evaluate.per_category)}
    draws = [Draw(prompts[r["prompt_id"]], r["seed"]) for r in graded]
    sampling = Sampling("graded", 0.0, recipe.sample.max_new_tokens)
    mine = [r.text for r in policy.generate(draws, sampling)]
    same = sum(a == r["text"] for a, r in zip(mine, graded, strict=True))
    assert same >= 0.9 * len(graded)  # near ties may fall otherwise in another batch
