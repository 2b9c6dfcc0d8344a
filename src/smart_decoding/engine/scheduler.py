"""Continuous batching: which requests run in the next round, and what yields when KV memory runs
out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smart_decoding.engine.kv import PAGE, OutOfPagesError, PagePool
from smart_decoding.engine.sharing import Shares
from smart_decoding.engine.turns import Turns, Waiting

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request

PATIENCE = 0.01  # seconds for a mask where nobody else can go on: others may come meanwhile


@dataclass(slots=True)
class Batch:
    """One round's work: requests that decode one token or more, and chunks of prompts (request,
    tokens)."""

    decode: list[Request]
    prefill: list[tuple[Request, int]]

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """Running requests go on before new ones join; prompts go in chunks of a token budget. Clients
    take turns at slots and budget, and share the time of rounds; of one client, the first come is
    the first served.

    max_num_seqs: requests in a round; max_num_batched_tokens: prompt tokens in a round, beside the
    decoding rows."""

    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.chunk = max_num_batched_tokens
        self.waiting: Waiting[Request] = Waiting()
        self.running: list[Request] = []
        # of the last next_batch(): the engine tells their drafters
        self.preempted: list[Request] = []
        self.shares = Shares()
        self._turns = Turns()

    def add(self, request: Request) -> None:
        """Queues a request."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees its memory."""
        request.table.release()
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.running)

    def can_begin(self, clients: Collection[str]) -> bool:
        """Whether a request of one of these clients, coming now, would join the next round, as far
        as slots and debts go."""
        if not clients or len(self.running) >= self.max_num_seqs:
            return False
        waiting = any(head.ready() for head in self.waiting.heads())
        return not waiting and not self.shares.wait(clients, self._clients())

    def _clients(self) -> set[str]:
        """Those that have requests here."""
        return {request.client for request in (*self.running, *self.waiting.heads())}

    def next_batch(self) -> Batch:
        """The next round's requests, with KV memory for their committed rows reserved."""
        self.preempted = []
        self.shares.next_round(self._clients(), self.running)
        batch = self._batch()
        if not batch and self.shares.indebted:
            self.shares.forgive()
            batch = self._batch()
        if not batch:
            self._wait_for_masks()
        return batch

    def _wait_for_masks(self) -> None:
        for request in (*self.running, *self.waiting):
            if not request.ready():
                request.ready(PATIENCE)
                break

    def _batch(self) -> Batch:
        """Of those who need not wait."""
        decode = []
        prompts = []
        for request in list(self.running):
            if not request.decodes:
                if request.client not in self.shares.indebted and request.ready():
                    prompts.append(request)
            elif request.client in self.shares.resting or not request.ready():
                continue
            elif request not in self.preempted and self._reserve(request, 1):
                decode.append(request)
        prefill = self._prefill(prompts)
        if self.preempted:
            decode = [request for request in decode if request not in self.preempted]
            prefill = [part for part in prefill if part[0] not in self.preempted]
        return Batch(decode, prefill)

    def _prefill(self, prompts: list[Request]) -> list[tuple[Request, int]]:
        """The round's chunks of prompts: of running requests, `prompts`, and of waiting ones."""
        chunks = []
        budget = self.chunk
        joining = True
        while budget > 0:
            asking = [request for request in prompts if request not in self.preempted]
            if joining and not self.preempted:
                asking += self._next_waiting()
            if not asking:
                break
            request = self._turns.choose(asking)
            if request in prompts:
                prompts.remove(request)
                if not self._reserve(request, min(request.pending, budget)):
                    continue
            elif len(self.running) >= self.max_num_seqs or not self._admit(request):
                self._yield_to(request)
                joining = False
                continue
            rows = min(request.pending, budget)
            chunks.append((request, rows))
            budget -= rows
            self._turns.taken(request.client)
        return chunks

    def _next_waiting(self) -> list[Request]:
        """The one whose turn it is, of those whose client is not in debt. A client with dear
        grammars has the first mask of one of them computed at a time."""
        heads = [head for head in self.waiting.heads() if head.client not in self.shares.indebted]
        for head in heads:
            if head.constraint is not None and head.client in self.shares.dear:
                head.constraint.compute_beside()
        ready = [head for head in heads if head.ready()]
        return [self._turns.choose(ready, self._held())] if ready else []

    def _held(self) -> Counter[str]:
        """Slots, by client."""
        return Counter(request.client for request in self.running)

    def _yield_to(self, request: Request) -> None:
        """Has whoever holds more slots, even without one of them, give one up: so that `request`
        joins the next round."""
        held = self._held()
        for client, most in held.most_common(1):
            if most - 1 > held[request.client]:
                youngest = next(r for r in reversed(self.running) if r.client == client)
                youngest.metrics.preemptions += 1
                self.put_back(youngest)

    def _reserve(self, request: Request, rows: int) -> bool:
        """Makes room for the request's rows, preempting the youngest others; false if it was
        preempted itself."""
        while True:
            try:
                request.table.cover(rows)
                return True
            except OutOfPagesError:
                youngest = self.running[-1]
                youngest.metrics.preemptions += 1
                self.put_back(youngest)
                if youngest is request:
                    return False

    def _admit(self, request: Request) -> bool:
        """Moves a waiting request to the running ones if its first chunk and a page of room to grow
        fit."""
        cached = 0 if request.scores_prompt else request.table.reuse(request.tokens)
        rows = min(request.pending, self.chunk)
        slack = PAGE * (1 + len(self.running)) if self.running else 0
        if (rows + slack + PAGE - 1) // PAGE > self.pool.available:
            request.table.release()
            return False
        if not request.admitted:  # afterwards it may find pages of its own answer
            request.metrics.cached_tokens = cached
            request.admitted = True
        request.table.cover(rows)
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def put_back(self, request: Request) -> None:
        """Puts a running request back to the front of its client's line; its keys are computed
        again later."""
        request.table.release()
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preempted.append(request)
