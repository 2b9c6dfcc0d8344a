"""`build_rows`, and the forms that backends read, against a plain reading of their definition."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.kv import PAGE, BlockTable, PagePool
from smart_decoding.engine.rows import RowLayout, Rows, Span, build_rows
from smart_decoding.models.torch.rows import GroupedRows, device_rows

from .fake_target import visible_slots


def random_trees(rng: np.random.Generator, batch: int) -> DraftTrees:
    """Nodes of all requests in mixed order, parents first."""
    trees = DraftTrees.empty(batch)
    for _ in range(int(rng.integers(0, 14)) if batch else 0):
        owner = int(rng.integers(batch))
        parent = int(rng.choice([ROOT, *trees.nodes_of(owner)]))
        trees.append([owner], [int(rng.integers(50))], [parent], [0.5])
    return trees


def random_batch(seed: int) -> tuple[list[Span], DraftTrees, list[bool], list[list[int]], PagePool]:
    rng = np.random.default_rng(seed)
    pool = PagePool(60)
    pool._free = rng.permutation(60).tolist()
    decoding = int(rng.integers(0, 4))
    prompts = int(rng.integers(0, 3))
    prompts += decoding + prompts == 0
    trees = random_trees(rng, decoding)
    spans = []
    slots = []
    for i in range(decoding + prompts):
        table = BlockTable(pool)
        start = int(rng.integers(0, 40))
        count = 1 if i < decoding else int(rng.integers(1, 20))
        if start:
            table.reserve(start)
            table.commit([0] * start, start)
        own = table.reserve(count + len(trees.nodes_of(i)))
        spans.append(
            Span(rng.integers(0, 50, count).tolist(), start, own, np.array(table.pages, np.int32))
        )
        slots.append([page * PAGE + j for page in table.pages for j in range(PAGE)])
    return (
        spans,
        trees,
        [i < decoding or bool(rng.random() < 0.5) for i in range(len(spans))],
        slots,
        pool,
    )


def check_best_chain(layout: RowLayout, trees: DraftTrees, owner: int) -> None:
    """The first child of the first child of ... follows the root."""
    nodes = trees.nodes_of(owner)
    best = []
    below = nodes[trees.parent[nodes] == -1]
    while len(below):
        best.append(layout.node_row[below[0]])
        below = nodes[trees.parent[nodes] == below[0]]
    root = layout.last[owner]
    assert best == [root + depth for depth in range(1, len(best) + 1)]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
def test_every_row_has_its_token_position_slot_and_reads_its_past(seed: int) -> None:
    spans, trees, want, slots, _ = random_batch(seed)
    layout = build_rows(spans, trees, want)
    rows, last, at = layout
    node_row = np.array(at, np.int64)
    committed = [last[i] - k for i, span in enumerate(spans) for k in range(len(span.tokens))]
    assert list(range(len(rows))) == sorted(committed + at)
    for i, span in enumerate(spans):
        first = int(last[i]) - len(span.tokens) + 1
        assert rows.query_start_loc[i] == first
        for k, token in enumerate(span.tokens):
            position = span.start + k
            assert (rows.token[first + k], rows.position[first + k]) == (token, position)
            assert rows.slot_mapping[first + k] == slots[i][position]
            assert visible_slots(rows, first + k).tolist() == slots[i][: position + 1]
        nodes = trees.nodes_of(i)
        assert rows.query_start_loc[i + 1] == first + len(span.tokens) + len(nodes)
        assert sorted(node_row[nodes].tolist()) == list(
            range(last[i] + 1, last[i] + 1 + len(nodes))
        )
        check_best_chain(layout, trees, i)
        for node in nodes:
            row = int(node_row[node])
            path = trees.path(int(node))
            assert rows.token[row] == trees.token[node]
            assert rows.position[row] == span.start + trees.depth[node]
            assert rows.slot_mapping[row] == slots[i][span.start + row - last[i]]
            visible = slots[i][: span.start + 1]
            visible += [int(rows.slot_mapping[node_row[n]]) for n in path]
            assert visible_slots(rows, row).tolist() == visible
    expected = [int(last[i]) for i in range(len(spans)) if want[i]] + node_row.tolist()
    if rows.logit_rows is None:
        assert sorted(expected) == list(range(len(rows)))
    else:
        assert rows.logit_rows.tolist() == expected


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_plain_torch_is_shown_the_same_slots(seed: int) -> None:
    spans, trees, want, _, _ = random_batch(seed)
    rows: Rows = build_rows(spans, trees, want)[0]
    compared = 0
    for part, (page, offset), behind in GroupedRows(rows, torch.device("cpu")).groups:
        slots = page * PAGE + offset
        for row, distance in zip(range(len(rows))[part], behind, strict=True):
            visible = visible_slots(rows, row).tolist()
            order = distance.argsort(descending=True)[-len(visible) :]  # from the farthest on
            assert slots[order].tolist() == visible
            assert distance[order].tolist() == list(range(len(visible)))[::-1]
            assert (distance != GroupedRows.NOTHING).sum() == len(visible)
            compared += 1
    assert compared == len(rows)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_kernels_on_a_gpu_are_shown_the_same_slots(seed: int) -> None:
    """As they read `meta`: tile by tile."""
    spans, trees, want, _, _ = random_batch(seed)
    rows: Rows = build_rows(spans, trees, want)[0]
    there = device_rows(rows, torch.device("cpu"))
    meta = there.meta.numpy()
    slot, context, begin, end = meta[: 4 * there.size].reshape(4, there.size)
    first, count, table = meta[4 * there.size :][: 3 * there.tiles].reshape(3, there.tiles)
    assert (slot[len(rows) :] == -1).all()
    read = [row for i in range(there.tiles) for row in range(first[i], first[i] + count[i])]
    assert sorted(read) == list(range(len(rows)))
    for i in range(there.tiles):
        for row in range(first[i], first[i] + count[i]):
            at = np.arange(context[row])
            slots = (meta[table[i] + at // PAGE] * PAGE + at % PAGE).tolist()
            slots += meta[begin[row] : end[row]].tolist()
            assert slots == visible_slots(rows, row).tolist()
            assert slot[row] == rows.slot_mapping[row]
    assert there.token.tolist() == rows.token.tolist()
    assert there.position.tolist() == rows.position.tolist()
    expected = [] if rows.logit_rows is None else rows.logit_rows.tolist()
    assert there.logit_rows.tolist() == expected
