"""KV pages: nothing lost or doubly used in any order of operations; cached prefixes are found by
exact content."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from smart_decoding.engine.kv import PAGE, BlockTable, OutOfPagesError, PagePool

PAGES = 7


class Tables(RuleBasedStateMachine):
    """Several requests over two-token prompts, so that prefixes are often equal; `content` models
    the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES, prefix_caching=True)
        self.content = np.full(PAGES * PAGE, -1)
        self.tables: list[tuple[BlockTable, list[int]]] = []

    def pick(self, at: int) -> tuple[BlockTable, list[int]]:
        return self.tables[at % len(self.tables)]

    @rule(pages=st.lists(st.integers(0, 1), min_size=1, max_size=5), rest=st.integers(1, PAGE))
    def begin(self, pages: list[int], rest: int) -> None:
        tokens = [t for page in pages for t in [page] * PAGE] + [0] * rest
        table = BlockTable(self.pool)
        found = table.reuse(tokens)
        assert found == table.length
        assert found % PAGE == 0
        assert found < len(tokens)
        self.tables.append((table, tokens))

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99), rows=st.integers(1, 40), used=st.integers(1, 40))
    def grow(self, at: int, rows: int, used: int) -> None:
        table, tokens = self.pick(at)
        before = (list(table.pages), table.length)
        try:
            slots = table.reserve(rows)
        except OutOfPagesError:
            assert (table.pages, table.length) == before
            assert self.pool.available < -(-(table.length + rows) // PAGE) - len(table.pages)
            return
        assert len(slots) == rows == len(set(slots))
        assert slots == [
            table.pages[p // PAGE] * PAGE + p % PAGE for p in range(before[1], before[1] + rows)
        ]
        used = min(used, rows)
        tokens.extend([1] * max(0, table.length + used + 1 - len(tokens)))
        self.content[slots] = -1  # rejected nodes leave rubbish
        self.content[slots[:used]] = tokens[table.length : table.length + used]
        table.commit(tokens, table.length + used)
        assert len(table.pages) == -(-table.length // PAGE)

    @precondition(lambda self: self.tables)
    @rule(at=st.integers(0, 99))
    def end(self, at: int) -> None:
        table, _ = self.tables.pop(at % len(self.tables))
        table.release()
        assert (table.pages, table.length) == ([], 0)

    @invariant()
    def memory_is_sound(self) -> None:
        self.pool.check_integrity(table for table, _ in self.tables)
        for table, tokens in self.tables:
            slots = [table.pages[p // PAGE] * PAGE + p % PAGE for p in range(table.length)]
            assert self.content[slots].tolist() == tokens[: table.length]


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def filled(pool: PagePool, tokens: list[int]) -> BlockTable:
    table = BlockTable(pool)
    start = table.reuse(tokens)
    table.reserve(len(tokens) - start)
    table.commit(tokens, len(tokens))
    return table


def test_only_full_pages_of_equal_content_and_equal_past_are_found() -> None:
    pool = PagePool(10, prefix_caching=True)
    tokens = list(range(40))
    filled(pool, tokens).release()
    assert len(pool.find(tokens, 39)) == 2
    assert len(pool.find(tokens, 32)) == 2
    assert len(pool.find(tokens, 31)) == 1  # a page counts only with all its tokens in the limit
    assert pool.find([99, *tokens[1:]], 39) == []
    assert len(pool.find([*tokens[:31], 99], 32)) == 1
    assert (
        pool.find(tokens[16:], 24) == []
    )  # the second page's tokens, but not after the first page's


def test_the_end_of_the_oldest_prefix_is_evicted_first() -> None:
    pool = PagePool(4, prefix_caching=True)
    old = [1] * 33
    new = [2] * 17
    filled(pool, old).release()  # two cached pages
    filled(pool, new).release()  # one
    pool.give(pool.take(2))  # takes the free one and evicts one
    assert [BlockTable(pool).reuse(new)] == [16]
    table = BlockTable(pool)
    assert table.reuse(old) == 16
    with pytest.raises(OutOfPagesError):
        table.reserve(3 * PAGE)


def together(pool: PagePool, *prompts: list[int]) -> list[BlockTable]:
    """Requests that are admitted before any of them has computed anything."""
    tables = [BlockTable(pool) for _ in prompts]
    for table, tokens in zip(tables, prompts, strict=True):
        assert table.reuse(tokens) == 0
        table.reserve(len(tokens))
    for table, tokens in zip(tables, prompts, strict=True):
        table.commit(tokens, len(tokens))
    return tables


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_follows_a_prefix_that_another_request_computed_too_is_found(
    order: tuple[int, int],
) -> None:
    """Whichever of them ends first. The prefix is kept once."""
    pool = PagePool(12, prefix_caching=True)
    prompts = [[*range(32), *[end] * 20] for end in (50, 60)]
    tables = together(pool, *prompts)
    for i in order:
        for tokens in prompts:
            found = pool.find(tokens, 51)
            assert len(found) == 3
            pool.give(found)
        tables[i].release()
        pool.check_integrity(tables)
    assert len(pool._idle) == 4
    assert [len(pool.find(tokens, 51)) for tokens in prompts] == [3, 3]


def test_a_page_that_is_held_outlives_an_idle_one_of_the_same_content() -> None:
    """Else the idle one, which is older, would be evicted before what the other's request has put
    behind it."""
    pool = PagePool(6, prefix_caching=True)
    tokens = list(range(48))
    late = BlockTable(pool)
    late.reserve(48)
    filled(pool, tokens[:33]).release()
    late.commit(tokens, 48)
    pool.check_integrity([late])
    pool.give(pool.take(3))  # all others
    assert len(pool.find(tokens, 48)) == 3


def test_borrowed_pages_do_not_count_as_used_memory() -> None:
    """`/metrics` reported a full memory while costs were measured."""
    pool = PagePool(6, prefix_caching=True)
    table = filled(pool, list(range(33)))
    borrowed = pool.borrow(pool.available)
    assert len(borrowed) == 3
    assert pool.used == 0.5
    pool.check_integrity([table])
    with pytest.raises(OutOfPagesError):
        pool.take(1)
    table.release()
    assert pool.used == 0
    pool.put_back(borrowed)
    pool.check_integrity([])
    assert pool.available == pool.pages


def test_integrity_notices_a_lost_page_and_a_double_use() -> None:
    pool = PagePool(3)
    table = filled(pool, [1] * 20)
    other = BlockTable(pool)
    other.pages = list(table.pages)
    with pytest.raises(AssertionError):
        pool.check_integrity([table, other])
    with pytest.raises(AssertionError):
        pool.check_integrity([])
    pool._free.append(table.pages[0])
    with pytest.raises(AssertionError):
        pool.check_integrity([table])
