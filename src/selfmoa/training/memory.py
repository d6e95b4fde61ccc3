"""Memory: an allocator that keeps what was freed, and how to know that there is no more."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 2**31 - 1
"""Bytes; the largest value that mallopt takes."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step; return whether it does.

    By default it gives every large tensor back to the system and asks for it again a step later:
    each page of it is then cleared and mapped anew. Does nothing on other C libraries.
    """
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        return bool(mallopt(M_MMAP_THRESHOLD, KEPT)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
    return False


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is what torch raises where memory ends, on any device."""
    is_ours = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_ours or "can't allocate memory" in str(error)
