"""The page: its files, and its live events, which cost time only while somebody watches."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.policies.statistics import KINDS
from smart_decoding.server.errors import ApiError
from smart_decoding.server.worker import Watcher, Worker

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.tree import DraftTrees, FloatArray
    from smart_decoding.engine.engine import Engine, RoundRecord
    from smart_decoding.engine.request import Request
    from smart_decoding.llm import LLM

PAGE = Path(__file__).with_name("page")  # the folder of its files
FILES = {each.name: each for each in PAGE.iterdir()}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
INTERVAL = 0.25  # seconds between events
WINDOW = 2.0  # seconds that speeds are averaged over
MAX_WATCHERS = 16
MAX_OF_ONE = 4  # of a client
MAX_TREES = 8
BEFORE = 12  # tokens of text before a tree
# Nothing from elsewhere, no script within the page, and no text that becomes HTML: what an answer
# holds is not ours.
CSP = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CSP,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # after an update all its files are new
}


@dataclass(frozen=True, slots=True)
class Pace:
    """One round: its end, seconds and tokens, and the seconds and tokens of plain decoding.

    expected: tokens that the round's guesses promised; drafted: whether it had guesses, None for a
    round with a prompt, which never has.
    """

    at: float
    seconds: float
    tokens: int
    plain_seconds: float
    plain_tokens: int
    expected: float
    drafted: bool | None


@dataclass(frozen=True, slots=True)
class _Trees:
    """A round, its end, and for each of one viewer's requests its place and its tokens after it."""

    at: float
    record: RoundRecord
    shown: list[tuple[int, int]]


class Live(Watcher):
    """Observe the worker: keep the last round that could draft, and make events of it.

    A viewer sees the trees of its own requests only; numbers are for all.

    name: the model's, as clients ask for it; watchers: open streams of events, by client and
    viewer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.watchers: Counter[tuple[str, str]] = Counter()
        self._llm: LLM | None = None
        self._counted: RoundRecord | None = None
        self._last: RoundRecord | None = None  # the last decoding round
        # The last round with trees of each viewer that watches or has watched, oldest first.
        self._trees: dict[str, _Trees] = {}
        self._paces: deque[Pace] = deque(maxlen=4096)

    # --- the engine thread's calls ---

    def start(self, llm: LLM) -> None:
        """Take the model: from now on there are numbers to show."""
        self._llm = llm

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        """Keep the round, if anybody watches."""
        record = engine.last_round
        watching = self.watchers.copy()
        if not watching or record is None or record is self._counted:
            return
        self._counted = record
        # Requests that refuse drafts say nothing about drafting, such as the page's plain answer.
        if not any(request.params.speculate for request in record.requests):
            return
        batch = record.round.batch
        if batch.size:
            self._last = record
            self._keep_trees(record, {viewer for _, viewer in watching if viewer})
        cost = engine.policy.cost
        plain = record.seconds if batch.prefill_rows else 0.0  # plain decoding reads prompts, too
        if cost is not None and batch.size and not batch.prefill_rows:
            plain = float(cost.verify_seconds(batch.size, batch.size, batch.mean_context))
        size = len(record.requests)
        guesses = _chances(record.round.trees.take(record.round.kept))
        drafted = None if batch.prefill_rows else len(guesses) > 0
        expected = size + float(guesses.sum())
        self._paces.append(
            Pace(time.monotonic(), record.seconds, record.emitted, plain, size, expected, drafted)
        )

    def _keep_trees(self, record: RoundRecord, watching: set[str]) -> None:
        owners: dict[str, list[int]] = {}
        for owner, request in enumerate(record.requests):
            if request.viewer in watching:
                owners.setdefault(request.viewer, []).append(owner)
        kept = {viewer: each for viewer, each in self._trees.items() if viewer not in owners}
        for viewer, mine in owners.items():
            shown = [(owner, len(record.requests[owner].tokens)) for owner in mine[:MAX_TREES]]
            kept[viewer] = _Trees(time.monotonic(), record, shown)
        # A new dict, for another thread reads it.
        self._trees = dict(list(kept.items())[-MAX_WATCHERS:])

    # --- the event loop's ---

    async def events(self, worker: Worker, client: str, viewer: str) -> AsyncIterator[str]:
        """Yield server-sent events for a viewer until it leaves or the server ends."""
        self.watchers[client, viewer] += 1
        try:
            while not worker.draining:
                yield f"data: {json.dumps(self.snapshot(viewer), separators=(',', ':'))}\n\n"
                await asyncio.sleep(INTERVAL)
        finally:
            self.watchers[client, viewer] -= 1
            self.watchers += Counter()  # drop zero counts

    def check_room(self, client: str) -> None:
        """Raise ApiError if too many pages watch already, in all or of this client."""
        mine = sum(count for (each, _), count in self.watchers.items() if each == client)
        if self.watchers.total() >= MAX_WATCHERS or mine >= MAX_OF_ONE:
            message = f"{MAX_WATCHERS} pages are watching already, or {MAX_OF_ONE} of yours"
            raise ApiError(503, message, "too_many_watchers", retry_after=10)

    def snapshot(self, viewer: str) -> dict[str, Any]:
        """Return the present state as JSON; unknown values are null.

        idle: seconds since the last round; speeds are those before its end. trees: of the last
        round with requests of this viewer; trees_idle: seconds since then.
        """
        llm = self._llm
        if llm is None:
            return {"ready": False}
        engine = llm.engine
        paces = self._paces.copy()
        last = paces[-1].at if paces else 0.0  # an idle engine keeps its last speeds
        recent = [pace for pace in paces if pace.at > last - WINDOW]
        now = time.monotonic()
        trees = self._trees.get(viewer)
        return {
            "ready": True,
            "name": self.name,
            "model": str(llm.provenance.get("model", "")).rpartition("/")[2],
            "chat": llm.tokenizer.template is not None,
            "drafts": engine.drafts,
            "policy": engine.policy.name,
            "speculation": llm.speculation.description,
            "running": len(engine.scheduler.running),
            "waiting": len(engine.scheduler.waiting),
            "slots": engine.config.max_num_seqs,
            "kv": round(engine.pool.used, 4),
            "idle": round(now - last, 2) if paces else None,
            **_speeds(recent),
            "predicted": _predicted(engine.policy.stats()),
            **self._last_round(engine.policy.cost),
            "trees_idle": None if trees is None else round(now - trees.at, 2),
            "trees": [] if trees is None else _drawn(llm, trees),
        }

    def _last_round(self, cost: CostModel | None) -> dict[str, Any]:
        if self._last is None:
            return {"curve": None, "point": None}
        done = self._last.round
        return {
            "curve": None if cost is None else _curve(cost, done),
            "point": {"rows": done.verify_rows, "ms": round(1000 * done.verify_seconds, 3)},
        }


def _predicted(stats: Mapping[str, float]) -> dict[str, float]:
    """Return predicted over real seconds of each kind of rounds that there were."""
    known = {kind: stats.get(f"{kind}_predicted_seconds") for kind in KINDS}
    return {kind: round(ratio, 4) for kind, ratio in known.items() if ratio is not None}


def _curve(cost: CostModel, done: Round) -> dict[str, Any]:
    """Return predicted milliseconds of a verification, against its rows."""
    batch = done.batch
    last = max(2 * done.verify_rows, batch.size + 32)
    rows = np.unique(np.linspace(batch.size, last, 33).astype(np.int64))
    seconds = cost.verify_seconds(batch.size, rows, batch.mean_context)
    milliseconds = np.round(1000 * seconds, 3)
    return {"batch": batch.size, "rows": rows.tolist(), "ms": milliseconds.tolist()}


def _speeds(recent: Sequence[Pace]) -> dict[str, float | None]:
    """Return tokens per second and per request of some rounds, beside plain decoding's and the
    expected ones; and the share of rounds with guesses."""
    tokens = sum(pace.tokens for pace in recent)
    plain_tokens = sum(pace.plain_tokens for pace in recent)
    plain_seconds = sum(pace.plain_seconds for pace in recent)
    expected = sum(pace.expected for pace in recent)
    drafted = [pace.drafted for pace in recent if pace.drafted is not None]
    tps = tokens / sum(pace.seconds for pace in recent) if recent else 0.0
    plain_tps = plain_tokens / plain_seconds if plain_seconds else None
    return {
        "tps": round(tps, 2),
        "plain_tps": _rounded(plain_tps),
        "speedup": _rounded(tps / plain_tps if plain_tps else None),
        "yield": _rounded(tokens / plain_tokens if plain_tokens else None),
        "expected": _rounded(expected / plain_tokens if plain_tokens else None),
        "drafting": _rounded(sum(drafted) / len(drafted) if drafted else None),
    }


def _drawn(llm: LLM, trees: _Trees) -> list[dict[str, Any]]:
    return [_tree(llm, trees.record, owner, end) for owner, end in trees.shown]


def _tree(llm: LLM, record: RoundRecord, owner: int, end: int) -> dict[str, Any]:
    """Return one request's verified tree. nodes: [parent, text, probability or null, accepted]."""
    acceptance = record.acceptance
    request = record.requests[owner]
    assert acceptance is not None
    trees = record.round.trees.take(record.round.kept)
    mine = trees.nodes_of(owner).tolist()
    place = {node: i for i, node in enumerate(mine)}
    accepted = set(acceptance.path[owner])
    prob = _chances(trees)
    nodes = [
        [
            place.get(int(trees.parent[node]), -1),
            _text(llm, [int(trees.token[node])]),
            round(float(prob[node]), 3),
            node in accepted,
        ]
        for node in mine
    ]
    root = end - len(acceptance.emitted[owner])
    before = request.tokens[max(0, root - BEFORE) : root]
    return {
        "id": request.id[-12:],
        "before": _text(llm, before),
        "nodes": nodes,
        "own": _text(llm, [acceptance.emitted[owner][-1]]),
        "tokens": len(request.output),
    }


def _chances(trees: DraftTrees) -> FloatArray:
    """Return each node's chance: the policy's, else the drafter's own."""
    own = trees.path_prob
    chances: FloatArray = np.where(np.isnan(trees.accept_prob), own, trees.accept_prob)
    return chances


def _text(llm: LLM, tokens: list[int]) -> str:
    return llm.tokenizer.decode(tokens, False)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
