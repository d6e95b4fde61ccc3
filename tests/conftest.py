"""What several test files share: a recipe so small that the whole loop takes seconds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test workers must not fight for two cores

# A busy machine is slow at drawing examples; that is no fault of a test.
hypothesis_settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("patient")

TINY = [
    "rounds=2",
    "policy.checkpoint_every=1",  # its trainings take four steps
    "sandbox.hidden=64",
    "sandbox.steps=420",
    "sandbox.lr=6e-3",
    "sandbox.batch_size=48",
    "sandbox.examples=12000",
    "reset.steps=30",
    "reset.examples=400",
    "red_team.calls=60",
    "red_team.batch_size=20",
    "red_team.benign_prompts=24",
    "red_team.max_prompts=24",
    "red_team.checks=1",
    "sample.k=2",
    "sample.k_careful=2",
    "sample.batch_size=48",
    "pair.min_safety_gap=0.1",
    "pair.max_flip=0.45",
    "pair.min_helpfulness_gap=0.3",
    "pair.min_consensus=0",
    "train.epochs=2",
    "evaluate.per_category=12",
    "evaluate.probes=12",
    "gate.max_refusal_rise=1",
    "gate.max_helpfulness_drop=1",
    "gate.min_found=0",
]


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Overrides that make the recipe `sandbox` tiny."""
    return list(TINY)


@pytest.fixture(scope="session", autouse=True)
def model_cache() -> Path:
    """One cache of instruct models for all test workers of this machine, apart from the user's."""
    folder = Path(tempfile.gettempdir()) / f"selfmoa-test-cache-{os.getuid()}"
    os.environ["SELFMOA_CACHE"] = str(folder)
    return folder
