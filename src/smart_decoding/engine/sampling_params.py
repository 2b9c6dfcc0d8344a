"""`SamplingParams`: a user's options of one request, with vLLM's names and defaults.

Some ranges are narrower than vLLM's: temperature, repetition_penalty, and the length of bad words.
A logit_bias out of range is refused, not clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smart_decoding.engine.stop_strings import StopString
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.errors import ConfigError
from smart_decoding.options import named_options, option

MAX_BAD_WORD = 256  # characters
MAX_STOP = 1024  # characters
GREEDY_BELOW = 1e-5  # vLLM's threshold: colder than this is argmax
INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1


class RequestOutputKind(Enum):
    """Content of each output of `AsyncLLM.generate`, in vLLM's names: the answers so far, the text
    since the last output, or nothing until all answers are whole."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@named_options
@dataclass(slots=True)
class SamplingParams:
    """How to sample one request. Raises ConfigError, naming the parameter, if a value is out of
    range or the name unknown. A value that is set later is checked when it is used.

    n: independent answers to one prompt (1 if greedy).
    Below a temperature of 1e-5 top_p, top_k and min_p have no effect. Else min_p, top_k and top_p
    are applied in this order, as in vLLM: top_p is a part of the tokens that the others keep.
    presence_penalty, frequency_penalty: in [-2, 2], on output tokens.
    logit_bias: token id -> bias in [-100, 100], added to the logits before anything else.
    allowed_token_ids: no other tokens are drawn. bad_words: forbidden texts: the token that would
    complete one is not drawn, at a text's beginning or after a blank.
    stop / stop_token_ids: strings and token ids that end the answer; text before a stop string is
    kept. min_tokens: end-of-sequence and stop ids cannot be drawn before so many tokens.
    t_max_predict_ms: llama.cpp's, for editors: behind so many milliseconds of writing an answer
    ends, once it has a line's end; None or 0: never. Where it ends depends on the machine.
    logprobs: how many most likely tokens to return with log probabilities, beyond the drawn one; -1
    means all. prompt_logprobs: the same for the prompt's tokens, which then are not taken from the
    cache.
    detokenize: false leaves the text empty. output_kind: see `RequestOutputKind`; `LLM` always
    gives whole answers.
    structured_outputs: form of the text, such as JSON under a schema; only the form decides when
    the answer may end. speculate: false refuses speculation for this request; its tokens are the
    same either way.
    bad_words_token_ids: `bad_words` as token ids, set by `LLM`. bias_ids, bias_values, stop_array,
    allowed_array: [entries] logit_bias, stop_token_ids and allowed_token_ids as arrays. stop_ids:
    distinct stop_token_ids; stop_searches: of distinct stop strings. All answers share them.
    """

    n: int = 1
    temperature: float = option(
        1.0, "0 takes the likeliest token, more draws more freely; at most 2"
    )
    top_p: float = option(1.0, "draw from the likeliest tokens of this probability, in (0, 1]")
    top_k: int = option(0, "draw from this many likeliest tokens; 0 or -1: all")
    min_p: float = option(
        0.0, "draw from tokens of at least this part of the likeliest one's probability"
    )
    repetition_penalty: float = option(
        1.0, "lower the scores of tokens in prompt and answer by this factor, in [0.01, 100]"
    )
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | NDArray[np.int64] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = option(
        16, "longest answer; -1 on the command line, None in Python: to the end of the context"
    )
    t_max_predict_ms: int | None = None
    seed: int | None = option(
        None,
        "the same seed gives the same answer under every policy",
        usual="the engine draws one",
    )
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | NDArray[np.int64] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None
    speculate: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    bad_words_token_ids: list[tuple[int, ...]] | None = field(default=None, init=False, repr=False)
    bias_ids: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    bias_values: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    stop_array: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    stop_ids: frozenset[int] = field(init=False, repr=False, compare=False)
    stop_searches: tuple[StopString, ...] = field(init=False, repr=False, compare=False)
    allowed_array: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("stop_token_ids", "allowed_token_ids"):
            if isinstance(getattr(self, name), np.ndarray):  # lists can be compared
                setattr(self, name, getattr(self, name).tolist())
        if self.seed == -1:
            self.seed = None
        self._check_numbers()
        self._check_lengths()
        self._check_stops()
        self._check_logit_bias()
        self._check_masks()
        self._check_structure()
        for name in (
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "include_stop_str_in_output",
            "speculate",
        ):
            self._check(isinstance(getattr(self, name), bool), name, "True or False")
        of_kind = isinstance(self.output_kind, RequestOutputKind)
        self._check(of_kind, "output_kind", "a RequestOutputKind")

    def _check_numbers(self) -> None:
        self._check_real("temperature", "in [0, 2]", lambda x: 0 <= x <= 2)
        self._check_real("top_p", "in (0, 1]", lambda x: 0 < x <= 1)
        self._check_real("min_p", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_real("repetition_penalty", "in [0.01, 100]", lambda x: 0.01 <= x <= 100)
        self._check_real("presence_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._check_real("frequency_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._check_integer("top_k", "0 or -1 (all tokens) or an integer >= 1", -1)

    def _check_lengths(self) -> None:
        self._check_integer("n", "an integer >= 1", 1)
        self._check(self.n == 1 or not self.greedy, "n", "1 with greedy sampling (temperature 0)")
        most = INT64_MAX
        allowed = "an integer >= 0"
        if self.max_tokens is not None:
            end = "an integer >= 1, or None (up to the context's end)"
            self._check_integer("max_tokens", end, 1)
            most = self.max_tokens
            allowed = f"an integer in [0, max_tokens={most}]"
        self._check_integer("min_tokens", allowed, 0, most)
        if self.t_max_predict_ms is not None:
            self._check_integer("t_max_predict_ms", "an integer or None", INT64_MIN)
        if self.seed is not None:
            self._check_integer("seed", "a 64-bit signed integer or None", INT64_MIN)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_integer(name, "an integer >= 0, -1 (all tokens) or None", -1)

    def _check_stops(self) -> None:
        strings = self.stop if isinstance(self.stop, list | tuple) else [self.stop]
        if self.stop is None:
            strings = []
        good = all(isinstance(s, str) and s for s in strings)
        self._check(good, "stop", "a non-empty string or a list of non-empty strings")
        _check_lengths("stop", self.stop_strings, MAX_STOP)
        good = _token_ids(self.stop_token_ids)
        self._check(good, "stop_token_ids", "a list of token ids >= 0")
        self.stop_ids = frozenset(() if self.stop_token_ids is None else self.stop_token_ids)
        self.stop_array = np.fromiter(self.stop_ids, np.int64, len(self.stop_ids))
        self.stop_searches = tuple(map(StopString, self.stop_strings))
        self._check(self.detokenize or not strings, "detokenize", "True with stop strings")

    def _check_masks(self) -> None:
        words = self.bad_words
        good = words is None or (
            isinstance(words, list | tuple) and all(isinstance(w, str) and w.strip() for w in words)
        )
        self._check(good, "bad_words", "a list of texts that are not blank")
        _check_lengths("bad_words", words or (), MAX_BAD_WORD)
        ids = self.allowed_token_ids
        good = ids is None or (_token_ids(ids) and len(ids) > 0)
        self._check(good, "allowed_token_ids", "a list of token ids >= 0, not empty")
        self.allowed_array = np.array([] if ids is None else list(ids), np.int64)

    def _check_logit_bias(self) -> None:
        allowed = "a dict of token ids >= 0 to biases in [-100, 100]"
        biases = {} if self.logit_bias is None else self.logit_bias
        self._check(isinstance(biases, dict) and _token_ids(biases), "logit_bias", allowed)
        for token, bias in biases.items():
            if not (isinstance(bias, int | float | Real) and -100 <= bias <= 100):
                _require(False, "logit_bias", {token: bias}, allowed)
        self.bias_ids = np.fromiter(biases, np.int64)
        self.bias_values = np.fromiter(biases.values(), np.float32)

    def _check_structure(self) -> None:
        structure = self.structured_outputs
        if structure is None:
            return
        good = isinstance(structure, StructuredOutputsParams)
        self._check(good, "structured_outputs", "StructuredOutputsParams or None")
        self._check(not self.ignore_eos, "ignore_eos", "False with structured_outputs")
        self._check(not self.min_tokens, "min_tokens", "0 with structured_outputs")
        for name in ("bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            self._check(value is None or not len(value), name, "None with structured_outputs")

    def _check(self, good: bool, name: str, allowed: str) -> None:
        _require(good, name, getattr(self, name), allowed)

    def _check_real(self, name: str, allowed: str, in_range: Callable[[float], bool]) -> None:
        value = getattr(self, name)
        number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
        self._check(number and in_range(float(value)), name, allowed)

    def _check_integer(self, name: str, allowed: str, low: int, high: int = INT64_MAX) -> None:
        value = getattr(self, name)
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        self._check(whole and low <= int(value) <= high, name, allowed)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ConfigError if a token id or a number of log probabilities does not fit a model of
        `vocab_size` tokens."""
        allowed = f"less than the model's vocabulary of {vocab_size}"
        for name, ids in (
            ("logit_bias", self.bias_ids),
            ("stop_token_ids", self.stop_array),
            ("allowed_token_ids", self.allowed_array),
        ):
            largest = int(ids.max(initial=0))
            _require(largest < vocab_size, name, largest, allowed)
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            allowed = f"at most the vocabulary of {vocab_size}"
            _require(count is None or count <= vocab_size, name, count, allowed)

    def check_logprobs(self, most: int) -> None:
        """Raise ConfigError for more log probabilities of a token than `most` (-1: any number)."""
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            good = most == -1 or count is None or 0 <= count <= most
            _require(good, name, count, f"at most max_logprobs={most}")

    def checked(self, encode: Callable[[str], Sequence[int]]) -> SamplingParams:
        """Return a copy, checked anew, with `bad_words_token_ids`. encode: text to ids."""
        found = replace(self)
        if self.bad_words:
            ids = dict.fromkeys(tuple(encode(text)) for text in self.bad_word_texts)
            found.bad_words_token_ids = list(ids)
        return found

    @property
    def bad_word_texts(self) -> list[str]:
        """Texts of the bad words: at a text's beginning, and after a blank."""
        return [blank + word.lstrip() for word in self.bad_words or () for blank in ("", " ")]

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def drawing_temperature(self) -> float:
        """The temperature that tokens are drawn at: 0 if greedy."""
        return 0.0 if self.greedy else self.temperature

    @property
    def needs_history(self) -> bool:
        """Whether a penalty makes the scores depend on the tokens so far."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before temperature; if not, a greedy request is a plain
        argmax."""
        masked = self.allowed_token_ids is not None or bool(self.bad_words)
        structured = self.structured_outputs is not None
        biased = bool(self.logit_bias) or self.min_tokens > 0
        return self.needs_history or biased or masked or structured

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Distinct strings that end the answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(dict.fromkeys(self.stop))


def _check_lengths(name: str, texts: Sequence[str], most: int) -> None:
    longest = max(texts, key=len, default="")
    _require(len(longest) <= most, name, longest, f"texts of at most {most} characters each")


def _require(good: bool, name: str, value: object, allowed: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value!r:.200} is not allowed: it must be {allowed}")


def _token_ids(ids: Collection[object] | None) -> bool:
    if isinstance(ids, str) or not isinstance(ids, Collection | None):
        return False
    values: list[Any] = [] if ids is None else list(ids)
    types: set[type[Any]] = {type(i) for i in values}
    whole = bool not in types and all(issubclass(each, Integral) for each in types)
    return whole and min(values, default=0) >= 0 and max(values, default=0) <= INT64_MAX
