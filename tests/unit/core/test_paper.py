"""The published rule: golden values computed by hand, and mutants of the rule that must fail them.

Each golden check takes the classes that it checks, so that a mutant (the module's source with one
expression exchanged, executed in memory) goes through the same arithmetic as the rule itself.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest

from smart_decoding.core import selection
from smart_decoding.core.batch import BatchState
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import paper
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.tree import ROOT, DraftTrees

# (owner, parent, draft_prob): nodes in the order in which they are drafted.
Nodes = Sequence[tuple[int, int, float]]


def grown(nodes: Nodes) -> DraftTrees:
    trees = DraftTrees.empty(1 + max(owner for owner, _, _ in nodes))
    for i, (owner, parent, prob) in enumerate(nodes):
        trees.append([owner], [100 + i], [parent], [prob])
    return trees


def kept(rule, nodes: Nodes) -> list[int]:
    """What the rule verifies; each level's frontier must be the kept nodes of that level."""
    trees = grown(nodes)
    limits = np.full(trees.batch, 9)
    tree_rule = TreeRule(9, 8, limits, np.zeros(0, np.int64), rule, rule)
    selected = tree_rule.select(trees)
    for level in range(1, int(trees.depth.max()) + 1):
        frontier = tree_rule.frontier(trees, level)
        assert frontier.tolist() == selected[trees.depth[selected] == level].tolist()
    return selected.tolist()


def costs(spent: Sequence[float], step: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """C_spec of 0, 1, ... nodes, and the same derivative everywhere."""
    return np.array(spent, np.float64), np.full(len(spent), step)


# --- the inequality ---


def check_inequality(rule: type) -> None:
    """alpha dL / dC > L / C at an empty tree: L = 1, one path, dL = p.

    alpha = 0.5, C(0) = 4, dC(1) = 1: kept iff 0.5 p / 1 > 1 / 4, p > 0.5."""
    spent, step = costs([4.0, 5.0])
    assert kept(rule(0.5, spent, step), [(0, ROOT, 0.51)]) == [0]
    assert kept(rule(0.5, spent, step), [(0, ROOT, 0.5)]) == []  # equal is not more
    assert kept(rule(0.5, spent, step), [(0, ROOT, 0.49)]) == []


def check_second_of_a_chain(rule: type) -> None:
    """One node kept, p = 0.8: L = 1.8. Its child, 0.5 of it: dL = 0.8 * 0.5 = 0.4, still one path.

    alpha = 1, dC(2) = 1: kept iff 0.4 > 1.8 / C(1), C(1) > 4.5. C(0) = 10 keeps the first:
    0.8 > 0.1."""
    nodes = [(0, ROOT, 0.8), (0, 0, 0.5)]
    assert kept(rule(1.0, *costs([10.0, 4.51, 9.0])), nodes) == [0, 1]
    assert kept(rule(1.0, *costs([10.0, 4.49, 9.0])), nodes) == [0]


def check_derivative_of_the_next_size(rule: type) -> None:
    """dC is taken with the candidate: at n + 1 = 1, where it is 3, not at 0, where it is 1.

    alpha = 1, C(0) = 4, p = 0.7: 0.7 / 3 = 0.23 < 1 / 4."""
    rejecting = rule(1.0, np.array([4.0, 5.0]), np.array([1.0, 3.0]))
    keeping = rule(1.0, np.array([4.0, 5.0]), np.array([3.0, 1.0]))
    assert kept(rejecting, [(0, ROOT, 0.7)]) == []
    assert kept(keeping, [(0, ROOT, 0.7)]) == [0]


def check_first_candidate_is_free(rule: type) -> None:
    """C(0) = 0 through the origin: the first candidate is kept, whatever it is.

    The second: one path is p = 0.1, L = 1.1; a sibling of 0.05 makes two paths, dL = 0.025.
    alpha = 1, dC = 1: 0.025 < 1.1 / 2."""
    spent, step = costs([0.0, 2.0, 3.0])
    assert kept(rule(1.0, spent, step), [(0, ROOT, 0.1), (0, ROOT, 0.05)]) == [0]


# --- L_tree ---


def check_mean_over_paths(rule: type) -> None:
    """Children a = 0.9 and b = 0.6 of the root: two paths, L = 1 + (0.9 + 0.6) / 2 = 1.75.

    c below a, 0.8: P = 0.72 on the same two paths, dL = 0.36. Kept iff 0.36 > 1.75 / C(2),
    C(2) > 4.861. (The sum over nodes would be L = 2.5, dL = 0.72: C(2) > 3.472. The running sum of
    gains would be L = 1 + 0.9 + 0.3 = 2.2: C(2) > 6.111.)"""
    nodes = [(0, ROOT, 0.9), (0, ROOT, 0.6), (0, 0, 0.8)]
    assert kept(rule(1.0, *costs([20.0, 20.0, 4.87, 20.0])), nodes) == [0, 1, 2]
    assert kept(rule(1.0, *costs([20.0, 20.0, 4.85, 20.0])), nodes) == [0, 1]


def check_mean_over_paths_when_a_path_branches(rule: type) -> None:
    """a, b, c as before: paths a-c = 0.9 + 0.72 = 1.62 and b = 0.6, L = 1 + 2.22 / 2 = 2.11.

    d below a, 0.5: P = 0.45 opens a third path, dL = 0.15. Kept iff 0.15 > 2.11 / C(3),
    C(3) > 14.067."""
    nodes = [(0, ROOT, 0.9), (0, ROOT, 0.6), (0, 0, 0.8), (0, 0, 0.5)]
    assert kept(rule(1.0, *costs([20.0, 20.0, 20.0, 14.1, 20.0])), nodes) == [0, 1, 2, 3]
    assert kept(rule(1.0, *costs([20.0, 20.0, 20.0, 14.0, 20.0])), nodes) == [0, 1, 2]


def check_mean_after_branching(rule: type) -> None:
    """a, b, c, d: paths 1.62, a-d = 0.9 + 0.45 = 1.35 and 0.6, L = 1 + 3.57 / 3 = 2.19.

    e below c, 0.5: P = 0.36 on the same three paths, dL = 0.12. Kept iff 0.12 > 2.19 / C(4),
    C(4) > 18.25."""
    nodes = [(0, ROOT, 0.9), (0, ROOT, 0.6), (0, 0, 0.8), (0, 0, 0.5), (0, 2, 0.5)]
    assert kept(rule(1.0, *costs([20.0] * 4 + [18.3, 20.0])), nodes) == [0, 1, 2, 3, 4]
    assert kept(rule(1.0, *costs([20.0] * 4 + [18.2, 20.0])), nodes) == [0, 1, 2, 3]


def check_node_sum(rule: type) -> None:
    """a, b: L = 1 + 0.9 + 0.6 = 2.5; c below a, P = 0.72 = dL. Kept iff 0.72 > 2.5 / C(2),
    C(2) > 3.472."""
    nodes = [(0, ROOT, 0.9), (0, ROOT, 0.6), (0, 0, 0.8)]
    assert kept(rule(1.0, *costs([20.0, 20.0, 3.48, 20.0]), False), nodes) == [0, 1, 2]
    assert kept(rule(1.0, *costs([20.0, 20.0, 3.46, 20.0]), False), nodes) == [0, 1]


# --- order and budget ---


def check_most_probable_first(rule: type) -> None:
    """Room for one of two siblings: the likelier one, drafted last."""
    assert kept(rule(1.0, *costs([9.0, 9.0])), [(0, ROOT, 0.3), (0, ROOT, 0.6)]) == [1]


def check_level_by_level(rule: type) -> None:
    """Room for two: both of the first level, though c below a is likelier (0.81) than b (0.3)."""
    nodes = [(0, ROOT, 0.9), (0, ROOT, 0.3), (0, 0, 0.9)]
    assert kept(rule(1.0, *costs([20.0, 20.0, 20.0])), nodes) == [0, 1]


def check_only_below_a_kept_parent(rule: type) -> None:
    """a = 0.6 is kept: 0.6 > 1 / C(0) = 0.2. b = 0.3 is not: dL = 0.15 < 1.6 / C(1) = 0.178.

    b's child has P = 0.3, and as a node that extends a path dL = 0.3 > 0.178: it would pay, but its
    parent is not there."""
    nodes = [(0, ROOT, 0.6), (0, ROOT, 0.3), (0, 1, 1.0)]
    assert kept(rule(1.0, *costs([5.0, 9.0, 9.0])), nodes) == [0]


def check_requests_are_apart(rule: type) -> None:
    """The second request begins anew: L = 1 and no node, whatever the first one keeps.

    alpha = 1, C(0) = 4: p > 0.25. C(1) = 2: a second node would need dL > 1.5 / 2 at p = 0.5."""
    nodes = [(0, ROOT, 0.5), (1, ROOT, 0.5), (0, ROOT, 0.4), (1, ROOT, 0.2)]
    assert kept(rule(1.0, *costs([4.0, 2.0, 2.0])), nodes) == [0, 1]


# Flat costs but for a trifle, so that the budget alone decides.
CHEAP = CostModel.from_table({1: {1: 1.0, 2000: 1.001}}, {1: 1e-6, 2000: 2e-6})


def batch_of(size: int) -> BatchState:
    return BatchState(np.full(size, 50), np.full(size, 20), np.zeros(size), np.ones(size, bool))


def check_even_budget(policy: type) -> None:
    """8 nodes over 1, 2, 3 and 9 requests: 8, 4, 2 and 1 (at least) each; also where the first
    request's nodes are far likelier than all others'."""
    for size, share in ((1, 8), (2, 4), (3, 2), (9, 1)):
        nodes = [
            (owner, ROOT, 0.12 if owner == 0 else 0.05) for owner in range(size) for _ in range(8)
        ]
        made = policy(CHEAP, budget=8, family="offset")
        trees = grown(nodes)
        selected = made.plan(batch_of(size)).select(trees)
        assert np.bincount(trees.owner[selected], minlength=size).tolist() == [share] * size


CHECKS: list[Callable[[type], None]] = [
    check_inequality,
    check_second_of_a_chain,
    check_derivative_of_the_next_size,
    check_first_candidate_is_free,
    check_mean_over_paths,
    check_mean_over_paths_when_a_path_branches,
    check_mean_after_branching,
    check_node_sum,
    check_most_probable_first,
    check_level_by_level,
    check_only_below_a_kept_parent,
    check_requests_are_apart,
]


@pytest.mark.parametrize("check", CHECKS)
def test_the_rule(check: Callable[[type], None]) -> None:
    check(selection.MarginalRatio)


def test_the_budget_is_even() -> None:
    check_even_budget(paper.Paper)


# --- mutants ---

PAYS = "self.alpha * gain * spent > length * float(self.step[nodes + 1])"
FULL = "nodes >= len(self.spent) - 1 or parent not in tree.down"
MUTANTS = {
    "keep one": (FULL, f"nodes >= 1 or {FULL}"),
    "keep all": (PAYS, "True"),
    "keep none": (PAYS, "False"),
    "flipped sign": (PAYS, PAYS.replace(">", "<")),
    "equal is enough": (PAYS, PAYS.replace(">", ">=")),
    "no alpha": (PAYS, PAYS.replace("self.alpha * ", "")),
    "derivative before the candidate": (PAYS, PAYS.replace("nodes + 1", "nodes")),
    "ratio of an empty tree": (PAYS, PAYS.replace("length * ", "")),
    "child of a rejected parent": (FULL, "nodes >= len(self.spent) - 1"),
    "no budget": (FULL, "nodes >= len(self.spent) - 2 and parent not in tree.down"),
    "sum for the mean over paths": ("self.path_sum / max(self.paths, 1)", "self.node_sum"),
    "gain not shared by paths": ("path_prob / tree.paths_with(parent) if", "path_prob if"),
    "every node a path": ("return self.paths + (not extends_leaf)", "return self.paths + 1"),
    "a branch forgets its beginning": (
        "self.path_sum += self.down[node] if",
        "self.path_sum += path_prob if",
    ),
    "node sum a mean": ("tree.mean_length() if", "tree.mean_length() if True or"),
    "least probable first": (
        "-trees.accept_prob[useful], trees",
        "trees.accept_prob[useful], trees",
    ),
    "not level by level": (", trees.depth[useful]))", "))"),
    "first candidate tested": ("if spent == 0:", "if spent < 0:"),
}
UNEVEN = {
    "each has the whole budget": ("self.budget // batch.size", "self.budget"),
    "rounded up": ("self.budget // batch.size", "-(-self.budget // batch.size)"),
    "nothing for a large batch": ("max(1, self.budget // batch.size)", "self.budget // batch.size"),
}


def mutated(module: ModuleType, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module with one expression of its source exchanged."""
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"not once in {module.__name__}: {old}"
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)  # dataclasses look their module up
    exec(compile(source.replace(old, new), "mutant", "exec"), mutant.__dict__)
    return mutant


def failures(checks: Sequence[Callable[[type], None]], subject: type) -> list[str]:
    """The checks that a class does not pass."""
    failed = []
    for check in checks:
        try:
            check(subject)
        except (AssertionError, KeyError, IndexError, ZeroDivisionError):
            failed.append(check.__name__)
    return failed


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_rule_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutated(selection, *MUTANTS[name], monkeypatch)
    assert failures(CHECKS, mutant.MarginalRatio)


@pytest.mark.parametrize("name", UNEVEN)
def test_mutants_of_the_budget_fail(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutated(paper, *UNEVEN[name], monkeypatch)
    assert failures([check_even_budget], mutant.Paper)


def test_an_unchanged_copy_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = mutated(selection, PAYS, PAYS, monkeypatch)
    assert failures(CHECKS, copy.MarginalRatio) == []
    copy = mutated(paper, "self.budget // batch.size", "self.budget // batch.size", monkeypatch)
    assert failures([check_even_budget], copy.Paper) == []
