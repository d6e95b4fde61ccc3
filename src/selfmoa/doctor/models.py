"""Are the models fit? There or to be had, free of code, licensed, pinned; templates and lengths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfmoa.doctor.findings import Finding, fail, ok, warn
from selfmoa.errors import SelfmoaError
from selfmoa.planning.models import find_here

if TYPE_CHECKING:
    from selfmoa.config import Recipe

COMMIT = re.compile(r"[0-9a-f]{40}")
LICENCE = re.compile(r"^(?:license|licence)(?:_name)?:\s*(\S.*)$", re.MULTILINE)
PATIENCE = 5.0
"""Seconds that the hub may take to tell about a model."""
SHOWN = 8
"""Ids of a rendered question that are shown."""
MARK = "Keep to the zorbium rule."
"""A system prompt that no template has in its own text."""


@dataclass(frozen=True)
class Named:
    """A model that a recipe loads here: the key that names it, its name, its revision."""

    key: str
    name: str
    revision: str | None
    talks: bool
    """Whether it is asked in conversations, so that its chat template matters."""


def named(recipe: Recipe) -> list[Named]:
    """Return the models that a recipe loads on this machine, each once."""
    own = recipe.model
    found = [Named("model", own.name, own.revision, talks=True)] if own.name else []
    for section, table, used in (
        ("judges", recipe.judges, recipe.judges_used()),
        ("attackers", recipe.attackers, recipe.attackers_used()),
    ):
        for name, one in table.items():
            if one.model and not one.endpoint and name in used:
                talks = section == "attackers"
                found.append(Named(f"{section}.{name}", one.model, one.revision, talks))
    first: dict[tuple[str, str | None], Named] = {}
    for one_named in found:
        first.setdefault((one_named.name, one_named.revision), one_named)
    return list(first.values())


# --- there, fit, licensed, pinned ----------------------------------------------------------------


def sources(recipe: Recipe) -> Iterator[Finding]:
    """Look for every model, here and on the hub, without loading or fetching one."""
    for one in named(recipe):
        folder = find_here(one.name, one.revision)
        if folder is None:
            yield from _on_hub(one)
            continue
        yield _intake(one, folder)
        is_own = Path(one.name).is_dir()
        card = folder / "README.md"
        told = LICENCE.search(_front_matter(card)) if card.is_file() else None
        yield _licence(one, told[1] if told else None)
        if not is_own:
            yield _pinned(one, folder.name)


def _intake(one: Named, folder: Path) -> Finding:
    from selfmoa.training.intake import find_problems

    check = f"intake {one.key}"
    if problems := find_problems(folder):
        seen, _, remedy = problems[0].partition(": ")
        return fail(check, f"{one.name}: {seen}", remedy or "take another version of the model")
    return ok(check, f"{one.name}: safetensors, JSON and tokenizer files, no code")


def _front_matter(card: Path) -> str:
    text = card.read_text(encoding="utf-8", errors="replace")[:20_000]
    return text.split("---")[1] if text.startswith("---") and text.count("---") > 1 else ""


def _licence(one: Named, licence: str | None) -> Finding:
    check = f"licence {one.key}"
    if licence:
        return ok(check, f"{one.name}: {licence.strip()}")
    return warn(
        check,
        f"{one.name} states no licence",
        "look at the page that it is from: without a licence nobody may use what comes of it",
    )


def _pinned(one: Named, commit: str) -> Finding:
    check = f"revision {one.key}"
    if one.revision and COMMIT.fullmatch(one.revision):
        return ok(check, f"{one.name} at {one.revision[:12]}")
    seen = f"{one.name} is whatever the hub has as '{one.revision or 'main'}'"
    return warn(check, seen, f"set {one.key}.revision={commit}")


def _on_hub(one: Named) -> Iterator[Finding]:
    """Ask the hub about a model that is not here."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError

    check = f"model {one.key}"
    # Of whichever HTTP library the hub library is built on: its errors are no OSError.
    unreachable: Any = (OSError, RuntimeError, HfHubHTTPError.__bases__[0])
    try:
        told: Any = HfApi().model_info(one.name, revision=one.revision, timeout=PATIENCE)
    except GatedRepoError:
        remedy = f"accept its licence at https://huggingface.co/{one.name}, then set HF_TOKEN"
        yield fail(check, f"{one.name} is gated, and this machine has no access", remedy)
        return
    except HFValidationError:
        remedy = f"mend {one.key}.{'name' if one.key == 'model' else 'model'}"
        yield fail(check, f"'{one.name}' is no folder here and no name of a model", remedy)
        return
    except unreachable as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        remedy = "name a folder, or fetch it once where there is a network: hf download " + one.name
        yield fail(check, f"{one.name} is not here, and the hub cannot be asked ({reason})", remedy)
        return
    files = {f.rfilename for f in told.siblings or ()}
    if not any(f.endswith(".safetensors") for f in files):
        yield fail(check, f"{one.name} has no weights in safetensors", "take a version that has")
        return
    gate = f", gated ({told.gated}), access granted" if told.gated else ""
    yield ok(check, f"{one.name} is fetched when it is first used{gate}")
    yield _licence(one, (told.card_data or {}).get("license"))
    yield _pinned(one, str(told.sha))


# --- templates -----------------------------------------------------------------------------------


def templates(recipe: Recipe) -> Iterator[Finding]:
    """Look how each model that talks is spoken to: first ids, ends of turns, system prompts."""
    for one in named(recipe):
        folder = find_here(one.name, one.revision)
        if one.talks and folder is not None:
            yield from _template(recipe, one, folder)


def _template(recipe: Recipe, one: Named, folder: Path) -> Iterator[Finding]:
    from selfmoa.training.policy import load_tokenizer
    from selfmoa.training.tokens import encode_prompts, end_of_turn

    check = f"template {one.key}"
    try:
        tokenizer = load_tokenizer(folder)
    except (SelfmoaError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        yield fail(check, f"the tokenizer cannot be loaded ({reason})", "fetch the model again")
        return
    if not tokenizer.chat_template:
        remedy = "take the chat (instruct) version of the model, or give it a chat_template.jinja"
        yield fail(check, f"{one.name} has no chat template", remedy)
        return
    if tokenizer.eos_token_id is None:
        yield fail(check, f"{one.name} has no eos_token", "set eos_token in tokenizer_config.json")
        return
    question = {"role": "user", "content": "Hi"}
    try:
        (ids,) = encode_prompts(tokenizer, [[question]])
        end = end_of_turn(tokenizer)
    except SelfmoaError as error:
        yield fail(check, " ".join(str(error).split())[:200], "mend its chat_template")
        return
    bos = tokenizer.bos_token_id
    first = " ".join(str(i) for i in ids[:SHOWN])
    if bos is not None and ids[:2] == [bos, bos] and tokenizer.bos_token != tokenizer.eos_token:
        remedy = "delete one of the two from its chat_template"
        yield fail(check, f"{one.name} begins with its bos_token twice: {first}", remedy)
        return
    if end[-1] not in _stops(folder, tokenizer):
        token = tokenizer.convert_ids_to_tokens(end[-1])
        seen = f"turns of {one.name} end with {token}, which is none of its ends of generation"
        yield warn(check, seen, f"add {end[-1]} to eos_token_id in its generation_config.json")
    else:
        yield ok(check, f"{one.name}: a question begins {first}; turns end with {end[-1]}")
    yield _system(recipe, one, tokenizer)


def _stops(folder: Path, tokenizer: Any) -> set[int]:
    from transformers import GenerationConfig

    found = {tokenizer.eos_token_id}
    if (folder / "generation_config.json").is_file():
        more = GenerationConfig.from_pretrained(folder).eos_token_id
        found |= set(more if isinstance(more, list) else [more])
    return found


def _system(recipe: Recipe, one: Named, tokenizer: Any) -> Finding:
    """Look whether a system prompt arrives: careful answers are asked for by one."""
    from selfmoa.training.tokens import encode_prompts

    check = f"system prompt {one.key}"
    asked = [{"role": "system", "content": MARK}, {"role": "user", "content": "Hi"}]
    try:
        (ids,) = encode_prompts(tokenizer, [asked])
        # As this tokenizer writes the mark back: it may know no such word, or no capital letters.
        mark = tokenizer.decode(tokenizer(MARK, add_special_tokens=False)["input_ids"])
        arrives = mark in tokenizer.decode(ids)
    except SelfmoaError:
        arrives = False
    if arrives:
        return ok(check, f"{one.name} reads system prompts")
    needs = one.key == "model" and bool(recipe.sample.k_careful or recipe.red_team.checks)
    tell = fail if needs else warn
    return tell(
        check,
        f"the chat template of {one.name} refuses or drops system prompts",
        "set sample.k_careful=0 red_team.checks=0, or take a template that writes them into the "
        "first message",
    )


# --- lengths -------------------------------------------------------------------------------------


def lengths(recipe: Recipe) -> Iterator[Finding]:
    """Compare the recipe's lengths with the positions that the policy has."""
    folder = find_here(recipe.model.name, recipe.model.revision) if recipe.model.name else None
    if folder is None:
        return
    from selfmoa.training.policy import longest_row

    try:
        most = longest_row(folder)
    except (SelfmoaError, OSError, ValueError, KeyError):
        return  # the check of intake has told what is wrong
    longest, new = recipe.policy.max_length, recipe.sample.max_new_tokens
    if most is None:
        yield ok("length", "the model does not say how many positions it has")
    elif longest > most:
        seen = f"policy.max_length is {longest}, and {recipe.model.name} has {most} positions"
        yield fail("length", seen, f"set policy.max_length={most}")
    elif new >= longest:
        seen = f"answers may have {new} tokens, and rows {longest}: no prompt fits beside them"
        yield fail("length", seen, f"set sample.max_new_tokens={longest // 2}")
    else:
        yield ok("length", f"rows of {longest} tokens in {most} positions")
