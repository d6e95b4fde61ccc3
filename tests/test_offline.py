"""No network: the whole loop runs with sockets blocked, and nothing so much as tries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = """
import json, socket, sys

tried = []

def watch(name):
    real = getattr(socket.socket, name)
    def stand_in(self, address, *rest):
        if self.family == socket.AF_UNIX:  # processes of this machine
            return real(self, address, *rest)
        tried.append([name, str(address)])
        raise OSError(101, "Network is unreachable")
    setattr(socket.socket, name, stand_in)

def look_up(name):
    def stand_in(host, *rest, **more):
        tried.append([name, str(host)])
        raise socket.gaierror(-3, "Temporary failure in name resolution")
    setattr(socket, name, stand_in)

for name in ("connect", "connect_ex"):
    watch(name)
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    look_up(name)
real_send = socket.socket.sendto
def send(self, data, *rest):
    if self.family != socket.AF_UNIX:
        tried.append(["sendto", str(rest[-1:])])
        raise OSError(101, "Network is unreachable")
    return real_send(self, data, *rest)
socket.socket.sendto = send

if sys.argv[1] == "check":  # that the block blocks
    try:
        socket.create_connection(("127.0.0.1", 9))
    except OSError:
        pass
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.socket(family).connect(("::1" if family == socket.AF_INET6 else "127.0.0.1", 9))
        except OSError:
            pass
else:
    from selfmoa import loop
    from selfmoa.recipes import load_recipe

    summary = loop.run(load_recipe("sandbox", json.loads(sys.argv[3])), sys.argv[2])
    assert summary["headline"], summary
print(json.dumps(tried))
"""


def drive(*arguments: str, offline: bool = False) -> list[list[str]]:
    """Return what the driver tried to reach."""
    left_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[str]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_block_sees_who_tries() -> None:
    assert [name for name, _ in drive("check")] == ["create_connection", "connect", "connect"]


@pytest.mark.slow
@pytest.mark.parametrize("offline", [False, True])
def test_the_whole_loop_tries_no_connection(
    tiny: list[str], model_cache: Path, tmp_path: Path, offline: bool
) -> None:
    more = [*tiny, "policy.adapter=lora", "policy.lora_rank=4"]
    assert drive("run", str(tmp_path / "run"), json.dumps(more), offline=offline) == []
