"""The doctor: a sound recipe passes, and each of ten planted faults is found by its own check."""

from __future__ import annotations

import json
import pickle
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from replicas import write_replica
from selfmoa.commands.checks import doctor as command
from selfmoa.console import doctor as shown
from selfmoa.doctor import Finding, examine, is_sick, machine
from selfmoa.recipes import load_recipe

ACTS = ("brew", "sing", "bury", "wake", "bind", "melt", "ride", "feed", "paint", "carve")
THINGS = ("moon tea", "star dust", "a fog bell", "the old tide", "an ember owl", "a glass eel")


def edit(path: Path, **more: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


class Case:
    """A recipe on a replica and files of its own: sound until something is done to it."""

    def __init__(self, home: Path, replica: Path) -> None:
        self.home = home
        self.model = Path(shutil.copytree(replica, home / "model"))
        (self.model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A replica\n")
        wishes = [(act, thing) for act in ACTS for thing in THINGS]
        self.seeds = self._write("seeds.jsonl", [{"prompt": f"how to {a} {t}"} for a, t in wishes])
        tame = [{"prompt": f"a song on {t} that we {a}", "response": "La."} for a, t in wishes]
        self.tame = self._write("tame.jsonl", tame)
        self.more: list[str] = []

    def _write(self, name: str, rows: list[dict[str, str]]) -> Path:
        path = self.home / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def examine(self, *, deep: bool = False) -> list[Finding]:
        recipe = load_recipe(
            "sandbox",
            [
                "policy.world=files",
                f"model.name={self.model}",
                f"data.seeds=[{self.seeds}]",
                f"data.instructions=[{self.tame}]",
                "policy.max_length=512",
                "policy.adapter=lora",
                "red_team.attacks=[rewrite]",
                "sample.batch_size=16",
                f"judges.one={{kind: llamaguard3, model: {self.model}}}",
                f"judges.two={{kind: qwen3guard, model: {self.model}}}",
                f"judges.three={{kind: wildguard, model: {self.model}}}",
                f"judges.rubric={{kind: helpfulness-rubric, model: {self.model}, family: rubric}}",
                f"judges.grade={{kind: shieldgemma, model: {self.model}}}",
                f"judges.rated={{kind: helpfulness-rubric, model: {self.model}, family: rated}}",
                f"judges.refused={{kind: qwen3guard-refusal, model: {self.model}, family: other}}",
                "judge.safety=[one, two, three]",
                "judge.helpfulness=rubric",
                "judge.refusal=refusal-rules",
                "evaluate.judges={safety: grade, helpfulness: rated, refusal: refused}",
                *self.more,
            ],
        )
        return examine(recipe, deep=deep, directory=self.home / "runs")


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("replica") / "model", "qwen2.5")


@pytest.fixture
def case(tmp_path: Path, replica: Path) -> Case:
    return Case(tmp_path, replica)


def failed(findings: list[Finding]) -> dict[str, Finding]:
    return {f.check: f for f in findings if f.level == "fail"}


def test_a_sound_recipe_passes(case: Case) -> None:
    findings = case.examine()
    assert [f for f in findings if f.level != "ok"] == []
    assert not is_sick(findings)
    checks = {f.check for f in findings}
    assert {"packages", "device", "recipe", "data", "intake model", "licence model"} <= checks
    assert {"template model", "system prompt model", "length", "memory", "disk"} <= checks
    assert shown.verdict(findings).endswith("ready to run.")


def test_first_ids_are_shown(case: Case) -> None:
    from selfmoa.training.policy import load_tokenizer
    from selfmoa.training.tokens import encode_prompts

    (ids,) = encode_prompts(load_tokenizer(case.model), [[{"role": "user", "content": "Hi"}]])
    (found,) = [f for f in case.examine() if f.check == "template model"]
    assert " ".join(map(str, ids[:8])) in found.seen


# --- ten planted faults --------------------------------------------------------------------------


def pickled(case: Case, patch: pytest.MonkeyPatch) -> None:
    (case.model / "model.safetensors").unlink()
    (case.model / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def template_gone(case: Case, patch: pytest.MonkeyPatch) -> None:
    (case.model / "chat_template.jinja").unlink()


def begins_twice(case: Case, patch: pytest.MonkeyPatch) -> None:
    path = case.model / "chat_template.jinja"
    path.write_text("{{ bos_token }}{{ bos_token }}" + path.read_text())
    more = {"bos_token": "<|endoftext|>"}
    edit(case.model / "tokenizer_config.json", **more)


def end_unknown(case: Case, patch: pytest.MonkeyPatch) -> None:
    edit(case.model / "tokenizer_config.json", eos_token=None)


def system_refused(case: Case, patch: pytest.MonkeyPatch) -> None:
    path = case.model / "chat_template.jinja"
    no = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    path.write_text(no + path.read_text())


def too_long(case: Case, patch: pytest.MonkeyPatch) -> None:
    case.more += ["policy.max_length=99999"]


def bad_row(case: Case, patch: pytest.MonkeyPatch) -> None:
    case.seeds.write_text('{"prompt": "fine"}\n{"prompt": 7}\n')


def no_gpu(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.cuda.is_available", lambda: False)
    case.more += ["policy.device=cuda"]


def old_package(case: Case, patch: pytest.MonkeyPatch) -> None:
    real = machine.version
    patch.setattr(
        machine, "version", lambda name: "5.2.0" if name == "transformers" else real(name)
    )


def disk_full(case: Case, patch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    patch.setattr(machine.shutil, "disk_usage", lambda path: usage(10, 9, 1))


def few_families(case: Case, patch: pytest.MonkeyPatch) -> None:
    case.more += ["judge.safety=[one, two]"]


def little_memory(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine, "_memory_gb", lambda recipe: 0.51)


def nowhere(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    case.more += ["judges.one.model=someone/not-here-1B"]


def unreachable(case: Case, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_HUB_OFFLINE", raising=False)
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    case.more += ["judges.one.model=someone/not-here-1B"]


FAULTS: list[tuple[Callable[[Case, pytest.MonkeyPatch], None], str, str, str]] = [
    (pickled, "intake model", "pytorch_model.bin", "take a version that has"),
    (template_gone, "template model", "no chat template", "instruct"),
    (begins_twice, "template model", "bos_token twice", "delete one"),
    (end_unknown, "template model", "no eos_token", "set eos_token"),
    (system_refused, "system prompt model", "refuses or drops", "sample.k_careful=0"),
    (too_long, "length", "2048 positions", "policy.max_length=2048"),
    (bad_row, "data", "row 2", "mend the file"),
    (no_gpu, "device", "no cuda", "policy.device=auto"),
    (old_package, "packages", "transformers is 5.2.0", "pip install -U 'transformers>="),
    (disk_full, "disk", "0.0 GB free", "make room"),
    (few_families, "recipe", "2 judges of 2 families", "judge.safety"),
    (little_memory, "memory", "GB", "try "),
    (nowhere, "model judges.one", "not here", "name a folder"),
    (unreachable, "model judges.one", "the hub cannot be asked", "name a folder"),
]


@pytest.mark.parametrize(
    ("plant", "check", "seen", "remedy"), FAULTS, ids=lambda p: getattr(p, "__name__", "")
)
def test_a_planted_fault_is_found_by_its_check_alone(
    case: Case,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[Case, pytest.MonkeyPatch], None],
    check: str,
    seen: str,
    remedy: str,
) -> None:
    plant(case, monkeypatch)
    found = failed(case.examine())
    others = set(found) - {check}
    if plant is pickled:  # nothing of such a model is loaded, so nobody can say more of it
        others -= {"template model"}
    assert others == set()
    assert seen in found[check].seen
    assert remedy in found[check].remedy
    assert f"-> {found[check].remedy}"[:20] in shown.line(found[check])


def test_what_a_run_would_survive_is_a_warning(case: Case) -> None:
    (case.model / "README.md").unlink()
    edit(case.model / "generation_config.json", eos_token_id=None)
    findings = case.examine()
    assert not is_sick(findings)
    assert {f.check for f in findings if f.level == "warn"} == {"licence model"}


def test_a_model_of_a_hub_should_be_pinned(
    case: Case, replica: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(replica, cached / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    case.more += ["judges.one.model=someone/tiny"]
    found = {f.check: f for f in case.examine()}
    assert found["revision judges.one"].level == "warn"
    assert found["revision judges.one"].remedy == f"set judges.one.revision={commit}"
    case.more += [f"judges.one.revision={commit}"]
    found = {f.check: f for f in case.examine()}
    assert found["revision judges.one"].level == "ok"


# --- endpoints -----------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that lists its models; what it says can be changed."""
    said: dict[str, Any] = {"status": 200, "body": {"data": [{"id": "guard"}]}, "asked": []}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said["asked"].append((self.path, self.headers.get("Authorization")))
            body = json.dumps(said["body"]).encode()
            self.send_response(said["status"])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1", said
        running.shutdown()
        thread.join()


def behind(case: Case, url: str, model: str = "guard") -> None:
    case.more += [
        f"endpoints.far={{url: '{url}', key_env: DOCTOR_TEST_KEY}}",
        f"judges.one={{kind: llamaguard3, model: {model}, endpoint: far}}",
    ]


def test_an_endpoint_that_answers_is_well(
    case: Case, server: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCTOR_TEST_KEY", "moon-tea")
    behind(case, server[0])
    findings = case.examine()
    assert failed(findings) == {}
    assert "endpoint far" in {f.check for f in findings}
    assert server[1]["asked"] == [("/v1/models", "Bearer moon-tea")]
    assert not any("moon-tea" in f.seen + f.remedy for f in findings)


def test_faults_of_endpoints_are_told_apart(
    case: Case, server: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, said = server
    behind(case, url)
    assert "export DOCTOR_TEST_KEY" in failed(case.examine())["endpoint far"].remedy
    assert said["asked"] == []  # without its key, nobody is asked
    monkeypatch.setenv("DOCTOR_TEST_KEY", "moon-tea")
    for status, body, seen in (
        (401, {}, "refuses the key (401)"),
        (500, {}, "says 500"),
        (200, {"data": [{"id": "other"}]}, "no model 'guard', but other"),
        (200, ["odd"], "another form"),
        (302, {}, "says 302"),
    ):
        said["status"], said["body"] = status, body
        found = failed(case.examine())
        assert set(found) == {"endpoint far"}
        assert seen in found["endpoint far"].seen
        assert "moon-tea" not in found["endpoint far"].seen
    case.more.clear()
    behind(case, "http://127.0.0.1:9/v1")
    assert "does not answer" in failed(case.examine())["endpoint far"].seen


# --- with the models loaded ----------------------------------------------------------------------


def test_padding_and_judges_are_tried(case: Case) -> None:
    found = {f.check: f for f in case.examine(deep=True)}
    assert found["padding"].level == "ok"
    assert found["judge refusal-rules"].level == "ok"  # rules need no model
    for name in ("one", "rubric", "grade"):  # a random model says nothing that can be read
        assert found[f"judge {name}"].level == "fail"
        assert "no usable verdict on 3" in found[f"judge {name}"].seen
        assert "template" in found[f"judge {name}"].remedy


def test_padding_that_changes_answers_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from selfmoa.generators.local import LocalGenerator

    real = LocalGenerator.generate

    def padded(self: Any, draws: Any, sampling: Any) -> Any:
        found = real(self, draws, sampling)
        if len(draws) > 1:
            found[0] = type(found[0])(**(found[0].to_json() | {"text": "other"}))
        return found

    monkeypatch.setattr(LocalGenerator, "generate", padded)
    found = {f.check: f for f in case.examine(deep=True)}
    assert found["padding"].level == "fail"
    assert "Hi!" in found["padding"].seen


@pytest.mark.slow
def test_the_sandbox_passes_with_its_models_loaded(tiny: list[str], tmp_path: Path) -> None:
    findings = examine(load_recipe("sandbox", tiny), deep=True, directory=tmp_path)
    assert failed(findings) == {}
    assert not any(tmp_path.iterdir())


def test_the_command_prints_findings_and_tells_by_its_exit_code() -> None:
    def run(*more: str) -> Result:
        return CliRunner().invoke(command, ["sandbox", *more])

    well = run()
    assert well.exit_code == 0, well.stdout
    assert "ready to run." in well.stdout
    ill = run("judge.safety=[sandbox-lexical, sandbox-ngram]", "--json")
    assert ill.exit_code == 21
    (found,) = [f for f in json.loads(ill.stdout) if f["level"] == "fail"]
    assert found["check"] == "recipe"
    assert found["remedy"]
