"""Tries a grammar in a process of its own: `python -m smart_decoding.models.grammar_check SECONDS`.

llguidance compiles in native code that cannot be interrupted, takes minutes for some grammars, and
overflows its stack on others. The grammar comes on standard input; what is wrong with it goes to
standard output. On a vocabulary of bytes this takes as long as on a model's, and starts at once.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
import threading
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


class _Bytes:
    """A vocabulary as llguidance's wrapper asks for it: a token a byte, and the end."""

    eos_token_id = 256
    bos_token_id = None
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]  # noqa: RUF012
    special_token_ids = [256]  # noqa: RUF012

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _try(source: str) -> None:
    import llguidance

    wrapped = llguidance.TokenizerWrapper(_Bytes())
    tokens = llguidance.LLTokenizer(wrapped, n_vocab=257, eos_token=[256], slices=[])
    matcher = new_matcher(llguidance, tokens, source)
    matcher.compute_bitmask()
    sys.stdout.write(matcher.get_error())


def main() -> None:
    """Ends by a signal if the grammar takes more than the seconds of processor, stack or memory."""
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source = sys.stdin.read()
    threading.stack_size(STACK)
    thread = threading.Thread(target=_try, args=(source,))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
