"""A round drafted in one call is the round drafted level by level, to the bit: heads of every
layout and a draft model, by every kind of rule, beside what free drafters propose."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch

from smart_decoding.core.rule import NO_NODES, TreeRule
from smart_decoding.core.selection import Beam, KeepBest, MarginalRatio
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.engine.kv import BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.draft_model import DraftModel
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import load_head
from smart_decoding.models.target import TorchTarget

from .reference_head import write
from .test_published_heads import LAYOUTS, VOCAB, D, target_config, target_model
from .test_selection import EXPANDS, KEEPS, copy_of, random_rule, random_trees

if TYPE_CHECKING:
    from collections.abc import Callable

    from smart_decoding.core.tree import IntArray
    from smart_decoding.drafters.levels import LevelDrafter

pytestmark = pytest.mark.usefixtures("variant")
PAGES, SCRATCH, POSITIONS = 32, 8, 128
CPU = torch.device("cpu")
SMALL = ModelConfig("qwen2", 2, 32, 2, 1, 16, 40, VOCAB - 6, 5e4, 1e-5, 1024, qkv_bias=True)
GEMMA = replace(
    SMALL,
    family="gemma3",
    qkv_bias=False,
    qk_norm=True,
    windows=(9, 0),
    local_theta=1e4,
    query_scalar=24,
)
MODELS = {"draft model": SMALL, "draft model of Gemma's": GEMMA}
DTYPES = {"eagle3": torch.bfloat16, "eagle1, two layers": torch.bfloat16}  # else float32


class Replay(NgramDrafter):
    """A free drafter that proposes fixed trees."""

    def __init__(self, trees: DraftTrees) -> None:
        super().__init__()
        self.trees = trees

    def propose(self, requests: Any, rule: TreeRule) -> DraftTrees:
        return self.trees


class Source(NamedTuple):
    """What drafts, without state. width: of its features."""

    drafter: Callable[[], LevelDrafter[Any]]
    width: int


def head_of(name: str, folder: Path, native: bool = True) -> Source:
    config, tensors, pickled, *_ = LAYOUTS[name]
    dtype = DTYPES.get(name, torch.float32)
    weights = target_model().state_dict()
    decoder = Decoder(target_config(), weights, dtype, CPU, PAGES, POSITIONS, native)
    files = load_head(write(folder, config, tensors, pickled), target_config(), trust_pickle=True)
    head = EagleHead(files, decoder, PAGES, SCRATCH, POSITIONS)
    return Source(lambda: EagleDrafter(head, PAGES, SCRATCH), D * len(head.aux_layers))


def draft_model(shape: ModelConfig) -> Source:
    """Its vocabulary is smaller than the target's: it does not know all that others propose."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(size, generator=generator) * 0.3
        for name, size in shape.expected_shapes().items()
    }
    mine = Checkpoint(target_config(), target_model().state_dict(), Path("nowhere"), {})
    target = TorchTarget(mine, "float32", "cpu", PAGES, POSITIONS)
    model = DraftModel(Checkpoint(shape, weights, Path("nowhere"), {}), target, PAGES, SCRATCH)
    return Source(lambda: DraftModelDrafter(model, PAGES, SCRATCH), 0)


def waiting(drafter: Any, width: int, temperatures: tuple[float, ...]) -> list[Request]:
    """Requests of which rows wait, some of rounds that were logged."""
    pool = PagePool(PAGES)
    rng = np.random.default_rng(0)
    torch_rng = torch.Generator().manual_seed(0)
    features = functools.partial(torch.randn, generator=torch_rng)
    requests = []
    for i, temperature in enumerate(temperatures):
        params = SamplingParams(temperature=temperature)
        tokens = rng.integers(0, VOCAB, 20 + 9 * i).tolist()
        stop = StopChecker(params, lambda ids: "")
        request = Request(str(i), tokens, params, i, BlockTable(pool), stop)
        count = len(tokens) - 1
        request.table.reserve(count)
        request.table.commit(tokens, count)
        drafter.extend(request, features(count, width), 0, tokens[:count])
        requests.append(request)
    for _ in range(3):  # plain rounds
        for request in requests:
            request.table.reserve(1)
            request.tokens += rng.integers(0, VOCAB, 1).tolist()
            request.table.commit(request.tokens, len(request.tokens) - 1)
        drafter.extend_each(requests, features(len(requests), width))
    return requests


def with_free(source: Source, free: list[DraftTrees], slots: int) -> Any:
    """A drafter with room for so many expanded nodes."""
    drafter = source.drafter()
    drafter._scratch_size = slots
    return UnionDrafter([drafter, *map(Replay, free)]) if free else drafter


@dataclass(frozen=True)
class Asked:
    """A rule's part in Python: it is followed level by level."""

    part: Any

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        found: IntArray = self.part.frontier(rule, trees, level)
        return found


def by_level(drafter: Any, requests: list[Request], rule: TreeRule) -> Any:
    draft = drafter.draft(requests, replace(rule, expand=Asked(rule.expand)), lambda: False)
    return draft.trees, draft.kept, draft.widths[1:]


def check(
    source: Source,
    temperatures: tuple[float, ...],
    rule: TreeRule,
    free: list[DraftTrees],
    slots: int,
) -> tuple[DraftTrees, IntArray, list[int]]:
    """Both ways give the same; returns it."""
    drafter = with_free(source, [copy_of(trees) for trees in free], slots)
    mine = waiting(drafter, source.width, temperatures)
    whole = drafter.draft(mine, rule, lambda: False)
    other = with_free(source, [copy_of(trees) for trees in free], slots)
    requests = waiting(other, source.width, temperatures)
    trees, kept, expanded = by_level(other, requests, rule)
    assert np.array_equal(whole.trees.ints[:, : len(whole.trees)], trees.ints[:, : len(trees)])
    ours, plain = (each.floats[:, : len(each)] for each in (whole.trees, trees))
    assert np.array_equal(ours, plain)
    assert whole.kept.tolist() == kept.tolist()
    assert whole.widths[1:] == expanded
    assert len(whole.level_seconds) == 1 + len(expanded)
    assert min(whole.level_seconds) > 0
    assert whole.choosing > 0
    assert drafter.pending_rows(mine) == other.pending_rows(requests)
    return trees, kept, expanded


def free_trees(rng: np.random.Generator, trees: DraftTrees) -> DraftTrees:
    """Some of what a model proposes, more or less likely, and other tokens below it."""
    free = DraftTrees.empty(trees.batch)
    place = {ROOT: ROOT}
    for node in range(len(trees)):
        above = int(trees.parent[node])
        if above in place and rng.random() < 0.4:
            place[node] = len(free)
            owner = int(trees.owner[node])
            free.append([owner], [trees.token[node]], [place[above]], [rng.random()], source=1)
    for node in range(len(free)):
        if rng.random() < 0.3:
            free.append([free.owner[node]], [VOCAB - 1], [node], [rng.random()], source=1)
    return free


def random_round(rng: np.random.Generator, expand: str, keep: str, batch: int) -> TreeRule:
    trees = random_trees(rng, batch, 2, ties=False)
    rule = random_rule(rng, trees, expand, keep)
    levels, children = int(rng.integers(1, 6)), int(rng.integers(1, 6))
    limits = rng.choice([0, 2, 3, 20, 20], batch)
    return replace(rule, levels=levels, children=children, limits=limits)


@pytest.mark.parametrize("name", [*LAYOUTS, *MODELS])
def test_one_call_drafts_what_levels_draft(name: str, tmp_path: Path) -> None:
    source = draft_model(MODELS[name]) if name in MODELS else head_of(name, tmp_path)
    rng = np.random.default_rng(len(name))
    levels = merged = 0
    for seed in range(6 * len(EXPANDS)):
        temperatures = [(0.0,), (0.0, 0.8, 1.2), (0.8, 0.8)][seed % 3]
        expand, keep = EXPANDS[seed % 4], KEEPS[int(rng.integers(4))]
        rule = random_round(rng, expand, keep, len(temperatures))
        slots = int(rng.choice([7, 16 * SCRATCH]))
        trees, _, expanded = check(source, temperatures, rule, [], slots)
        free = [free_trees(rng, trees), free_trees(rng, trees)]
        both, _, _ = check(source, temperatures, rule, free, slots)
        levels += len(expanded)
        merged += (
            int(np.count_nonzero(both.source == 0)) < len(both) < len(trees) + sum(map(len, free))
        )
    assert levels > 10
    assert merged > 8


@pytest.mark.parametrize("name", ["eagle3", "eagle1, two layers"])
def test_what_torch_runs_on_a_cpu_is_drafted_level_by_level(name: str, tmp_path: Path) -> None:
    rule = TreeRule(2, 2, np.array([9]), NO_NODES, Beam(1), KeepBest(9))
    assert not head_of(name, tmp_path, native=False).drafter().follows(rule)
    assert head_of(name, tmp_path).drafter().follows(rule)


def test_a_free_node_is_expanded_where_its_parent_was(tmp_path: Path) -> None:
    """And raised by the model's probability, with all that lies below it."""
    source = head_of("eagle3", tmp_path)
    rule = TreeRule(4, 3, np.array([9]), NO_NODES, Beam(2), KeepBest(5))
    alone, _, _ = check(source, (0.0,), rule, [], 100)
    first = int(alone.token[0])
    free = DraftTrees.empty(1)
    free.append([0, 0], [first, VOCAB - 1], [ROOT, ROOT], [1e-9, 1.0], source=1)
    free.append([0], [VOCAB - 2], [0], [1.0], source=1)
    trees, _, expanded = check(source, (0.0,), rule, [free], 100)
    assert trees.source[:3].tolist() == [0, 1, 1]
    assert trees.draft_prob[0] == alone.draft_prob[0]
    assert trees.path_prob[2] == trees.draft_prob[0]
    assert {0, 1, 2} <= set(trees.parent.tolist())
    assert expanded == [2, 2, 2]


def test_a_rule_may_expand_everything(tmp_path: Path) -> None:
    """The published rule with alpha 1 and costs of nothing keeps all; memory is bounded by its
    budget."""
    source = head_of("speculators", tmp_path)
    ratio = MarginalRatio(1.0, np.full(40, 1e-9), np.zeros(40))
    rule = TreeRule(3, 3, np.array([9, 9]), NO_NODES, ratio, ratio)
    trees, kept, expanded = check(source, (0.0, 0.8), rule, [], 1000)
    assert expanded == [6, 18]
    assert len(trees) == 6 + 18 + 54
    assert len(kept) == 78
