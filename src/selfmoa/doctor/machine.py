"""Is the machine ready? Packages, device, room on the disk and in memory, endpoints."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from selfmoa.doctor.findings import Finding, fail, ok, warn
from selfmoa.errors import SelfmoaError
from selfmoa.planning import plan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from selfmoa.config import Attacker, Endpoint, JudgeModel, Recipe

PATIENCE = 5.0
"""Seconds that an endpoint may take to list its models."""
MOST = 4 << 20
"""Bytes of that list that are read."""
ROOM = 1.2
"""Free room on the disk, as a multiple of what is planned, below which a warning is due."""


def packages(recipe: Recipe) -> Iterator[Finding]:
    """Compare what is installed with the lowest versions that are safe, extras included."""
    extras = ("", *_extras(recipe))
    needed = [Requirement(line) for line in requires("selfmoa") or []]
    problems = []
    for one in needed:
        applies = [x for x in extras if one.marker is None or one.marker.evaluate({"extra": x})]
        if applies and (problem := _package(one, applies[0])):
            problems.append(problem)
    yield from problems or [ok("packages", "all are there, at safe versions")]


def _package(needed: Requirement, extra: str) -> Finding | None:
    asked = f"{needed.name}{needed.specifier}"
    try:
        seen = version(needed.name)
    except PackageNotFoundError:
        what = f"selfmoa[{extra}]" if extra else asked
        return fail("packages", f"{needed.name} is missing", f"pip install '{what}'")
    if needed.specifier.contains(seen, prereleases=True):
        return None
    problem = f"{needed.name} is {seen}, and {needed.specifier} is needed"
    return fail("packages", problem, f"pip install -U '{asked}'")


def _extras(recipe: Recipe) -> list[str]:
    """Return the extras of the package that a recipe needs."""
    found = []
    if recipe.policy.adapter == "qlora" or recipe.policy.inference == "nf4":
        found.append("qlora")
    if recipe.policy.engine == "vllm":
        found.append("vllm")
    if _endpoints(recipe):
        found.append("endpoint")
    return found


def device(recipe: Recipe) -> Iterator[Finding]:
    """Look whether the device that the recipe asks for is there and can do what is asked."""
    import torch

    wanted, policy = recipe.policy.device, recipe.policy
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    there = {"cuda": cuda, "mps": mps, "cpu": True}
    name = next(n for n in there if there[n]) if wanted == "auto" else wanted
    wants_bf16 = "bf16" in (policy.precision, policy.inference)
    wants_nf4 = policy.adapter == "qlora" or policy.inference == "nf4"
    if not there[name]:
        remedy = "set policy.device=auto, or use a machine that has one"
        yield fail("device", f"there is no {name} here", remedy)
    elif (
        name == "cuda"
        and wants_bf16
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        remedy = "set policy.precision=fp32 policy.inference=fp32"
        yield fail("device", "this GPU has no bf16", remedy)
    elif name != "cuda" and wants_nf4:
        remedy = "set policy.adapter=lora policy.inference=auto"
        yield warn("device", f"4 bits a weight are slow on {name}, where they work at all", remedy)
    elif name == "cpu" and wants_bf16:
        remedy = "set policy.precision=fp32 policy.inference=fp32"
        yield warn("device", "bf16 is slow on most CPUs", remedy)
    else:
        yield ok("device", name)


def room(recipe: Recipe, directory: Path) -> Iterator[Finding]:
    """Compare disk and memory with the plan."""
    limit = _memory_gb(recipe)
    try:
        found = plan(recipe, limit)
    except SelfmoaError as error:
        yield warn("memory", f"nothing can be planned: {error}", "mend what the other checks name")
        return
    memory, disk = found["memory"], found["disk"]
    if memory["fits"]:
        yield ok("memory", f"{memory['peak_gb']:.1f} of {limit:.1f} GB in {memory['stage']}")
    else:
        seen = f"{memory['stage']} takes {memory['peak_gb']:.1f} GB, and there are {limit:.1f}"
        yield fail("memory", seen, memory["remedy"])
    needed = disk["run"] + disk["to_fetch"]
    free = shutil.disk_usage(_existing(directory)).free
    seen = f"{needed / 1e9:.1f} GB planned, {free / 1e9:.1f} GB free"
    remedy = "make room, choose another --dir, or set policy.adapter=lora"
    if free < needed:
        yield fail("disk", seen, remedy)
    else:
        yield ok("disk", seen) if free > ROOM * needed else warn("disk", seen, remedy)


def _memory_gb(recipe: Recipe) -> float:
    """Return what is free of the device's memory, in 10^9 bytes."""
    import torch

    if recipe.policy.device in ("auto", "cuda") and torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0] / 1e9)
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
        return float((pages or os.sysconf("SC_PHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE") / 1e9)
    except (AttributeError, ValueError, OSError):
        return float("inf")


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(p for p in (folder, *folder.parents) if p.exists())


# --- endpoints -----------------------------------------------------------------------------------


def _endpoints(recipe: Recipe) -> dict[str, list[str]]:
    """Return the endpoints that are asked, each with the models that it must have."""
    found: dict[str, list[str]] = {}
    if recipe.model.endpoint:
        found[recipe.model.endpoint] = []  # the policy's folders are loaded as they come
    owns: list[JudgeModel | Attacker] = [*recipe.judges.values(), *recipe.attackers.values()]
    for own in owns:
        if own.endpoint:
            found.setdefault(own.endpoint, []).append(str(own.model))
    return found


def endpoints(recipe: Recipe) -> Iterator[Finding]:
    """Ask each endpoint which models it has."""
    for name, wanted in _endpoints(recipe).items():
        yield _endpoint(name, recipe.endpoints[name], wanted)


def _endpoint(name: str, own: Endpoint, wanted: list[str]) -> Finding:
    check = f"endpoint {name}"
    if own.key_env and not os.environ.get(own.key_env, "").strip():
        return fail(check, f"its key {own.key_env} is not set", f"export {own.key_env}=...")
    try:
        listed = _listed(own)
    except ImportError:
        return fail(check, "httpx2 is missing", "pip install 'selfmoa[endpoint]'")
    except SelfmoaError as error:
        return fail(check, str(error), f"mend endpoints.{name}.url")
    except _NoAnswer as error:
        return fail(check, f"{own.url} {error}", f"start the server, or mend endpoints.{name}")
    if missing := [model for model in wanted if model not in listed]:
        has = ", ".join(sorted(listed)[:8]) or "none"
        return fail(check, f"it has no model '{missing[0]}', but {has}", "name one that it has")
    return ok(check, f"answers, {len(listed)} models")


class _NoAnswer(Exception):  # noqa: N818
    """An endpoint did not list its models."""


def _listed(own: Endpoint) -> set[str]:
    """Return the names of the models at an endpoint; nothing is followed, no proxy is asked."""
    import httpx2

    from selfmoa.generators.endpoint.address import parse

    key = os.environ.get(own.key_env, "").strip() if own.key_env else ""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = f"{parse(own.url).shown}/models"
    try:
        with (
            httpx2.Client(timeout=PATIENCE, trust_env=False, follow_redirects=False) as client,
            client.stream("GET", address, headers=headers) as reply,
        ):
            if reply.status_code in (401, 403):
                raise _NoAnswer(f"refuses the key ({reply.status_code})")
            if reply.status_code != 200:
                raise _NoAnswer(f"says {reply.status_code} when it is asked for its models")
            body = b""
            for piece in reply.iter_bytes():
                body += piece
                if len(body) > MOST:
                    raise _NoAnswer("never ends its list of models")
    except httpx2.HTTPError as error:
        raise _NoAnswer(f"does not answer ({type(error).__name__})") from error
    try:
        said: Any = json.loads(body)
        return {str(entry["id"]) for entry in said["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _NoAnswer("lists its models in another form than OpenAI's") from error
