"""What the live page shows, a few times a second: only while somebody watches does it cost
anything."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smart_decoding.core.cost import CostModel
from smart_decoding.engine.engine import Engine, RoundRecord
from smart_decoding.engine.request import Request
from smart_decoding.llm import LLM
from smart_decoding.server.errors import ApiError
from smart_decoding.server.worker import Worker

PAGE = Path(__file__).with_name("page.html")
INTERVAL, WINDOW = 0.25, 2.0  # seconds between events; seconds that speeds are averaged over
MAX_WATCHERS, MAX_TREES, BEFORE = 16, 8, 12
CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Pace:
    """One round: when it ended, its seconds and tokens, and what plain decoding would take and
    yield."""

    at: float
    seconds: float
    tokens: int
    plain_seconds: float
    plain_tokens: int


class Live:
    """An observer of the worker that keeps the last round, and makes events of it on the event
    loop."""

    def __init__(self, name: str) -> None:
        self.name, self.watchers = name, 0  # of the model, as clients ask for it
        self._llm: LLM | None = None
        self._seen: RoundRecord | None = None
        # The last decoding round, and its requests' tokens after it; one value, for it is read by
        # another thread.
        self._last: tuple[RoundRecord, list[int]] | None = None
        self._paces: deque[Pace] = deque(maxlen=4096)

    # --- the engine thread's calls ---

    def start(self, llm: LLM) -> None:
        self._llm = llm

    def before(self, engine: Engine) -> None:
        pass

    def after(self, engine: Engine, touched: Sequence[Request]) -> None:
        record = engine.last_round
        if not self.watchers or record is None or record is self._seen:
            return
        self._seen = record
        if record.round.batch.size:
            self._last = record, [len(request.tokens) for request in record.requests]
        batch, cost = record.round.batch, engine.policy.cost
        plain = 0.0
        if cost is not None and batch.size:
            context = float(batch.context.mean())
            plain = float(cost.verify_seconds(batch.size, batch.size + batch.prefill_rows, context))
        self._paces.append(
            Pace(time.monotonic(), record.seconds, record.emitted, plain, len(record.requests))
        )

    def ended(self, request: Request, reason: str) -> None:
        pass

    # --- the event loop's ---

    async def events(self, worker: Worker) -> AsyncIterator[str]:
        """Server-sent events until the client leaves or the server ends."""
        self.watchers += 1
        try:
            while not worker.draining:
                yield f"data: {json.dumps(self.snapshot(), separators=(',', ':'))}\n\n"
                await asyncio.sleep(INTERVAL)
        finally:
            self.watchers -= 1

    def check_room(self) -> None:
        """Raises ApiError if too many watch already."""
        if self.watchers >= MAX_WATCHERS:
            raise ApiError(
                503,
                f"{MAX_WATCHERS} pages are watching already",
                "too_many_watchers",
                retry_after=10,
            )

    def snapshot(self) -> dict[str, Any]:
        """The present state as JSON; null is what is not known."""
        llm = self._llm
        if llm is None:
            return {"ready": False}
        engine, pool, scheduler = llm.engine, llm.engine.pool, llm.engine.scheduler
        stats = engine.policy.stats()
        recent = [pace for pace in self._paces.copy() if pace.at > time.monotonic() - WINDOW]
        seconds, plain = sum(p.seconds for p in recent), sum(p.plain_seconds for p in recent)
        tokens, plain_tokens = sum(p.tokens for p in recent), sum(p.plain_tokens for p in recent)
        tps = tokens / seconds if recent else 0.0
        plain_tps = plain_tokens / plain if plain else None
        return {
            "ready": True,
            "name": self.name,
            "model": str(llm.provenance.get("model", "")).rpartition("/")[2],
            "policy": engine.policy.name,
            "speculation": llm.speculation.description,
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting),
            "slots": engine.config.max_num_seqs,
            "kv": round(1 - pool.available / pool.pages, 4),
            "tps": round(tps, 2),
            "plain_tps": _rounded(plain_tps),
            "speedup": _rounded(tps / plain_tps if plain_tps else None),
            "yield": _rounded(tokens / plain_tokens if plain_tokens else None),
            "off": _rounded(stats.get("share_off")),
            "calibration": _rounded(stats.get("calibration_error")),
            **self._last_round(llm, engine.policy.cost, not recent),
        }

    def _last_round(self, llm: LLM, cost: CostModel | None, idle: bool) -> dict[str, Any]:
        if self._last is None:
            return {"curve": None, "point": None, "trees": []}
        record, ends = self._last
        done, batch = record.round, record.round.batch
        point = {"rows": done.verify_rows, "ms": round(1000 * done.verify_seconds, 3)}
        curve = None
        if cost is not None:
            last = max(2 * done.verify_rows, batch.size + 32)
            rows = np.unique(np.linspace(batch.size, last, 33).astype(np.int64))
            seconds = cost.verify_seconds(batch.size, rows, float(batch.context.mean()))
            curve = {
                "batch": batch.size,
                "rows": rows.tolist(),
                "ms": np.round(1000 * seconds, 3).tolist(),
            }
        trees = (
            [] if idle else [_tree(llm, record, i, end) for i, end in enumerate(ends[:MAX_TREES])]
        )
        return {"curve": curve, "point": point, "levels": len(done.level_widths), "trees": trees}


def _tree(llm: LLM, record: RoundRecord, owner: int, end: int) -> dict[str, Any]:
    """One request's verified tree. nodes: [parent, text, probability or null, accepted]."""
    acceptance, request = record.acceptance, record.requests[owner]
    assert acceptance is not None
    trees = record.round.trees.take(record.round.kept)
    mine = trees.nodes_of(owner).tolist()
    place = {node: i for i, node in enumerate(mine)}
    accepted = set(acceptance.path[owner])
    prob = np.where(np.isnan(trees.accept_prob), trees.path_prob, trees.accept_prob)
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


def _text(llm: LLM, tokens: list[int]) -> str:
    return llm.tokenizer.decode(tokens, False)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
