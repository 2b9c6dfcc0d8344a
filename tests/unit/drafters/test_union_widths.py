"""What a level costs is learned by the rows that the model ran: what free drafters propose is none
of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.kernels import ops
from smart_decoding.kernels.selection import native_selection
from smart_decoding.models.draft_model import DraftModel

from .tiny import PAGES, SCRATCH, SMALL, ask, checkpoint, engine_of, target_of

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.rows import LevelRequest, Rows


class ByLevel(DraftModelDrafter):
    """Drafts one level after another."""

    def follows(self, rule: TreeRule) -> bool:
        return False


def engine_with(scratch: int, in_one_call: bool) -> Engine:
    target = target_of()
    model = DraftModel(checkpoint(SMALL, 1), target, PAGES, scratch)
    kind = DraftModelDrafter if in_one_call else ByLevel
    drafter = UnionDrafter([kind(model, PAGES, scratch), NgramDrafter(min_n=1)])
    options = {"depth": 3, "top_k": 6, "total_tokens": 24}
    engine = engine_of(target, drafter, "eagle2", options=options)
    ask(engine, [[5, 6, 7, 5, 6, 8, 5, 6], [9, 9, 9, 9]], tokens=40)
    return engine


@pytest.mark.parametrize(
    "scratch", [SCRATCH, 1]
)  # with one page of scratch, wide levels are cut short
def test_widths_are_the_rows_that_the_model_ran(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafted level by level; a round in one call says the same of itself."""
    ran: list[int] = []
    rank = DraftModel.rank

    def counted(self: DraftModel, rows: Rows, request: LevelRequest) -> Any:
        ran.append(len(rows))
        return rank(self, rows, request)

    monkeypatch.setattr(DraftModel, "rank", counted)
    by_level, in_one_call = (engine_with(scratch, whole) for whole in (False, True))
    fewer = 0
    while by_level.has_unfinished_requests:
        ran.clear()
        by_level.step()
        widths = list(ran)
        in_one_call.step()
        assert by_level.last_round is not None
        assert in_one_call.last_round is not None
        done = by_level.last_round.round
        assert ran == done.level_widths == widths
        assert in_one_call.last_round.round.level_widths == widths
        assert len(done.level_seconds) == len(widths)
        fewer += any(width < 6 * len(done.batch.context) for width in widths[1:])
    assert fewer


def callers() -> list[str]:
    """The functions between this one's caller and `Engine.step`, the nearest first."""
    frame = sys._getframe(2)
    names: list[str] = []
    while frame.f_code.co_name != "step":
        names.append(frame.f_code.co_qualname)
        assert frame.f_back is not None
        frame = frame.f_back
    return names


class Watched:
    """A library whose drafting notes who called it, from the nearest function on."""

    def __init__(self, inner: Any, found: list[list[str]]) -> None:
        self._inner = inner
        self._found = found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def smart_draft(self, *arguments: Any) -> int:
        self._found.append(callers())
        return int(self._inner.smart_draft(*arguments))


def test_few_frames_lie_between_a_step_and_the_native_draft(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_with(SCRATCH, in_one_call=True)
    selection = native_selection()
    found: list[list[str]] = []
    monkeypatch.setattr(selection, "_library", Watched(selection._library, found))
    while engine.has_unfinished_requests:
        engine.step()
    assert found
    for names in found:
        model = ["NativeSelection.draft", "DraftModel.draft", "DraftModelDrafter._draft_round"]
        assert names == [*model, "LevelDrafter.draft", "UnionDrafter.draft", "Engine._draft"]


def test_few_frames_lie_between_a_step_and_the_native_verification(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_with(SCRATCH, in_one_call=True)
    found: list[list[str]] = []
    native = ops.verify_round

    def watched(*arguments: Any) -> bool:
        found.append(callers())
        return native(*arguments)

    monkeypatch.setattr(ops, "verify_round", watched)
    while engine.has_unfinished_requests:
        engine.step()
    assert found
    for names in found:
        assert names == ["NativeModel.verify", "TorchTarget.verify"]
