"""Model folders from strangers: what is refused, before any loader sees it, and what is not."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from replicas import write_replica
from selfmoa.generators.classifier import LocalClassifier
from selfmoa.training.intake import (
    MAX_TEMPLATE,
    UnfitModel,
    find_problems,
    provenance,
    refuse_unfit,
)
from selfmoa.training.policy import (
    find_model,
    load_policy,
    load_tokenizer,
    make_trainable,
    save_policy,
)

Poison = Callable[[Path, Path], None]
"""Does something to a model folder by which a canary file would appear."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replica(tmp_path_factory.mktemp("clean") / "model", "qwen2.5")


@pytest.fixture
def model(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "model"))


def edit(path: Path, **more: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def template(folder: Path, text: str) -> None:
    (folder / "chat_template.jinja").write_text(text)


class Touch:
    """Unpickles to an open file: what a pickle with a payload does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def code(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()\nclass Own: pass\n"


def poison_pickle(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(canary)))


def poison_checkpoint(folder: Path, canary: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Touch(canary), folder / "model.pt")


def poison_auto_map(folder: Path, canary: Path) -> None:
    (folder / "modeling_own.py").write_text(code(canary))
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})


def poison_tokenizer(folder: Path, canary: Path) -> None:
    own = {"AutoTokenizer": ["someone/else--tokenization_own.Own", None]}
    edit(folder / "tokenizer_config.json", auto_map=own)


def poison_deep_map(folder: Path, canary: Path) -> None:
    edit(folder / "config.json", text_config={"deep": [{"auto_map": {"AutoConfig": "own.Own"}}]})


def poison_kernel(folder: Path, canary: Path) -> None:
    edit(folder / "config.json", _attn_implementation_internal="someone/attention")


def poison_named_kernel(folder: Path, canary: Path) -> None:
    edit(folder / "config.json", _attn_implementation={"": "someone/attention"})


def poison_generate(folder: Path, canary: Path) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code(canary))


def poison_generation_config(folder: Path, canary: Path) -> None:
    edit(folder / "generation_config.json", custom_generate="someone/generate")


def poison_trust(folder: Path, canary: Path) -> None:
    edit(folder / "config.json", trust_remote_code=True)


def poison_adapter(folder: Path, canary: Path) -> None:
    own = {"base_model_class": "Own", "parent_library": "own_code"}
    settings = {"peft_type": "LORA", "base_model_name_or_path": "x", "auto_mapping": own}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def poison_template(folder: Path, canary: Path) -> None:
    template(
        folder,
        "{{ messages.__class__.__mro__[1].__subclasses__() }}"
        f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
    )


def poison_hidden_reach(folder: Path, canary: Path) -> None:
    text = "{{ (messages | attr('_' ~ '_class_' ~ '_')).mro() }}"
    edit(folder / "tokenizer_config.json", chat_template=text)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def poison_long_template(folder: Path, canary: Path) -> None:
    template(folder, "{{ 'x' * 1000000000 }}")


def poison_endless_template(folder: Path, canary: Path) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template(folder, loops)


def poison_wordy_template(folder: Path, canary: Path) -> None:
    template(folder, "{% for a in range(99999) %}{{ 'word ' * 99 }}{% endfor %}")


def poison_include(folder: Path, canary: Path) -> None:
    template(folder, "{% include '/etc/hostname' %}")


def poison_second_template(folder: Path, canary: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ ''.__class__ }}")


def poison_link(folder: Path, canary: Path) -> None:
    outside = folder.parent / "secret.json"
    shutil.move(folder / "generation_config.json", outside)
    (folder / "generation_config.json").symlink_to(outside)


def poison_index(folder: Path, canary: Path) -> None:
    shutil.move(folder / "model.safetensors", folder.parent / "weights.safetensors")
    shutil.copy(folder.parent / "weights.safetensors", folder / "part.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../weights.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def poison_header(folder: Path, canary: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + data[8:])


def poison_offsets(folder: Path, canary: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


POISONS: list[tuple[Poison, str]] = [
    (poison_pickle, "format that can run code"),
    (poison_checkpoint, "format that can run code"),
    (poison_auto_map, "is code"),
    (poison_tokenizer, "auto_map"),
    (poison_deep_map, "auto_map"),
    (poison_kernel, "_attn_implementation_internal"),
    (poison_named_kernel, "kernel to be fetched"),
    (poison_generate, "custom_generate is code"),
    (poison_generation_config, "custom_generate"),
    (poison_trust, "trust_remote_code"),
    (poison_adapter, "own_code"),
    (poison_template, "Python's own"),
    (poison_hidden_reach, "leave the sandbox"),
    (poison_long_template, "MB or"),
    (poison_endless_template, "MB or"),
    (poison_wordy_template, "writes more than"),
    (poison_include, "reads other files"),
    (poison_second_template, "__class__"),
    (poison_link, "link out of the folder"),
    (poison_index, "../weights.safetensors"),
    (poison_header, "damaged"),
    (poison_offsets, "damaged"),
]


@pytest.mark.parametrize(("poison", "seen"), POISONS, ids=lambda p: getattr(p, "__name__", ""))
def test_no_way_of_loading_a_poisoned_model_runs_anything_of_it(
    model: Path, tmp_path: Path, poison: Poison, seen: str
) -> None:
    canary = tmp_path / "canary"
    poison(model, canary)
    ways: list[Callable[[], object]] = [
        lambda: find_model(str(model)),
        lambda: load_policy(model),
        lambda: load_tokenizer(model),
        lambda: LocalClassifier.load(model, threads=0, digest="sha256:0"),
    ]
    for load in ways:
        with pytest.raises(UnfitModel, match=seen) as caught:
            load()
        assert not canary.exists()
    assert caught.value.exit_code == 4
    assert ": " in str(caught.value).partition("is not loaded: ")[2]  # the remedy


@pytest.mark.parametrize(
    "family", ["smollm2", "qwen2.5", "qwen3", "llama-3.2", "gemma-3", "phi-4-mini", "granite-3"]
)
def test_models_of_every_family_are_taken_in(tmp_path: Path, family: str) -> None:
    folder = write_replica(tmp_path / family, family)
    refuse_unfit(folder)
    found = provenance(folder)["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= found.keys()


def test_what_no_loader_reads_is_left_alone(model: Path, tmp_path: Path) -> None:
    (model / "training_args.bin").write_bytes(pickle.dumps(Touch(tmp_path / "canary")))
    (model / "README.md").write_text("# A model\n")
    (model / "figure.png").write_bytes(b"\x89PNG")
    (model / "original").mkdir()
    (model / "original" / "consolidated.00.pth").write_bytes(b"\x80\x04.")
    assert find_problems(model) == []
    load_policy(model)
    assert not (tmp_path / "canary").exists()


def test_words_of_a_vocabulary_are_no_settings(model: Path) -> None:
    (model / "vocab.json").write_text(json.dumps({"_internal": 0, "auto_map": 1}))
    assert find_problems(model) == []


def test_kernels_that_ship_with_the_library_may_be_named(model: Path) -> None:
    edit(model / "config.json", _attn_implementation="sdpa")
    assert find_problems(model) == []


def test_a_template_that_refuses_conversations_is_no_harm(model: Path) -> None:
    template(model, "{{ raise_exception('roles must alternate') }}")
    assert find_problems(model) == []
    template(model, "{{ undefined.thing.of.its_own }}")
    assert find_problems(model) == []


def test_an_overlong_template_is_not_even_parsed(model: Path) -> None:
    template(model, "x" * (MAX_TEMPLATE + 1))
    assert "longer than" in find_problems(model)[0]


def test_a_change_is_seen_at_once(model: Path) -> None:
    assert find_problems(model) == []
    edit(model / "config.json", auto_map={})
    assert len(find_problems(model)) == 1


def test_every_problem_of_a_folder_is_told(model: Path) -> None:
    edit(model / "config.json", auto_map={}, trust_remote_code=True)
    with pytest.raises(UnfitModel, match=r"and 1 more like it"):
        refuse_unfit(model)


# --- a hub's cache -------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_cache(model: Path, home: Path) -> Path:
    """Lay a model out as a hub's cache does: a snapshot of links to blobs named by digest."""
    cached = home / "models--someone--tiny"
    snapshot = cached / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for name, digest in provenance(model)["files"].items():
        blob = cached / "blobs" / digest.removeprefix("sha256:")
        shutil.copy(model / name, blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def test_a_hubs_cache_is_read_through_its_links(model: Path, tmp_path: Path) -> None:
    snapshot = in_cache(model, tmp_path / "hub")
    assert find_problems(snapshot) == []
    found = provenance(snapshot)
    assert found["name"] == "someone/tiny"
    assert found["revision"] == COMMIT
    assert found["files"] == provenance(model)["files"]


def test_a_link_out_of_a_hubs_cache_is_refused(model: Path, tmp_path: Path) -> None:
    snapshot = in_cache(model, tmp_path / "hub")
    (snapshot / "generation_config.json").unlink()
    (snapshot / "generation_config.json").symlink_to(model / "generation_config.json")
    assert "link out of the folder" in find_problems(snapshot)[0]


def test_a_changed_blob_is_found_by_its_name(model: Path, tmp_path: Path) -> None:
    snapshot = in_cache(model, tmp_path / "hub")
    blob = (snapshot / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    with pytest.raises(UnfitModel, match=r"model\.safetensors is not what the hub had"):
        provenance(snapshot)


def test_a_folder_of_ones_own_has_a_path_and_no_commit(model: Path) -> None:
    found = provenance(model)
    assert (found["name"], found["revision"]) == (str(model), None)
    assert found["files"]["model.safetensors"].startswith("sha256:")


# --- adapters ------------------------------------------------------------------------------------


def write_adapter(base: Path, out: Path) -> Path:
    from selfmoa.config import Policy

    model, tokenizer = load_policy(base)
    save_policy(make_trainable(model, Policy(adapter="lora", lora_rank=2), 0), tokenizer, out)
    return out


def test_an_adapter_is_put_on_its_base(model: Path, tmp_path: Path) -> None:
    load_policy(write_adapter(model, tmp_path / "adapter"))


def test_an_adapter_on_another_base_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(model, tmp_path / "adapter")
    wider = write_replica(tmp_path / "wider", "qwen2.5", hidden=64)
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(wider))
    with pytest.raises(UnfitModel, match="name its own base"):
        load_policy(adapter)
    other = write_replica(tmp_path / "other", "phi-4-mini")  # of the same width, with fused weights
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(other))
    with pytest.raises(UnfitModel, match="that has no weight"):
        load_policy(adapter)


def test_an_adapter_with_pickled_weights_is_refused(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(model, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "canary")))
    with pytest.raises(UnfitModel, match=r"adapter_model\.bin"):
        load_policy(adapter)
    assert not (tmp_path / "canary").exists()


def test_weights_of_odd_kinds_do_not_confuse_it(model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(model, tmp_path / "adapter")
    save_file({"loose": torch.zeros(3)}, adapter / "more.safetensors")
    load_policy(adapter)
