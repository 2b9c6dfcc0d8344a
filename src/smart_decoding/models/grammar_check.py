"""Tries a grammar in a process of its own: `python -m smart_decoding.models.grammar_check SECONDS`.

llguidance compiles in native code that cannot be interrupted, takes minutes for some grammars, and
overflows its stack on others. What a request asks for comes on standard input, as JSON; to standard
output goes what llguidance compiles, or with status 1 what is wrong. On a vocabulary of bytes this
takes as long as on a model's, and starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.engine.structured import StructuredOutputsParams

# Of one mask, by Earley's algorithm. With llguidance's own 50,000 an ambiguous grammar takes a
# second of every round; with these 0.1 s.
_STEP_ITEMS = 20_000
STACK = 4 * 2**20  # bytes here; where the grammar is used there must be more
_MEMORY = 2**30  # bytes
NICE = 10  # a tenth of the processor time of who wants it, too: rounds go on meanwhile
# Unbounded blanks are how small models fill an answer to its end. `lenient` would ignore keywords
# that are not known.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ \t\n\r]{0,40}", "lenient": False}
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)  # linear in a text's length


def stand_back(nice: int = NICE) -> None:
    """Has this thread, and the processes that it starts, leave most of the processors to rounds."""
    if sys.platform == "linux":  # elsewhere this is told of whole processes
        os.nice(nice)


def source_of(llguidance: Any, params: StructuredOutputsParams) -> str:
    """What llguidance compiles. Raises ValueError for what cannot be read at all."""
    return str(_source(llguidance.LLMatcher, params))


def _source(make: Any, params: StructuredOutputsParams) -> Any:
    if params.json is not None:
        return make.grammar_from_json_schema(params.json, overrides=JSON_OPTIONS)
    if params.json_object:
        return make.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS)
    if params.regex is not None:
        return make.grammar_from_regex(params.regex)
    if params.choice is not None:  # one terminal: alternatives of a rule take quadratic time
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        return make.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    return make.grammar_from_lark(_lark(params.grammar or ""))


def _lark(grammar: str) -> str:
    """A grammar as llguidance takes it: those of llama.cpp and vLLM's examples are GBNF."""
    if _GBNF_RULE.search(grammar) is None:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the grammar is no GBNF: {error}") from error


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


def _try(asked: str, found: list[str]) -> None:
    import llguidance

    params: Any = SimpleNamespace(**json.loads(asked))
    try:
        source = source_of(llguidance, params)
    except ValueError as error:
        found += [str(error), ""]
        return
    spelt = Tokens(256, None, [*(bytes([i]) for i in range(256)), b"<end>"], [256], list)
    wrapped = llguidance.TokenizerWrapper(spelt)
    tokens = llguidance.LLTokenizer(wrapped, n_vocab=257, eos_token=[256], slices=[])
    matcher = new_matcher(llguidance, tokens, source)
    matcher.compute_bitmask()
    found += [matcher.get_error(), source]


def main() -> int:
    """Ends by a signal if the grammar takes more than the seconds of processor, stack or memory."""
    import resource  # not everywhere where the rest of this module is

    if sys.platform != "linux":  # there the thread that starts it stands back
        os.nice(NICE)
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asked = sys.stdin.read()
    threading.stack_size(STACK)
    found: list[str] = []
    thread = threading.Thread(target=_try, args=(asked, found))
    thread.start()
    thread.join()
    error, source = found or ["", ""]
    sys.stdout.write(error or source)
    return 1 if error or not source else 0


if __name__ == "__main__":
    sys.exit(main())
