"""KV memory: pages of 16 positions, shared by reference, and one block table per request.

The pool is bounded: reserve() fails when the pool is empty, and the scheduler then makes room.
Pages of finished requests stay findable by content (prefix caching) until their memory is needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int32]
# The preceding page's content id, and this page's tokens and content hashes.
Key: TypeAlias = tuple[int, bytes]
# Index of a request's page -> hash of the pictures in it.
ContentHashes: TypeAlias = Mapping[int, bytes]

PAGE = 16
NO_STATE = -1
_ROOT_CONTENT = 0
_NO_HASHES: ContentHashes = {}


class OutOfPagesError(Exception):
    """The pool is empty: internal, the scheduler catches it and preempts."""


class PagePool:
    """Pages 0 .. pages-1 with reference counts, and the index of cached content. states: requests
    whose recurrent states there is room for, 0: the model has none. snapshots: room for copies of
    states, behind them. Of a model with states, pages are found up to one that has a snapshot."""

    def __init__(
        self, pages: int, prefix_caching: bool = False, states: int = 0, snapshots: int = 0
    ) -> None:
        self.pages = pages
        self.prefix_caching = prefix_caching
        self._free = list(range(pages - 1, -1, -1))
        self._references = np.zeros(pages, np.int32)
        # The first page is found; requests that ran at once hold the others.
        self._pages_of: dict[Key, list[int]] = {}
        self._key_of: dict[int, Key] = {}
        # page -> content id, never used again: a key always means the same tokens
        self._content: dict[int, int] = {}
        self._next_content = _ROOT_CONTENT + 1
        # cached pages that no request holds, oldest first
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._borrowed: set[int] = set()
        self._states = states
        self._free_states = list(range(states - 1, -1, -1))
        self._places = range(states, states + snapshots)
        self._free_places = list(self._places)
        # content id of a page -> place of the state behind it, the one used last at the end
        self._snapshots: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def of(cls, pages: Sequence[int]) -> PagePool:
        """Return a pool of pages that were taken from another one, without cached content."""
        pool = cls(max(pages) + 1)
        pool._free = list(pages)
        return pool

    @property
    def available(self) -> int:
        """Pages that can be taken, cached idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def available_states(self) -> int:
        """Places of recurrent states that can be taken."""
        return len(self._free_states)

    @property
    def used(self) -> float:
        """The share of pages that requests hold, in [0, 1]. Safe to read from other threads."""
        return np.count_nonzero(self._references) / self.pages

    def admits(self, pages: int) -> bool:
        """Return whether one more request with so many pages has room."""
        return pages <= self.available and (not self._states or bool(self._free_states))

    def take_state(self) -> int:
        """Return a place for a request's recurrent state; NO_STATE if the model has none. Raises
        OutOfPagesError."""
        if not self._states:
            return NO_STATE
        if not self._free_states:
            raise OutOfPagesError
        return self._free_states.pop()

    def give_state(self, state: int) -> None:
        """Take back what `take_state` gave."""
        if state != NO_STATE:
            self._free_states.append(state)

    @property
    def keeps_snapshots(self) -> bool:
        """Whether states are copied for prompts that begin alike."""
        return self.prefix_caching and bool(self._places)

    def take_snapshot(self, page: int, instead: int | None = None) -> int:
        """Return a place for a copy of the state behind this page: that of the copy behind the page
        `instead`, a free one, or that of the copy that was unused for the longest time. NO_STATE if
        there is one already, or nobody can find the page."""
        content = self._content.get(page)
        if not self.keeps_snapshots or content is None or content in self._snapshots:
            return NO_STATE
        before = None if instead is None else self._content.get(instead)
        if before is not None and before in self._snapshots:
            place = self._snapshots.pop(before)
        elif self._free_places:
            place = self._free_places.pop()
        else:
            _, place = self._snapshots.popitem(last=False)
        self._snapshots[content] = place
        return place

    def snapshot_behind(self, page: int) -> int:
        """Return the place of the state behind a page that `find` returned last; NO_STATE if the
        model has none."""
        if not self._states:
            return NO_STATE
        content = self._content[page]
        self._snapshots.move_to_end(content)
        return self._snapshots[content]

    def take(self, count: int) -> list[int]:
        """Take `count` pages of arbitrary content. Raises OutOfPagesError, taking none."""
        pages = self._pop(count)
        self._references[pages] += 1
        return pages

    def borrow(self, count: int) -> list[int]:
        """Take pages for work between rounds, not for a request, until `put_back`. Raises
        OutOfPagesError, taking none."""
        pages = self._pop(count)
        self._borrowed.update(pages)
        return pages

    def put_back(self, pages: Iterable[int]) -> None:
        """Free borrowed pages."""
        self._borrowed.difference_update(pages)
        self._free.extend(pages)

    def give(self, pages: Iterable[int]) -> None:
        """Drop one reference to each page."""
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of and len(self._pages_of[self._key_of[page]]) == 1:
                    self._idle[page] = None
                else:
                    self._drop(page)

    def find(
        self, tokens: Sequence[int], limit: int, content_hashes: ContentHashes = _NO_HASHES
    ) -> list[int]:
        """Return cached pages of the first tokens of `tokens`, at most `limit`, each with a new
        reference."""
        found: list[int] = []
        if not self.prefix_caching:
            return found
        content = _ROOT_CONTENT
        for start in range(0, limit - PAGE + 1, PAGE):
            content_hash = content_hashes.get(start // PAGE, b"")
            key = (content, _bytes(tokens[start : start + PAGE]) + content_hash)
            if key not in self._pages_of:
                break
            page = self._pages_of[key][0]
            content = self._content[page]
            found.append(page)
        while self._states and found and self._content[found[-1]] not in self._snapshots:
            found.pop()
        for page in found:
            self._references[page] += 1
            self._idle.pop(page, None)
        return found

    def remember(
        self, page: int, before: int | None, tokens: Sequence[int], content_hash: bytes = b""
    ) -> None:
        """Make a full page findable; `before` is the request's preceding page, which must be
        findable itself."""
        if not self.prefix_caching or page in self._key_of:
            return
        content = _ROOT_CONTENT if before is None else self._content.get(before)
        if content is None:
            return
        key = (content, _bytes(tokens) + content_hash)
        same = self._pages_of.setdefault(key, [])
        if same:  # equal content has one id, so its following pages are found through either page
            self._content[page] = self._content[same[0]]
        else:
            self._content[page] = self._next_content
            self._next_content += 1
        same.append(page)
        self._key_of[page] = key
        if same[0] in self._idle:  # the new page stays longer
            del self._idle[same[0]]
            self._drop(same[0])

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise AssertionError unless every page is free, idle, or held exactly as often as the
        tables say."""
        held = np.zeros(self.pages, np.int32)
        states = list(self._free_states)
        for table in tables:
            states += [] if table.state == NO_STATE else [table.state]
            for page in table.pages:
                held[page] += 1
        assert sorted(states) == [*range(self._states)], "a state is lost, or doubly used"
        places = sorted([*self._free_places, *self._snapshots.values()])
        assert places == [*self._places], "a snapshot is lost, or doubly used"
        assert self._snapshots.keys() <= set(self._content.values()), "a snapshot has no page"
        assert (held == self._references).all(), "reference counts differ from the block tables"
        free = set(self._free) | set(self._idle)
        assert len(free) == self.available, "a page is listed as free twice"
        unheld = set(np.flatnonzero(held == 0).tolist())
        assert free | self._borrowed == unheld, "a page is lost, or free and held"
        listed = {page: key for key, pages in self._pages_of.items() for page in pages}
        assert listed == self._key_of, "the index of content is not sound"
        assert listed.keys() == self._content.keys(), "the index of content is not sound"
        assert listed.keys().isdisjoint(self._free), "a page is free and cached"
        for page in self._idle:
            assert self._pages_of[listed[page]] == [page], (
                "an idle page has the content of another page"
            )

    def _pop(self, count: int) -> list[int]:
        if count > self.available:
            raise OutOfPagesError
        return [self._free.pop() if self._free else self._evict() for _ in range(count)]

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._forget(page)
        return page

    def _drop(self, page: int) -> None:
        """Free a page that no request holds."""
        if page in self._key_of:
            self._forget(page)
        self._free.append(page)

    def _forget(self, page: int) -> None:
        """Take a page's content out of the index."""
        key = self._key_of.pop(page)
        content = self._content.pop(page)
        self._pages_of[key].remove(page)
        if not self._pages_of[key]:
            del self._pages_of[key]
            if content in self._snapshots:
                self._free_places.append(self._snapshots.pop(content))


class BlockTable:
    """One request's pages; `length` positions of them are committed. state: where its recurrent
    state at that length lies. origin: where a state lies that must be copied there first."""

    def __init__(self, pool: PagePool, content_hashes: ContentHashes = _NO_HASHES) -> None:
        self._pool = pool
        self.content_hashes = content_hashes
        self.pages: list[int] = []
        self.length = 0
        self.state = NO_STATE
        self.origin = NO_STATE
        self.copied = 0  # positions whose state was copied last
        self._remembered = 0  # pages already offered to the prefix cache
        self._lay_out()

    def _lay_out(self) -> None:
        self._array: Ints = np.array(self.pages, np.int32)
        self.address = self._array.ctypes.data  # where `array` lies, for native code

    @property
    def array(self) -> Ints:
        """[pages] the page numbers, to be read only."""
        return self._array[: len(self.pages)]

    def reuse(self, tokens: Sequence[int]) -> int:
        """Start from cached pages, leaving at least one token to compute. Return the positions
        found."""
        assert not self.pages
        self.pages = self._pool.find(tokens, len(tokens) - 1, self.content_hashes)
        self._lay_out()
        if self.pages:
            self.origin = self._pool.snapshot_behind(self.pages[-1])
        self.length = self.copied = len(self.pages) * PAGE
        self._remembered = len(self.pages)
        return self.length

    def cover(self, rows: int) -> None:
        """Take the missing pages of the positions length, length + 1, ... length + rows - 1, and a
        place for a recurrent state. Raises OutOfPagesError, taking no page."""
        if self.state == NO_STATE:
            self.state = self._pool.take_state()
        missing = (self.length + rows + PAGE - 1) // PAGE - len(self.pages)
        if missing > 0:
            self.pages.extend(self._pool.take(missing))
            self._lay_out()

    def reserve(self, rows: int) -> list[int]:
        """Return slots [rows] of the positions length, length + 1, ... Raises OutOfPagesError,
        changing nothing."""
        self.cover(rows)
        pages = self.pages
        return [pages[t // PAGE] * PAGE + t % PAGE for t in range(self.length, self.length + rows)]

    def commit(self, tokens: Sequence[int], length: int) -> None:
        """Note that the first `length` positions hold the keys of tokens[:length], and give pages
        beyond them back."""
        self.length = length
        needed = (length + PAGE - 1) // PAGE
        if needed < len(self.pages):
            self._pool.give(self.pages[needed:])
            del self.pages[needed:]
        if self._pool.prefix_caching:
            for i in range(self._remembered, length // PAGE):
                before = self.pages[i - 1] if i else None
                content = tokens[i * PAGE : (i + 1) * PAGE]
                content_hash = self.content_hashes.get(i, b"")
                self._pool.remember(self.pages[i], before, content, content_hash)
            self._remembered = length // PAGE

    def take_snapshot(self, end: int, replaces: bool = False) -> int:
        """Return the place for a copy of the state behind `end` positions, whole pages; see the
        pool's. replaces: the last copy of this request makes way."""
        last = self.pages[self.copied // PAGE - 1] if replaces and self.copied else None
        place = self._pool.take_snapshot(self.pages[end // PAGE - 1], last)
        self.copied = end
        return place

    def release(self) -> None:
        """Give all pages back, last first: without its beginning, a cached prefix could never be
        found."""
        self._pool.give(reversed(self.pages))
        self._pool.give_state(self.state)
        self.state = NO_STATE
        self.origin = NO_STATE
        self.copied = 0
        self.pages = []
        self.length = 0
        self._remembered = 0


def _bytes(tokens: Sequence[int]) -> bytes:
    return np.asarray(tokens, np.int32).tobytes()
