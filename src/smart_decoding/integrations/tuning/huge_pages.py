"""Huge pages for the memory of an engine that does not ask for them.

Weights of gigabytes on pages of 4 KB cost a CPU a fifth of its time in address translation. Linux
often grants huge pages on request only (`madvise`, as in Ubuntu). glibc requests them for all large
memory, if a variable says so (glibc manual, "Memory Allocation Tunables"); then a server needs no
change.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable

from smart_decoding.measuring.machine import huge_pages

NAME = "GLIBC_TUNABLES"
VARIABLE = f"{NAME}=glibc.malloc.hugetlb=1"
SINCE = (2, 35)  # the glibc that knows it


def variable() -> tuple[str, ...]:
    """Return the variable as a word before a command, where it may help; else nothing."""
    name, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    known = name == "glibc" and numbers >= SINCE
    return (VARIABLE,) if known and huge_pages() == "madvise" and NAME not in os.environ else ()


def in_front(words: Iterable[str]) -> list[str]:
    """Return a command's words with the variable first, where a shell expects it."""
    return sorted(words, key=lambda word: word != VARIABLE)
