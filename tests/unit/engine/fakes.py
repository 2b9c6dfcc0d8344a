"""What the engine's tests run on: a clock that only work moves, a timed fake target, a drafter that
guesses well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import make_policy
from smart_decoding.core.selection import Selection
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.levels import draft_by_levels
from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.sampling_params import SamplingParams

from .fake_target import FakeTarget

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft, TreeRule
    from smart_decoding.engine.request import Request

VOCAB = 23
EOS = 3
CHEAP_ROWS = CostModel.from_table({1: {1: 1.0, 512: 1.1}}, {1: 0.01, 512: 0.02})


class Clock:
    """Seconds that pass only when someone works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedTarget(FakeTarget):
    """Takes the seconds that CHEAP_ROWS promises."""

    def __init__(self, clock: Clock, pages: int, **more: Any) -> None:
        super().__init__(pages, VOCAB, (EOS,), **more)
        self.clock = clock

    def forward(self, rows, aux_layers):
        self.clock.now += float(CHEAP_ROWS.verify_seconds(1, len(rows), 0))
        return super().forward(rows, aux_layers)


def true_token(target: FakeTarget, request: Request, path: Sequence[int]) -> int:
    """What the target will draw after the request's tokens and `path`."""
    row = target.logits_of([*request.tokens, *path])
    forbidden = path and request.constraint is not None and not request.constraint.accepts(path)
    if forbidden or (request.params.greedy and not request.params.changes_logits):
        return int(row.argmax())
    logits = torch.from_numpy(row)[None]
    position = len(request.output) + len(path)
    spec = SampleSpec(
        request.params,
        request.seed,
        request.sample,
        position,
        request.history,
        list(path),
        target.eos_token_ids,
        request.constraint,
        request.output,
    )
    return int(target.sample(logits, np.array([0]), [spec])[0])


class FakeDrafter:
    """Random trees that contain the true continuation with probability `skill`.

    It also checks what the engine tells it: positions without gaps, the right tokens, each row's
    own features."""

    name = "fake"
    has_model = True
    aux_layers = (1,)
    resting_layers = (1,)
    needs_ends = False

    def __init__(
        self,
        target: TimedTarget,
        free: bool = False,
        skill: float = 0.8,
        seed: int = 0,
    ):
        self.target = target
        self.free = free
        self.skill = skill
        self.rng = np.random.default_rng(seed)
        self.known: dict[Request, int] = {}  # tokens whose features arrived

    def pending_rows(self, requests: Sequence[Request]) -> int:
        return len(requests)

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        proposed = DraftTrees.empty(len(requests))
        selection = Selection()
        return draft_by_levels(
            self, requests, rule, interrupted, proposed, selection, self.target.clock
        )

    def propose_roots(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        for request in requests:
            assert (
                self.known.get(request, request.table.length)
                == len(request.tokens) - 1
                == request.table.length
            )
        trees = DraftTrees.empty(len(requests))
        if rule.levels:
            self._propose(
                requests, trees, [ROOT] * len(requests), list(range(len(requests))), rule.children
            )
        if self.free:
            for owner, request in enumerate(requests):
                self._propose_chain(request, owner, trees)
        return trees

    def next_level(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: np.ndarray, rule: TreeRule
    ) -> int:
        self._propose(requests, trees, nodes.tolist(), trees.owner[nodes].tolist(), rule.children)
        return len(nodes)

    def extend_each(self, requests: Sequence[Request], features: Any) -> None:
        for i, request in enumerate(requests):
            first = request.table.length - 1
            self.extend(request, features[i : i + 1], first, request.tokens[first : first + 1])

    def extend(self, request: Request, features: Any, first: int, tokens: Sequence[int]) -> None:
        assert self.known.get(request, first) == first
        assert list(tokens) == request.tokens[first : first + len(tokens)]
        assert len(tokens) == len(features)
        assert features.tolist() == [[token, first + i] for i, token in enumerate(tokens)]
        self.known[request] = first + len(tokens)

    def release(self, request: Request) -> None:
        self.known.pop(request, None)

    def _propose(
        self, requests, trees: DraftTrees, nodes: list[int], owners: list[int], children: int
    ) -> None:
        self.target.clock.now += float(CHEAP_ROWS.draft_seconds(len(nodes), 0))
        count = min(children, VOCAB)
        for node, owner in zip(nodes, owners, strict=True):
            tokens = self.rng.permutation(VOCAB)[:count]
            true = true_token(self.target, requests[owner], trees.token[trees.path(node)].tolist())
            rank = 0 if self.rng.random() < 0.7 else int(self.rng.integers(count))
            tokens = tokens[tokens != true]
            if self.rng.random() < self.skill:
                tokens = np.insert(tokens, min(rank, len(tokens)), true)[:count]
            prob = np.sort(self.rng.dirichlet(np.full(VOCAB, 0.2)))[::-1][: len(tokens)]
            trees.append([owner] * len(tokens), tokens, [node] * len(tokens), prob)

    def _propose_chain(self, request: Request, owner: int, trees: DraftTrees) -> None:
        path: list[int] = []
        parent = ROOT
        for _ in range(int(self.rng.integers(4))):
            right = self.rng.random() < self.skill
            path.append(
                true_token(self.target, request, path) if right else int(self.rng.integers(VOCAB))
            )
            trees.append([owner], [path[-1]], [parent], [0.5], source=1)
            parent = len(trees) - 1


def token_ids(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text.strip()]


def text_of(tokens: Sequence[int]) -> str:
    return "".join(chr(ord("a") + token) for token in tokens)


def make_engine(
    policy: str = "off",
    pages: int = 256,
    drafter: dict[str, Any] | None = None,
    constrain: Any = None,
    **config: Any,
) -> Engine:
    """An engine on the fakes; `drafter` holds FakeDrafter's options, `config` EngineConfig's."""
    clock = Clock()
    target = TimedTarget(clock, pages)
    offered = {"cost": CHEAP_ROWS, "eos_token_ids": (EOS,)}
    limits = {"max_model_len": min(1024, 16 * pages), **config}
    return Engine(
        target,
        make_policy(policy, offered),
        FakeDrafter(target, **(drafter or {})),
        EngineConfig(pages, **limits),
        lambda skip_special: text_of,
        clock,
        constrain,
    )


def finish(engine: Engine, steps: int = 5000) -> None:
    """Runs all requests to their end, checking memory after every round."""
    for _ in range(steps):
        if not engine.has_unfinished_requests:
            engine.check_integrity()
            assert engine.pool.available == engine.pool.pages
            assert not engine.drafter.known
            return
        engine.step()
        engine.check_integrity()
    raise AssertionError("the engine makes no progress")


def random_requests(count: int, seed: int, **params: Any) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 60 tokens, a third of them beginning alike, with 1 to 40 tokens to emit."""
    rng = np.random.default_rng(seed)
    common = rng.integers(0, VOCAB, 37).tolist()
    made = []
    for i in range(count):
        prompt = (common if rng.random() < 0.4 else []) + rng.integers(
            0, VOCAB, rng.integers(1, 24)
        ).tolist()
        sampling = SamplingParams(**{"max_tokens": int(rng.integers(1, 41)), "seed": i, **params})
        made.append((prompt, sampling.checked(token_ids)))
    return made


def alone(prompt: Sequence[int], params: SamplingParams, constrain: Any = None) -> list[Request]:
    """The answers of policy off to one request with nothing else around."""
    engine = make_engine(constrain=constrain)
    requests = engine.add_request("alone", prompt, params)
    finish(engine)
    return requests
