"""Which model folders are loaded: weights in safetensors, JSON and tokenizer files, no code.

    refuse_unfit(folder)        before anything of it is loaded
    provenance(folder)          name, commit and digests, for the record

A model is data from a stranger. What could make a loader run, fetch or read something else is
refused before a loader sees it: pickles, Python files, keys that name code (`auto_map`) or a kernel
to be fetched, templates that leave their sandbox or never end, links and indices that lead out of
the folder, damaged headers. Files of other kinds that no loader reads (images, a README, pickled
weights beside those in safetensors) are left alone. So is what lies in folders below, but for the
two that transformers reads.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from safetensors import SafetensorError, safe_open

from selfmoa.errors import SelfmoaError
from selfmoa.rundir.files import digest_file
from selfmoa.training import template_probe
from selfmoa.training.template_probe import ESCAPES, HUNGRY, LONG

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5", ".npz")
READ = (".safetensors", ".json", ".txt", ".model", ".jinja")
"""Ends of the names of what loaders read."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json")
"""JSON files whose keys are tokens: any word may be one, and no loader looks for others there."""
INDEX = ".safetensors.index.json"
TEMPLATES, CODE = "additional_chat_templates", "custom_generate"
"""The folders below a model's that transformers reads."""
MAX_JSON = 256 << 20
MAX_TEMPLATE = 1 << 18
"""Characters of a chat template; the longest of a known model has some 20,000."""
WAIT = 20.0
"""Seconds that the child which renders a template may take in all."""
COMMIT = re.compile(r"[0-9a-f]{40}")
DIGEST = re.compile(r"[0-9a-f]{64}")
NO_CODE = "take a version of the model that transformers loads without code of its own"
FOUND = {
    ESCAPES: "tries to leave the sandbox that templates are rendered in",
    LONG: f"writes more than {template_probe.OUTPUT:,} characters about a few words",
    HUNGRY: f"takes more than {template_probe.MEMORY >> 20} MB or {template_probe.SECONDS} s",
}


class UnfitModel(SelfmoaError):  # noqa: N818
    """A model folder holds something that is not loaded, for safety's sake."""

    exit_code = 4

    def __init__(self, folder: object, problems: list[str]) -> None:
        self.problems = problems
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        super().__init__(f"the model '{folder}' is not loaded: {problems[0]}{more}.")


def refuse_unfit(folder: Path) -> None:
    """Stop before a folder is loaded that a loader should not see.

    Raises:
        UnfitModel: it is one.
    """
    if problems := find_problems(folder):
        raise UnfitModel(folder, problems)


def find_problems(folder: Path) -> list[str]:
    """Return what is wrong with a model folder, each with its remedy; looked at once a change."""
    stats = [(p, p.stat()) for p in _files(folder) if p.exists()]
    seen = tuple((str(p), s.st_size, s.st_mtime_ns) for p, s in stats)
    return list(_find_problems(folder, seen))


def provenance(folder: Path) -> dict[str, Any]:
    """Return {"name", "revision", "files"}: what was loaded, and how to get the same again.

    Of a model from a hub, `revision` is the commit. `files` are sha256 digests by name.

    Raises:
        UnfitModel: a file from a hub is not what the hub had: it was damaged or changed since.
    """
    name, revision = _origin(folder)
    files = {}
    for path in sorted(p for p in _files(folder) if p.suffix in READ):
        files[path.name] = digest = digest_file(path)
        blob = path.readlink().name if revision and path.is_symlink() else ""
        if DIGEST.fullmatch(blob) and digest != f"sha256:{blob}":  # the name of a large file's blob
            problem = f"{path.name} is not what the hub had: delete it and fetch it again"
            raise UnfitModel(folder, [problem])
    return {"name": name, "revision": revision, "files": files}


def refuse_other_base(adapter: Path, base: Path) -> None:
    """Stop before an adapter is put on a model that it was not made for.

    Told by the shapes of weights: an adapter of a larger model, or of another family.

    Raises:
        UnfitModel: its weights do not fit the base that it names.
    """
    below = _shapes(base)
    pairs = [(n, s, below.get(_key(n))) for n, s in _lora_shapes(adapter)]
    if not pairs or not below:
        return
    known = [(n, s, t) for n, s, t in pairs if t is not None]
    other = [(n, s, t) for n, s, t in known if sorted(s) != sorted(t)]  # GPT-2 has them transposed
    missing = [n for n, _, t in pairs if t is None]  # some, where loading fuses weights
    if len(missing) < len(known) and not other:
        return
    seen = f"that has no weight {missing[0]}" if missing else ""
    if other:
        name, ours, theirs = other[0]
        seen = f"its {name} is for {ours}, and there it is {theirs}"
    problem = f"its adapter_config.json says that it is for '{base}', but {seen}: name its own base"
    raise UnfitModel(adapter, [problem])


# --- one folder ----------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """Return what could be read of a folder: its own files, and further templates."""
    if not folder.is_dir():
        return []
    found = [p for p in sorted(folder.iterdir()) if not p.is_dir() or p.name == CODE]
    return found + sorted((folder / TEMPLATES).glob("*.jinja"))


@lru_cache(maxsize=64)
def _find_problems(folder: Path, _seen: tuple[object, ...]) -> tuple[str, ...]:
    files = _files(folder)
    names = {p.name for p in files}
    has_weights = any(n.endswith(".safetensors") for n in names)
    found = [*_outside(folder, files), *_unread(files, has_weights)]
    if names & {"config.json", "adapter_config.json"} and not has_weights and not found:
        found.append("it has no weights in safetensors: take a version that has")
    if found:
        return tuple(found)
    for path in files:
        if path.name.endswith(INDEX):
            found += _astray(folder, path)
        elif path.suffix == ".json" and path.name not in VOCABULARIES:
            found += _in_json(path)
        elif path.suffix == ".jinja":
            found += _in_template(path.name, path.read_text(encoding="utf-8", errors="replace"))
        elif path.suffix == ".safetensors":
            found += _in_weights(path)
    return tuple(found)


def _outside(folder: Path, files: list[Path]) -> Iterator[str]:
    """Yield links out of the folder; the hub's cache links to its own blobs."""
    homes = [folder.resolve()]
    if _origin(folder)[1] is not None:
        cached = folder.resolve().parent.parent
        homes += [cached / "blobs", cached.parent / "blobs"]
    for path in files:
        if not any(path.resolve().is_relative_to(home) for home in homes):
            yield f"{path.name} is a link out of the folder: put the file itself there"
        elif not path.exists():
            yield f"{path.name} is a link to nothing: fetch the model again"


def _unread(files: list[Path], has_weights: bool) -> Iterator[str]:
    for path in files:
        if path.suffix == ".py" or path.name == CODE:
            yield f"{path.name} is code: {NO_CODE}, or delete it"
        elif path.suffix in PICKLES and not has_weights:
            yield (
                f"{path.name} is a format that can run code, and there are no weights in "
                "safetensors: take a version that has, or convert it on a machine of no account"
            )


def _astray(folder: Path, index: Path) -> Iterator[str]:
    named = _read_json(index)
    shards = named.get("weight_map") if isinstance(named, Mapping) else None
    if not isinstance(shards, Mapping):
        yield f"{index.name} has no 'weight_map': fetch it again"
        return
    for shard in sorted({str(s) for s in shards.values()}):
        is_name = shard == Path(shard).name and shard.endswith(".safetensors") and "\\" not in shard
        if not is_name:
            yield f"{index.name} names '{shard[:80]}', no file beside it: take another version"
        elif not (folder / shard).is_file():
            yield f"{index.name} names '{shard[:80]}', which is not there: fetch it again"


def _in_weights(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        yield f"{path.name} is damaged or no safetensors file ({reason}): fetch it again"


def _read_json(path: Path) -> Any:
    """Return what a JSON file holds, or None if it cannot be read as such."""
    try:
        if path.stat().st_size > MAX_JSON:
            return None
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def _in_json(path: Path) -> Iterator[str]:
    found = _read_json(path)
    if found is None:
        yield f"{path.name} is damaged, too large or no JSON: fetch it again"
        return
    for key, value in _items(found):
        if problem := _in_key(key, value):
            yield f"{path.name} {problem}"
        if key in ("chat_template", "template") and isinstance(value, str):
            yield from _in_template(path.name, value)


def _items(value: object) -> Iterator[tuple[str, object]]:
    """Yield every key with its value, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            yield from one.items()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _in_key(key: str, value: object) -> str | None:
    """Return what is wrong with a key: it names code, or a kernel that would be fetched."""
    if key == "auto_map" or key.endswith("_internal") or key == CODE:
        return f"has the key '{key}', by which a loader runs code of the model: {NO_CODE}"
    if key == "trust_remote_code" and value:
        return f"asks for trust_remote_code: {NO_CODE}"
    if key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        texts = value.values() if isinstance(value, Mapping) else [value]
        if any(isinstance(t, str) and "/" in t for t in texts):
            return f"names a kernel to be fetched ({key}): delete the key"
    if key == "auto_mapping" and isinstance(value, Mapping):
        library = str(value.get("parent_library"))
        if library.partition(".")[0] not in ("transformers", "peft"):
            return f"names the library '{library[:80]}' to be imported ({key}): delete the key"
    if key == "megatron_config" and value:
        return f"names a library to be imported ({key}): delete the key"
    return None


# --- templates -----------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _in_template(file: str, text: str) -> tuple[str, ...]:
    """Return what is wrong with a chat template; one that is no Jinja is another module's."""
    problem = _reach(text) or FOUND.get(_rendered(text))
    remedy = "take the template of the model that it was made from"
    return (f"{file} has a chat template that {problem}: {remedy}",) if problem else ()


def _reach(text: str) -> str | None:
    """Return what a template reaches for, as far as it can be read."""
    if len(text) > MAX_TEMPLATE:
        return f"is longer than {MAX_TEMPLATE:,} characters"
    try:
        tree = template_probe.environment().parse(text)
    except (TemplateSyntaxError, RecursionError):
        return None
    for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
        return f"reads other files ({type(node).__name__.lower()})"
    attributes = [n.attr for n in tree.find_all(nodes.Getattr)]
    attributes += [n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)]
    for name in attributes:
        if name.startswith("__") and name.endswith("__") and name.strip("_").isidentifier():
            return f"reaches for '{name}', which is Python's own"
    return None


def _rendered(text: str) -> str:
    """Return what rendering a template in a child process comes to (`template_probe`)."""
    try:
        child = subprocess.run(  # noqa: S603 - our own program; the template is its stdin
            [sys.executable, "-I", template_probe.__file__],
            input=text.encode("utf-8", "replace"),
            capture_output=True,
            timeout=WAIT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return HUNGRY
    said = child.stdout.decode()
    if child.returncode < 0 or "MemoryError" in child.stderr.decode("utf-8", "replace"):
        return HUNGRY
    return said


# --- where a model is from, and what an adapter is for -------------------------------------------


def _origin(folder: Path) -> tuple[str, str | None]:
    """Return name and commit of a model; a folder that is no hub's has its path, and no commit."""
    whole = folder.resolve()
    home = whole.parent.parent.name
    if whole.parent.name == "snapshots" and home.startswith("models--"):
        return home.removeprefix("models--").replace("--", "/"), whole.name
    return str(whole), None


def _key(name: str) -> str:
    """Return a weight's name from its layer on: what is before it differs by who wrote it."""
    start = name.find("layers.")
    return name[start:] if start >= 0 else name.rpartition("model.")[2]


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Return [out, in] of every matrix of a model; what is packed in few bits has none."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                part = file.get_slice(name)
                if len(part.get_shape()) == 2 and part.get_dtype() in ("F32", "F16", "BF16"):
                    found[_key(name)] = list(part.get_shape())
    return found


def _lora_shapes(adapter: Path) -> list[tuple[str, list[int]]]:
    """Return (weight, [out, in]) that an adapter's pairs of matrices are for."""
    ends: dict[str, dict[str, list[int]]] = {}
    for path in sorted(adapter.glob("adapter_model*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                weight, _, side = name.removesuffix(".weight").rpartition(".lora_")
                if side in ("A", "B"):
                    shape = list(file.get_slice(name).get_shape())
                    ends.setdefault(f"{weight}.weight", {})[side] = shape
    return [
        (name.removeprefix("base_model.model."), [sides["B"][0], sides["A"][1]])
        for name, sides in ends.items()
        if len(sides) == 2
    ]
