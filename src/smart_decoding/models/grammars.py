"""Grammars on a model's tokens, through llguidance: which tokens may come next, at every node of a
draft tree."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.engine.structured import StructuredOutputsParams
    from smart_decoding.models.tokenizer import Tokenizer

# Unbounded blanks are how small models fill an answer to its end. `lenient` would ignore keywords
# that are not known.
JSON_OPTIONS: dict[str, Any] = {"whitespace_pattern": r"[ \t\n\r]{0,40}", "lenient": False}
_KEPT = 16  # compiled grammars
_SHOWN = 200  # characters of an error


class Grammars:
    """Compiles what requests ask for into constraints on the tokens of one model; the latest ones
    are kept.

    vocab: columns of the model's logits. eos_ids: tokens that end an answer. May be called from
    several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._eos_ids = tuple(eos_ids)
        self._ready: Any = None  # llguidance's tokenizer: made at first use, which takes a while
        self._compiled: OrderedDict[StructuredOutputsParams, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, params: StructuredOutputsParams) -> GrammarConstraint:
        """A constraint at its start. Raises ConfigError for a grammar that is wrong, unsupported or
        matches nothing."""
        with self._lock:
            known = self._compiled.pop(params, None)
        matcher = known or self._compile(params)
        with self._lock:
            self._compiled[params] = matcher  # the latest comes last
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return GrammarConstraint(matcher.deep_copy(), self._vocab, self._eos_ids)

    def _compile(self, params: StructuredOutputsParams) -> Any:
        llguidance = _library()
        if not self._eos_ids:
            raise ConfigError(
                "structured_outputs cannot end here: this model has no end-of-sequence token"
            )
        try:
            matcher = llguidance.LLMatcher(
                self._tokens(llguidance), _source(llguidance, params), log_level=0
            )
            # the first one takes longest: not in the engine's time
            mask = matcher.deep_copy().compute_bitmask()
        except ValueError as error:
            raise ConfigError(f"structured_outputs: {_one_line(error)}") from error
        if matcher.is_error():
            raise ConfigError(f"structured_outputs: {_one_line(matcher.get_error())}")
        if not any(mask):
            raise ConfigError("structured_outputs: no text fulfils this")
        return matcher

    def _tokens(self, llguidance: Any) -> Any:
        with self._lock:
            if self._ready is None:
                self._ready = self._new_tokens(llguidance)
            return self._ready

    def _new_tokens(self, llguidance: Any) -> Any:
        """llguidance takes every added token for a special one, which no text may contain. Some are
        text: Qwen's <tool_call> and <think>. Where a model has such tokens, it is told all tokens'
        bytes and which are special."""
        ends = list(self._eos_ids)
        backend = self._tokenizer.backend
        found = llguidance.LLTokenizer(backend.to_str(), n_vocab=self._vocab, eos_token=ends)
        added = backend.get_added_tokens_decoder()
        text = {id_ for id_, token in added.items() if not token.special and id_ not in ends}
        if not text:
            return found
        everything = range(self._vocab)
        special = [id_ for id_ in everything if found.is_special_token(id_) and id_ not in text]
        told = _Tokens(
            ends[0],
            None,
            [found.decode_bytes([id_]) for id_ in everything],
            special,
            found.tokenize_bytes,
        )
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(told), n_vocab=self._vocab, eos_token=ends
        )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A tokenizer as llguidance's wrapper asks for it."""

    eos_token_id: int
    bos_token_id: int | None
    tokens: list[bytes]
    special_token_ids: list[int]
    encode: Callable[[bytes], list[int]]

    def __call__(self, text: bytes) -> list[int]:
        return self.encode(text)


class GrammarConstraint:
    """An `engine.structured.Constraint` over a matcher that has taken in the committed tokens.

    End-of-sequence tokens are not shown to the matcher: it may not count them, and then could not
    go back."""

    def __init__(self, matcher: Any, vocab: int, eos_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._vocab = vocab
        self._eos_ids = eos_ids
        self._ended = False

    def allowed(self, path: Sequence[int]) -> NDArray[np.bool_]:
        """See `Constraint`."""
        if self._ended or not set(self._eos_ids).isdisjoint(path):  # whatever comes then is dropped
            mask = np.zeros(self._vocab, np.bool_)
            mask[list(self._eos_ids)] = True
            return mask
        self._take(path)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        self._matcher.rollback(len(path))
        return np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)

    def accepts(self, path: Sequence[int]) -> bool:
        """See `Constraint`."""
        *before, last = path
        if self._ended or not set(self._eos_ids).isdisjoint(before):
            return False
        if last not in self._eos_ids:
            return bool(self._matcher.validate_tokens(list(path)) == len(path))
        if self._matcher.validate_tokens(before) < len(before):
            return False
        self._take(before)
        may_end = self._matcher.is_accepting()
        self._matcher.rollback(len(before))
        return bool(may_end)

    def append(self, tokens: Sequence[int]) -> None:
        """See `Constraint`."""
        ends = [i for i, token in enumerate(tokens) if token in self._eos_ids]
        self._ended = self._ended or bool(ends)
        self._take(tokens[: ends[0]] if ends else tokens)

    def _take(self, tokens: Sequence[int]) -> None:
        self._matcher.consume_tokens(list(tokens))
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(f"structured_outputs: {_one_line(self._matcher.get_error())}")


def json_grammar(schema: Mapping[str, Any]) -> str:
    """A JSON schema with our options in it, as a Lark grammar takes it after %json."""
    return json.dumps({**schema, "x-guidance": JSON_OPTIONS})


def _source(llguidance: Any, params: StructuredOutputsParams) -> str:
    make = llguidance.LLMatcher
    if params.json is not None:
        return str(make.grammar_from_json_schema(params.json, overrides=JSON_OPTIONS))
    if params.json_object:
        return str(make.grammar_from_json_schema({"type": "object"}, overrides=JSON_OPTIONS))
    if params.regex is not None:
        return str(make.grammar_from_regex(params.regex))
    if params.choice is not None:
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choice)
        return str(make.grammar_from_lark(f"start: {choices}"))
    return str(make.grammar_from_lark(_lark(params.grammar or "")))


def _lark(grammar: str) -> str:
    """A grammar as llguidance takes it: those of llama.cpp and vLLM's examples are GBNF."""
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(grammar))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"the grammar is no GBNF: {error}") from error


def _library() -> Any:
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ConfigError(
            "structured_outputs needs llguidance: in the clone, pip install -e '.[grammar]'"
        ) from error
    return llguidance


def _one_line(error: object) -> str:
    text = " ".join(str(error).partition("<state>")[0].split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
