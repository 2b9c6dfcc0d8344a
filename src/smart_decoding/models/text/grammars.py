"""Grammars on a model's tokens, through llguidance: which tokens may come next, at every node of a
draft tree."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import ReferenceType, WeakValueDictionary, ref

import numpy as np
from numpy.typing import NDArray

from smart_decoding.engine.fairness import ClientQueues, VirtualTokenCounter
from smart_decoding.errors import ConfigError
from smart_decoding.models.text.grammar_source import (
    Tokens,
    check_matcher,
    library,
    new_matcher,
    one_line,
    source_of,
)

if TYPE_CHECKING:
    from smart_decoding.engine.structured import StructuredOutputsParams
    from smart_decoding.models.text.tokenizer import Tokenizer

T = TypeVar("T")
_KEPT = 16  # compiled grammars
# Seconds of processor of a mask: from there on a round does not wait for it. A usual one takes a
# thousandth, the first one of 152,000 tokens less than three.
EXPENSIVE = 0.01
NICE = 5


def stand_back(nice: int) -> None:
    """Lower the priority of this thread and of the processes that it starts, so that rounds keep
    most of the processors."""
    if sys.platform == "linux":  # elsewhere the priority is the whole process's
        os.nice(nice)


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Compiled:
    """A grammar on a model's tokens, at its start."""

    matcher: Any


class Grammars:
    """Compiles what requests ask for into constraints on the tokens of one model. The latest ones
    are kept, and those that somebody holds.

    vocab: columns of the model's logits. eos_ids: tokens that end an answer. May be called from
    several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._eos_ids = tuple(eos_ids)
        self._ready: Any = None  # llguidance's tokenizer: made at first use, which takes a while
        self._latest: OrderedDict[StructuredOutputsParams, Compiled] = OrderedDict()
        self._held: WeakValueDictionary[StructuredOutputsParams, Compiled] = WeakValueDictionary()
        self._lock = threading.Lock()

    def __call__(self, params: StructuredOutputsParams) -> GrammarConstraint:
        """Return a constraint at its start. Raises ConfigError for a grammar that is wrong,
        unsupported or matches nothing."""
        compiled = self.compiled(params)
        return GrammarConstraint(compiled.matcher.deep_copy(), self._vocab, self._eos_ids)

    def compiled(self, params: StructuredOutputsParams, source: str | None = None) -> Compiled:
        """Return the grammar: while it is held, calls find it. Raises ConfigError as they do.
        source: its `source_of`, where somebody has it."""
        found = self.known(params) or self._compile(params, source)
        with self._lock:
            self._held[params] = found
            self._latest.pop(params, None)
            self._latest[params] = found  # the latest comes last
            if len(self._latest) > _KEPT:
                self._latest.popitem(last=False)
        return found

    def known(self, params: StructuredOutputsParams) -> Compiled | None:
        """Return the grammar, if it has been compiled already."""
        with self._lock:
            return self._held.get(params)

    def prepare(self) -> None:
        """Do what the first grammar would wait for, and all of the process with it: seconds. Where
        there are no grammars, requests for them get an error that says why."""
        with contextlib.suppress(ConfigError):
            self._tokens(library())

    def _compile(self, params: StructuredOutputsParams, source: str | None) -> Compiled:
        tokens = self._tokens(library())
        matcher = new_matcher(tokens, source or source_of(params))
        # the first one takes longest: not in the engine's time
        mask = matcher.deep_copy().compute_bitmask()
        check_matcher(matcher)
        if not any(mask):
            raise ConfigError("structured_outputs: no text fulfils this")
        return Compiled(matcher)

    def _tokens(self, llguidance: Any) -> Any:
        if not self._eos_ids:
            raise ConfigError(
                "structured_outputs cannot end here: this model has no end-of-sequence token"
            )
        with self._lock:
            if self._ready is None:
                try:
                    self._ready = self._new_tokens(llguidance)
                except ValueError as error:
                    reason = one_line(error)
                    raise ConfigError(
                        f"structured_outputs: not with this model's tokenizer: {reason}"
                    ) from error
            return self._ready

    def _new_tokens(self, llguidance: Any) -> Any:
        """llguidance takes every added token for a special one, which no text may contain. Some are
        text: Qwen's <tool_call> and <think>. Where a model has such tokens, llguidance gets all
        tokens' bytes, and which are special."""
        ends = list(self._eos_ids)
        backend = self._tokenizer.backend
        found = llguidance.LLTokenizer(backend.to_str(), n_vocab=self._vocab, eos_token=ends)
        added = backend.get_added_tokens_decoder()
        text = {id_ for id_, token in added.items() if not token.special and id_ not in ends}
        if not text:
            return found
        everything = range(self._vocab)
        special = [id_ for id_ in everything if found.is_special_token(id_) and id_ not in text]
        vocabulary = Tokens(
            ends[0],
            None,
            [found.decode_bytes([id_]) for id_ in everything],
            special,
            found.tokenize_bytes,
        )
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), n_vocab=self._vocab, eos_token=ends
        )


@dataclass(eq=False, slots=True)
class _MaskTask:
    """What waits for the thread. result: what `work` returns or raises, once it is done."""

    client: str
    work: Callable[[], Any]
    result: Future[Any]


class MaskThread:
    """Computes masks beside the rounds, one after the other. The client whose masks have taken the
    least processor time is next.

    One thread, so that all grammars together take no more than a third of the processor time of a
    round's thread. llguidance does not hold the interpreter while it computes a mask."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "smart-masks", stand_back, (NICE,))
        self._waiting: ClientQueues[_MaskTask] = ClientQueues()
        self._counter = VirtualTokenCounter()  # microseconds
        self._lock = threading.Lock()

    def submit(self, client: str, work: Callable[[], T]) -> Future[T]:
        """Queue `work`; return its result to come."""
        place = _MaskTask(client, work, Future())
        with self._lock:
            self._counter.arrive([client], self._waiting.clients)
            self._waiting.append(place)
        self._thread.submit(self._next)
        return place.result

    def _next(self) -> None:
        with self._lock:
            place = self._waiting.popleft(self._counter.select(self._waiting.clients))
        began = time.thread_time()
        try:
            done = functools.partial(place.result.set_result, place.work())
        except BaseException as error:  # llguidance's panics are no Exceptions
            done = functools.partial(place.result.set_exception, error)
        with self._lock:
            self._counter.charge(place.client, 1 + int(1e6 * (time.thread_time() - began)))
        done()


_MASKS = MaskThread()


class GrammarConstraint:
    """An `engine.structured.Constraint` over a matcher that has taken in the committed tokens.

    A matcher does not come back from an error: where a path ends in one, a copy takes its place.
    End-of-sequence tokens are not shown to the matcher: it may not count them, and then could not
    go back. The matcher is used by one thread at a time: while a mask is computed beside the
    rounds, it is that thread's."""

    def __init__(self, matcher: Any, vocab: int, eos_ids: Sequence[int]) -> None:
        self.error: ConfigError | None = None
        self.expensive = False
        self.client = ""
        self._in_background = False
        self._coming: Future[NDArray[np.bool_]] | None = None  # the next mask
        self._matcher = matcher.deep_copy()
        self._sound = matcher  # to be copied: it takes in no drafted path
        self._behind: list[int] = []  # committed tokens that `_sound` has not taken in yet
        self._errors: dict[tuple[int, ...], ConfigError] = {}  # after which path
        self._vocab = vocab
        self._eos_ids = eos_ids
        self._ended = False

    def allowed(self, path: Sequence[int]) -> NDArray[np.bool_]:
        """See `Constraint`."""
        if self._ended or not set(self._eos_ids).isdisjoint(path):
            return self._ends()
        if self._coming is not None:
            coming = self._coming.result()
            if not path:
                return coming
        return self._mask(path)

    def _mask(self, path: Sequence[int]) -> NDArray[np.bool_]:
        began = time.thread_time()
        self._matcher.consume_tokens(list(path))
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self.expensive |= time.thread_time() - began > EXPENSIVE
        if self._matcher.is_error():
            self._errors[tuple(path)] = self._what_is_wrong()
            self._replace_matcher()
            return self._ends()
        self._matcher.rollback(len(path))
        return np.unpackbits(bits, count=self._vocab, bitorder="little").view(np.bool_)

    def accepts(self, path: Sequence[int]) -> bool:
        """See `Constraint`."""
        *before, last = path
        if self._coming is not None:
            self._coming.result()
        if self._ended or not set(self._eos_ids).isdisjoint(before):
            return False
        if last not in self._eos_ids:
            return bool(self._matcher.validate_tokens(list(path)) == len(path))
        trial = self._matcher.deep_copy()
        return bool(trial.consume_tokens(before) and trial.is_accepting())

    def before_error(self, tokens: Sequence[int]) -> Sequence[int]:
        """See `Constraint`."""
        ends = [len(path) for path in self._errors if path == tuple(tokens[: len(path)])]
        return tokens[: min(ends)] if ends else tokens

    def append(self, tokens: Sequence[int]) -> None:
        """See `Constraint`."""
        self.error = self._errors.get(tuple(tokens))
        self._errors.clear()
        if self.error is not None:
            return
        ends = [i for i, token in enumerate(tokens) if token in self._eos_ids]
        self._ended = self._ended or bool(ends)
        taken = list(tokens[: ends[0]] if ends else tokens)
        self._behind += taken
        if self._in_background or self.expensive:
            self._begin(taken)
            return
        self._matcher.consume_tokens(taken)
        if self._matcher.is_error():
            self.error = self._what_is_wrong()

    def compute_in_background(self) -> None:
        """See `Constraint`."""
        if not self._in_background and self._coming is None:
            self._in_background = True
            self._begin([])

    def ready(self, seconds: float = 0.0) -> bool:
        """See `Constraint`."""
        if self._coming is None:
            return True
        if seconds:
            wait([self._coming], seconds)
        return self._coming.done()

    def _begin(self, taken: list[int]) -> None:
        """Has another thread take in the tokens and compute the next mask."""
        self._coming = _MASKS.submit(self.client, functools.partial(_mask_after, ref(self), taken))

    def _ends(self) -> NDArray[np.bool_]:
        """Return the mask where whatever comes is dropped."""
        mask = np.zeros(self._vocab, np.bool_)
        mask[list(self._eos_ids)] = True
        return mask

    def _replace_matcher(self) -> None:
        self._sound.consume_tokens(self._behind)
        self._behind.clear()
        self._matcher = self._sound.deep_copy()

    def _what_is_wrong(self) -> ConfigError:
        return ConfigError(f"structured_outputs: {one_line(self._matcher.get_error())}")


def _mask_after(
    constraint: ReferenceType[GrammarConstraint], taken: list[int]
) -> NDArray[np.bool_]:
    """Return the mask after the answer and these tokens; any if the constraint is gone."""
    alive = constraint()
    if alive is None:
        return np.zeros(0, np.bool_)
    alive._matcher.consume_tokens(taken)  # an error is found with the mask
    return alive._mask([])
