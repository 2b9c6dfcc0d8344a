"""What a level costs is learned by the rows that the model ran: a union's foreign nodes are none of
them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.models.draft_model import DraftModel

from .tiny import PAGES, SCRATCH, SMALL, ask, checkpoint, engine_of, target_of

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Rows


@pytest.mark.parametrize(
    "scratch", [SCRATCH, 1]
)  # with one page of scratch, wide levels are cut short
def test_widths_are_the_rows_that_the_model_ran(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    run = DraftModel.run

    def counted(self: DraftModel, rows: Rows) -> Any:
        ran.append(len(rows))
        return run(self, rows)

    monkeypatch.setattr(DraftModel, "run", counted)
    target = target_of()
    model = DraftModel(checkpoint(SMALL, 1), target, PAGES, scratch)
    drafter = UnionDrafter([DraftModelDrafter(model, PAGES, scratch), NgramDrafter(min_n=1)])
    engine = engine_of(
        target, drafter, "eagle2", options={"depth": 3, "top_k": 6, "total_tokens": 24}
    )
    ask(engine, [[5, 6, 7, 5, 6, 8, 5, 6], [9, 9, 9, 9]], tokens=40)
    fewer = 0
    while engine.has_unfinished_requests:
        ran.clear()
        engine.step()
        assert engine.last_round is not None
        done = engine.last_round.round
        assert list(done.level_widths) == ran
        assert len(done.level_seconds) == len(ran)
        fewer += any(width < 6 * len(done.batch.context) for width in ran[1:])
    assert fewer
