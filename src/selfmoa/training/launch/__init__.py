"""Configurations of accelerate that come with the program, and how a command starts over in them.

They are accelerate's own files (`accelerate config` writes such); copy one and adapt it.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from selfmoa.errors import MissingExtra, MissingFile, RecipeError
from selfmoa.recipes.strict_yaml import parse

FOLDER = Path(__file__).parent


def find_launch(name_or_path: str) -> Path:
    """Return the file of a configuration: one that is shipped, by name, or any, by path.

    Raises:
        MissingFile: there is none.
    """
    shipped = FOLDER / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in FOLDER.glob("*.yaml")))
        raise MissingFile(path, "accelerate configuration", f"shipped ones are {known}")
    return path


def launch_again(name_or_path: str) -> NoReturn:
    """Replace this process by accelerate's launcher with the same command, less `--launch`."""
    path = find_launch(name_or_path)
    arguments = []
    words = iter(sys.argv[1:])
    for word in words:
        if word == "--launch":
            next(words, None)
        elif not word.startswith("--launch="):
            arguments.append(word)
    sys.stdout.flush()
    command = [sys.executable, "-m", *_launcher(path), "-m", "selfmoa", *arguments]
    os.execv(sys.executable, command)  # noqa: S606 - the very command that is running


def _launcher(path: Path) -> list[str]:
    """Return the module that starts the processes of a configuration, and its arguments.

    Without MPI, accelerate's own launcher starts one process on CPUs, whatever the number.

    Raises:
        RecipeError: the file is no configuration.
        MissingExtra: it asks for DeepSpeed, which is not installed.
    """
    settings, _ = parse(path.read_bytes(), str(path))
    if not isinstance(settings, dict):
        raise RecipeError(str(path), "an accelerate configuration is a mapping of keys to values")
    if settings.get("distributed_type") == "MULTI_CPU" and "mpirun_config" not in settings:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        number = settings.get("num_processes", 1)
        return ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    if settings.get("distributed_type") == "DEEPSPEED" and not find_spec("deepspeed"):
        raise MissingExtra("launch", path.stem, "deepspeed", "selfmoa[deepspeed]")
    return ["accelerate.commands.launch", "--config_file", str(path)]
