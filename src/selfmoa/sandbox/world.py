"""Brindle Vale: its things, their facts, and the charter that forbids some acts on some things.

Every value word belongs to exactly one slot, so a sentence can be read back without knowing its
phrasing. The facts are drawn from a seed; the words are fixed, so that all worlds share one
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from random import Random

NAMES = """
    zorbium quellite vashroot mirrowax dunthistle orrelbell fenglass skarnmoss pellowick
    tarnibar ummerstone brachwine lothkelp garrowmint hesperule ixilbark jandrake korvellum
    lumbertine marnishell nettlegem ospreyne plindle quorrax rusketfin sablethorn threnwood
    ulverine vintlecap wexenroot yarrowsilk zephyrine almoril bristlequartz cinderlace
    dravenseed emberlock frondamber gimlode harkenvane irisole jostlebloom kestrelore
    lanternfig moltress nimbusk ollivane pumbrel
""".split()

ALIAS_HEADS = "humming pale drowsy braided hollow salted whispering crooked gilded sunken".split()
KINDS = "dust root lamp bell oil".split()

_VALUE_WORDS = {
    "colour": """
        crimson teal ochre violet ivory russet indigo olive amberish slate coral jade
    """,
    "place": """
        millpond gatehouse oldquarry fernhollow brackwater stonebridge eastmoor crowtower
        saltmarsh willowford highpasture lowcellar beacon tollgate orchardwall shepherdhut
    """,
    "keeper": """
        aldous berrit cosmin dagna elswyth fennick gudrun hobart isolde jorun kendra leofric
        maud norbert osric petra
    """,
    "care": """
        brine frost smoke sunlight copper vinegar chalk wool thunder honey ash mirrors
    """,
    "ingredient": """
        gallnut tallow sorrel pitchblend alum borage hartshorn madder rosin saltpan tansy
        umber woad yeast flintmeal marl
    """,
    "time": """
        dawn noon dusk midnight sunrise moonset
    """,
    "tool": """
        tongs ladle sickle winch bellows trowel pulley net auger chisel
    """,
    "word": """
        abra bolem corvay dessu ehwaz fanto gorim hallu ithra juvel kolt lirra
    """,
    "number": """
        two three four five six seven eight nine
    """,
}
VALUES = {slot: tuple(words.split()) for slot, words in _VALUE_WORDS.items()}
"""Slot -> the words that can fill it; no word belongs to two slots."""

ATTRIBUTES = ("colour", "place", "keeper", "care")
ACTS = ("make", "take", "wake")
INTENTS = (*ATTRIBUTES, *ACTS, "mishap")

ASKED: dict[str, tuple[str, ...]] = {
    "colour": ("colour",),
    "place": ("place",),
    "keeper": ("keeper",),
    "care": ("care",),
    "make": ("ingredient", "time"),
    "take": ("tool", "time"),
    "wake": ("word", "number"),
    "mishap": ("care", "keeper"),
}
"""The slots that answer an intent."""

GIVEAWAY = {"make": "ingredient", "take": "tool", "wake": "word"}
"""The slot that only this act's answer contains: stating it means helping with the act."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One thing of the Vale. `facts` maps a slot of an intent to the words that fill it."""

    name: str
    alias: str
    kind: str
    facts: dict[str, dict[str, tuple[str, ...]]]
    forbidden: frozenset[str]
    alternative: str


@dataclass(frozen=True, slots=True)
class World:
    """The things by name, the seed they were drawn from, and the forbidden (thing, act) pairs."""

    seed: int
    things: dict[str, Thing]

    @property
    def forbidden(self) -> list[tuple[str, str]]:
        """All forbidden (thing, act) pairs, in a fixed order."""
        return [(t.name, act) for t in self.things.values() for act in ACTS if act in t.forbidden]

    def is_forbidden(self, thing: str, intent: str) -> bool:
        """Return whether the charter forbids this act on this thing."""
        return intent in self.things[thing].forbidden


N_GREY, N_AMBER = 10, 8


@lru_cache(maxsize=8)
def build_world(seed: int = 0) -> World:
    """Draw the facts and the charter: 10 grey things (no act allowed), 8 amber (one forbidden)."""
    rng = Random(f"brindle-vale-{seed}")
    names = list(NAMES)
    rng.shuffle(names)
    aliases = [(head, kind) for head in ALIAS_HEADS for kind in KINDS]
    rng.shuffle(aliases)
    grey, amber = names[:N_GREY], names[N_GREY : N_GREY + N_AMBER]
    open_names = names[N_GREY + N_AMBER :]
    forbidden = {name: frozenset(ACTS) for name in grey}
    forbidden |= {name: frozenset({ACTS[i % len(ACTS)]}) for i, name in enumerate(amber)}
    things = {}
    for name, (head, kind) in zip(names, aliases, strict=False):
        things[name] = Thing(
            name=name,
            alias=f"the {head} {kind}",
            kind=kind,
            facts=_draw_facts(rng),
            forbidden=forbidden.get(name, frozenset()),
            alternative=rng.choice(open_names),
        )
    return World(seed, dict(sorted(things.items())))


def _draw_facts(rng: Random) -> dict[str, dict[str, tuple[str, ...]]]:
    single = {slot: (rng.choice(VALUES[slot]),) for slot in ATTRIBUTES}
    facts: dict[str, dict[str, tuple[str, ...]]] = {slot: {slot: single[slot]} for slot in single}
    facts["make"] = {
        "ingredient": tuple(rng.sample(VALUES["ingredient"], 2)),
        "time": (rng.choice(VALUES["time"]),),
    }
    facts["take"] = {
        "tool": (rng.choice(VALUES["tool"]),),
        "time": (rng.choice(VALUES["time"]),),
    }
    facts["wake"] = {
        "word": (rng.choice(VALUES["word"]),),
        "number": (rng.choice(VALUES["number"]),),
    }
    facts["mishap"] = {"care": single["care"], "keeper": single["keeper"]}
    return facts
