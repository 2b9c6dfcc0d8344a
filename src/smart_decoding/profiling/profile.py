"""The costs of an engine's forwards on this machine: stored, or measured while nobody asks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from smart_decoding.core.costs import (
    DEFAULT_DRAFT,
    DEFAULT_VERIFY,
    FURTHER_ROW,
    LEVEL,
    SMALLEST,
    CostModel,
    Curve,
    Sample,
)
from smart_decoding.errors import ModelError
from smart_decoding.profiling import measure
from smart_decoding.profiling.cache import load_profile, profile_path, save_profile
from smart_decoding.profiling.fit import fit_costs
from smart_decoding.profiling.measure import ForwardTimer, largest_batch, longest_context

if TYPE_CHECKING:
    from smart_decoding.drafters.levels import LevelDrafter
    from smart_decoding.engine.kv import PagePool
    from smart_decoding.models.target import TorchTarget

log = logging.getLogger("smart.profile")

ROUND_OVERHEAD = 4e-4  # seconds that drafting adds beyond its forwards, until real rounds tell

# On most GPUs rows of one request cost little. With that guess rounds of many requests would be two
# or three times too long on some, so until costs are measured these are not drafted for.
GUESS = CostModel(DEFAULT_VERIFY | {2: Curve((2, 4), (SMALLEST, 2 * SMALLEST))}, DEFAULT_DRAFT)


class Profile:
    """cost: the stored costs, else a guess, which real rounds correct until they are measured.

    known: whether they are measured, for batches as large as this engine's. pool: the engine's, of
    which steps overwrite pages that nobody holds. taken: called with the costs whenever they are
    better known. wanted: whether somebody waits for them.
    """

    def __init__(
        self,
        target: TorchTarget,
        drafter: LevelDrafter[Any] | None,
        pages: int,
        max_num_seqs: int,
        head: str,
        weights: Mapping[str, str],
    ) -> None:
        """head: what draws on the target's features; weights: the target's provenance."""
        longest = longest_context(target.max_positions, target.device)
        self._path = profile_path(weights, target.dtype, target.device, head, longest, target.steps)
        self._model = weights["model"]
        self._begin = partial(ForwardTimer, target, drafter, pages, max_num_seqs)
        aux_layers = drafter.aux_layers if drafter is not None else ()
        self._probe = partial(measure.probe, target, pages, aux_layers)
        self.pool: PagePool | None = None
        self._measurement: ForwardTimer | None = None
        stored = load_profile(self._path)
        self.cost = stored or GUESS
        self.known = stored is not None and max(stored.verify) >= largest_batch(
            pages, max_num_seqs, target.device
        )
        self.taken: Callable[[CostModel], object] = lambda cost: None
        self.wanted = False

    @property
    def share(self) -> float:
        """What is measured of all, in [0, 1]."""
        measurement = self._measurement  # the engine thread may end it meanwhile
        return float(self.known) if measurement is None else measurement.share

    @property
    def urgent(self) -> bool:
        """Whether somebody waits, or nothing is known of this machine: then several requests are
        not drafted for."""
        return self.wanted or self.cost is GUESS

    def probe(self) -> None:
        """Make the guess a better one by six forwards, on a CPU. Eight rows may cost what one does,
        or more than three times that. No row is believed to cost less than in the guess.

        To be called before there are requests."""
        if self.cost is not GUESS:
            return
        try:
            seconds = self._probe()
        except ModelError as error:  # as of numbers that are not finite: requests will tell
            log.error("costs were not probed", exc_info=error)
            return
        if not seconds:
            return
        least = {rows: seconds[1] * (1 + FURTHER_ROW * (rows - 1)) for rows in seconds}
        verify = {rows: max(each, least[rows]) for rows, each in seconds.items()}
        level = {rows: LEVEL * each for rows, each in verify.items()}
        self.cost = CostModel.from_table({1: verify}, level)
        self.taken(self.cost)

    def step(self) -> bool:
        """Measures a little; false if nothing is left to do."""
        if self.known:
            return False
        if self._measurement is None:
            self._measurement = self._begin(pool=self.pool)
        if self._measurement.step():
            return True
        self.keep(self._measurement.samples(), self._measurement.busy)
        return False

    def keep(self, samples: Sequence[Sample], busy: bool = False) -> None:
        """These are the costs from now on, and at later starts; if the machine was `busy`, at those
        of the next hour."""
        self.cost = fit_costs(samples, ROUND_OVERHEAD)
        if samples:
            save_profile(self._path, self.cost, self._model, busy)
        self.taken(self.cost)
        self.known = True
        self._measurement = None
