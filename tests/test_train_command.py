"""`selfmoa train`: what it prints and writes, how it fails, and that neither a power cut nor more
processes change what comes out."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from accelerate import DistributedType
from accelerate.commands.config import load_config_from_file
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import ComputeEnvironment
from safetensors.torch import load_file

from selfmoa import cli, errors
from selfmoa.commands import shared
from selfmoa.console import views
from selfmoa.errors import MissingFile, RecipeError, SelfmoaError
from selfmoa.rundir.files import CHECKPOINT_KILL_POINTS, digest_tree
from selfmoa.sandbox.model import build_model, build_tokenizer
from selfmoa.training import fitting, launch, processes
from selfmoa.training.policy import save_policy

QUESTIONS = [f"tell me where {x} is found ." for x in ("zorbium", "quellite", "vashroot")]
ANSWERS = ["look near beacon .", "it has a teal shade .", "nobody here can say ."]
QUICK = ["train.loss=dpo", "train.lr=5e-3", "train.batch_size=3", "train.epochs=2"]
CPU = """\
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_machines: 1
num_processes: {number}
mixed_precision: "no"
"""


def rows_of_file(**more):
    return [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": "i decline to answer ."}],
            "rejected": [{"role": "assistant", "content": answer}],
            **more,
        }
        for question in QUESTIONS
        for answer in ANSWERS
    ]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    tokenizer = build_tokenizer()
    how = {"architecture": "llama", "hidden": 32, "layers": 1, "heads": 2, "seed": 0}
    save_policy(build_model(tokenizer, **how), tokenizer, folder)
    return folder


@pytest.fixture
def here(model, tmp_path, monkeypatch):
    """A folder to work in, with `model` and `pairs.jsonl`."""
    (tmp_path / "model").symlink_to(model)
    write_rows(tmp_path / "pairs.jsonl", rows_of_file())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*more, pairs="pairs.jsonl", model="model", out="out", settings=QUICK):
    return cli.main(["train", pairs, "--model", model, "--out", out, *settings, *more])


def log_of(folder):
    """Return the steps of a training without the clock."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


# --- what it prints and writes -------------------------------------------------------------------


def test_results_go_to_stdout_and_progress_to_stderr(here, capsys, monkeypatch):
    monkeypatch.setattr(views, "SECONDS_BETWEEN_LINES", 0)
    assert run("train.epochs=4") == 0
    out, err = capsys.readouterr()
    last = log_of(here / "out")[-1]
    assert out == (
        f"12 steps, at the last one loss {last['loss']:.3f}, accuracy {last['accuracy']:.3f}.\n"
        "Policy: out\n"
    )
    told = err.splitlines()
    assert [line for line in told if line.startswith("shared prompts by '")]
    assert [line for line in told if line.startswith("training out: ") and "10" in line]
    assert [line for line in told if line.startswith("training out: ") and "12" in line]


def test_json_is_one_document(here, capsys):
    assert run("--json") == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    last = log_of(here / "out")[-1]
    assert found == {
        "out": "out",
        "steps": 6,
        "dropped": {},
        "layout": json.loads((here / "out/selfmoa.json").read_text())["layout"],
        "last_step": {"loss": last["loss"], "accuracy": last["accuracy"]},
    }


def test_quiet_leaves_results_only(here, capsys):
    assert run("--quiet") == 0
    out, err = capsys.readouterr()
    assert out.startswith("6 steps")
    assert err == ""


def test_plain_is_taken(here, capsys):
    assert run("--plain") == 0
    assert "shared prompts" in capsys.readouterr().err


def test_settings_and_seed_reach_the_training(here, capsys):
    assert run("policy.adapter=full", "train.beta=0.2", "--seed", "3") == 0
    receipt = json.loads((here / "out/selfmoa.json").read_text())
    assert receipt["policy"]["adapter"] == "full"
    assert receipt["settings"]["beta"] == 0.2
    assert receipt["settings"]["loss"] == "dpo"
    assert receipt["seed"] == 3
    assert (here / "out/model.safetensors").is_file()


def test_without_settings_it_trains_an_adapter_on_one_objective(here, capsys):
    assert run(settings=[]) == 0
    receipt = json.loads((here / "out/selfmoa.json").read_text())
    assert receipt["policy"]["adapter"] == "lora"
    assert receipt["settings"]["weights"] == {"preference": 1.0}
    assert receipt["settings"]["lr"] == 5e-5
    # One objective: the default loss is DPO.
    assert log_of(here / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_supervised_training_has_no_accuracy_to_tell(here, capsys):
    assert run("train.loss=sft", "--json") == 0
    assert json.loads(capsys.readouterr().out)["last_step"].keys() == {"loss"}


def test_rows_that_are_too_long_are_counted(here, capsys):
    rows = rows_of_file()
    rows[0]["rejected"][0]["content"] = "nobody here can say . " * 20
    write_rows(here / "pairs.jsonl", rows)
    assert run("policy.max_length=60", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["dropped"] == {"too_long": 1}
    assert "1 of 9 rows are longer than 60 tokens and are left out" in err


def test_what_libraries_print_is_not_in_the_results(here, capfd, monkeypatch):
    def fit(*_, **__):
        os.write(1, b"from C\n")
        return fitting.Trained([{"step": 0, "loss": 0.5}])

    monkeypatch.setattr(fitting, "train", fit)
    assert run("--json") == 0
    assert json.loads(capfd.readouterr().out)["last_step"] == {"loss": 0.5}


# --- how it fails --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["train.bta=1"],
            "train.bta (override 'train.bta=1') is not a known key. Did you mean 'beta'?",
        ),
        (
            ["train.beta=0"],
            "train.beta (override 'train.beta=0') is 0; it should be greater than 0",
        ),
        (
            ["train.beta=x"],
            "train.beta (override 'train.beta=x') is 'x'; it should be a valid number",
        ),
        (["policy.adapter=dora"], "policy.adapter (override 'policy.adapter=dora') is 'dora'"),
        (["policy.max_length=1"], "it should be greater than or equal to 8"),
        (["train.weights={preference: -1}"], "it should be greater than or equal to 0"),
        (["train.lr=.inf"], "override 'train.lr=.inf', line 1: .inf is not a finite number"),
        (["sample.k=2"], "sample is not a known key"),
        (["beta"], "override 'beta': an override looks like section.key=value"),
    ],
)
def test_a_wrong_setting_is_one_sentence(here, capsys, settings, told):
    assert run(settings=settings, model="nowhere") == RecipeError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("selfmoa: ")
    assert told in err
    assert err.count("\n") == 1


def test_all_wrong_settings_are_told_at_once(here, capsys):
    assert run(settings=["train.bta=1", "policy.rank=2"]) == RecipeError.exit_code
    err = capsys.readouterr().err
    assert "the settings: 2 problems\n" in err
    assert "train.bta" in err
    assert "policy.rank" in err


def test_wrong_settings_need_no_torch(here):
    code = (
        "import sys; from selfmoa.cli import main\n"
        "code = main(['train', 'p', '--model', 'm', '--out', 'o', *sys.argv[1:]])\n"
        "print(code, [m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train.bta=1"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "3 []\n"


@pytest.mark.parametrize(
    "args",
    [
        ["train"],
        ["train", "pairs.jsonl", "--out", "out"],
        ["train", "pairs.jsonl", "--model", "model"],
        ["train", "pairs.jsonl", "--model", "model", "--out", "out", "--seed", "-1"],
        ["train", "pairs.jsonl", "--modle", "model", "--out", "out"],
    ],
)
def test_wrong_usage_is_code_2(here, capsys, args):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert (out, "Usage: selfmoa train" in err) == ("", True)
    assert not (here / "out").exists()


MANY = [{"role": "assistant", "content": "look near beacon ."}]
BAD_ROWS = {
    "no prompt": ({"prompt": None}, "field 'prompt' is missing"),
    "no answer": ({"chosen": None}, "field 'chosen' is missing"),
    "an empty answer": ({"rejected": ""}, "field 'rejected' should be a list"),
    "identical sides": ({"chosen": MANY, "rejected": MANY}, "field 'rejected' is the same answer"),
    "an unknown margin": (
        {"margins": {"wit": 1}},
        "field 'margins' has the unknown objective 'wit'",
    ),
    "a NaN": ({"margins": {"preference": math.nan}}, "field 'margins.preference' is nan"),
    "an objective": ({"objective": "wit"}, "field 'objective' is 'wit', which has no weight"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_found_before_the_model_is_looked_for(here, capsys, name):
    change, told = BAD_ROWS[name]
    rows = rows_of_file()
    rows[4] |= change
    write_rows(here / "pairs.jsonl", rows)
    assert run(model="nowhere") == errors.BadInput.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"selfmoa: pairs.jsonl, row 5: {told}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["train.weights={safety: 0}"], "pairs.jsonl, row 1: field 'objective'"),
        (["train.loss=safedpo"], "pairs.jsonl, row 1: "),
        (["train.loss=bfpo"], "pairs.jsonl, row 1: "),
    ],
)
def test_rows_that_a_loss_cannot_use_are_found_before_the_model_is(here, capsys, more, told):
    assert run(*more, model="nowhere") == errors.BadInput.exit_code
    assert capsys.readouterr().err.startswith(f"selfmoa: {told}")


def test_text_in_another_encoding_is_named(here, capsys):
    good = (here / "pairs.jsonl").read_bytes()
    (here / "pairs.jsonl").write_bytes(good.replace(b"teal", b"t\xe9al", 1))
    assert run(model="nowhere") == errors.BadInput.exit_code
    assert "pairs.jsonl, row 2: it is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("how", "more", "kind", "told"),
    [
        ({"pairs": "none.jsonl"}, [], "MissingFile", "preference file 'none.jsonl' does not exist"),
        ({}, ["train.loss=dppo"], "UnknownPlugin", "Did you mean 'dpo'?"),
        ({}, ["policy.adapter=qlora"], "MissingExtra", "pip install 'selfmoa[qlora]'"),
        ({}, ["policy.max_length=9"], "TrainingStopped", "all 9 rows are longer than 9 tokens"),
    ],
)
def test_each_failure_has_its_sentence_and_code(here, capsys, how, more, kind, told):
    assert run(*more, "-q", **how) == getattr(errors, kind).exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
    assert not (here / "out").exists()


def test_a_model_that_is_nowhere_is_missing(here, capsys, monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("it is not in the cache.\nMore.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert run("-q", model="org/none") == MissingFile.exit_code
    assert "model 'org/none' does not exist" in capsys.readouterr().err


def test_a_tokenizer_without_a_template_is_refused(here, model, capsys):
    shutil.copytree(model, here / "mute")
    (here / "mute/chat_template.jinja").unlink()
    assert run("-q", model="mute") == errors.UnusableTokenizer.exit_code
    assert "has no chat template" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_a_folder_that_cannot_be_written_is_named_before_the_training(here, capsys, monkeypatch):
    (here / "out").write_text("a file")
    monkeypatch.setattr(fitting, "fit", lambda *_, **__: pytest.fail("it was trained for nothing"))
    assert run("-q") == errors.CannotWrite.exit_code
    assert "out" in capsys.readouterr().err


# --- processes -----------------------------------------------------------------------------------


class Started(Exception):  # noqa: N818
    """Stands for the program that takes the place of this one."""


@pytest.fixture
def started(monkeypatch):
    """What `execv` would run: a list of command lines."""
    commands = []

    def execv(path, command):
        commands.append([path, *command])
        raise Started

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    return commands


def launched(started, monkeypatch, *words):
    """Return the command that a command line starts over with."""
    started.clear()
    arguments = ["train", "pairs.jsonl", "--model", "model", "--out", "out", *words]
    monkeypatch.setattr(sys, "argv", ["selfmoa", *arguments])
    with pytest.raises(Started):
        launch.launch_again(words[words.index("--launch") + 1])
    return started[0]


TRAIN = ["train", "pairs.jsonl", "--model", "model", "--out", "out"]


def test_gpus_are_left_to_the_launcher_of_accelerate(started, monkeypatch):
    command = launched(started, monkeypatch, "train.beta=0.2", "--launch", "fsdp", "-q")
    config = str(launch.FOLDER / "fsdp.yaml")
    python = sys.executable
    assert command == [
        *(python, python, "-m", "accelerate.commands.launch", "--config_file", config),
        *("-m", "selfmoa", *TRAIN, "train.beta=0.2", "-q"),
    ]


def test_cpus_are_started_by_torch(started, monkeypatch):
    command = launched(started, monkeypatch, "--launch", "cpu", "--seed", "1")
    assert command == [
        *(sys.executable, sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node=2", "-m", "selfmoa", *TRAIN, "--seed", "1"),
    ]
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_the_option_is_not_handed_on_in_either_spelling(here, started, monkeypatch, capsys):
    write_own = here / "mine.yaml"
    write_own.write_text(CPU.format(number=3))
    for words in (["--launch", "mine.yaml"], ["--launch=mine.yaml"]):
        monkeypatch.setattr(sys, "argv", ["selfmoa", *TRAIN, *words, *QUICK])
        started.clear()
        assert cli.main([*TRAIN, *words, *QUICK]) == 70  # Started is no error of ours
        assert started[0][-len(TRAIN) - len(QUICK) :] == [*TRAIN, *QUICK]
        assert "--nproc-per-node=3" in started[0]
        assert not [word for word in started[0] if "mine" in word or word.startswith("--launch")]


@pytest.mark.parametrize("suffix", ["yaml", "json"])
@pytest.mark.parametrize("kind", ["MULTI_GPU", "MULTI_CPU"])
def test_files_that_accelerate_writes_are_taken(here, started, monkeypatch, suffix, kind):
    path = here / f"own.{suffix}"
    config = ClusterConfig(
        compute_environment=ComputeEnvironment.LOCAL_MACHINE,
        distributed_type=DistributedType(kind),
        mixed_precision="no",
        use_cpu=kind == "MULTI_CPU",
        debug=False,
        num_processes=4,
    )
    (config.to_yaml_file if suffix == "yaml" else config.to_json_file)(path)
    command = launched(started, monkeypatch, "--launch", f"own.{suffix}")
    if kind == "MULTI_CPU":
        assert "--nproc-per-node=4" in command
    else:
        assert command[command.index("--config_file") + 1] == f"own.{suffix}"


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("cpu", "MULTI_CPU", 2),
        ("multi-gpu", "MULTI_GPU", 2),
        ("fsdp", "FSDP", 2),
        ("deepspeed", "DEEPSPEED", 2),
    ],
)
def test_shipped_configurations_are_accelerates_own(name, kind, number):
    path = launch.find_launch(name)
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes) == (DistributedType(kind), number)
    assert path.read_text().startswith("# ")
    if name == "fsdp":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name == "deepspeed":
        assert config.deepspeed_config["zero_stage"] == 2
        assert config.deepspeed_config["gradient_accumulation_steps"] == 1


def test_all_shipped_configurations_are_in_the_help(capsys):
    assert cli.main(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert all(path.stem in told for path in launch.FOLDER.glob("*.yaml"))


def test_a_configuration_that_is_not_there_is_named(here, started, capsys):
    assert run("--launch", "cpus") == MissingFile.exit_code
    err = capsys.readouterr().err
    assert "accelerate configuration 'cpus' does not exist" in err
    assert "cpu, deepspeed, fsdp, multi-gpu" in err


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words", ""])
def test_what_is_no_configuration_is_refused(here, started, capsys, text):
    (here / "odd.yaml").write_text(text)
    assert run("--launch", "odd.yaml") == RecipeError.exit_code
    assert "odd.yaml" in capsys.readouterr().err
    assert started == []


def test_settings_are_checked_before_processes_start(here, started, capsys):
    assert run("--launch", "cpu", "train.bta=1") == RecipeError.exit_code
    assert started == []


def test_the_file_is_checked_before_processes_start(here, started, capsys):
    """Else each process says so, and the launcher adds a traceback and a code of its own."""
    (here / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    assert run("--launch", "cpu") == errors.BadInput.exit_code
    assert capsys.readouterr().err.count("\n") == 1
    assert started == []


def test_deepspeed_is_asked_for_by_name(here, started, capsys):
    """accelerate's launcher would end in a traceback."""
    assert run("--launch", "deepspeed") == errors.MissingExtra.exit_code
    assert "pip install 'selfmoa[deepspeed]'" in capsys.readouterr().err
    assert started == []


class FakeAccelerator:
    """What accelerate makes of processes for which it finds no devices: each is alone."""

    def __init__(self, **_):
        pass

    distributed_type = DistributedType.NO
    process_index, num_processes = 0, 1
    device = "cpu"


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch):
    """Each would train alone, as the main one, and write into the same folder."""
    monkeypatch.setattr(processes, "Accelerator", FakeAccelerator)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SelfmoaError, match="2 processes"):
        processes._join.__wrapped__(False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes._join.__wrapped__(False).count == 1


@pytest.mark.parametrize(("rank", "is_quiet"), [("0", False), ("1", True)])
def test_only_the_first_process_shows_anything(here, capsys, monkeypatch, rank, is_quiet):
    asked = []
    real = shared.watch

    def watch(*, quiet, plain):
        asked.append(quiet)
        return real(quiet=quiet, plain=plain)

    monkeypatch.setattr(shared, "watch", watch)
    monkeypatch.setattr(
        fitting, "train", lambda *_, **__: fitting.Trained([{"step": 0, "loss": 0.5}])
    )
    monkeypatch.setenv("RANK", rank)
    assert run() == 0
    assert (capsys.readouterr().out == "") == is_quiet
    assert asked == [is_quiet]


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """A training by one process, on rows of unlike lengths."""
    folder = tmp_path_factory.mktemp("alone")
    return train_in(folder, model)


def train_in(folder, model, *launch_words, settings=()):
    """Train in a process of its own; return the folder it worked in and what it said."""
    rows = rows_of_file()
    for n, row in enumerate(rows):
        row["rejected"][0]["content"] += " it is so ." * (n % 4)
    write_rows(folder / "pairs.jsonl", rows)
    done = subprocess.run(
        [
            *(sys.executable, "-W", "ignore::FutureWarning", "-m", "selfmoa"),
            *("train", "pairs.jsonl", "--model", str(model), "--out", "out", *QUICK),
            *(*settings, *launch_words),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return SimpleNamespace(out=folder / "out", stdout=done.stdout, stderr=done.stderr)


def assert_alike(one, other, tolerance=1e-5):
    """Compare two trainings: the measurements of each step, and the weights."""
    for a, b in zip(log_of(one.out), log_of(other.out), strict=True):
        for name in ("loss", "accuracy", "kl_estimate", "lr"):
            assert a[name] == pytest.approx(b[name], abs=tolerance), (a["step"], name)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-4)
    ours, theirs = (load_file(w.out / "adapter_model.safetensors") for w in (one, other))
    assert ours.keys() == theirs.keys()
    assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) <= tolerance


@pytest.mark.slow
def test_four_processes_train_the_same_policy(alone, model, tmp_path):
    """Batches are of three pairs: one process has nothing to do in any step."""
    (tmp_path / "mine.yaml").write_text(CPU.format(number=4))
    together = train_in(tmp_path, model, "--launch", "mine.yaml")
    assert_alike(alone, together)
    # One process speaks, and writes.
    assert together.stdout.count("steps, at the last one") == 1
    assert together.stderr.count("shared prompts by") == 1
    names = {path.name for path in together.out.iterdir()}
    assert names == {path.name for path in alone.out.iterdir()}


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_cut_off(alone, model, tmp_path, monkeypatch):
    settings = ["policy.checkpoint_every=2"]
    with monkeypatch.context() as patch:
        patch.setenv("SELFMOA_KILL_AT", "checkpoint.after_replace#2")
        with pytest.raises(AssertionError):
            train_in(tmp_path, model, settings=settings)
    kept = {path.name for path in (tmp_path / "out/.training").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4"}
    together = train_in(tmp_path, model, "--launch", "cpu", settings=settings)
    assert_alike(alone, together)
    assert "going on after step 4 of 6" in together.stderr
    assert not (tmp_path / "out/.training").exists()


# accelerate shards on GPUs alone. This tells it that ours are GPUs, and no more.
SHARDED = """
import sys
from accelerate import DistributedType
from accelerate.state import PartialState
PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
from selfmoa.training.fitting import train
from selfmoa.training.processes import join
from torch.distributed.fsdp import FSDPModule
model, out, adapter = sys.argv[1:]
train("pairs.jsonl", model, out, adapter=adapter, loss="dpo", lr=5e-3, batch_size=3, epochs=2)
units = [name for name, m in join()._wrapped.named_modules() if isinstance(m, FSDPModule)]
assert join().are_sharded
if join().is_main:
    print(len(units))
"""
FSDP = {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def train_sharded(folder, model, adapter="lora"):
    (folder / "sharded.py").write_text(SHARDED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node=2", "sharded.py", str(model), "out", adapter),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=folder,
        env={**os.environ, **FSDP},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(out=folder / "out", stdout=done.stdout, stderr=done.stderr)


@pytest.mark.slow
def test_sharded_weights_train_the_same_policy(alone, model, tmp_path):
    shutil.copy(alone.out.parent / "pairs.jsonl", tmp_path / "pairs.jsonl")
    together = train_sharded(tmp_path, model)
    assert_alike(alone, together)
    # The one layer, and the rest: a model in one piece would have to fit into one memory whole.
    assert together.stdout.split() == ["2"]


# --- power cuts ----------------------------------------------------------------------------------

# Forked children spare every attempt the seconds that importing torch takes; their parent never
# computes, so no thread is lost in a fork.
DRIVER = """
import json, os, pathlib, sys
import peft, torch, transformers
import selfmoa.training.fitting
from selfmoa.cli import main

def attempt(point, breaks):
    child = os.fork()
    if child == 0:
        if breaks:
            kept = pathlib.Path("out/.training").glob("checkpoint-*")
            newest = max(kept, key=lambda path: int(path.name.partition("-")[2]))
            (newest / "state.json").write_text("{")
        os.environ["SELFMOA_KILL_AT"] = point
        os._exit(main(sys.argv[2:]))
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) == 9 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)

print(json.dumps([attempt(*each) for each in json.loads(sys.argv[1])]))
"""


def drive(folder, model, attempts, *settings):
    """Give the same command again and again, each time with another point to die at.

    An attempt is a point, and whether the newest checkpoint is broken before it. Return how each
    ended: True if it was killed, else its exit code.
    """
    command = ["train", "pairs.jsonl", "--model", str(model), "--out", "out", *settings]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(attempts), *command],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
def test_a_training_killed_at_every_point_leaves_the_same_bytes(here, model):
    settings = [*QUICK, "train.epochs=8", "policy.checkpoint_every=1"]
    whole = here / "whole"
    whole.mkdir()
    shutil.copy(here / "pairs.jsonl", whole)
    assert drive(whole, model, [("", False)], *settings)[0] == [0]
    atomic = ["atomic.before_replace", "atomic.after_replace"]
    points = [f"{point}{nth}" for point in KILLED_AT for nth in ("", "#2")]
    attempts = [(point, False) for point in (*atomic, *points)]
    # Only where a checkpoint is written again is there one to be put aside.
    attempts += [("checkpoint.aside", True), ("checkpoint.after_replace", False)]
    # The receipt and the log are written after the weights.
    attempts += [(atomic[0], True), (atomic[1], False), (f"{atomic[0]}#2", False), ("", False)]
    ended, err = drive(here, model, attempts, *settings)
    assert ended == [True] * (len(attempts) - 1) + [0]
    assert log_of(here / "out") == log_of(whole / "out")
    assert len(log_of(here / "out")) == 24
    for path in (whole / "out").iterdir():
        if path.name != "train.jsonl":
            assert path.read_bytes() == (here / "out" / path.name).read_bytes(), path.name
    assert {path.name for path in (here / "out").iterdir()} == {
        path.name for path in (whole / "out").iterdir()
    }
    assert "going on after step " in err
    assert err.count("cannot be used: state.json has 1 bytes instead of") >= 2


KILLED_AT = [point for point in CHECKPOINT_KILL_POINTS if point != "checkpoint.aside"]


def test_other_settings_do_not_go_on_with_what_was_left(here, capsys, monkeypatch):
    class Cut(BaseException):
        pass

    real = fitting.Checkpoints.save

    def save(*given):
        real(*given)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Checkpoints, "save", save)
        with pytest.raises(Cut):
            run("policy.checkpoint_every=2")
    capsys.readouterr()
    before = digest_tree(here / "out/.training/checkpoint-2")
    assert run("policy.checkpoint_every=2", "train.beta=0.3", "-q") == (
        errors.TrainingChanged.exit_code
    )
    err = capsys.readouterr().err
    assert "train.beta=0.1, now it is train.beta=0.3" in err
    assert "train into another folder, or delete them to start anew" in err
    assert err.count("\n") == 1
    assert digest_tree(here / "out/.training/checkpoint-2") == before
    assert run("policy.checkpoint_every=2") == 0
    assert "going on after step 2 of 6" in capsys.readouterr().err


def test_an_interrupt_names_the_folder_and_keeps_what_was_done(here, capsys, monkeypatch):
    real = fitting.Checkpoints.save

    def save(*given):
        real(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting.Checkpoints, "save", save)
    assert run("policy.checkpoint_every=2", "-q") == 130
    assert capsys.readouterr().err == f"selfmoa: {errors.Interrupted('out')}\n"
    assert (here / "out/.training/checkpoint-2").is_dir()
