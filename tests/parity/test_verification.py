"""A round's verification in one call of the kernels against the same step by step: tokens, paths,
features and keys."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.kv import BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.scheduler import Batch
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.engine.verification import Verified, make_room, verify
from smart_decoding.models.sampler import Sampler
from smart_decoding.models.target import TorchTarget

from .checkpoints import MODELS, PAGES, VOCAB, decoder

pytestmark = pytest.mark.usefixtures("variant")
CONTEXTS = (5, 15, 63, 126)
DRAFTER = SimpleNamespace(aux_layers=(1, 2), wants_logits=False)
PROMPT = np.random.default_rng(8).integers(VOCAB, size=200).tolist()


class World:
    """Requests of several lengths on a tiny model, verified in one call or step by step."""

    verify = TorchTarget.verify
    argmax = TorchTarget.argmax
    move = TorchTarget.move
    _in_one_call = TorchTarget._verify_greedy

    def __init__(self, name: str, dtype: torch.dtype, whole: bool) -> None:
        self.decoder, self.sampler = decoder(name, True, dtype), Sampler(VOCAB)
        self.verify_greedy = self._in_one_call if whole else None
        pool = PagePool(PAGES)
        params = SamplingParams(temperature=0.0, max_tokens=100)
        self.requests = [
            Request(
                str(n), PROMPT[n : n + n], params, 0, BlockTable(pool), StopChecker(params, str)
            )
            for n in CONTEXTS
        ]
        for request in self.requests:
            request.table.cover(len(request.tokens))
        self.after(
            self.run(Batch([], [(r, len(r.tokens)) for r in self.requests]), DraftTrees.empty(0))
        )

    def run(self, batch: Batch, trees: DraftTrees, kept: np.ndarray | None = None) -> Verified:
        kept = np.arange(len(trees)) if kept is None else kept
        for request in batch.decode:
            request.table.cover(1)
        kept = make_room(batch, trees, kept)
        return verify(self, DRAFTER, batch, trees, kept, lambda: 0.0)  # type: ignore[arg-type]

    def round(self, trees: DraftTrees | None = None, kept: np.ndarray | None = None) -> Verified:
        trees = DraftTrees.empty(len(self.requests)) if trees is None else trees
        return self.after(self.run(Batch(self.requests, []), trees, kept))

    def after(self, verified: Verified) -> Verified:
        for request, tokens in zip(verified.requests, verified.acceptance.emitted, strict=True):
            request.tokens += tokens
            request.table.commit(request.tokens, len(request.tokens) - 1)
        return verified


def trees_around(answers: list[list[int]], rng: np.random.Generator, nodes: int) -> DraftTrees:
    """Trees that follow the target's own answers more often than not, branches beside them, and
    siblings that are equal."""
    trees = DraftTrees.empty(len(answers))
    for _ in range(nodes):
        owner = int(rng.integers(len(answers)))
        parent = int(rng.choice([ROOT, *trees.nodes_of(owner)[-5:]]))
        depth = 0 if parent == ROOT else int(trees.depth[parent])
        token = (
            answers[owner][depth]
            if rng.random() < 0.7 and depth < len(answers[owner])
            else int(rng.integers(9))
        )
        trees.append([owner], [token], [parent], [0.5])
    return trees


def some_of(trees: DraftTrees, rng: np.random.Generator) -> np.ndarray:
    """Most nodes, with all their ancestors."""
    wanted = {
        node for at in np.flatnonzero(rng.random(len(trees)) < 0.5) for node in trees.path(int(at))
    }
    return np.array(sorted(wanted), np.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3", "head_dim 64, one query per key"])
def test_one_call_equals_step_by_step(name: str, dtype: torch.dtype) -> None:
    assert name in MODELS
    ahead = World(name, dtype, False)
    for _ in range(30):
        ahead.round()
    answers = [request.tokens[n:] for request, n in zip(ahead.requests, CONTEXTS, strict=True)]
    worlds = [World(name, dtype, whole) for whole in (True, False)]
    rng = np.random.default_rng(4)
    accepted = 0
    for turn in range(12):
        others = [
            answer[len(request.tokens) - n :]
            for answer, request, n in zip(answers, worlds[0].requests, CONTEXTS, strict=True)
        ]
        trees = trees_around(others, rng, (0, 1, 24, 60)[turn % 4])
        kept = some_of(trees, rng) if turn > 3 else np.arange(len(trees))
        one, steps = (world.round(copy.copy(trees), kept.copy()) for world in worlds)
        assert one.acceptance.emitted == steps.acceptance.emitted
        assert one.acceptance.path == steps.acceptance.path
        assert (one.acceptance.root_next == steps.acceptance.root_next).all()
        assert (one.acceptance.next_token == steps.acceptance.next_token).all()
        assert one.rows == steps.rows == len(CONTEXTS) + len(kept)
        for ours, theirs in zip(one.committed, steps.committed, strict=True):
            assert (ours.first, ours.count) == (theirs.first, theirs.count)
            assert (one.features[ours.rows] == steps.features[theirs.rows].numpy()).all()
        accepted += sum(map(len, one.acceptance.path))
    assert accepted > 15
    for request, answer, n in zip(worlds[0].requests, answers, CONTEXTS, strict=True):
        assert request.tokens[n:][: len(answer)] == answer[: len(request.tokens) - n]


def test_broken_weights_are_reported() -> None:
    world = World("llama", torch.float32, True)
    world.decoder.kv.values.fill_(torch.nan)
    with pytest.raises(Exception, match="NaN or infinite"):
        world.round()
