"""Continuous batching: chooses the requests of the next round, and preempts some when KV memory
runs out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smart_decoding.engine.fairness import REMEMBERED, ClientQueues, VirtualTokenCounter
from smart_decoding.engine.kv import PAGE, OutOfPagesError, PagePool

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request

SHARED = 4  # a round with another client's answer has one part in so many of the prompt tokens
PATIENCE = 0.01  # seconds to wait for a mask where no request can go on: others may come meanwhile


@dataclass(slots=True)
class Batch:
    """One round's work: requests that decode one token or more, and chunks of prompts (request,
    tokens).

    maskless: running requests that wait for their masks, and skip the round."""

    decode: list[Request]
    prefill: list[tuple[Request, int]]
    maskless: list[Request] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decode or self.prefill)


class Scheduler:
    """Chooses the rows of each round. Running requests decode in every round; prompts run in chunks
    of a token budget. Chunks and free slots go to the client with the least virtual token counter.
    Requests of one client are served in their order. A client whose mask was missing arrives anew,
    without credit for the wait.

    max_num_seqs: requests in a round; max_num_batched_tokens: prompt tokens in a round, in addition
    to the decoding rows. If another client's answer waits for the round, the prompts have a quarter
    of these tokens.

    snapshots_after: tokens of a prompt that must be computed for one more forward to be worth a
    snapshot.

    The bound of `VirtualTokenCounter` holds while slots are free. M is a chunk and the rows that a
    client's answers decode until its next chunk. Without a free slot M is all rows of a client's
    running requests."""

    snapshots_after = 128

    def __init__(self, pool: PagePool, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.chunk = max_num_batched_tokens
        self.waiting: ClientQueues[Request] = ClientQueues()
        self.running: list[Request] = []
        # by the last next_batch(): the engine releases them in the drafter
        self.preempted: list[Request] = []
        self._counter = VirtualTokenCounter()
        self._unserved: set[str] = set()  # clients left selectable by the last round
        self._expensive: dict[str, None] = {}  # clients whose latest grammar was expensive

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Take a request out, wherever it is, and free its memory."""
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
        """Return whether a new request of one of these clients would get a slot in the next
        round."""
        if not clients or len(self.running) >= self.max_num_seqs:
            return False
        return not any(head.ready() for head in self.waiting.heads())

    def next_batch(self) -> Batch:
        """Choose the next round's requests, and reserve KV memory for their committed rows."""
        self.preempted = []
        decode = []
        maskless = []
        prompts: ClientQueues[Request] = ClientQueues()
        for request in list(self.running):
            if not request.ready():
                maskless.append(request)
            elif not request.decodes:
                prompts.append(request)
            elif request not in self.preempted and self._reserve(request, 1):
                decode.append(request)
        heads = {head.client: head for head in self.waiting.heads() if self._may_join(head)}
        selectable = {*prompts.clients, *heads}
        self._counter.arrive(selectable, self._unserved & selectable)
        prefill = self._prefill(prompts, heads, self._budget(decode, prompts, heads))
        if self.preempted:
            decode = [request for request in decode if request not in self.preempted]
            for request, rows in prefill:
                if request in self.preempted:
                    self._counter.charge(request.client, -rows)
            prefill = [part for part in prefill if part[0] not in self.preempted]
        batch = Batch(decode, prefill, maskless)
        if not batch:
            self._wait_for_masks()
        return batch

    def charge(self, batch: Batch, rows: Sequence[int]) -> None:
        """Count the rows of a round's decoding requests. The rows of prompts are counted when they
        are chosen.

        A running request without its mask counts as one row, since it occupies a slot: otherwise a
        client of slow grammars could keep all slots."""
        for request, count in zip(batch.decode, rows, strict=True):
            self._counter.charge(request.client, count)
        for request in batch.maskless:
            self._counter.charge(request.client, 1)
        for request in (*batch.decode, *(request for request, _ in batch.prefill)):
            self._note_expense(request)

    def _note_expense(self, request: Request) -> None:
        if request.constraint is None:
            return
        if request.constraint.expensive:
            self._expensive[request.client] = None
            if len(self._expensive) > REMEMBERED:
                del self._expensive[next(iter(self._expensive))]
        elif request.finished:
            self._expensive.pop(request.client, None)

    def _wait_for_masks(self) -> None:
        for request in (*self.running, *self.waiting):
            if not request.ready():
                request.ready(PATIENCE)
                break

    def _budget(
        self, decode: list[Request], prompts: ClientQueues[Request], heads: dict[str, Request]
    ) -> int:
        """Return the prompt tokens that a round may have, with these decoding requests, running
        prompts and heads."""
        joining = heads if len(self.running) < self.max_num_seqs else ()
        clients = {*prompts.clients, *joining, *(request.client for request in decode)}
        return max(1, self.chunk // SHARED) if decode and len(clients) > 1 else self.chunk

    def _prefill(
        self, prompts: ClientQueues[Request], heads: dict[str, Request], budget: int
    ) -> list[tuple[Request, int]]:
        """Return the round's chunks of prompts: of running requests, `prompts`, and of `heads`, the
        first waiting request of each client."""
        chunks = []
        joining = True
        while budget > 0:
            clients = [*prompts.clients, *(heads if joining and not self.preempted else ())]
            if not clients:
                break
            client = self._counter.select(clients)
            if client in prompts.clients:
                request = prompts.popleft(client)
                rows = self._chunk(request, budget)
                if request in self.preempted or not self._reserve(request, rows):
                    continue
            else:
                request = heads[client]
                if len(self.running) >= self.max_num_seqs or not self._admit(request):
                    self._yield_to(request)
                    joining = False
                    continue
                rows = self._chunk(request, budget)
                following = self.waiting.head(client)
                if following is not None and self._may_join(following):
                    heads[client] = following
                else:
                    del heads[client]
            chunks.append((request, rows))
            budget -= rows
            self._counter.charge(client, rows)
        unfinished = (request.client for request, rows in chunks if rows < request.pending)
        self._unserved = {*prompts.clients, *heads, *unfinished}
        return chunks

    def _chunk(self, request: Request, budget: int) -> int:
        """Return the tokens of the next chunk of a prompt. Where snapshots of states are kept, the
        last chunk of a long one begins behind whole pages."""
        if request.pending <= budget and self.pool.keeps_snapshots:
            whole = (len(request.tokens) - 1) // PAGE * PAGE
            computed = whole - request.metrics.cached_tokens
            if computed >= self.snapshots_after and whole > request.table.length:
                return whole - request.table.length
        return min(request.pending, budget)

    def _may_join(self, head: Request) -> bool:
        """Return whether the first waiting request of a client has its mask. For a client with
        expensive grammars, one first mask at a time is computed."""
        if head.constraint is not None and head.client in self._expensive:
            head.constraint.compute_in_background()
        return head.ready()

    def _yield_to(self, request: Request) -> None:
        """Preempt the youngest request of the client with the most slots, if it has at least two
        more than the client of `request`, which then joins the next round."""
        slots = Counter(request.client for request in self.running)
        for client, most in slots.most_common(1):
            if most >= slots[request.client] + 2:
                youngest = next(r for r in reversed(self.running) if r.client == client)
                youngest.metrics.preemptions += 1
                self.put_back(youngest)

    def _reserve(self, request: Request, rows: int) -> bool:
        """Make room for the request's rows, preempting the youngest others; return False if it was
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
        """Make a waiting request a running one, if its first chunk fits, with a free page for each
        running request. Return whether it fits."""
        cached = 0 if request.scores_prompt else request.table.reuse(request.tokens)
        rows = min(request.pending, self.chunk)
        slack = PAGE * (1 + len(self.running)) if self.running else 0
        if not self.pool.admits((rows + slack + PAGE - 1) // PAGE):
            request.table.release()
            return False
        if not request.admitted:  # a preempted one may find pages of its own answer
            request.metrics.cached_tokens = cached
            request.admitted = True
        request.table.cover(rows)
        self.waiting.remove(request)
        self.running.append(request)
        return True

    def put_back(self, request: Request) -> None:
        """Put a running request back to the front of its client's queue; its keys are computed
        again later."""
        request.table.release()
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.preempted.append(request)
