"""Drafters without model cost, and the union of drafters: expected trees, exact frequencies,
bounds, no duplicates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.rule import NO_NODES, Draft, TreeRule
from smart_decoding.core.selection import Beam, KeepBest, Selection
from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.drafters.levels import draft_by_levels
from smart_decoding.drafters.ngram import SHORTER, NgramDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError

VOCABULARY = 5


def rule_of(levels: int, batch: int = 2) -> TreeRule:
    return TreeRule(levels, 2, np.full(batch, 9), NO_NODES, Beam(2), KeepBest(9))


FREE = rule_of(0)


def request(tokens: list[int]) -> Request:
    return Request("r", tokens, SamplingParams(), 0, table=None, stop=None)


def check(trees: DraftTrees) -> None:
    """Arrays agree, parents come before their children and belong to the same request, no two equal
    siblings."""
    nodes = np.arange(len(trees))
    inner = trees.parent != ROOT
    assert (trees.parent < nodes).all()
    assert (trees.parent >= ROOT).all()
    assert (trees.owner[trees.parent[inner]] == trees.owner[inner]).all()
    assert (trees.depth == np.where(inner, trees.depth[trees.parent] + 1, 1)).all()
    above = np.where(inner, trees.path_prob[trees.parent], 1.0)
    np.testing.assert_allclose(trees.path_prob, above * trees.draft_prob, rtol=1e-12)
    assert ((trees.draft_prob > 0) & (trees.draft_prob <= 1)).all()
    assert len(set(zip(trees.owner, trees.parent, trees.token, strict=True))) == len(trees)
    for column in (trees.owner, trees.token, trees.parent, trees.depth, trees.source):
        assert column.dtype == np.int64
        assert len(column) == len(trees)
        assert column.flags.c_contiguous
    assert trees.draft_prob.flags.c_contiguous


def paths(trees: DraftTrees, owner: int = 0) -> dict[tuple[int, ...], float]:
    """Tokens from the root down to each node -> its draft_prob."""
    return {
        tuple(trees.token[trees.path(n)].tolist()): float(trees.draft_prob[n])
        for n in trees.nodes_of(owner)
    }


# --- n-gram


def test_ngram_proposes_what_followed_before() -> None:
    found = paths(NgramDrafter().propose([request([1, 2, 3, 4, 9, 8, 1, 2, 3])], FREE))
    chain = [(4,), (4, 9), (4, 9, 8), (4, 9, 8, 1), (4, 9, 8, 1, 2), (4, 9, 8, 1, 2, 3)]
    assert found == {
        path: 1 - 0.5 ** (2 + len(path)) for path in chain
    }  # three tokens agree, then four, five ...


def test_ngram_quotes_at_length() -> None:
    """Where rows are nearly free, all of a long quote is verified at once."""
    quote = list(range(100))
    trees = NgramDrafter().propose([request([*quote, 200, *quote[:5]])], FREE)
    assert trees.token.tolist() == quote[5:53]
    assert trees.depth.tolist() == list(range(1, 49))


def test_ngram_frequencies_branch() -> None:
    text = [7, 1, 2, 5, 7, 1, 2, 5, 7, 1, 2, 6, 7, 1, 2]
    found = paths(NgramDrafter(min_n=3, max_n=3, max_depth=1).propose([request(text)], FREE))
    assert found == {(5,): pytest.approx(2 / 3 * 7 / 8), (6,): pytest.approx(1 / 3 * 7 / 8)}


def test_ngram_sees_the_root_and_knows_nothing_of_new_text() -> None:
    drafter = NgramDrafter()
    assert paths(drafter.propose([request([3, 3, 3])], FREE)) == {
        (3,): 0.75
    }  # the root follows the first pair
    empty = drafter.propose([request([1, 2, 3, 4]), request([1])], FREE)
    assert len(empty) == 0
    assert empty.batch == 2


def test_ngram_index_grows_with_the_text_in_any_pieces() -> None:
    text = np.random.default_rng(0).integers(0, 3, 60).tolist()
    growing = request(text[:20])
    drafter = NgramDrafter()
    for end in (21, 22, 30, 60):
        growing.tokens = text[:end]
        drafter.extend(growing, None, end - 2, text[end - 2 : end - 1])
    assert (
        paths(drafter.propose([growing], FREE))
        == paths(NgramDrafter().propose([request(text)], FREE))
        != {}
    )


def naive_occurrences(text: list[int], min_n: int, max_n: int) -> dict[int, int]:
    matched = {
        at: max(
            (n for n in range(min_n, max_n + 1) if n <= at and text[at - n : at] == text[-n:]),
            default=0,
        )
        for at in range(1, len(text))
    }
    return {at: n for at, n in matched.items() if n}


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_ngram_equals_counting_by_hand(text: list[int]) -> None:
    trees = NgramDrafter(1, 3, max_nodes=1024, max_depth=4, occurrences=1024).propose(
        [request(text)], FREE
    )
    check(trees)
    occurrences = naive_occurrences(text, 1, 3)
    longest = max(occurrences.values(), default=0)

    def seen(path: tuple[int, ...]) -> float:
        those = [n for at, n in occurrences.items() if tuple(text[at : at + len(path)]) == path]
        return sum(SHORTER ** (longest - n) for n in those)

    found = paths(trees)
    assert set(found) == {
        tuple(text[at : at + d]) for at in occurrences for d in range(1, min(4, len(text) - at) + 1)
    }
    for path, prob in found.items():
        share = seen(path) / sum(seen((*path[:-1], token)) for token in range(3))
        context = (
            max(n for at, n in occurrences.items() if tuple(text[at : at + len(path)]) == path)
            + len(path)
            - 1
        )
        assert prob == pytest.approx(share * (1 - 0.5**context))


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=80), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_ngram_bounds_keep_the_likeliest(texts: list[list[int]]) -> None:
    requests = [request(text) for text in texts]
    trees = NgramDrafter(max_nodes=5, max_depth=3).propose(requests, FREE)
    everything = NgramDrafter(max_nodes=1024, max_depth=3).propose(requests, FREE)
    check(trees)
    assert (trees.source == 1).all()
    assert (trees.depth <= 3).all()
    for owner in range(len(texts)):
        best = np.sort(everything.path_prob[everything.nodes_of(owner)])[::-1][:5]
        np.testing.assert_allclose(np.sort(trees.path_prob[trees.nodes_of(owner)])[::-1], best)


def test_ngram_looks_at_few_occurrences_the_newest_first() -> None:
    text = [1, 2, 5] * 30 + [1, 2, 6] * 2 + [1, 2]
    found = paths(
        NgramDrafter(min_n=2, max_n=2, max_depth=1, occurrences=4).propose([request(text)], FREE)
    )
    assert found == {(6,): pytest.approx(0.375), (5,): pytest.approx(0.375)}


def test_ngram_forgets_released_requests() -> None:
    drafter = NgramDrafter()
    old = request([1, 2, 3, 1, 2])
    other = request([4, 5, 6, 4, 5])
    drafter.propose([old, other], FREE)
    drafter.release(old)
    drafter.release(old)
    assert list(drafter._index) == [other]
    old.tokens = [1, 2, 9, 1, 2]  # preempted and begun anew: nothing of the former index is left
    assert paths(drafter.propose([old], FREE))[(9,)] == 0.75


@pytest.mark.parametrize(
    "options", [{"min_n": 0}, {"min_n": 5}, {"max_nodes": 0}, {"max_depth": 0}]
)
def test_ngram_refuses_nonsense(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        NgramDrafter(**options)


# --- union


class FakeModel:
    """A drafter with a model: children drawn by seed, noted by owner and path; insists on expanding
    children of what it has expanded only, and each only once."""

    name = "fake"
    has_model = True
    free = False
    aux_layers = (1, 2)
    resting_layers = (1, 2)

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.calls: list[str] = []

    def pending_rows(self, requests: list[Request]) -> int:
        return 7

    def draft(
        self,
        requests: list[Request],
        rule: TreeRule,
        interrupted: Callable[[], bool],
        given: DraftTrees,
    ) -> Draft:
        return draft_by_levels(self, requests, rule, interrupted, given, Selection())

    def propose_roots(self, requests: list[Request], rule: TreeRule) -> DraftTrees:
        assert rule.levels > 0
        self.said: list[dict[tuple[int, ...], float]] = [{} for _ in requests]
        self.expanded: set[tuple[int, ...]] = set()
        trees = DraftTrees.empty(len(requests))
        self._append(trees, range(len(requests)), [ROOT] * len(requests))
        return trees

    def next_level(
        self, requests: list[Request], trees: DraftTrees, nodes: np.ndarray, rule: TreeRule
    ) -> int:
        self._append(trees, trees.owner[nodes].tolist(), nodes.tolist())
        return len(nodes)

    def _append(self, trees: DraftTrees, owners: Sequence[int], parents: list[int]) -> None:
        for owner, parent in zip(owners, parents, strict=True):
            path = () if parent == ROOT else tuple(trees.token[trees.path(parent)].tolist())
            assert (owner, *path) not in self.expanded
            assert not path or (owner, *path[:-1]) in self.expanded
            self.expanded.add((owner, *path))
            children = self._children()
            self.said[owner] |= {(*path, token): prob for token, prob in children.items()}
            probs = list(children.values())
            trees.append([owner] * len(probs), list(children), [parent] * len(probs), probs)

    def _children(self) -> dict[int, float]:
        tokens = self.rng.choice(VOCABULARY, 2, replace=False).tolist()
        return dict(zip(tokens, self.rng.uniform(0.05, 0.5, 2).tolist(), strict=True))

    def extend_each(self, requests: list[Request], features: object) -> None:
        self.calls.append("extend_each")

    def extend(self, request: Request, features: object, first: int, tokens: list[int]) -> None:
        self.calls.append("extend")

    def release(self, request: Request) -> None:
        self.calls.append("release")


class Replay(NgramDrafter):
    """A free drafter that proposes given trees."""

    def __init__(self, trees: DraftTrees) -> None:
        super().__init__()
        self.trees = trees

    def propose(self, requests: list[Request], rule: TreeRule) -> DraftTrees:
        return self.trees


@dataclass(frozen=True)
class By:
    """Expands what a function says."""

    frontier: Callable[[TreeRule, DraftTrees, int], IntArray]


def random_trees(rng: np.random.Generator, batch: int, nodes: int) -> DraftTrees:
    trees = DraftTrees.empty(batch)
    taken = set()
    for _ in range(nodes):
        owner = int(rng.integers(batch))
        token = int(rng.integers(VOCABULARY))
        parent = int(rng.choice([ROOT, *trees.nodes_of(owner)]))
        if (owner, parent, token) not in taken:
            taken.add((owner, parent, token))
            trees.append([owner], [token], [parent], [rng.uniform(0.05, 1)], source=1)
    return trees


def proposals(of_each: list[dict[tuple[int, ...], float]]) -> dict[tuple[int, ...], Any]:
    """Path -> the largest draft_prob and the first drafter that proposed it."""
    result: dict[tuple[int, ...], tuple[float, int]] = {}
    for source, proposed in enumerate(of_each):
        for path, prob in proposed.items():
            best, first = result.get(path, (0.0, source))
            result[path] = (max(best, prob), first)
    return result


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=80, deadline=None)
def test_union_is_the_union(seed: int, batch: int, one: int, two: int) -> None:
    rng = np.random.default_rng(seed)
    model = FakeModel(seed)
    free = [random_trees(rng, batch, one), random_trees(rng, batch, two)]
    union = UnionDrafter([model, *map(Replay, free)])
    requests = [request([0]) for _ in range(batch)]
    rule = rule_of(4, batch)

    def some(rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        check(trees)
        for owner in range(batch):
            found = {
                p: (prob, trees.source[n])
                for (p, prob), n in zip(
                    paths(trees, owner).items(), trees.nodes_of(owner), strict=True
                )
            }
            everything = [model.said[owner], *(paths(each, owner) for each in free)]
            assert found == proposals(everything)
        nodes = rule.expandable(trees, level)
        asked.append(nodes[rng.random(len(nodes)) < 0.6])
        return asked[-1]

    asked: list[IntArray] = []
    draft = union.draft(requests, replace(rule, expand=By(some)), lambda: False)
    assert draft.widths == [7, *(len(nodes) for nodes in asked if len(nodes))]


def test_union_merges_by_path_and_promotes_what_the_model_proposes_too() -> None:
    class Fixed(FakeModel):
        def _children(self) -> dict[int, float]:
            return {1: 0.4} if len(self.expanded) == 1 else {2: 0.8}

    free = DraftTrees.empty(1)
    free.append([0, 0], [1, 3], [ROOT, ROOT], [0.5, 0.2], source=1)
    free.append([0, 0], [2, 4], [0, 1], [0.6, 0.9], source=1)
    free.append([0], [0], [2], [0.5], source=1)
    union = UnionDrafter([Fixed(0), Replay(free)])
    requests = [request([0])]
    rule = rule_of(3, 1)

    def expanding(*nodes: int) -> DraftTrees:
        expand = By(lambda rule, trees, level: np.array(nodes if level == 1 else [], np.int64))
        return union.draft(requests, replace(rule, expand=expand), lambda: False).trees

    trees = expanding(2)  # its parent is a leaf still
    assert trees.token.tolist() == [1, 3, 2, 4, 0]
    assert trees.source.tolist() == [0, 1, 1, 1, 1]
    assert trees.draft_prob.tolist() == [0.5, 0.2, 0.6, 0.9, 0.5]
    assert rule.expandable(trees, 1).tolist() == [0, 1]
    trees = expanding(0, 1)
    assert trees.token.tolist() == [1, 3, 2, 4, 0, 2]
    assert trees.parent.tolist() == [ROOT, ROOT, 0, 1, 2, 1]
    assert trees.source.tolist() == [0, 1, 0, 1, 1, 0]
    assert trees.draft_prob.tolist() == [0.5, 0.2, 0.8, 0.9, 0.5, 0.8]
    assert trees.path_prob[[2, 4]].tolist() == pytest.approx([0.4, 0.2])
    assert rule.expandable(trees, 2).tolist() == [2, 3, 5]


def test_union_derives_what_the_engine_asks_for() -> None:
    model = FakeModel(0)
    ngram = NgramDrafter()
    union = UnionDrafter([model, ngram])
    assert (union.has_model, union.free, union.aux_layers) == (True, True, (1, 2))
    assert union.pending_rows([]) == 7
    text = request([1, 2, 3, 1, 2])
    union.extend(text, None, 0, [1, 2, 3, 1])
    trees = union.draft(
        [text], FREE, lambda: False
    ).trees  # without model levels the model is not asked
    assert set(trees.source.tolist()) == {1}
    assert paths(trees)[(3,)] == 0.75
    union.release(text)
    assert model.calls == ["extend", "release"]
    assert not ngram._index
    free = UnionDrafter([ngram, NgramDrafter()])
    assert (free.has_model, free.free, free.aux_layers) == (False, True, ())
    assert free.pending_rows([text]) == 0
    assert (free.propose([text], FREE).source == 1).all()


def test_union_refuses_what_it_cannot_merge() -> None:
    for drafters in ([], [NgramDrafter(), FakeModel(0)], [FakeModel(0), FakeModel(1)]):
        with pytest.raises(ConfigError):
            UnionDrafter(drafters)
