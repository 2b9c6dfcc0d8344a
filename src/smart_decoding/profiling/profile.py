"""The costs of an engine's forwards on this machine: stored, or measured while it is idle."""

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

ROUND_OVERHEAD = 4e-4  # seconds that drafting adds beyond its forwards, until rounds are observed

# On most GPUs rows of one request cost little. On some, that guess would make rounds of many
# requests two or three times too long: they get no drafts until costs are measured.
GUESS = CostModel(DEFAULT_VERIFY | {2: Curve((2, 4), (SMALLEST, 2 * SMALLEST))}, DEFAULT_DRAFT)


class Profile:
    """The costs of an engine's forwards.

    cost: the stored costs, else a guess that real rounds correct until costs are measured. known:
    whether they are measured, for batches as large as this engine's. pool: the engine's; steps
    overwrite its free pages. taken: called with the costs whenever they improve. requested: whether
    a caller waits for the measurement.
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
        """head: the shape of the drafter's model; weights: the target's provenance."""
        longest = longest_context(target.max_positions, target.device)
        self._path = profile_path(weights, target.dtype, target.device, head, longest, target.steps)
        self._model = weights["model"]
        self._experts = target.experts
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
        self.requested = False

    @property
    def share(self) -> float:
        """The share of the measurement that is done, in [0, 1]."""
        measurement = self._measurement  # the engine thread may end it meanwhile
        return float(self.known) if measurement is None else measurement.share

    @property
    def urgent(self) -> bool:
        """Whether a caller waits, or costs are still the guess, under which several requests get no
        drafts."""
        return self.requested or self.cost is GUESS

    def probe(self) -> None:
        """Improve the guess by six forwards, on a CPU: eight rows may cost as much as one row, or
        more than three times that. No row costs less than in the guess.

        Call it before there are requests."""
        if self.cost is not GUESS:
            return
        try:
            seconds = self._probe()
        except ModelError as error:  # such as numbers that are not finite: requests will raise it
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
        """Measure a little; return false if nothing is left to do."""
        if self.known:
            return False
        if self._measurement is None:
            self._measurement = self._begin(pool=self.pool)
        if self._measurement.step():
            return True
        self.keep(self._measurement.samples(), self._measurement.busy)
        return False

    def keep(self, samples: Sequence[Sample], busy: bool = False) -> None:
        """Use these costs from now on and at later starts; after a `busy` measurement, only at
        starts within an hour."""
        self.cost = fit_costs(samples, ROUND_OVERHEAD, self._experts)
        if samples:
            save_profile(self._path, self.cost, self._model, busy)
        self.taken(self.cost)
        self.known = True
        self._measurement = None
