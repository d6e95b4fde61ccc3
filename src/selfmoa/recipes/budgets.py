"""What fits on a card: memory and size of the policy -> settings. No result depends on them much.

They say how much is held and computed at once, how many bits a weight has, and who grades. What
training sees of the data, such as `train.batch_size`, is the same on every card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfmoa.errors import RecipeError

Settings = dict[str, Any]

BUDGETS: Mapping[int, Mapping[str, Settings]] = {
    8: {
        "policy": {"max_tokens": 2048, "gradient_checkpointing": True},
        "red_team": {"batch_size": 64},
        "sample": {"batch_size": 16},
    },
    16: {
        "policy": {"max_tokens": 4096, "gradient_checkpointing": True},
        "red_team": {"batch_size": 128},
        "sample": {"batch_size": 32},
    },
    24: {
        "policy": {"max_tokens": 8192, "gradient_checkpointing": True},
        "red_team": {"batch_size": 128},
        "sample": {"batch_size": 64},
        "evaluate": {"judges": {"safety": "wildguard"}},
    },
    80: {
        "policy": {"max_tokens": 16384, "gradient_checkpointing": False},
        "red_team": {"batch_size": 256},
        "sample": {"batch_size": 256},
        "evaluate": {"judges": {"safety": "wildguard"}},
    },
}
"""By memory in GB. Reckoned for answers of 256 tokens and models of up to 4 billion weights, whose
keys and values take up to 0.2 MB a token in bf16."""

BYTES_A_WEIGHT = 2
"""In bf16."""
FOR_WEIGHTS = 0.5
"""Share of the memory that the policy's weights may take; beyond, they are held in 4 bits."""


def memory_class(gigabytes: float) -> int:
    """Return the largest of the classes that fits.

    Raises:
        RecipeError: none does.
    """
    fitting = [size for size in BUDGETS if size <= gigabytes]
    if not fitting:
        raise RecipeError(
            "memory",
            f"{gigabytes:g} GB is less than the {min(BUDGETS)} GB that the shipped recipes need; "
            "name smaller judges, or put them behind an endpoint",
        )
    return max(fitting)


def budget(gigabytes: float, billions: float | None) -> dict[str, Settings]:
    """Return the settings for that much memory and a policy of that many billion weights.

    A policy of unknown size is taken for one whose weights fit.

    Raises:
        RecipeError: it is too little memory.
    """
    size = memory_class(gigabytes)
    found = {section: dict(values) for section, values in BUDGETS[size].items()}
    if billions is not None and billions * BYTES_A_WEIGHT > FOR_WEIGHTS * size:
        found["policy"] = {"adapter": "qlora", "inference": "nf4", **found["policy"]}
    return found
