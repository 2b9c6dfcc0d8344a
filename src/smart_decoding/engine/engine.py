"""The engine: runs one round of the running batch after the other; `Engine.step` is a round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.rule import Draft, TreeRule
from smart_decoding.core.tree import BoolArray, DraftTrees, FloatArray, IntArray
from smart_decoding.engine.admission import BEFORE, Admission, EngineConfig
from smart_decoding.engine.kv import NO_STATE, PAGE, PagePool
from smart_decoding.engine.protocols import NoDrafter
from smart_decoding.engine.scheduler import Batch, Scheduler
from smart_decoding.engine.structured import Constraint, StructuredOutputsParams, grammatical
from smart_decoding.engine.verification import make_room
from smart_decoding.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.tree import Acceptance
    from smart_decoding.engine.media import Media
    from smart_decoding.engine.protocols import Clock, Drafter, Target, Verified
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.engine.stopping import Decode

log = logging.getLogger("smart.engine")

__all__ = ["BEFORE", "Engine", "EngineConfig", "RoundRecord"]
# Positions between copies of an answer's recurrent state. A copy takes milliseconds; what lies
# behind it is computed again in the next turn.
BETWEEN_COPIES = 64
# Prompts spare the layers that only a draft model reads while it drafts for fewer than RARE of the
# RECENT tokens' rounds. A closed batch's last answers are drafted, and no reason to read them.
RARE, RECENT = 0.25, 512
MOST_FAILURES = 3  # drafts in a row that raise, after which nothing is drafted any more


@dataclass(slots=True)
class RoundRecord:
    """One finished round, for benchmarks, metrics and the live page.

    seconds: of the whole round. emitted: tokens that entered answers. accepted: the drafted ones
    among them, for each decoding request."""

    round: Round
    emitted: int
    seconds: float
    draft_seconds: float
    verify_seconds: float
    sample_seconds: float
    kv_seconds: float
    requests: list[Request] = field(default_factory=list)
    acceptance: Acceptance | None = None
    accepted: Sequence[int] = ()

    @property
    def controller_seconds(self) -> float:
        """Seconds outside forwards, sampling and moves of keys."""
        work = self.draft_seconds + self.verify_seconds + self.sample_seconds + self.kv_seconds
        return self.seconds - work


class Engine:
    """Runs requests to their end, one round at a time. Without a drafter this is plain decoding."""

    def __init__(
        self,
        target: Target,
        policy: Policy,
        drafter: Drafter | None,
        config: EngineConfig,
        decode: Callable[[bool], Decode],
        clock: Clock = time.perf_counter,
        constrain: Callable[[StructuredOutputsParams], Constraint] | None = None,
    ) -> None:
        if config.max_model_len > config.pages * PAGE:
            raise CapacityError(
                f"max_model_len={config.max_model_len} exceeds the KV memory of "
                f"{config.pages * PAGE} tokens: lower it or raise kv_cache_tokens"
            )
        if target.states and not target.snapshots and config.prefix_caching:
            log.info("no prefixes are reused: the model's states are kept at one length only")
            config = replace(config, prefix_caching=False)
        self.target = target
        self.policy = policy
        self.drafter: Drafter = drafter or NoDrafter()
        self.config = config
        self.pool = PagePool(config.pages, config.prefix_caching, target.states, target.snapshots)
        self.scheduler = Scheduler(self.pool, config.max_num_seqs, config.max_num_batched_tokens)
        self.last_round: RoundRecord | None = None
        self.admission = Admission(target, config, self.pool, decode, clock, constrain)
        self._clock = clock
        self._requests: dict[str, Request] = {}
        # Seconds behind rounds of each kind, of learning, of texts and of deliveries. The next
        # round of the kind is charged with them.
        self._behind = {"prompts": 0.0, "drafted": 0.0, "plain": 0.0}
        self._kind = "plain"  # of the last round
        self._model_share = 1.0  # of recent tokens' rounds, those for which a model drafted
        self._lost_seconds = 0.0  # of dropped drafts
        self._reported: set[str] = set()  # parts of speculation that have raised
        self._failures = 0  # drafts in a row that have raised
        # Requests whose drafts were dropped. Their next round is plain, so that it never
        # waits for two drafts, and the drafter, which has read their last tokens, gets new ones.
        self._dropped: set[Request] = set()
        self._batched: list[Request] = []  # the last round's decoding requests
        self._traits = _traits([])

    def add_request(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        media: Media | None = None,
        client: str = "",
        cache_salt: str = "",
    ) -> list[Request]:
        """Queue the prompt's `params.n` answers for `client`. Requests with an equal `cache_salt`
        share cached prefixes. Raises ConfigError or CapacityError for a prompt that can never
        run."""
        requests = self.admission.requests(request_id, prompt, params, media, cache_salt)
        if any(request.id in self._requests for request in requests):
            raise ConfigError(f"request id {request_id!r} is already running")
        for request in requests:
            request.client = client
            if request.constraint is not None:
                request.constraint.client = client
            self._requests[request.id] = request
            self.scheduler.add(request)
        return requests

    def abort(self, request_id: str) -> None:
        """End a request with all its answers, and free its memory. An unknown id is ignored: the
        request may have ended."""
        found = self._requests.get(request_id)
        prefix = f"{request_id}#"
        several = [] if found else [r for r in self._requests.values() if r.id.startswith(prefix)]
        for request in [found] if found else several:
            request.aborted = True
            self._finish(request)

    def suspend(self) -> list[Request]:
        """Put all running requests back into the queue after a step that raised; return them.

        They stand as after their last tokens, and their keys are computed again. Ended requests
        leave."""
        suspended = list(self.scheduler.running)
        for request in suspended:
            if request.logprobs is not None:
                del request.logprobs[len(request.output) :]
            if request.finished:
                self._finish(request)
        for request in reversed(self.scheduler.running[:]):
            self.scheduler.put_back(request)
        self._forget(suspended)
        return suspended

    def listen(self, drafter: Drafter) -> None:
        """Replace the drafter before the first request, such as by one that records the target's
        features."""
        if self._requests:
            raise ConfigError("a drafter can only be changed while no request is running")
        self.drafter = drafter

    def share_pages(self, other: Engine) -> None:
        """Take KV pages from the pool of `other`, which has the same memory. Call it before the
        first request."""
        self.pool = self.scheduler.pool = self.admission.pool = other.pool

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.has_work

    @property
    def drafts(self) -> bool:
        """Whether there is a drafter."""
        return self.drafter.has_model or self.drafter.free

    def step(self, arrived: Callable[[], Collection[str]] = tuple) -> list[Request]:
        """Run one round; return the requests that got tokens, finished ones included.

        arrived: returns the clients whose requests wait to be added. If one of these could join the
        next round, drafting stops and nothing is returned. A forward cannot be cut short: the
        request would wait for all of it."""
        started = self._clock()
        batch = self.scheduler.next_batch()
        self._forget(self.scheduler.preempted)
        if not batch:
            return []
        for request, _ in batch.prefill:
            request.metrics.scheduled = request.metrics.scheduled or started
        apart = self._encode_images(batch)  # seconds that no round is charged
        self._begin_states(batch)
        state = self._state(batch)
        lost = self._lost_seconds
        draft = self._draft(batch, state, lambda: self.scheduler.can_begin(arrived()))
        apart += self._lost_seconds - lost
        if draft.interrupted:
            self._dropped.update(batch.decode)
            self._lost_seconds += self._clock() - started - apart
            return []
        draft.kept = _allowed(batch, state, draft)
        verified = self.target.verify(batch, draft, self._aux_layers(batch))
        emitted, accepted = self._update(batch, verified)
        self._keep_states(batch, verified)
        self._hand_over(batch, verified)
        self.scheduler.charge(batch, _count_nodes(batch, draft, accepted))
        done = _round(batch, state, draft, verified)
        self._note(batch, done)
        if batch.decode:
            forwards = verified.forward_seconds + draft.seconds
            self._observe(done, self._clock() - started - apart - forwards)
        seconds = self._clock() - started - apart
        self.last_round = _record(done, draft, verified, emitted, accepted, seconds)
        for request in verified.requests:
            if request.finished:
                self._finish(request)
        return verified.requests

    def _note(self, batch: Batch, done: Round) -> None:
        """Note the round's kind, and whether a model drafted."""
        self._dropped.difference_update(batch.decode)
        drafted = done.rule is not None
        self._kind = "prompts" if batch.prefill else "drafted" if drafted else "plain"
        if not batch.prefill:  # rounds with prompts never draft
            part = min(1.0, len(batch.decode) / RECENT)
            self._model_share += part * (bool(done.level_widths) - self._model_share)

    def charge(self, seconds: float) -> None:
        """Charge the time that the last round's texts and deliveries took to its kind of rounds."""
        self._behind[self._kind] += seconds

    def _aux_layers(self, batch: Batch) -> tuple[int, ...]:
        """Return the layers whose states the drafter gets."""
        resting = batch.prefill and self._model_share < RARE
        return self.drafter.resting_layers if resting else self.drafter.aux_layers

    def _encode_images(self, batch: Batch) -> float:
        """Run the vision tower on pictures that the round's rows reach for the first time; return
        its seconds."""
        total = 0.0
        for request, count in (*batch.prefill, *((request, 1) for request in batch.decode)):
            if request.media is None:
                continue
            for picture in request.media.to_encode(request.table.length, count):
                began = self._clock()
                picture.embeddings = self.target.encode_image(picture.pixels)
                spent = self._clock() - began
                request.metrics.vision_seconds += spent
                total += spent
        return total

    def _begin_states(self, batch: Batch) -> None:
        """Copy the states that prompts begin with behind reused pages."""
        for request, _ in batch.prefill:
            table = request.table
            if table.origin != NO_STATE:
                self.target.copy_state(table.origin, table.state)
                table.origin = NO_STATE

    def _keep_states(self, batch: Batch, verified: Verified) -> None:
        """Copy the states of prompts that have come to their last pages, and of answers now and
        then, each in place of the one before."""
        if not self.pool.keeps_snapshots:
            return
        copies = []
        for request, _ in batch.prefill:
            length = request.table.length
            if 0 < request.pending <= PAGE and not request.output and not length % PAGE:
                copies.append((request.table, request.table.take_snapshot(length), 0))
        answers = verified.committed[: len(batch.decode)]
        for part in answers if 2 * len(answers) <= self.target.snapshots else ():
            table = part.request.table
            end = table.length // PAGE * PAGE
            if end > part.first and end - table.copied >= BETWEEN_COPIES:
                place = table.take_snapshot(end, replaces=table.copied > len(part.request.prompt))
                copies.append((table, place, part.first + part.count - end))
        for table, place, beyond in copies:
            if place != NO_STATE:
                self.target.copy_state(table.state, place, beyond)

    def _state(self, batch: Batch) -> BatchState:
        requests = batch.decode
        drafter = self.drafter
        pending = drafter.pending_rows(requests) - len(requests) if drafter.has_model else 0
        if requests != self._batched:
            self._batched = requests
            self._traits = _traits(requests)
        temperature, may_speculate, pictures, constrained, numbers = self._traits
        if constrained is not None:
            may_speculate = np.array([r.may_speculate for r in requests], np.bool_)
        return BatchState(
            context=np.array([r.table.length for r in requests], np.int64),
            remaining=np.array([r.remaining for r in requests], np.int64),
            temperature=temperature,
            may_speculate=may_speculate,
            prefill_rows=sum(rows for _, rows in batch.prefill),
            catch_up_rows=max(0, pending),
            has_model=drafter.has_model,
            has_free=drafter.free,
            pictures=pictures,
            constrained=constrained,
            requests=numbers,
        )

    def _draft(self, batch: Batch, state: BatchState, interrupted: Callable[[], bool]) -> Draft:
        """Plan and draft a round; no answer depends on either, so what raises leaves it plain.
        Rounds with prompts never draft: their requests wait for a first token."""
        plain = Draft(DraftTrees.empty(len(batch.decode)))
        if batch.prefill or not batch.decode or self._failures == MOST_FAILURES:
            return plain
        if not self._dropped.isdisjoint(batch.decode):
            return plain
        with self._reporting("plan()"):
            rule = self.policy.plan(state)
            if rule is not None and not isinstance(rule, TreeRule):  # of a user's own policy
                kind = type(rule).__name__
                raise ConfigError(f"plan() of a policy must return a TreeRule or None, not {kind}")
            if rule is not None:
                started = self._clock()
                with self._reporting("draft()"):
                    draft = self.drafter.draft(batch.decode, rule, interrupted)
                    self._failures = 0
                    return draft
                self._lost_seconds += self._clock() - started
                self._failures += 1
                if self._failures == MOST_FAILURES:
                    log.error(
                        "%d drafts in a row raised: decoding is plain from now on", MOST_FAILURES
                    )
        return plain

    @contextmanager
    def _reporting(self, part: str) -> Iterator[None]:
        """Log the first exception of a part of speculation, and go on without what it does."""
        try:
            yield
        except Exception:
            if part not in self._reported:
                self._reported.add(part)
                log.exception("%s raised: such rounds are plain, and this is said once", part)

    def _update(self, batch: Batch, verified: Verified) -> tuple[int, list[int]]:
        """Append the new tokens and commit the KV lengths. Return how many tokens entered answers,
        and each decoding request's drafted ones among them."""
        now = self._clock()
        emitted = 0
        accepted = []
        for i, request in enumerate(verified.requests):
            tokens = request.accept(verified.acceptance.emitted[i], now)
            emitted += len(tokens)
            if i < len(batch.decode):  # an end may cut the path short
                drafted = min(len(tokens), len(verified.acceptance.path[i]))
                accepted.append(drafted)
                request.metrics.rounds += 1
                request.metrics.accepted += drafted
        for part in verified.committed:
            tokens = part.request.tokens
            part.request.table.commit(tokens, min(part.first + part.count, len(tokens)))
        return emitted, accepted

    def _hand_over(self, batch: Batch, verified: Verified) -> None:
        """Give the drafter the committed tokens and the target's features."""
        drafter = self.drafter
        features = verified.features
        going_on = [
            i
            for i, part in enumerate(verified.committed)
            if drafter.needs_ends or not part.request.finished
        ]
        if batch.prefill or len(verified.acceptance.next_token):
            for i in going_on:
                part = verified.committed[i]
                tokens = part.request.tokens[part.first : part.first + part.count]
                rows = None if features is None else features[part.rows]
                drafter.extend(part.request, rows, part.first, tokens)
        elif going_on:  # one row for each request
            if features is not None and len(going_on) < len(verified.requests):
                features = features[going_on]
            drafter.extend_each([verified.requests[i] for i in going_on], features)

    def _observe(self, done: Round, other_seconds: float) -> None:
        """Let the policy observe the round."""
        start = self._clock()
        kind = self._kind
        done.other_seconds = other_seconds + self._behind[kind]
        done.lost_seconds = self._lost_seconds
        self._behind[kind] = self._lost_seconds = 0.0
        with self._reporting("observe()"):
            self.policy.observe(done)
        self._behind[kind] += self._clock() - start

    def _forget(self, requests: Sequence[Request]) -> None:
        self._dropped.difference_update(requests)
        for request in requests:
            self.drafter.release(request)
            if request.media is not None:
                request.media.forget()

    def _finish(self, request: Request) -> None:
        request.metrics.finished = self._clock()
        self.scheduler.finish(request)
        self._requests.pop(request.id, None)
        self._forget([request])
        if request.media is not None:
            request.media.release()

    def check_integrity(self) -> None:
        """Raise AssertionError if KV pages are lost or doubly used."""
        self.pool.check_integrity(r.table for r in self._requests.values())


def _traits(
    requests: Sequence[Request],
) -> tuple[FloatArray, BoolArray, BoolArray | None, BoolArray | None, list[int]]:
    """Return the fields of BatchState that last as long as the batch: temperature, may_speculate,
    pictures, constrained and requests."""
    temperature = np.array([r.params.drawing_temperature for r in requests])
    may_speculate = np.array([r.params.speculate for r in requests], np.bool_)
    pictures = np.array([r.media is not None for r in requests], np.bool_)
    constrained = np.array([r.constraint is not None for r in requests], np.bool_)
    return (
        temperature,
        may_speculate,
        pictures if pictures.any() else None,
        constrained if constrained.any() else None,
        [r.number for r in requests],
    )


def _allowed(batch: Batch, state: BatchState, draft: Draft) -> IntArray:
    """Return the selected nodes that grammars allow and that fit into memory."""
    kept = draft.kept
    if state.constrained is not None:
        kept = grammatical([r.constraint for r in batch.decode], draft.trees, kept)
    return make_room(batch, draft.trees, kept)


def _round(
    batch: Batch,
    state: BatchState,
    draft: Draft,
    verified: Verified,
) -> Round:
    kept = draft.kept
    next_token = verified.acceptance.next_token  # after each node in `kept`
    if len(kept) < len(draft.trees):
        next_token = np.full(len(draft.trees), -1, np.int64)
        next_token[kept] = verified.acceptance.next_token
    return Round(
        state,
        draft.rule,
        draft.trees,
        kept,
        next_token,
        verified.acceptance.root_next[: len(batch.decode)],
        draft.widths,
        draft.level_seconds,
        verified.rows,
        verified.forward_seconds,
        experts=verified.experts,
    )


def _record(
    done: Round,
    draft: Draft,
    verified: Verified,
    emitted: int,
    accepted: list[int],
    seconds: float,
) -> RoundRecord:
    return RoundRecord(
        done,
        emitted=emitted,
        seconds=seconds,
        draft_seconds=draft.seconds,
        verify_seconds=verified.forward_seconds,
        sample_seconds=verified.sample_seconds,
        kv_seconds=verified.kv_seconds,
        requests=verified.requests,
        acceptance=verified.acceptance,
        accepted=accepted,
    )


def _count_nodes(batch: Batch, draft: Draft, accepted: Sequence[int]) -> list[int]:
    """Count drafted and verified nodes. Return the rows of each decoding request."""
    if not len(draft.trees):
        return [1] * len(batch.decode)
    drafted = draft.trees.counts()
    verified = draft.trees.counts(draft.kept)
    for i, request in enumerate(batch.decode):
        request.metrics.drafted += drafted[i]
        request.metrics.verified += verified[i]
        if verified[i]:
            request.metrics.accepted_lengths[accepted[i]] += 1
    return [1 + nodes for nodes in verified]
