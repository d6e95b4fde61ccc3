"""Run the tiny loop in forked children that kill themselves at named points, one after another.

    python kill_driver.py RUN_FOLDER [OVERRIDE ...]

prints one JSON line: {"killed": n, "missed": [...]}.

Forking spares every attempt the seconds that importing torch and its like takes. The parent never
computes, so no thread is lost in a fork.
"""

import json
import os
import signal
import sys

# Imported once, inherited by every child.
import torch  # noqa: F401
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import selfmoa.generators.local
import selfmoa.training.fitting  # noqa: F401
from selfmoa import loop, registry
from selfmoa.recipes import load_recipe

ATOMIC = ("atomic.before_replace", "atomic.after_replace")
SEAL = ("seal.before", "seal.after")
# Each attempt goes on from the last complete checkpoint. `test_train_command` dies at all points of
# a checkpoint; here two show that a stage takes up what a training left.
SAVE = ("checkpoint.torn", "checkpoint.after_replace")
# A point that a stage never passes would let the child finish it, so each stage has its own list.
POINTS = {
    "reset": ("checkpoint.torn#7", SAVE[1], *SEAL),
    "evaluate": ("journal.append.torn", "journal.append.after#2", ATOMIC[0], *SEAL),
    "red_team": ("journal.append.torn", "journal.append.after#3", *ATOMIC, *SEAL),
    "sample": ("journal.append.before", "journal.append.torn#2", "journal.append.after#2", *SEAL),
    "judge": ("journal.append.torn#2", "journal.append.after#4", *ATOMIC, *SEAL),
    "pair": (*ATOMIC, *SEAL),
    # The reference's log-probabilities, then checkpoints.
    "train": (ATOMIC[1], *SAVE, *SEAL),
    "report": (*ATOMIC, "atomic.before_replace#3", *SEAL),
}
# From the second round on only between stages, and once inside a training.
LATER = {"train": ("checkpoint.after_replace#2", *SEAL)}


def attempt(recipe, folder: str, stage: str, round_: int, point: str) -> bool:
    """Run up to a stage in a child that kills itself at the point; return whether it died."""
    child = os.fork()
    if child == 0:
        os.environ["SELFMOA_KILL_AT"] = f"{stage}:{point}"
        try:
            loop.run(recipe, folder, only=(stage, round_))
        except BaseException as error:  # noqa: BLE001  (the child must never return to the loop)
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) == signal.SIGKILL
    if os.WEXITSTATUS(status):
        raise SystemExit(f"{stage}@{round_} failed when killed at {point}")
    return False


def main() -> None:
    folder, overrides = sys.argv[1], sys.argv[2:]
    recipe = load_recipe("sandbox", overrides)
    for kind in registry.PLUGINS:
        for name in registry.names(kind):
            registry.resolve(kind, name)
    killed, missed = 0, []
    for stage, round_ in loop.plan(recipe):
        for point in POINTS[stage] if round_ < 2 else LATER.get(stage, SEAL):
            if attempt(recipe, folder, stage, round_, point):
                killed += 1
            else:
                missed.append(f"{stage}@{round_}:{point}")
    sys.stdout.write(json.dumps({"killed": killed, "missed": missed}) + "\n")


if __name__ == "__main__":
    main()
