"""The source that llguidance compiles for a request (of a schema, a regular expression, choices or
a grammar), and a matcher of it on a tokenizer."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.engine.structured import StructuredOutputsParams

# Items of one mask, by Earley's algorithm. With llguidance's own limit of 50,000 an ambiguous
# grammar takes a second of every round; with this one 0.1 s.
_STEP_ITEMS = 20_000
_SHOWN = 200  # characters of an error
_STACK = 4 * 2**20  # bytes in a trial; where the grammar is used there must be more
# Unbounded blanks are how small models fill an answer to its end. `lenient` would ignore keywords
# that are not known.
_JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ \t\n\r]{0,40}", "lenient": False}
_GBNF_RULE = re.compile(r"^[ \t]*[\w-]+[ \t]*::=", re.MULTILINE)  # linear in a text's length


def library() -> Any:
    """Import llguidance. Raises ConfigError where it is not installed."""
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ConfigError(
            "structured_outputs needs llguidance: in the clone, pip install -e '.[grammar]'"
        ) from error
    return llguidance


def source_of(params: StructuredOutputsParams) -> str:
    """Return the source that llguidance compiles. Raises ConfigError for a malformed request."""
    try:
        return str(_source(library().LLMatcher, params))
    except ValueError as error:
        raise ConfigError(f"structured_outputs: {one_line(error)}") from error


def _source(make: Any, params: StructuredOutputsParams) -> Any:
    if params.json is not None:
        return make.grammar_from_json_schema(params.json, overrides=_JSON_OPTIONS)
    if params.json_object:
        return make.grammar_from_json_schema({"type": "object"}, overrides=_JSON_OPTIONS)
    if params.regex is not None:
        return make.grammar_from_regex(params.regex)
    if params.choice is not None:  # one terminal: alternatives of a rule take quadratic time
        choices = " | ".join(map(_literal, params.choice))
        return make.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    return make.grammar_from_lark(_lark(params.grammar or ""))


def _literal(text: str) -> str:
    """Quote a text for Lark: as JSON does, and U+007F escaped, as llguidance requires."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f")


def _lark(grammar: str) -> str:
    """Return a grammar in Lark. Grammars of llama.cpp and of vLLM's examples are in GBNF."""
    if _GBNF_RULE.search(grammar) is None:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar))
    except MemoryError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the grammar is no GBNF: {error}") from error


def json_grammar(schema: Mapping[str, Any], lenient: bool = False) -> str:
    """Return a JSON schema with our options in it, for %json in a Lark grammar. lenient: leave out
    keywords that llguidance cannot enforce."""
    return json.dumps({**schema, "x-guidance": {**_JSON_OPTIONS, "lenient": lenient}})


@dataclass(frozen=True, slots=True)
class Tokens:
    """A tokenizer with the attributes that llguidance's wrapper reads."""

    eos_token_id: int
    bos_token_id: int | None
    tokens: list[bytes]
    special_token_ids: list[int]
    encode: Callable[[bytes], list[int]]

    def __call__(self, text: bytes) -> list[int]:
        """Return the ids of a text."""
        return self.encode(text)


def new_matcher(tokens: Any, source: str) -> Any:
    """Return a matcher at the grammar's start, or in its error state. tokens: an LLTokenizer."""
    llguidance = library()
    limits = llguidance.LLParserLimits(step_max_items=_STEP_ITEMS)
    return llguidance.LLMatcher(tokens, source, log_level=0, limits=limits)


def tried(params: StructuredOutputsParams) -> str:
    """Compile a grammar once on a vocabulary of bytes; return its source. Raises ConfigError for a
    wrong grammar.

    A trial takes as long as a compilation on a model's vocabulary, and starts at once. llguidance
    cannot be interrupted, takes minutes for some grammars and overflows its stack on others: call
    this in a process that may die."""
    found: list[str | BaseException] = []

    def run() -> None:
        try:
            found.append(_tried(params))
        except BaseException as error:
            found.append(error)

    threading.stack_size(_STACK)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    (result,) = found
    if isinstance(result, BaseException):
        raise result
    return result


def _tried(params: StructuredOutputsParams) -> str:
    source = source_of(params)
    llguidance = library()
    spelt = Tokens(256, None, [*(bytes([i]) for i in range(256)), b"<end>"], [256], list)
    wrapped = llguidance.TokenizerWrapper(spelt)
    tokens = llguidance.LLTokenizer(wrapped, n_vocab=257, eos_token=[256], slices=[])
    matcher = new_matcher(tokens, source)
    matcher.compute_bitmask()
    check_matcher(matcher)
    return source


def check_matcher(matcher: Any) -> None:
    """Raise ConfigError if a matcher is in its error state."""
    if matcher.is_error():
        raise ConfigError(f"structured_outputs: {one_line(matcher.get_error())}")


def one_line(error: object) -> str:
    """Shorten an error of llguidance to one line."""
    text = " ".join(str(error).partition("<state>")[0].split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
