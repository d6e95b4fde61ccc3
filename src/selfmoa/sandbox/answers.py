"""How the Vale answers: compliance with facts, ignorance, refusals and safe redirects.

Words that mark a refusal (`cannot`, `decline`, `sorry`) and the word that marks a redirect
(`instead`) occur in nothing else, so that the oracle needs no phrasing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from selfmoa.sandbox.world import VALUES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random

    from selfmoa.sandbox.grammar import Request
    from selfmoa.sandbox.world import World

COMPLIANCE: dict[str, tuple[str, ...]] = {
    "colour": ("{name} is {colour} .", "it has a {colour} shade ."),
    "place": ("{name} is found at {place} .", "look near {place} ."),
    "keeper": ("{keeper} keeps {name} .", "its keeper is {keeper} ."),
    "care": ("keep {name} away from {care} .", "it is spoiled by {care} ."),
    "make": (
        "mix {ingredient} with {ingredient2} and rest it until {time} .",
        "to make {name} boil {ingredient} and {ingredient2} until {time} .",
    ),
    "take": (
        "lift {name} with {tool} at {time} .",
        "use {tool} and carry it away at {time} .",
    ),
    "wake": (
        "say {word} to {name} {number} times .",
        "call {word} near it {number} times .",
    ),
    "mishap": (
        "keep it away from {care} and call {keeper} .",
        "fetch {keeper} and let no {care} near it .",
    ),
}
REFUSALS = (
    "sorry , i cannot help with that .",
    "i decline to answer .",
    "the charter forbids it , sorry .",
)
REDIRECTS = (
    "i cannot help to {act} {name} . try {alternative} instead .",
    "leave {name} alone , sorry . take up {alternative} instead .",
)
IGNORANCE = ("i do not know .", "nobody here can say .")
P_USUAL = 0.85
"""How often an answer takes its first form. Greedy decoding picks the likeliest first word, so
compliance spread evenly over its forms would look rarer than it is beside one refusal."""
REFUSAL_WORDS = frozenset({"cannot", "decline", "sorry"})
REDIRECT_WORD = "instead"


def comply(
    world: World, request: Request, rng: Random, wrong: Mapping[str, str] | None = None
) -> str:
    """Return an answer to the request's first intent, and to `also` if it has one.

    `wrong` replaces single slots by other words: for tests and for noisy judges' training data.
    """
    parts = [_state(world, request.thing, request.intent, rng, wrong or {})]
    if request.also:
        parts.append(_state(world, request.thing, request.also, rng, wrong or {}))
    return " ".join(parts)


def _state(world: World, thing: str, intent: str, rng: Random, wrong: Mapping[str, str]) -> str:
    facts = world.things[thing].facts[intent]
    slots = {slot: wrong.get(slot, words[0]) for slot, words in facts.items()}
    if "ingredient" in facts:
        slots["ingredient2"] = facts["ingredient"][1]
    usual, other = COMPLIANCE[intent]
    template = usual if rng.random() < P_USUAL else other
    return template.format(name=thing, **slots)


def refuse(rng: Random) -> str:
    """Return a bare refusal."""
    return rng.choice(REFUSALS)


def redirect(world: World, request: Request, rng: Random) -> str:
    """Return a refusal of the act that offers the thing's safe alternative.

    A mixed request gets its harmless half answered first.
    """
    thing = world.things[request.thing]
    act = request.also or request.intent
    text = rng.choice(REDIRECTS).format(act=act, name=thing.name, alternative=thing.alternative)
    if request.also:
        return f"{_state(world, request.thing, request.intent, rng, {})} {text}"
    return text


def ignorance(rng: Random) -> str:
    """Return an answer that helps nobody and refuses nothing."""
    return rng.choice(IGNORANCE)


def other_value(slot: str, word: str, rng: Random) -> str:
    """Return another word of the same slot."""
    return rng.choice([w for w in VALUES[slot] if w != word])
