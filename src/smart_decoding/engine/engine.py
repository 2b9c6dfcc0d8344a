"""The step: draft, select, verify, accept, commit, learn. One round of the running batch, on one
screen."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from smart_decoding.core.acceptance import Acceptance
from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, Policy, Round
from smart_decoding.core.tree import BoolArray, DraftTrees, FloatArray, IntArray
from smart_decoding.engine.kv import PAGE, BlockTable, PagePool
from smart_decoding.engine.media import Media
from smart_decoding.engine.protocols import Drafter, Features, Target
from smart_decoding.engine.request import Request, RequestMetrics
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.scheduler import Batch, Scheduler
from smart_decoding.engine.specs import new_history
from smart_decoding.engine.stopping import Decode, StopChecker
from smart_decoding.engine.structured import Constraint, StructuredOutputsParams, grammatical
from smart_decoding.engine.verification import Clock, Verified, make_room, verify
from smart_decoding.errors import CapacityError, ConfigError

_NONE = np.zeros(0, np.int64)
BEFORE = 6  # tokens of the prompt's end that the text of an answer's first token may depend on


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine. pages: KV pages of 16 tokens; max_model_len: longest prompt plus answer
    in tokens."""

    pages: int
    max_model_len: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 256
    prefix_caching: bool = True
    seed: int = 0
    stop_at_loops: bool = False


@dataclass(slots=True)
class RoundRecord:
    """One finished round, for benchmarks, metrics and pictures. Seconds; `seconds` is the whole
    round.

    `emitted`: tokens that entered answers; `accepted`: of those the drafted ones."""

    round: Round
    emitted: int
    seconds: float
    draft_seconds: float
    verify_seconds: float
    sample_seconds: float
    kv_seconds: float
    requests: list[Request] = field(default_factory=list)
    acceptance: Acceptance | None = None
    accepted: int = 0

    @property
    def controller_seconds(self) -> float:
        """All but forwards, sampling and KV."""
        return (
            self.seconds
            - self.draft_seconds
            - self.verify_seconds
            - self.sample_seconds
            - self.kv_seconds
        )


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
                f"max_model_len={config.max_model_len} exceeds the KV memory of {config.pages * PAGE} tokens: "
                "lower it or raise kv_cache_tokens"
            )
        self.target, self.policy, self.drafter, self.config = target, policy, drafter, config
        self.pool = PagePool(config.pages, config.prefix_caching)
        self.scheduler = Scheduler(self.pool, config.max_num_seqs, config.max_num_batched_tokens)
        self.last_round: RoundRecord | None = None
        self._learning_seconds = (
            0.0  # of the round before: a policy cannot be told what being told takes
        )
        # whether the last step dropped its drafts for a newcomer: its drafter awaits a plain round
        self._cut = False
        self._decode, self._clock, self._constrain = decode, clock, constrain
        self._seeds = np.random.SeedSequence(config.seed).spawn(1)[0]
        self._requests: dict[str, Request] = {}
        self._batched: list[Request] = []  # the last round's decoding requests
        self._traits = _traits([])

    # ------------------------------------------------------------------------------------------------ requests

    def add_request(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        media: Media | None = None,
    ) -> list[Request]:
        """Queues the prompt's `params.n` answers. Raises ConfigError or CapacityError for what can
        never run."""
        self._check(prompt, params)
        room = self.config.max_model_len - len(prompt)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = params.seed if params.seed is not None else self._next_seed()
        requests = []
        for sample in range(params.n):
            decode = self._decode(params.skip_special_tokens)
            eos, before = self.target.eos_token_ids, prompt[-BEFORE:]
            stop = StopChecker(params, decode, eos, limit, self.config.stop_at_loops, before)
            name = request_id if params.n == 1 else f"{request_id}#{sample}"
            table = BlockTable(self.pool, media.content_hashes if media else {})
            request = Request(name, list(prompt), params, seed, table, stop, sample, limit)
            request.media = media.copy() if media else None
            request.history = new_history(prompt, params)
            request.constraint = self._new_constraint(params)
            request.logprobs = None if params.logprobs is None else []
            request.metrics = RequestMetrics(arrival=self._clock())
            requests.append(request)
        if any(request.id in self._requests for request in requests):
            raise ConfigError(f"request id {request_id!r} is already running")
        for request in requests:
            self._requests[request.id] = request
            self.scheduler.add(request)
        return requests

    def abort(self, request_id: str) -> None:
        """Ends a request, all answers of it, freeing its memory now. Unknown ids are ignored: it
        may have ended."""
        for request in [
            r
            for r in self._requests.values()
            if r.id == request_id or r.id.startswith(f"{request_id}#")
        ]:
            request.aborted = True
            self._finish(request)

    def suspend(self) -> list[Request]:
        """Puts all running requests back to the queue, as they were after their last tokens: after
        a step that raised.

        Returns them. Their keys are computed again when they run on; ended ones leave."""
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
        """Puts a drafter in place before the first request, such as one that records the target's
        features."""
        if self._requests:
            raise ConfigError("a drafter can only be changed while no request is running")
        self.drafter = drafter

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_work

    # ---------------------------------------------------------------------------------------------------- step

    def step(self, arrived: Callable[[], bool] = lambda: False) -> list[Request]:
        """One round. Returns the requests that got tokens, finished ones included.

        arrived: whether somebody waits to be added. If a slot is free, drafting stops for it, and
        nothing is returned: a forward cannot be cut short, so who came would wait for all of it."""
        clock, started = self._clock, self._clock()
        batch = self.scheduler.next_batch()
        self._forget(self.scheduler.preempted)
        if not batch:
            return []
        started += self._see(batch)  # once a picture, so no part of what a round costs
        state = self._state(batch)
        # Rounds that carry prompts do not draft, whatever the policy: others wait for their first
        # token.
        plan = (
            self.policy.plan(state)
            if batch.decode and self.drafter and not (batch.prefill or self._cut)
            else OFF
        )
        drafted = self._draft(batch, state, plan, arrived)
        self._cut = drafted is None
        if drafted is None:
            return []
        trees, widths, seconds, drafting = drafted
        kept = self.policy.select(plan, state, trees) if len(trees) else _NONE
        if any(r.constraint is not None for r in batch.decode):
            kept = grammatical([r.constraint for r in batch.decode], trees, kept)
        kept = make_room(batch, trees, kept)
        verified = verify(self.target, self.drafter, batch, trees, kept, clock)
        emitted, accepted = self._update(batch, verified)
        if len(trees):
            _count_nodes(batch, trees, kept)
        asking, acceptance = verified.requests, verified.acceptance
        after, root_next = (
            _next_tokens(trees, kept, acceptance),
            acceptance.root_next[: len(batch.decode)],
        )
        done = Round(
            state,
            plan,
            trees,
            kept,
            after,
            root_next,
            widths,
            seconds,
            verified.rows,
            verified.seconds,
        )
        if batch.decode:
            learning = clock()
            done.other_seconds = (
                learning - started - verified.seconds - drafting + self._learning_seconds
            )
            self.policy.observe(done)
            self._learning_seconds = clock() - learning
        self.last_round = RoundRecord(
            done,
            emitted,
            clock() - started,
            drafting,
            verified.forward_seconds,
            verified.sample_seconds,
            verified.kv_seconds,
            asking,
            acceptance,
            accepted,
        )
        for request in asking:
            if request.finished:
                self._finish(request)
        return asking

    def _see(self, batch: Batch) -> float:
        """Runs the vision tower on pictures that the round's rows reach for the first time; its
        seconds."""
        total = 0.0
        for request, count in (*batch.prefill, *((request, 1) for request in batch.decode)):
            for picture in (
                request.media.unseen(request.table.length, count) if request.media else ()
            ):
                began = self._clock()
                picture.embeddings = self.target.encode_image(picture.pixels)
                spent = self._clock() - began
                request.metrics.vision_seconds += spent
                total += spent
        return total

    def _state(self, batch: Batch) -> BatchState:
        requests, drafter = batch.decode, self.drafter
        pending = (
            drafter.pending_rows(requests) - len(requests) if drafter and drafter.max_levels else 0
        )
        if requests != self._batched:
            self._batched, self._traits = requests, _traits(requests)
        temperature, may_speculate, pictures = self._traits
        return BatchState(
            context=np.array([r.table.length for r in requests], np.int64),
            remaining=np.array([r.remaining for r in requests], np.int64),
            temperature=temperature,
            may_speculate=may_speculate,
            prefill_rows=sum(rows for _, rows in batch.prefill),
            catch_up_rows=max(0, pending),
            has_model=bool(drafter and drafter.max_levels),
            has_free=bool(drafter and drafter.free),
            pictures=pictures,
        )

    def _draft(
        self, batch: Batch, state: BatchState, plan: DraftPlan, arrived: Callable[[], bool]
    ) -> tuple[DraftTrees, list[int], list[float], float] | None:
        """Drafts level by level, asking the policy after each; returns the trees, widths and
        seconds of the model's levels, and the drafter's seconds in all. None if somebody has
        arrived meanwhile who can begin at once."""
        if not plan.speculate or self.drafter is None:
            return DraftTrees.empty(len(batch.decode)), [], [], 0.0
        widths: list[int] = []
        seconds: list[float] = []
        width, start = len(batch.decode) + state.catch_up_rows, self._clock()
        if plan.growth is not None and self.drafter.grow is not None:
            trees, expanded, seconds, choosing = self.drafter.grow(batch.decode, plan)
            drafting = self._clock() - start - choosing
            seconds[0] = drafting - sum(seconds[1:])
            if self.scheduler.has_room and arrived():
                return None
            return trees, [width, *expanded], seconds, drafting
        trees = self.drafter.start(batch.decode, plan)
        drafting = self._clock() - start
        for level in range(1, plan.levels + 1):
            widths.append(width)
            seconds.append(self._clock() - start)
            if self.scheduler.has_room and arrived():
                return None
            nodes = self.policy.frontier(plan, state, trees, level) if level < plan.levels else None
            if nodes is None or not len(nodes):
                break
            start = self._clock()
            width = self.drafter.expand(batch.decode, trees, nodes, plan)
            drafting += self._clock() - start
            if not width:
                break
        return trees, widths, seconds, drafting

    def _update(self, batch: Batch, verified: Verified) -> tuple[int, int]:
        """Appends the new tokens, commits the KV lengths and hands the target's features to the
        drafter.

        Returns the tokens that entered answers, and how many of them had been drafted."""
        now, total, accepted, acceptance = self._clock(), 0, 0, verified.acceptance
        chunks = {id(request): count for request, count in batch.prefill}
        plain = not chunks and not len(acceptance.next_token)
        ends = self.drafter is not None and self.drafter.wants_ends
        for i, request in enumerate(verified.requests):
            chunk, path, metrics = chunks.get(id(request)), acceptance.path[i], request.metrics
            tokens = request.stop.push(acceptance.emitted[i])
            if request.logprobs is not None:
                del request.logprobs[len(request.output) :]
            start, count = request.table.length, chunk or 1
            request.tokens.extend(tokens)
            if request.history is not None:
                request.history.append(tokens)
            if request.constraint is not None:
                request.constraint.append(tokens)
            total += len(tokens)
            if metrics.first_token is None:
                metrics.first_token = now
            if chunk is None:
                drafted = min(len(tokens), len(path))
                metrics.rounds += 1
                metrics.accepted += drafted
                accepted += drafted
            # An end may cut the path short.
            request.table.commit(
                request.tokens, min(start + count + len(path), len(request.tokens))
            )
            if not plain and (ends or not request.finished):
                self._extend(request, verified, i, start, count + len(path))
        if plain and self.drafter is not None:
            self._extend_each(verified.requests, verified.features)
        going_on = (
            (r, n) for r, n in batch.prefill if n < r.pending and r not in verified.requests
        )
        for i, (request, count) in enumerate(going_on, start=len(verified.requests)):
            start = request.table.length
            request.table.commit(request.tokens, start + count)
            self._extend(request, verified, i, start, count)
        return total, accepted

    def _extend(self, request: Request, verified: Verified, i: int, first: int, count: int) -> None:
        """Hands the drafter what the target computed at `count` committed positions from `first`
        on."""
        if self.drafter is not None:
            features = (
                None if verified.features is None else verified.features[verified.committed[i]]
            )
            self.drafter.extend(request, features, first, request.tokens[first : first + count])

    def _extend_each(self, asking: list[Request], features: Features) -> None:
        """The same after a round of one row for each request."""
        assert self.drafter is not None
        going_on = [
            i for i, request in enumerate(asking) if self.drafter.wants_ends or not request.finished
        ]
        if len(going_on) == len(asking):
            self.drafter.extend_each(asking, features)
        elif going_on:
            features = None if features is None else features[going_on]
            self.drafter.extend_each([asking[i] for i in going_on], features)

    # ------------------------------------------------------------------------------------------------- helpers

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        params.check_vocabulary(self.target.vocab)
        if (
            params.min_tokens
            and len({*params.stop_ids, *self.target.eos_token_ids}) >= self.target.vocab
        ):
            raise ConfigError(
                "min_tokens forbids the end before it, and all tokens are ends: shorten stop_token_ids"
            )
        if not len(prompt):
            raise ConfigError("the prompt is empty: give at least one token")
        if min(prompt) < 0 or max(prompt) >= self.target.vocab:
            raise ConfigError(
                f"the prompt has a token id outside the vocabulary of {self.target.vocab}"
            )
        if len(prompt) >= self.config.max_model_len:
            raise CapacityError(
                f"the prompt has {len(prompt)} tokens, but prompt and answer must fit into max_model_len="
                f"{self.config.max_model_len}: shorten it or raise max_model_len"
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

    def _forget(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self.drafter is not None:
                self.drafter.release(request)
            if request.media is not None:
                request.media.forget()

    def _finish(self, request: Request) -> None:
        request.metrics.finished = self._clock()
        self.scheduler.finish(request)
        self._requests.pop(request.id, None)
        self._forget([request])

    def check_integrity(self) -> None:
        """Raises AssertionError if KV pages are lost or doubly used."""
        self.pool.check_integrity(r.table for r in self._requests.values())


def _traits(requests: Sequence[Request]) -> tuple[FloatArray, BoolArray, BoolArray | None]:
    """What stays as it is as long as the batch is the same: temperature, may_speculate and pictures
    of BatchState."""
    pictures = (
        np.array([r.media is not None for r in requests])
        if any(r.media for r in requests)
        else None
    )
    temperature = np.array([r.params.temperature for r in requests], np.float64)
    return temperature, np.array([r.params.speculate for r in requests], np.bool_), pictures


def _next_tokens(trees: DraftTrees, kept: IntArray, acceptance: Acceptance) -> IntArray:
    """[nodes] the target's token after each node of `trees` that the walk accepted, else -1."""
    if len(kept) == len(trees):
        return acceptance.next_token
    after = np.full(len(trees), -1, np.int64)
    after[kept] = acceptance.next_token
    return after


def _count_nodes(batch: Batch, trees: DraftTrees, kept: IntArray) -> None:
    drafted = np.bincount(trees.owner, minlength=len(batch.decode))
    verified = np.bincount(trees.owner[kept], minlength=len(batch.decode))
    for i, request in enumerate(batch.decode):
        request.metrics.drafted += int(drafted[i])
        request.metrics.verified += int(verified[i])
