"""The end of an answer (stop strings, stop ids, end of sequence, length, loops), and the certain
part of its text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from smart_decoding.engine.loops import LoopDetector

if TYPE_CHECKING:
    from smart_decoding.engine.sampling_params import SamplingParams

FinishReason: TypeAlias = Literal["stop", "length"]
Decode: TypeAlias = Callable[[Sequence[int]], str]

UNFINISHED = "\ufffd"  # tokenizers' text for the bytes of an incomplete character
LONGEST = 32  # tokens of an incomplete character, at most: more never become one
LOOP = "loop"  # the stop_reason of an answer that a loop ended


class Detokenizer:
    """Makes text of a growing token list, in pieces that never change later.

    It decodes a window from the last piece's start, since a token's text may depend on its left
    neighbour (leading spaces). A character may span tokens: its text is held back until it is
    complete. before: tokens before the list, a prompt's last ones."""

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = [] if before and decode(before).endswith(UNFINISHED) else list(before)
        self._read = len(self._window)  # tokens of the window whose text was returned

    def push(self, tokens: Sequence[int]) -> str:
        """Return the new text up to the last complete character."""
        self._window.extend(tokens)
        text = self._decode(self._window)
        if UNFINISHED in text and (len(tokens) > 1 or self._shorten()):
            # The text of invalid bytes depends on the piece that they are in. So every piece has
            # one token, however many a round brought, and the piece before as well.
            del self._window[-len(tokens) :]
            return "".join(self.push([token]) for token in tokens)
        waits = text.endswith(UNFINISHED) and len(self._window) - self._read < LONGEST
        return "" if waits else self._new_part(text)

    def flush(self) -> str:
        """Return the rest at the end of an answer, an incomplete character included."""
        return self._new_part(self._decode(self._window)) if self._read < len(self._window) else ""

    @property
    def held(self) -> str:
        """Complete characters that are held back, as an incomplete one follows."""
        if self._read == len(self._window):
            return ""
        return self._decode(self._window)[len(self._old()) :].rstrip(UNFINISHED)

    def _shorten(self) -> bool:
        """Shorten the returned part of the window to its last complete characters; return whether
        anything was cut."""
        if UNFINISHED in self._old():  # a piece of one token
            return False
        for start in range(self._read - 1, 0, -1):
            if not self._decode(self._window[:start]).endswith(UNFINISHED):
                del self._window[:start]
                self._read -= start
                return True
        return False

    def _old(self) -> str:
        return self._decode(self._window[: self._read]) if self._read else ""

    def _new_part(self, text: str) -> str:
        """Return the new part of the window's `text`, and begin the next window behind the old."""
        old = self._old()
        del self._window[: self._read]
        self._read = len(self._window)
        return text[len(old) :]


class StopChecker:
    """Finds the end of one answer, in vLLM's terms, for several tokens at once, as rounds emit.

    token_ids: the answer so far; the token that ends it is the last.
    finish_reason: 'stop', 'length' or None while it goes on.
    stop_reason: the stop string or stop id that ended it, LOOP, or None (end of sequence, length).
    """

    def __init__(
        self,
        params: SamplingParams,
        decode: Decode,
        eos_ids: Sequence[int] = (),
        max_tokens: int | None = None,
        loop_tokens: int = 0,
        before: Sequence[int] = (),
    ) -> None:
        """Start an answer. decode: token ids to text, with special tokens or not. max_tokens: room
        in the context, where it is less than `params.max_tokens`. loop_tokens: least length of a
        loop, which ends the answer; 0: none does. before: the prompt's last tokens, on which the
        first one's text may depend."""
        limits = [limit for limit in (params.max_tokens, max_tokens) if limit is not None]
        self._max_tokens = min(limits) if limits else None
        self._params = params
        self._strings = params.stop_searches
        self._matched = [0] * len(self._strings)  # characters of each that the text ends with
        self._eos_ids: frozenset[int] = frozenset() if params.ignore_eos else frozenset(eos_ids)
        self._detokenizer = Detokenizer(decode, before)
        self._loops = LoopDetector(loop_tokens) if loop_tokens else None
        self._patience = (params.t_max_predict_ms or 0) / 1000
        self._due: float | None = None  # when it is over, on time.perf_counter
        self._text = ""
        self._shown = 0
        self._undecoded: list[int] = []
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None

    @property
    def loop_start(self) -> int | None:
        """Index where the loop starts that ended the answer: a benchmark cuts token_ids there."""
        return self._loops.start if self._loops else None

    def push(self, tokens: Sequence[int]) -> list[int]:
        """Take the tokens of a round; return the answer's part of them, without tokens after its
        end."""
        before = len(self.token_ids)
        if self._goes_on(tokens):
            self.token_ids += tokens
            self._undecoded += tokens
        else:
            for token in tokens:
                if self.finish_reason:
                    break
                self._push_one(int(token))
        if self._patience > 0 and not self.finish_reason:
            self._check_time(time.perf_counter())
        return self.token_ids[before:]

    def _check_time(self, now: float) -> None:
        """End an answer that takes too long from its first tokens on, once it has a line's end."""
        if self._due is None:
            self._due = now + self._patience
        elif now > self._due:
            self._decode_pending()
            if "\n" in self._text:
                self._finish("length", None)

    def _goes_on(self, tokens: Sequence[int]) -> bool:
        """Return whether none of these tokens can end the answer: a quick check, nearly always
        true."""
        if self.finish_reason or self._strings or self._loops:
            return False
        room = self._max_tokens is None or len(self.token_ids) + len(tokens) < self._max_tokens
        ids = self._params.stop_ids
        return room and self._eos_ids.isdisjoint(tokens) and (not ids or ids.isdisjoint(tokens))

    @property
    def text(self) -> str:
        """All text that is certain: without a beginning of a stop string at its end."""
        self._decode_pending()
        return self._text[: len(self._text) - self._held_back()]

    def new_text(self) -> str:
        """Return the text since the last call, for streaming; after the end, all the rest."""
        text = self.text
        new = text[self._shown :]
        self._shown = len(text)
        return new

    def _push_one(self, token: int) -> None:
        self.token_ids.append(token)
        may_stop = len(self.token_ids) >= self._params.min_tokens
        if may_stop and (token in self._eos_ids or token in self._params.stop_ids):
            self._finish_at_id(token)
            return
        self._undecoded.append(token)
        if self._strings and self._stop_string_found():
            return
        if self._loops and self._loops.push(token):
            self._finish("stop", LOOP)
        elif self._max_tokens is not None and len(self.token_ids) >= self._max_tokens:
            self._finish("length", None)

    def _finish_at_id(self, token: int) -> None:
        if self._params.include_stop_str_in_output:
            self._undecoded.append(token)
        self._finish("stop", None if token in self._eos_ids else token)

    def _finish(self, reason: FinishReason, stop_reason: str | int | None) -> None:
        self._decode_pending()
        self._text += self._detokenizer.flush()
        self.finish_reason = reason
        self.stop_reason = stop_reason

    def _decode_pending(self) -> None:
        if self._undecoded:
            self._text += self._detokenizer.push(self._undecoded)
            self._undecoded.clear()

    def _stop_string_found(self) -> bool:
        """Look for a stop string that ends in the newest token's text; of several, the earliest
        counts. Return whether one ended the answer."""
        before = len(self._text)
        self._decode_pending()
        new = self._text[before:]
        found = []
        for order, string in enumerate(self._strings):
            self._matched[order], end = string.advance(self._matched[order], new)
            if end is not None:
                found.append((before + end - len(string.text), order, string.text))
        # vLLM: text of the first min_tokens cannot complete a stop string.
        if not found or len(self.token_ids) <= self._params.min_tokens:
            return False
        at, _, text = min(found)
        end = at + len(text) if self._params.include_stop_str_in_output else at
        self._text = self._text[:end]
        self.finish_reason = "stop"
        self.stop_reason = text
        return True

    def _held_back(self) -> int:
        """Return the length of the longest end of the text that begins a stop string; 0 once the
        answer has ended."""
        if self.finish_reason or self._params.include_stop_str_in_output:
            return 0
        return max(self._matched, default=0)
