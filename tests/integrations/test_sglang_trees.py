"""SGLang's own trees against our core's.

Its selection, tree-building and greedy verification are run from the installed wheel, the kernels
by Triton's interpreter (no GPU): they must give the tree that our core chooses, and the same walk
down it."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is to interpret: make test-sglang", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed here: make test-sglang")
pytest.importorskip("sglang", reason="SGLang is not installed here: make test-sglang")
torch = pytest.importorskip("torch")

from sglang_wheel import definitions  # noqa: E402

from smart_decoding.core.batch import BatchState  # noqa: E402
from smart_decoding.core.policies.eagle2 import Eagle2  # noqa: E402
from smart_decoding.core.tree import (  # noqa: E402
    ROOT,
    DraftTrees,
    accept,
)

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule

VOCABULARY = 50
CONTEXT = (7, 12, 3)  # tokens before the root, by request
Path_ = tuple[int, ...]  # tokens below the root


@pytest.fixture(scope="module")
def sglang() -> SimpleNamespace:
    """SGLang's functions, on the platform whose kernels are Triton's (its XPU branch)."""
    from sglang.kernels.ops.speculative import spec_tree

    patch = pytest.MonkeyPatch()
    patch.setattr(spec_tree, "_is_xpu", True)
    fast_topk = definitions("sglang.srt.utils.common", ["fast_topk"], {"torch": torch})["fast_topk"]
    select = definitions(
        "sglang.srt.speculative.spec_utils",
        ["_select_top_k_tokens_first", "_select_top_k_tokens_later", "select_top_k_tokens"],
        {"torch": torch, "fast_topk": fast_topk, "_is_npu": False, "_is_xpu": True},
    )
    build = definitions(
        "sglang.srt.speculative.eagle_utils",
        ["organize_draft_results", "build_tree_kernel_efficient"],
        {
            "torch": torch,
            "TreeMaskMode": spec_tree.TreeMaskMode,
            "maybe_detect_oob": lambda *_: None,
            "build_tree_kernel_efficient_func": spec_tree.build_tree_kernel_efficient_func,
        },
    )
    yield SimpleNamespace(**{**select, **build, "verify": spec_tree.verify_tree_greedy_func})
    patch.undo()


@dataclass
class World:
    """Drafter and target as tables: what follows a path depends on seed, request and path alone."""

    seed: int
    batch: int

    def draft(self, owner: int, path: Path_) -> np.ndarray:
        """[vocabulary] probabilities, in fp32 as SGLang has them."""
        logits = 2.5 * np.random.default_rng([self.seed, owner, *path]).normal(size=VOCABULARY)
        odds = np.exp(logits - logits.max())
        return (odds / odds.sum()).astype(np.float32)

    def target(self, owner: int, path: Path_) -> int:
        """The target's greedy token: mostly one of the drafter's best."""
        order = np.argsort(-self.draft(owner, path))
        return int(
            order[
                np.random.default_rng([self.seed, owner, *path, 9]).choice(
                    5, p=[0.5, 0.2, 0.1, 0.1, 0.1]
                )
            ]
        )


# --- our core ---


def candidates(world: World, policy: Eagle2, children: int) -> tuple[TreeRule, DraftTrees]:
    """All that a policy drafts, level by level, as our engine does."""
    size = world.batch
    batch = BatchState(
        np.array(CONTEXT[:size]), np.full(size, 99), np.zeros(size), np.ones(size, bool)
    )
    rule = policy.plan(batch)
    assert rule is not None
    trees = DraftTrees.empty(size)
    parents = np.full(size, ROOT)
    owners = np.arange(size)
    for level in range(1, rule.levels + 1):
        for owner, parent in zip(owners.tolist(), parents.tolist(), strict=True):
            probs = world.draft(owner, tokens_to(trees, parent))
            best = np.argsort(-probs)[:children]
            trees.append(
                np.full(children, owner), best, np.full(children, parent), probs[best].astype(float)
            )
        chosen = rule.frontier(trees, level)
        parents = chosen
        owners = trees.owner[chosen]
    return rule, trees


def tokens_to(trees: DraftTrees, node: int) -> Path_:
    return tuple(int(trees.token[n]) for n in trees.path(node)) if node != ROOT else ()


# --- SGLang ---


@dataclass
class Built:
    """SGLang's tree: [batch, 1 + nodes] arrays, and paths [batch][node] of its tokens."""

    tokens: np.ndarray
    index: Any
    next_token: Any
    next_sibling: Any
    mask: np.ndarray
    positions: np.ndarray
    paths: list[list[Path_]]


def sglang_lists(sglang: SimpleNamespace, world: World, topk: int, steps: int) -> Any:
    """The loop of SGLang's draft worker, with the table in the drafter's place."""
    beam: list[Path_] = [()] * world.batch
    scores = hidden = None
    lists: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    width = 1
    for step in range(steps):
        probs = torch.tensor(
            np.stack([world.draft(row // width, path) for row, path in enumerate(beam)])
        )
        best, index = sglang.fast_topk(probs, topk, dim=-1)
        # In the hidden states' place: whose row it is.
        marks = torch.arange(len(beam), dtype=torch.float32)[:, None]
        ids, hidden, scores, info = sglang.select_top_k_tokens(
            step, best, index, marks, scores, topk
        )
        for list_, part in zip(lists, info, strict=True):
            list_.append(part)
        beam = [(*beam[int(row)], int(token)) for row, token in zip(hidden[:, 0], ids, strict=True)]
        width = topk
    return lists


def sglang_tree(sglang: SimpleNamespace, world: World, topk: int, steps: int, nodes: int) -> Built:
    """What SGLang's draft worker builds, and the path of each node."""
    batch = world.batch
    lists = sglang_lists(sglang, world, topk, steps)
    parents, chosen, drafts = sglang.organize_draft_results(*lists, nodes + 1)
    context = torch.tensor(CONTEXT[:batch])
    mask, positions, index, next_token, next_sibling, tokens = sglang.build_tree_kernel_efficient(
        torch.full((batch,), 1000),
        parents,
        chosen,
        drafts,
        context,
        int(context.sum()),
        topk,
        steps,
        nodes + 1,
    )
    built = Built(
        tokens.view(batch, -1).numpy(),
        index,
        next_token,
        next_sibling,
        mask.numpy(),
        positions.numpy(),
        [],
    )
    built.paths += [node_paths(built, owner) for owner in range(batch)]
    return built


def node_paths(built: Built, owner: int) -> list[Path_]:
    """The tokens from the root down to each node of one request."""
    nodes = built.tokens.shape[1]
    paths: list[Path_] = [()] * nodes
    for node in range(nodes):
        child = int(built.next_token[owner, node])
        while child >= 0:
            paths[child] = (*paths[node], int(built.tokens[owner, child]))
            child = int(built.next_sibling[owner, child])
    return paths


# --- the same ---


def ancestor_mask(trees: DraftTrees) -> np.ndarray:
    """[nodes, nodes]: entry (i, j) is true iff j is i or an ancestor of i."""
    mask = np.eye(len(trees), dtype=np.bool_)
    for node, parent in enumerate(trees.parent):
        if parent != ROOT:
            mask[node] |= mask[parent]
    return mask


def assert_same_tree(trees: DraftTrees, built: Built) -> None:
    """Tokens, parents, links, positions and mask."""
    width = built.tokens.shape[1]
    first = 0
    for owner in range(trees.batch):
        mine = trees.nodes_of(owner)
        place = {path: node for node, path in enumerate(built.paths[owner])}  # theirs, by path
        paths = {int(node): tokens_to(trees, int(node)) for node in mine}
        assert sorted(paths.values()) == sorted(set(built.paths[owner]) - {()})
        assert len(mine) == width - 1
        order = sorted(paths, key=lambda node: place[paths[node]])  # ours, in SGLang's order
        assert trees.token[order].tolist() == built.tokens[owner, 1:].tolist()
        rows = {node: row for row, node in enumerate(order, start=1)} | {ROOT: 0}
        children: dict[int, list[int]] = {row: [] for row in range(width)}
        for node in order:
            children[rows[int(trees.parent[node])]].append(rows[node])
        following = {a: b for below in children.values() for a, b in itertools.pairwise(below)}
        assert built.next_token[owner].tolist() == [
            min(children[row], default=-1) for row in range(width)
        ]
        assert built.next_sibling[owner].tolist() == [
            following.get(row, -1) for row in range(width)
        ]
        assert built.index[owner].tolist() == list(range(owner * width, (owner + 1) * width))
        depths = [0, *trees.depth[order].tolist()]
        context = CONTEXT[owner]
        assert built.positions[owner * width : (owner + 1) * width].tolist() == [
            context + d for d in depths
        ]
        size = width * (context + width)
        mask = built.mask[first : first + size].reshape(width, context + width)
        first += size
        visible = ancestor_mask(trees)[np.ix_(order, order)]
        assert mask[:, : context + 1].all()
        assert (mask[1:, context + 1 :] == visible).all()
        assert not mask[0, context + 1 :].any()


def assert_same_walk(
    sglang: SimpleNamespace, world: World, trees: DraftTrees, built: Built, steps: int
) -> int:
    """Accepted paths and emitted tokens; returns how many drafts were accepted."""

    def sample(rows: list[int]) -> list[int]:
        owners = [row if row < trees.batch else int(trees.owner[row - trees.batch]) for row in rows]
        nodes = [ROOT if row < trees.batch else row - trees.batch for row in rows]
        return [world.target(o, tokens_to(trees, n)) for o, n in zip(owners, nodes, strict=True)]

    ours = accept(trees, sample)
    batch, width = built.tokens.shape
    target = torch.tensor(
        [[world.target(o, path) for path in paths] for o, paths in enumerate(built.paths)]
    )
    predict = torch.zeros(batch * width, dtype=torch.int32)
    index = torch.full((batch, steps + 1), -1, dtype=torch.int32)
    count = torch.empty(batch, dtype=torch.int32)
    sglang.verify(
        predict,
        index,
        count,
        torch.tensor(built.tokens),
        built.index,
        built.next_token,
        built.next_sibling,
        target,
    )
    for owner in range(batch):
        rows = index[owner, : int(count[owner]) + 1].tolist()
        assert int(count[owner]) == len(ours.path[owner])
        assert [built.paths[owner][row - owner * width] for row in rows[1:]] == [
            tokens_to(trees, node) for node in ours.path[owner]
        ]
        assert predict[rows].tolist() == ours.emitted[owner]
        assert index[owner, len(rows) :].tolist() == [-1] * (steps + 1 - len(rows))
    return sum(map(len, ours.path))


@pytest.mark.parametrize(
    ("topk", "steps", "nodes"),
    [(1, 4, 4), (2, 2, 3), (2, 5, 9), (4, 1, 4), (4, 3, 11), (4, 6, 24), (8, 5, 40)],
)
def test_a_tier_is_the_tree_that_our_core_chooses(
    sglang, topk: int, steps: int, nodes: int
) -> None:
    accepted = 0
    for seed in range(2):
        world = World(seed, batch=3)
        policy = Eagle2(depth=steps - 1, top_k=topk, total_tokens=nodes + 1)
        rule, drafted = candidates(world, policy, topk)
        trees = drafted.take(rule.select(drafted))
        built = sglang_tree(sglang, world, topk, steps, nodes)
        assert_same_tree(trees, built)
        accepted += assert_same_walk(sglang, world, trees, built, steps)
    assert accepted > 1
