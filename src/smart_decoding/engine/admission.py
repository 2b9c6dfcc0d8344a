"""From a prompt to the requests that answer it, with refusal of prompts that can never run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.engine.history import TokenHistory
from smart_decoding.engine.kv import BlockTable, ContentHashes, PagePool
from smart_decoding.engine.request import Request, RequestMetrics
from smart_decoding.engine.stopping import Decode, StopChecker
from smart_decoding.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from smart_decoding.engine.media import Media
    from smart_decoding.engine.protocols import Clock, Target
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.engine.structured import Constraint, StructuredOutputsParams

BEFORE = 6  # last tokens of the prompt that may change the text of an answer's first token


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine. pages: KV pages of 16 tokens; max_model_len: tokens of prompt and answer
    together."""

    pages: int
    max_model_len: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 256
    prefix_caching: bool = True
    seed: int = 0
    stop_at_loops: int = 0


class Admission:
    """Makes requests of prompts, each with its memory, seed, stops and grammar.

    decode: makes a detokenizer, which leaves special tokens out or not."""

    def __init__(
        self,
        target: Target,
        config: EngineConfig,
        pool: PagePool,
        decode: Callable[[bool], Decode],
        clock: Clock,
        constrain: Callable[[StructuredOutputsParams], Constraint] | None,
    ) -> None:
        self.decode = decode
        self.pool = pool
        self._target = target
        self._config = config
        self._clock = clock
        self._constrain = constrain
        self._seeds = np.random.SeedSequence(config.seed).spawn(1)[0]

    def requests(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        media: Media | None,
        cache_salt: str = "",
    ) -> list[Request]:
        """Return one request for each of the prompt's `params.n` answers. Raises ConfigError or
        CapacityError."""
        self._check(prompt, params)
        seed = params.seed if params.seed is not None else self._next_seed()
        names = [f"{request_id}#{sample}" for sample in range(params.n)]
        return [
            self._new_request(name, prompt, params, media, cache_salt, seed, sample)
            for sample, name in enumerate(names if params.n > 1 else [request_id])
        ]

    def _new_request(
        self,
        name: str,
        prompt: Sequence[int],
        params: SamplingParams,
        media: Media | None,
        cache_salt: str,
        seed: int,
        sample: int,
    ) -> Request:
        room = self._config.max_model_len - len(prompt)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        stop = StopChecker(
            params,
            self.decode(params.skip_special_tokens) if params.detokenize else _no_text,
            self._target.eos_token_ids,
            limit,
            self._config.stop_at_loops,
            prompt[-BEFORE:],
        )
        return Request(
            name,
            list(prompt),
            params,
            seed,
            table=BlockTable(self.pool, _content_hashes(media, cache_salt)),
            stop=stop,
            sample=sample,
            max_tokens=limit,
            media=media.copy() if media else None,
            history=TokenHistory(prompt) if params.needs_history else None,
            constraint=self._new_constraint(params),
            logprobs=None if params.logprobs is None else [],
            prompt_logprobs=None if params.prompt_logprobs is None or sample else [None],
            metrics=RequestMetrics(arrival=self._clock()),
        )

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        params.check_vocabulary(self._target.vocab)
        vocab = self._target.vocab
        self._check_tokens_left(params)
        if not len(prompt):
            raise ConfigError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ConfigError(f"the prompt has a token id outside the vocabulary of {vocab}")
        if len(prompt) >= self._config.max_model_len:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens, but prompt and answer must fit into "
                f"max_model_len={self._config.max_model_len}: shorten it or raise max_model_len"
            )

    def _check_tokens_left(self, params: SamplingParams) -> None:
        """Raise ConfigError if `params` may forbid every token at once."""
        if params.bad_words and params.bad_words_token_ids is None:
            raise ConfigError("bad_words is not supported here: this engine knows no tokenizer")
        forbidden = {word[-1] for word in params.bad_words_token_ids or ()}
        if params.min_tokens:
            forbidden |= params.stop_ids.union(self._target.eos_token_ids)
        allowed = params.allowed_token_ids
        if forbidden and (
            len(forbidden) >= self._target.vocab
            if allowed is None
            else forbidden.issuperset(allowed)
        ):
            raise ConfigError(
                "bad_words, and min_tokens with what ends an answer, may forbid all tokens that "
                "are allowed: leave out one of them"
            )

    def _new_constraint(self, params: SamplingParams) -> Constraint | None:
        if params.structured_outputs is None:
            return None
        if self._constrain is None:
            raise ConfigError(
                "structured_outputs is not supported here: this engine knows no grammars"
            )
        return self._constrain(params.structured_outputs)

    def _next_seed(self) -> int:
        return int(self._seeds.spawn(1)[0].generate_state(1, np.uint64)[0] >> np.uint64(1))


def _content_hashes(media: Media | None, cache_salt: str) -> ContentHashes:
    """Return a hash of each page's pictures. Only the first page gets the salt: the keys of all
    pages follow from it."""
    hashes = media.content_hashes if media else {}
    if not cache_salt:
        return hashes
    salt = blake2b(cache_salt.encode(), digest_size=16).digest()
    return {**hashes, 0: salt + hashes.get(0, b"")}


def _no_text(ids: Sequence[int]) -> str:
    return ""
