"""Tries a grammar in a process of its own: `python -m smart_decoding.models.grammar_check SECONDS`.

llguidance compiles in native code that cannot be interrupted, takes minutes for some grammars, and
overflows its stack on others. The grammar comes on standard input; what is wrong with it goes to
standard output. On a vocabulary of bytes this takes as long as on a model's, and starts at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Of one mask, by Earley's algorithm. With llguidance's own 50,000 an ambiguous grammar takes a
# second of every round; with these 0.1 s.
_STEP_ITEMS = 20_000
STACK = 4 * 2**20  # bytes here; where the grammar is used there must be more
_MEMORY = 2**30  # bytes


def new_matcher(llguidance: Any, tokens: Any, source: str) -> Any:
    """A matcher at the grammar's start, or in its error state. tokens: an LLTokenizer."""
    limits = llguidance.LLParserLimits(step_max_items=_STEP_ITEMS)
    return llguidance.LLMatcher(tokens, source, log_level=0, limits=limits)


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenizer as llguidance's wrapper asks for it."""

    eos_token_id: int
    bos_token_id: int | None
    tokens: list[bytes]
    special_token_ids: list[int]
    encode: Callable[[bytes], list[int]]

    def __call__(self, text: bytes) -> list[int]:
        """The ids of a text."""
        return self.encode(text)


def _try(source: str, found: list[str]) -> None:
    import llguidance

    spelt = Tokens(256, None, [*(bytes([i]) for i in range(256)), b"<end>"], [256], list)
    wrapped = llguidance.TokenizerWrapper(spelt)
    tokens = llguidance.LLTokenizer(wrapped, n_vocab=257, eos_token=[256], slices=[])
    matcher = new_matcher(llguidance, tokens, source)
    matcher.compute_bitmask()
    found.append(matcher.get_error())


def main() -> int:
    """Ends by a signal if the grammar takes more than the seconds of processor, stack or memory."""
    import resource  # not everywhere where the rest of this module is

    os.nice(5)  # rounds go on meanwhile
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source = sys.stdin.read()
    threading.stack_size(STACK)
    found: list[str] = []
    thread = threading.Thread(target=_try, args=(source, found))
    thread.start()
    thread.join()
    sys.stdout.write("".join(found))
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
