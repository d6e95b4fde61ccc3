"""Whatever happens to a training or to its checkpoints, the next one ends with the same bits.

Run as a program (`python tests/test_checkpoints.py FOLDER`), this file is the subject of the kill
test: it forks a training for every hit of every kill point, lets it die there, kills two that
resume it as well, runs a last one to the end and compares the result with that of a training
without checkpoints.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from torch import nn

from selfmoa.errors import BadInput, CannotRead, CannotWrite, TrainingChanged
from selfmoa.records import canonical_json, content_id
from selfmoa.rundir.files import CHECKPOINT_KILL_POINTS, KILL_POINTS, list_files
from selfmoa.training.checkpoints import FILES, MARKER, STATE, Checkpoints, Saved
from selfmoa.training.snapshots import DTYPES, MODEL, OPTIMIZER, RNG, safetensors_bytes, take

IDENTITY = {"model": "sha256:1", "lr": 0.01, "seed": 3, "template": None}
STEPS = 12


class Net(nn.Module):
    """Small, with all that matters: dropout, a frozen weight, one that is not contiguous."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.turned = nn.Parameter(torch.randn(3, 8).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        hidden = nn.functional.dropout(self.first(x), 0.3, self.training)
        return self.scale * (self.frozen(hidden).tanh() @ self.turned)


def adamw(groups, **settings):
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.98), **settings)


class Counting(torch.optim.Optimizer):
    """Keeps plain numbers and nothing beside its tensors, as some optimisers do."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                state["extra"] = None
                p.sub_(group["lr"] / state["steps"] * p.grad)


OPTIMIZERS = {
    "Counting": Counting,
    "AdamW": adamw,
    "fused": lambda groups: adamw(groups, fused=True),
    "amsgrad": lambda groups: adamw(groups, amsgrad=True, foreach=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "plain SGD": lambda groups: torch.optim.SGD(groups, lr=0.01),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
}


def start(make=adamw):
    torch.manual_seed(3)
    model = Net()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "bias" not in name], "weight_decay": 0.1},
        {"params": [p for name, p in named if "bias" in name], "weight_decay": 0.0},
    ]
    return model, make(groups)


def train(folder, until=STEPS, *, make=adamw, every=4, said=None, after_step=None):
    """Train as a loop would; return every bit that it ends with."""
    model, optimizer = start(make)
    said = [] if said is None else said
    checkpoints = Checkpoints(folder, IDENTITY, said.append) if folder else None
    saved = checkpoints.restore(model, optimizer) if checkpoints else None
    log = list(saved.log) if saved else []
    for step in range(len(log), until):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item()})
        if checkpoints and len(log) % every == 0:
            checkpoints.save(model, optimizer, len(log), log, {"max_tokens": 100 + len(log)})
        if after_step:
            after_step(checkpoints, model, optimizer, log)
    return log, bits(model, optimizer)


def bits(model, optimizer):
    """Return all that a training consists of, as bytes."""
    snapshot = take(model, optimizer)
    return {
        name: b"".join(safetensors_bytes(tensors)) for name, tensors in snapshot.tensors.items()
    } | {"settings": canonical_json(snapshot.settings)}


def restore(folder, *, fresh=False, identity=IDENTITY, make=adamw):
    """Return what a new process finds in a folder: (Saved, its bits, what it was told)."""
    said = []
    model, optimizer = start(make)
    torch.manual_seed(99)
    saved = Checkpoints(folder, identity, said.append).restore(model, optimizer, fresh=fresh)
    return saved, bits(model, optimizer), said


def restore_into(folder, model, optimizer):
    return Checkpoints(folder, IDENTITY, pytest.fail).restore(model, optimizer)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole():
    """A training without checkpoints."""
    return train(None)


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """The folder of a training that was stopped after checkpoint-8."""
    folder = tmp_path_factory.mktemp("halfway")
    train(folder, until=9)
    return folder


@pytest.fixture
def folder(halfway, tmp_path):
    """A folder with checkpoint-4 and checkpoint-8."""
    return shutil.copytree(halfway, tmp_path / "checkpoints")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_stopped_after_any_step_ends_with_the_same_bits(tmp_path, name):
    make = OPTIMIZERS[name]
    expected = train(None, make=make)
    for until in range(1, STEPS + 1):
        folder = tmp_path / str(until)
        train(folder, until, make=make, every=3)
        assert train(folder, make=make, every=3) == expected, until


def test_a_training_stopped_again_and_again_ends_with_the_same_bits(tmp_path, whole):
    for until in (2, 3, 5, 5, 8, 9):
        train(tmp_path, until, every=1)
    assert train(tmp_path, every=1) == whole


def test_a_resumed_training_writes_the_same_files(tmp_path):
    train(tmp_path / "one")
    train(tmp_path / "two", until=9)
    train(tmp_path / "two")
    assert names(tmp_path / "one") == names(tmp_path / "two") == ["checkpoint-12", "checkpoint-8"]
    for path in (tmp_path / "one").rglob("*.*"):
        twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == twin.read_bytes(), path


def test_what_was_saved_comes_back(folder):
    saved, after, said = restore(folder)
    log, before = train(None, until=8)
    assert repr(saved) == repr(Saved(8, log, {"max_tokens": 108}))  # in this order, too
    assert (after, said) == (before, [])


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
    model, optimizer = start()
    before = bits(model, optimizer)
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert Checkpoints(folder, IDENTITY, pytest.fail).restore(model, optimizer) is None
    assert bits(model, optimizer) == before
    assert not (tmp_path / "nowhere").exists()


def test_a_restored_training_does_not_live_in_its_files(folder):
    model, optimizer = start()
    restore_into(folder, model, optimizer)
    before = bits(model, optimizer)
    for path in folder.rglob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"\7" * path.stat().st_size)
    assert bits(model, optimizer) == before


def test_generators_of_gpus_go_by_position(tmp_path, monkeypatch):
    model, optimizer = start()
    states = {"cuda:2": torch.tensor([1, 2], dtype=torch.uint8), "cuda:5": torch.ones(2).byte()}
    have = {}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[str(device)])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda x, d: have.update({str(d): x.tolist()}))

    def see(*found):
        devices = {f"cuda-{n}": torch.device(name) for n, name in enumerate(found)}
        monkeypatch.setattr("selfmoa.training.snapshots._cuda_devices", lambda _: devices)

    see("cuda:2", "cuda:5")
    Checkpoints(tmp_path, IDENTITY, pytest.fail).save(model, optimizer, 1, [], {})
    for now, expected in (
        (["cuda:5", "cuda:2"], {"cuda:5": [1, 2], "cuda:2": [1, 1]}),
        (["cuda:5"], {"cuda:5": [1, 2]}),
        ([], {}),
    ):
        see(*now)
        assert restore_into(tmp_path, model, optimizer).step == 1
        assert have == expected
        have.clear()
    see("cuda:2")
    Checkpoints(tmp_path, IDENTITY, pytest.fail).save(model, optimizer, 2, [], {})
    see("cuda:5", "cuda:2")
    assert restore_into(tmp_path, model, optimizer).step == 2
    assert have == {"cuda:5": [1, 2]}


def test_state_goes_by_name_not_by_order(folder):
    model, optimizer = start()
    for group in optimizer.param_groups:
        group["params"].reverse()
    restore_into(folder, model, optimizer)
    found = take(model, optimizer).tensors[OPTIMIZER]
    saved = load_file(folder / "checkpoint-8" / OPTIMIZER)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_state_lies_in_memory_as_its_parameter_does(folder):
    model, optimizer = start()
    restore_into(folder, model, optimizer)
    assert optimizer.state[model.turned]["exp_avg"].stride() == model.turned.stride() == (1, 8)


def test_settings_keep_their_types(folder):
    _, live = start()
    model, optimizer = start()
    restore_into(folder, model, optimizer)
    for saved, before in zip(optimizer.param_groups, live.param_groups, strict=True):
        assert {**saved, "lr": 0, "params": 0} == {**before, "lr": 0, "params": 0}
        assert isinstance(saved["betas"], tuple)
        assert saved["lr"] == 0.01 / 8


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5))
def test_floats_of_the_log_come_back_exactly(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("floats")
    model, optimizer = start()
    log = [{"step": 0, "values": values, "name": "é\n"}]
    Checkpoints(folder, IDENTITY, pytest.fail).save(model, optimizer, 1, log, {"x": 0.1 + 0.2})
    saved, *_ = restore(folder)
    assert repr(saved) == repr(Saved(1, log, {"x": 0.1 + 0.2})) or saved.log == log
    assert [x.hex() for x in saved.log[0]["values"]] == [x.hex() for x in values]


# --- what is on the disk -------------------------------------------------------------------------


def test_only_safetensors_and_json_are_written(folder):
    assert names(folder) == ["checkpoint-4", "checkpoint-8"]
    for path in (folder / "checkpoint-4", folder / "checkpoint-8"):
        assert names(path) == sorted([MODEL, OPTIMIZER, RNG, STATE, MARKER])
        assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o600}


def test_only_what_is_trained_is_stored(folder):
    stored = load_file(folder / "checkpoint-8" / MODEL)
    assert set(stored) == {"first.weight", "first.bias", "turned", "scale", "unused"}
    state = load_file(folder / "checkpoint-8" / OPTIMIZER)
    assert set(state) == {
        f"{name}/{key}"
        for name in stored.keys() - {"unused"}
        for key in ("exp_avg", "exp_avg_sq", "step")
    }


def test_of_an_adapter_nothing_else_is_stored(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}

    def fit(folder, until):
        torch.manual_seed(5)
        base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
        lora = LoraConfig(r=2, lora_dropout=0.2, target_modules="all-linear")
        model = get_peft_model(base, lora).train()
        optimizer = adamw([p for p in model.parameters() if p.requires_grad], fused=True)
        checkpoints = Checkpoints(folder, IDENTITY, pytest.fail)
        saved = checkpoints.restore(model, optimizer)
        for step in range(saved.step if saved else 0, until):
            ids = torch.tensor([[1, 2, 3, step]])
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpoints.save(model, optimizer, step + 1, [], {})
        return bits(model, optimizer)

    fit(tmp_path / "resumed", 3)
    assert fit(tmp_path / "resumed", 5) == fit(tmp_path / "whole", 5)
    stored = load_file(tmp_path / "whole" / "checkpoint-5" / MODEL)
    assert len(stored) == 14  # A and B of seven projections
    assert all("lora_" in name for name in stored)


@given(
    st.lists(
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_the_library_reads_what_we_write(specs):
    tensors = {
        f"{n}.é": torch.randint(0, 2, shape).to(dtype) for n, (dtype, shape) in enumerate(specs)
    }
    written = b"".join(safetensors_bytes(tensors))
    found = load(written)
    assert found.keys() == tensors.keys()
    size = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + size])
    assert size % 8 == 0
    for name, about in header.items():
        assert about["data_offsets"][0] % tensors[name].element_size() == 0
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].double().equal(tensor.double())


def test_big_and_turned_tensors_are_written_in_pieces(monkeypatch):
    monkeypatch.setattr("selfmoa.training.snapshots.CHUNK", 64)
    tensors = {"a": torch.randn(7, 30).t(), "b": torch.randn(10, 8)[:, ::2]}
    pieces = list(safetensors_bytes(tensors))
    assert max(map(len, pieces[1:])) == 64
    found = load(b"".join(pieces))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files")
def test_all_is_durable_before_it_counts(tmp_path, monkeypatch):
    events, replace = [], os.replace
    model, optimizer = start()

    def log_fsync(fd):
        events.append(str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path)))

    def log_replace(one, other):
        replace(one, other)
        events.append((Path(one).name, Path(other).name))

    monkeypatch.setattr(os, "fsync", log_fsync)
    monkeypatch.setattr(os, "replace", log_replace)
    checkpoints = Checkpoints(tmp_path, IDENTITY, pytest.fail)
    checkpoints.save(model, optimizer, 1, [], {})
    checkpoints.save(model, optimizer, 2, [], {})
    new, temp, aside = "checkpoint-3", ".checkpoint-3.tmp", ".checkpoint-3.old"
    written = [f"{temp}/{name}" for name in (MODEL, OPTIMIZER, RNG, STATE)]
    written += [temp, f"{temp}/{MARKER}", temp]
    for events_after in (
        [(temp, new), ".", ("checkpoint-1", ".checkpoint-1.tmp")],
        [(new, aside), (temp, new), ".", (aside, f"{aside}.tmp")],
    ):
        events.clear()
        checkpoints.save(model, optimizer, 3, [], {})
        assert events == written + events_after


def test_the_newest_two_are_kept(tmp_path):
    model, optimizer = start()
    checkpoints = Checkpoints(tmp_path, IDENTITY, pytest.fail)
    for step in (1, 9, 10, 100):
        checkpoints.save(model, optimizer, step, [], {})
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    Checkpoints(tmp_path, IDENTITY, pytest.fail).save(model, optimizer, 101, [], {})
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-101"]


def test_a_step_saved_twice_is_there_once(folder):
    model, optimizer = start()
    checkpoints = Checkpoints(folder, IDENTITY, pytest.fail)
    checkpoints.save(model, optimizer, 8, [], {"again": True})
    assert names(folder) == ["checkpoint-4", "checkpoint-8"]
    assert restore(folder)[0].facts == {"again": True}


def test_what_was_found_broken_is_not_kept_as_the_one_before(folder):
    flip(folder / "checkpoint-8" / MODEL)
    train(folder, until=10, every=10)
    assert names(folder) == ["checkpoint-10", "checkpoint-4"]


def test_what_was_written_in_its_place_is_kept_as_the_one_before(folder):
    flip(folder / "checkpoint-8" / MODEL)
    train(folder)
    assert names(folder) == ["checkpoint-12", "checkpoint-8"]


def test_a_link_is_not_ours_even_if_it_leads_to_a_checkpoint(folder, tmp_path):
    shutil.move(folder / "checkpoint-4", tmp_path / "elsewhere")
    (folder / "checkpoint-4").symlink_to(tmp_path / "elsewhere")
    train(folder)
    Checkpoints(folder, IDENTITY, pytest.fail).discard()
    assert names(folder) == ["checkpoint-4"]
    assert len(names(tmp_path / "elsewhere")) == 5


def test_a_broken_one_is_replaced_when_its_step_comes_again(folder, whole):
    shutil.rmtree(folder / "checkpoint-8")
    (folder / "checkpoint-8").mkdir()
    assert train(folder, until=8) == train(None, until=8)
    assert restore(folder)[0].step == 8


def test_one_cut_short_does_not_count_as_the_one_before(folder):
    model, optimizer = start()
    cut(folder / "checkpoint-8" / OPTIMIZER)
    Checkpoints(folder, IDENTITY, pytest.fail).save(model, optimizer, 12, [], {})
    assert names(folder) == ["checkpoint-12", "checkpoint-4"]


def test_nothing_is_deleted_but_our_own(folder):
    for name in ("checkpoint-2", "checkpoint-20"):
        (folder / name).mkdir()
        (folder / name / "trainer_state.json").write_text("{}")
        (folder / name / MODEL).write_text("")
    (folder / "checkpoint-1").symlink_to(folder / "checkpoint-2")
    for name in ("checkpoint-x", "checkpoint-", "checkpoint-07", "checkpoint-1٣", "log"):
        (folder / name).mkdir()
    (folder / "checkpoint-3").write_text("a note")
    foreign = {name for name in names(folder) if name not in ("checkpoint-4", "checkpoint-8")}
    said = []
    train(folder, said=said)
    assert set(names(folder)) == foreign | {"checkpoint-8", "checkpoint-12"}
    assert [line.partition(" ")[0] for line in said] == ["checkpoint-20"]
    Checkpoints(folder, IDENTITY, pytest.fail).discard()
    assert set(names(folder)) == foreign
    assert names(folder / "checkpoint-2") == [MODEL, "trainer_state.json"]


def test_a_save_refuses_to_replace_what_is_not_ours(folder):
    model, optimizer = start()
    (folder / "checkpoint-9").write_text("a note")
    with pytest.raises(CannotWrite, match=r"checkpoint-9: something that is not a checkpoint"):
        Checkpoints(folder, IDENTITY, pytest.fail).save(model, optimizer, 9, [], {})
    assert names(folder) == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    assert (folder / "checkpoint-9").read_text() == "a note"


def test_discarding_leaves_nothing(folder):
    (folder / ".checkpoint-12.tmp").mkdir()
    (folder / "checkpoint-8" / MARKER).unlink()
    (folder / "checkpoint-4").rename(folder / ".checkpoint-4.old")
    checkpoints = Checkpoints(folder, IDENTITY, pytest.fail)
    checkpoints.discard()
    assert not folder.exists()
    checkpoints.discard()


def test_discarding_leaves_what_else_is_in_the_folder(folder):
    (folder / "policy").mkdir()
    Checkpoints(folder, IDENTITY, pytest.fail).discard()
    assert names(folder) == ["policy"]


def test_a_seal_does_not_see_what_is_half_written(folder):
    (folder / "checkpoint-4").rename(folder / ".checkpoint-4.tmp")
    (folder / "checkpoint-8").rename(folder / ".checkpoint-8.old")
    assert list_files(folder) == []


def test_what_a_crash_left_is_swept(folder):
    for name in (".checkpoint-12.tmp", ".checkpoint-2.old.tmp"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
    assert restore(folder)[0].step == 8
    assert names(folder) == ["checkpoint-4", "checkpoint-8"]


# --- broken states -------------------------------------------------------------------------------


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def reseal(path):
    """Write the marker that a checkpoint with these files would have."""
    marker = json.loads((path / MARKER).read_bytes())
    del marker["digest"]
    from hashlib import sha256

    for name in FILES:
        data = (path / name).read_bytes()
        marker["files"][name] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    text = canonical_json({**marker, "digest": content_id(marker, length=64)})
    (path / MARKER).write_text(text)


def damage_tensors(file, change):
    def damage(path):
        tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
        change(tensors)
        save_file(tensors, path / file)
        reseal(path)

    return damage


def damage_state(change):
    def damage(path):
        state = json.loads((path / STATE).read_bytes())
        change(state)
        (path / STATE).write_text(json.dumps(state))
        reseal(path)

    return damage


def write_resealed(file, data):
    def damage(path):
        (path / file).write_bytes(data)
        reseal(path)

    return damage


def become_folder(file):
    def damage(path):
        (path / file).unlink()
        (path / file).mkdir()

    return damage


def killed_before(*files):
    return lambda path: [(path / file).unlink() for file in files]


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def become_file(path):
    shutil.rmtree(path)
    path.write_text("checkpoint")


def become_link(path):
    shutil.move(path, path.parent / "elsewhere")
    path.symlink_to(path.parent / "elsewhere")


def become_the_other(path):
    shutil.rmtree(path)
    shutil.copytree(path.with_name("checkpoint-4"), path)


DAMAGES = {
    # the rows of the table
    "killed before the marker": (killed_before(MARKER), "complete.json is missing"),
    "no optimiser, no generators": (
        killed_before(OPTIMIZER, RNG),
        "optimizer.safetensors is missing",
    ),
    "optimiser cut": (lambda p: cut(p / OPTIMIZER), r"optimizer.safetensors has \d+ bytes instead"),
    "model cut": (lambda p: cut(p / MODEL), r"model.safetensors has \d+ bytes instead of \d+"),
    "no generators": (killed_before(RNG), "rng.safetensors is missing"),
    "state cut": (lambda p: cut(p / STATE), r"state.json has \d+ bytes instead of"),
    "empty folder": (empty, "complete.json is missing"),
    # of files and folders
    "no model": (killed_before(MODEL), "model.safetensors is missing"),
    "no state": (killed_before(STATE), "state.json is missing"),
    "marker cut": (lambda p: cut(p / MARKER), "complete.json is broken"),
    "marker empty": (lambda p: (p / MARKER).write_text(""), "complete.json is broken"),
    "marker a list": (lambda p: (p / MARKER).write_text("[]"), "complete.json is broken"),
    "marker deep": (lambda p: (p / MARKER).write_text("[" * 10**5), "complete.json is broken"),
    "marker not UTF-8": (lambda p: (p / MARKER).write_bytes(b"\xff"), "complete.json is broken"),
    "marker a folder": (become_folder(MARKER), "complete.json cannot be read: it is a folder"),
    "model a folder": (become_folder(MODEL), "model.safetensors"),
    "a file": (become_file, "it is not a folder"),
    "a link": (become_link, "it is not a folder"),
    "another one": (become_the_other, "it is checkpoint-4 under another name"),
    "state grown": (lambda p: os.truncate(p / STATE, 10**5), "state.json has 100000 bytes"),
    # of contents, with a marker that agrees with them
    "no tensors": (write_resealed(MODEL, b"nonsense"), "model.safetensors is broken"),
    "not JSON": (write_resealed(STATE, b'{"step": '), "state.json is broken"),
    "no log": (damage_state(lambda s: s.pop("log")), "state.json is broken"),
    "no settings": (damage_state(lambda s: s.pop("optimizer")), "state.json is broken"),
    "half the settings": (damage_state(lambda s: s["optimizer"].pop("groups")), "is broken"),
    "settings a list": (damage_state(lambda s: s.update(optimizer=[])), "state.json is broken"),
    "another group": (
        damage_state(lambda s: s["optimizer"]["groups"].pop()),
        "its optimiser has other groups of parameters",
    ),
    "other members": (
        damage_state(lambda s: s["optimizer"]["groups"][0]["params"].pop()),
        "its optimiser has other groups of parameters",
    ),
    "parameter missing": (
        damage_tensors(MODEL, lambda t: t.pop("first.bias")),
        "model.safetensors lacks 'first.bias'",
    ),
    "parameter too many": (
        damage_tensors(MODEL, lambda t: t.update(more=torch.ones(1))),
        "model.safetensors has 'more', which has no place",
    ),
    "parameter of another shape": (
        damage_tensors(MODEL, lambda t: t.update({"first.bias": torch.ones(9)})),
        r"model.safetensors has 'first.bias' as float32 \[9\], not float32 \[8\]",
    ),
    "parameter of another type": (
        damage_tensors(MODEL, lambda t: t.update({"scale": t["scale"].bfloat16()})),
        r"model.safetensors has 'scale' as bfloat16 \[\], not float32 \[\]",
    ),
    "state missing": (
        damage_tensors(OPTIMIZER, lambda t: t.pop("scale/exp_avg")),
        "optimizer.safetensors lacks 'scale/exp_avg'",
    ),
    "state of another shape": (
        damage_tensors(OPTIMIZER, lambda t: t.update({"scale/exp_avg": torch.ones(2)})),
        r"optimizer.safetensors has 'scale/exp_avg' as float32 \[2\]",
    ),
    "no generator": (
        damage_tensors(RNG, lambda t: (t.pop("cpu"), t.update(gpu=torch.ones(1)))),
        "rng.safetensors lacks 'cpu'",
    ),
    "generator of another size": (
        damage_tensors(RNG, lambda t: t.update(cpu=t["cpu"][:-1])),
        "rng.safetensors has 'cpu' as uint8",
    ),
    "generator of nonsense": (
        damage_tensors(RNG, lambda t: t["cpu"].fill_(255)),
        "rng.safetensors is broken",
    ),
} | {
    f"bit flipped in {file} at {at}": (
        lambda p, file=file, at=at: flip(p / file, at),
        f"{file} is not what was written" if file != MARKER else "complete.json is broken",
    )
    for file in (*FILES, MARKER)
    for at in (5, -3)
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_broken_checkpoint_is_passed_over_with_a_sentence(folder, whole, name):
    damage, reason = DAMAGES[name]
    damage(folder / "checkpoint-8")
    saved, found, said = restore(folder)
    log, expected = train(None, until=4)
    assert (saved, found) == (Saved(4, log, {"max_tokens": 104}), expected)
    assert len(said) == 1
    sentence = rf"checkpoint-8 cannot be used: .*{reason}.*; going on from checkpoint-4"
    assert re.fullmatch(sentence, said[0]), said[0]
    if not name.startswith("a "):  # those stand in the way
        assert train(folder) == whole


@pytest.mark.parametrize("name", [name for name in DAMAGES if name != "another one"])
def test_if_all_are_broken_nothing_is_touched(folder, name):
    for each in ("checkpoint-4", "checkpoint-8"):
        DAMAGES[name][0](folder / each)
        (folder / "elsewhere").exists() and (folder / "elsewhere").rename(folder / f"to-{each}")
    model, optimizer = start()
    before, said = bits(model, optimizer), []
    assert Checkpoints(folder, IDENTITY, said.append).restore(model, optimizer) is None
    assert bits(model, optimizer) == before
    assert [line.partition(" ")[0] for line in said] == ["checkpoint-8", "checkpoint-4"]
    assert all(line.endswith("; starting anew") for line in said)


def test_the_sentence_is_one(folder):
    (folder / "checkpoint-8" / OPTIMIZER).unlink()
    said = restore(folder)[2]
    assert said == [
        "checkpoint-8 cannot be used: optimizer.safetensors is missing; going on from checkpoint-4"
    ]


def test_no_byte_of_a_checkpoint_can_change_unseen(folder):
    """Not one flipped bit in any byte of the marker, which nothing else vouches for."""
    path = folder / "checkpoint-8" / MARKER
    whole = path.read_bytes()
    model, optimizer = start()
    for at in range(len(whole) - 1):
        flip(path, at)
        saved = Checkpoints(folder, IDENTITY, str).restore(model, optimizer)
        assert saved.step == 4, at
        path.write_bytes(whole)


def test_a_disk_that_cannot_be_read_is_passed_over(folder, monkeypatch):
    real = Path.open

    def failing(path, *args, **kwargs):
        if path.name == OPTIMIZER and "checkpoint-8" in str(path):
            raise OSError(errno.EIO, "fault")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    saved, _, said = restore(folder)
    assert saved.step == 4
    assert "the disk reports an input/output error; going on" in said[0]


def test_a_folder_that_is_none_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotRead, match="not a folder"):
        restore(tmp_path / "file")


def test_another_model_cannot_use_a_checkpoint(folder):
    model, optimizer = start()
    model.extra = nn.Parameter(torch.ones(2))
    said = []
    assert Checkpoints(folder, IDENTITY, said.append).restore(model, optimizer) is None
    assert said[0] == (
        "checkpoint-8 cannot be used: model.safetensors lacks 'extra'; starting anew"
    )


def test_an_optimiser_of_something_else_is_a_mistake(folder):
    model, _ = start()
    optimizer = adamw([nn.Parameter(torch.ones(1))])
    checkpoints = Checkpoints(folder, IDENTITY, pytest.fail)
    for call in (
        lambda: checkpoints.save(model, optimizer, 9, [], {}),
        lambda: checkpoints.restore(model, optimizer),
    ):
        with pytest.raises(RuntimeError, match="that the model does not train"):
            call()
    assert names(folder) == ["checkpoint-4", "checkpoint-8"]


# --- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "sha256:2"}, "model='sha256:1', now it is model='sha256:2'"),
        ({"lr": 0.02}, "lr=0.01, now it is lr=0.02"),
        ({"seed": 3.0}, "seed=3, now it is seed=3.0"),
        ({"template": "x"}, "template=None, now it is template='x'"),
        ({"more": None}, r"more=\(absent\), now it is more=None"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(folder, change, sentence):
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(TrainingChanged, match=sentence) as caught:
        restore(folder, identity=IDENTITY | change)
    assert (caught.value.key, caught.value.new) == next(iter(change.items()))
    model, optimizer = start()
    with pytest.raises(TrainingChanged):
        Checkpoints(folder, IDENTITY | change, str).save(model, optimizer, 12, [], {})
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_missing_key_is_a_change(folder):
    with pytest.raises(TrainingChanged, match=r"lr=0.01, now it is lr=\(absent\)"):
        restore(folder, identity={name: x for name, x in IDENTITY.items() if name != "lr"})


def test_the_order_of_keys_is_no_change(folder):
    assert restore(folder, identity=dict(reversed(IDENTITY.items())))[0].step == 8


def test_fresh_deletes_what_is_of_another_training_only(folder):
    assert restore(folder, fresh=True)[0].step == 8
    saved, _, said = restore(folder, fresh=True, identity=IDENTITY | {"lr": 1})
    assert (saved, said, names(folder)) == (None, [], [])


def test_fellows_may_discard_at_the_same_time(folder, monkeypatch):
    real = Path.replace

    def fellow_first(path, target):
        real(path, target)
        shutil.rmtree(target)
        return real(path, target)

    monkeypatch.setattr(Path, "replace", fellow_first)
    assert restore(folder, fresh=True, identity=IDENTITY | {"lr": 1})[0] is None
    assert names(folder) == []


def test_the_newest_of_another_training_is_refused_and_fresh_goes_on_from_ours(folder):
    marker = folder / "checkpoint-8" / MARKER
    content = json.loads(marker.read_bytes())
    del content["digest"]
    content["identity"]["seed"] = 4
    marker.write_text(canonical_json({**content, "digest": content_id(content, length=64)}))
    with pytest.raises(TrainingChanged, match="seed=4, now it is seed=3"):
        restore(folder)
    assert restore(folder, fresh=True)[0].step == 4
    assert names(folder) == ["checkpoint-4"]


# --- what cannot be written ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "log",
    [[{"loss": float("nan")}], [{"loss": float("inf")}], [{"x": torch.ones(1)}], [{"\ud800": 1}]],
)
def test_what_is_not_json_is_refused_before_anything_is_written(folder, log):
    model, optimizer = start()
    before = names(folder)
    with pytest.raises(BadInput, match="cannot be written as JSON"):
        Checkpoints(folder, IDENTITY, pytest.fail).save(model, optimizer, 12, log, {})
    assert names(folder) == before


class Fault:
    """Lets the n-th call of any writing function fail, a write after half of its bytes."""

    CALLS = ("write", "fsync", "replace", "mkdir", "open")

    def __init__(self, n, code):
        self.left, self.code = n, code

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.CALLS:
            self.patch.setattr(os, name, self.failing(name, getattr(os, name)))
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def failing(self, name, real):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                if name == "write":
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                raise OSError(self.code, "fault")
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("step", [12, 8])
def test_a_fault_at_any_write_leaves_a_checkpoint_and_is_named(halfway, tmp_path, code, step):
    old = restore(halfway)[1]
    model, optimizer = start()
    new = bits(model, optimizer)
    unsaid = 0
    for n in range(1, 1000):
        folder = shutil.copytree(halfway, tmp_path / str(n))
        checkpoints, said = Checkpoints(folder, IDENTITY, str), None
        with Fault(n, code) as fault:
            try:
                checkpoints.save(model, optimizer, step, [], {"new": True})
            except CannotWrite as error:
                said = str(error)
        if fault.left > 0:
            break
        unsaid += said is None
        assert said is None or str(folder) in said
        assert not list(folder.glob(".*.tmp/*.safetensors")) or said is None
        torch.manual_seed(3)
        saved, found, remarks = restore(folder)
        assert remarks == []
        if "new" in saved.facts:
            assert {**found, RNG: 0} == {**new, RNG: 0}
        else:
            assert (saved.step, found) == (8, old)
            assert said is not None
        checkpoints.save(model, optimizer, step, [], {"new": True})
        assert names(folder)[:2] == sorted(
            ["checkpoint-4" if step == 8 else "checkpoint-8", f"checkpoint-{step}"]
        )
        assert len(names(folder)) == 2
    assert n > 30
    assert unsaid <= 4  # what is swept fails in silence: it is swept again


# --- kill points ---------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the trainings fork")
@pytest.mark.parametrize("stride", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_killed_anywhere_ends_with_the_same_bits(tmp_path, stride):
    script = [sys.executable, __file__, str(tmp_path), str(stride)]
    result = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    hits = json.loads(result.stdout)
    assert set(hits) == set(CHECKPOINT_KILL_POINTS)
    assert not set(hits) & set(KILL_POINTS)
    assert min(hits.values()) >= 1
    assert hits["checkpoint.torn"] > 4 * 20
    assert hits["checkpoint.before_replace"] in (1, 4)


def save_again(checkpoints, model, optimizer, log):
    """Save the eighth step once more, as a loop may that is asked to stop."""
    if len(log) == 8:
        checkpoints.save(model, optimizer, 8, log, {"max_tokens": 108})


def forked(kill_at, folder, out):
    """Train in a process of its own; return whether it was killed."""
    pid = os.fork()
    if pid == 0:
        os.environ["SELFMOA_KILL_AT"] = kill_at
        said = []
        log, found = train(folder, said=said, after_step=save_again)
        text = repr((said, log, sorted(found.items())))
        out.write_text(text)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, f"{kill_at}: {status}"
    return status != 0


def kill_everywhere(root, stride):
    """Kill a training at every `stride`-th hit of every point; return the last hit of each."""
    os.fsync = lambda _: None  # a killed process takes nothing back from the system
    train(None)  # torch loads half of itself at the first step: once for all
    out, hits = root / "out", {}
    forked("", root / "whole", out)
    whole = out.read_text()
    assert whole.startswith("([], ")
    for point in CHECKPOINT_KILL_POINTS:
        for n in range(1, 1000, stride):
            folder = root / f"{point}-{n}"
            if not forked(f"{point}#{n}", folder, out):
                break
            hits[point] = n
            if n % 5 == 0 or (stride == 1 and n < 5):  # two that resume it die as well
                forked("checkpoint.torn#15", folder, out)
                forked("checkpoint.before_replace", folder, out)
            out.unlink(missing_ok=True)
            assert not forked("", folder, out)
            assert out.read_text() == whole, f"{point}#{n}"
            shutil.rmtree(folder)
    return hits


if __name__ == "__main__":
    print(json.dumps(kill_everywhere(Path(sys.argv[1]), int(sys.argv[2]))))  # noqa: T201
