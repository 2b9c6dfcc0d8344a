"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured
costs and calibrated probabilities. How it works: docs/controller.md."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from smart_decoding.core.calibration import KINDS, Calibration
from smart_decoding.core.choice import best_rates, best_size
from smart_decoding.core.cost import CostModel, DraftSample, VerifySample
from smart_decoding.core.forecast import Forecast, grow
from smart_decoding.core.lookahead import LookAhead
from smart_decoding.core.overhead import Overhead, about
from smart_decoding.core.policies.chooser import Chooser, Drafted, Growth, NumpyChooser
from smart_decoding.core.policies.common import TokenIds, depth_limits, require_int, require_number
from smart_decoding.core.policies.outlook import FREE_ONLY, Option, Outlook
from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, Round, merged
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.core.probing import CLEAR, RUN, Prober
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray, KindArray

WIDTHS = (1, 2, 4, 8)  # frontier nodes per drafting request that are considered
SMALL, FEW_LEVELS = (
    4,
    4,
)  # batches beyond SMALL have no room for wide or deep trees: those are not forecast
AHEAD = 3  # levels of look-ahead while drafting
KEEP_OUTLOOK = 64  # rounds that forecasts and prices are reused for while nothing changes
MAX_OUTLOOKS = 64
MOVED = 0.03  # of plain decoding's seconds: what rests must show for forecasts to be made anew
# Rounds at most that share the price of a long catch-up, if drafting and the answers last so long.
CATCH_UP_ROUNDS = 32
# What drafting must promise over plain decoding, to begin and to go on: costs are known to a few
# per cent, not better, and each return to drafting pays for the rows that have waited.
MARGIN, STAY = 1.03, 1.0
CLEARLY = 0.9  # of plain decoding: what drafting promises where no further look is needed soon
# rounds that a batch size is drafted for, if it promises no less than that: what was measured
# decides then
TRIED = 16
# Where drafting gains less than that, a probe of plain decoding goes on for so many resting rounds:
# they are what plain decoding is, their mean is nearly free of noise, and costs at drafting's sizes
# say too little of it.
NEAR, RESTS = 1.2, 3
PROBE_SHARE = 2  # a probe must afford this part of a long catch-up
FADE = 1 / 48  # per round without drafting: what drafting fell short of counts less and less
# Beliefs are updated in one go: in every second one of the first rounds, of all and of drafting,
# later in each 32nd, at the end of a run of probes, and once the accepted nodes are SURPRISE
# standard deviations (as if Poisson) off what was expected. The seconds of verification are learned
# every eighth round: a machine's state lasts for seconds only.
BUSY_ROUNDS, BEGINNING, SELDOM, SURPRISE, OFTEN = 32, 16, 32, 2.0, 8
# Rounds of plain decoding at most without asking whether to draft: 2, 4, 8, ... as long as the
# answer is no. A bad head is drafted from until it promises no more than plain decoding, and stays
# there: asked often, it costs 1 % of the time.
REST, SHORT_REST = 64, 16


@dataclass(slots=True)
class _Scratch:
    """What one round's calls share."""

    batch: BatchState
    limits: IntArray
    kind: KindArray
    kinds: list[int]  # [KINDS] requests of each
    drafting: int  # requests that may draft
    context: float
    deepest: int  # of the limits
    outlook: Outlook | None = None
    sunk: float = 0.0  # seconds of drafting, predicted
    drafted: Drafted | None = None
    probe: bool = False
    believed: float = 0.0  # tokens per second of the believed mode
    forecast: float = 0.0  # tokens per second forecast for this round, uncorrected
    expected: float = 0.0  # sum of accept_prob of the selected nodes


class Smart:
    """The cost-aware policy.

    cost: measured costs (None: a guess that real rounds correct). calibration, forecast: stored
    priors. chooser: the choice over drafted trees, as the backend computes it (None: numpy).
    max_levels, children: the deepest tree and the proposals per node that are considered.
    max_round_slowdown: with several requests, no round is planned to last longer than this multiple
    of a plain one. probe_budget: share of the time that may go into checking the mode that is
    believed worse.
    """

    name = "smart"

    def __init__(
        self,
        cost: CostModel | None = None,
        calibration: Calibration | None = None,
        forecast: Forecast | None = None,
        max_levels: int = 8,
        children: int = 8,
        max_round_slowdown: float = 2.0,
        probe_budget: float = 0.005,
        eos_token_ids: TokenIds = (),
        chooser: Chooser | None = None,
    ) -> None:
        self.cost = cost or CostModel.default()
        self.calibration = calibration or Calibration()
        self.forecast = forecast or Forecast(self.calibration)
        self.max_levels = require_int("max_levels", max_levels, 1, 64)
        self.children = require_int("children", children, 1, 256)
        self.max_round_slowdown = require_number(
            "max_round_slowdown", max_round_slowdown, 1.0, math.inf
        )
        self.prober = Prober(require_number("probe_budget", probe_budget, 0.0, 0.5), RUN)
        self.chooser: Chooser = chooser or NumpyChooser()
        self.eos = frozenset(eos_token_ids)
        self._ends = np.array(sorted(self.eos), np.int64)
        self.statistics = Statistics()
        self._overhead = Overhead(self.cost.overhead_seconds)
        self._foresight: dict[
            int, float
        ] = {}  # by size: log of what drafting rounds reached over their forecast
        self._tried: Counter[int] = Counter()  # by size: rounds with a model's drafts
        self._outlooks: dict[tuple[object, ...], Outlook] = {}  # by the batch's shape
        self._rounds = 0
        self._drafting = False
        self._began, self._lasts = (
            0,
            float(CATCH_UP_ROUNDS),
        )  # the round that drafting began in; rounds that it lasts
        self._scratch: _Scratch | None = None
        self._unlearned: list[
            tuple[Round, KindArray]
        ] = []  # rounds that drafted, and the kinds of their requests
        self._expected = self._surprise = (
            0.0  # nodes that these should have accepted, and that they accepted less
        )
        self._rest = self._rest_size = (
            0  # rounds to go without asking, as long as the batch has about this size
        )
        self._last_rest = 1
        self._rested: list[
            tuple[int, IntArray, float]
        ] = []  # size, contexts, seconds of these rounds' verifications
        self._learned_rests: set[int] = (
            set()
        )  # sizes whose rests costs have learned from since they were looked at
        self._busy = (
            False  # whether an outlook or what was learned is in this round's `other_seconds`
        )
        self._runs = 0  # of probes

    # --- before drafting ---

    def plan(self, batch: BatchState) -> DraftPlan:
        # Requests come and go: up to an eighth fewer or a quarter more are about the same batch.
        if self._rest and 7 * self._rest_size <= 8 * batch.size <= 10 * self._rest_size:
            self._rest -= 1
            self._scratch = None
            self._fade(batch.size)
            return OFF
        self._rest = 0
        self._learn_rests()
        scratch = self._scratch = self._open(batch)
        if not scratch.drafting or not (batch.has_model or batch.has_free):
            return OFF
        outlook = scratch.outlook = self._current_outlook(batch, scratch)
        believed = option = outlook.best(STAY if self._drafting else MARGIN) or self._trial(
            batch, outlook
        )
        scratch.believed = outlook.value(believed)
        if (believed is not None) != self._drafting:
            self._change_mode(believed is not None)
        self.prober.unlikely = believed is None and outlook.promise < CLEARLY
        if not self.prober.waits:
            other = self._probe(outlook, believed)
            price = outlook.price(other, believed) + self._catch_up(batch, scratch, other)
            near = outlook.promise < NEAR or not self._overhead.has_rested(batch.size)
            rests = RESTS if other is None and near else 0
            warm = (
                self.prober.hope > 0 and batch.catch_up_rows <= self.max_levels * batch.size
            )  # no newcomers
            if other != believed and (warm or self.prober.due((1 + rests) * price)):
                option, scratch.probe = other, True
                self._rest, self._rest_size = rests, batch.size
        if option is not None or scratch.probe or self._rounds <= BUSY_ROUNDS:
            self._last_rest = 1
        else:
            self._last_rest = min(
                2 * self._last_rest, REST if outlook.promise < CLEARLY else SHORT_REST
            )
            self._rest, self._rest_size = min(self._last_rest, self.prober.patience), batch.size
        return self._start(batch, scratch, outlook, option)

    def _trial(self, batch: BatchState, outlook: Outlook) -> Option | None:
        """The best way to draft with the model where it nearly promises to pay and has hardly been
        tried yet."""
        option = outlook.best_with_model
        if (
            option is None
            or not self._on_trial(batch.size)
            or outlook.value(option) <= CLEARLY * outlook.value(None)
        ):
            return None
        return option

    def _on_trial(self, size: int) -> bool:
        return self._tried[about(size)] < TRIED

    def _fade(self, size: int) -> None:
        """After a round without drafting: the head may be good again. A gain over the forecast
        stays: it comes of choosing among real nodes, which a mean cannot foresee."""
        key = about(size)
        if self._foresight.get(key, 0.0) < 0.0:
            self._foresight[key] *= 1.0 - FADE

    def _change_mode(self, drafting: bool) -> None:
        """Remembers how long drafting lasts: near break-even it may end before its catch-up has
        paid."""
        if drafting:
            self._began = self._rounds
        else:
            self._lasts += (min(self._rounds - self._began, CATCH_UP_ROUNDS) - self._lasts) / 4
        self._drafting = drafting
        self.prober.mode_changed()

    def outlook(self, batch: BatchState) -> Outlook:
        """Forecasts plain decoding and every way to draft for a batch, as `plan` chooses among
        them."""
        scratch = self._open(batch)
        return self._look_out(batch, scratch)

    def _open(self, batch: BatchState) -> _Scratch:
        limits = depth_limits(batch)
        deepest = limits.tolist()
        drafting, context = (
            sum(limit > 0 for limit in deepest),
            sum(batch.context.tolist()) / batch.size,
        )
        kinds = np.bincount(batch.kind, minlength=KINDS).tolist()
        return _Scratch(batch, limits, batch.kind, kinds, drafting, context, max(deepest))

    def _current_outlook(self, batch: BatchState, scratch: _Scratch) -> Outlook:
        """The outlook, looked out for anew when the batch's shape has changed, or after some
        rounds."""
        key = self._key(batch, scratch)
        outlook = self._outlooks.get(key)
        if outlook is None or self._is_stale(outlook, batch, scratch):
            self._busy = True
            if len(self._outlooks) >= MAX_OUTLOOKS:
                self._outlooks.clear()
            outlook = self._outlooks[key] = self._look_out(batch, scratch)
            outlook.born = self._rounds
        return outlook

    def _is_stale(self, outlook: Outlook, batch: BatchState, scratch: _Scratch) -> bool:
        if self._rounds - outlook.born >= min(KEEP_OUTLOOK, 2 + self._rounds // 2):
            return True
        if batch.size not in self._learned_rests:
            return False
        self._learned_rests.discard(batch.size)
        now = float(self.cost.verify_seconds(batch.size, batch.size, scratch.context))
        return abs(now / float(outlook.verify[0]) - 1.0) > MOVED

    def _key(self, batch: BatchState, scratch: _Scratch) -> tuple[object, ...]:
        """The shape of a batch; what barely changes the costs is taken coarsely."""
        waiting = (batch.catch_up_rows // (4 * batch.size)).bit_length()
        first = waiting, self._sharing(batch).bit_length() if waiting else 0
        coarse = (*first, int(scratch.context) // 128)
        sizes = (batch.size, scratch.drafting, self._max_levels(batch, scratch))
        return (*sizes, *scratch.kinds, batch.has_free, *coarse, self.calibration.changes)

    def _max_levels(self, batch: BatchState, scratch: _Scratch) -> int:
        """Levels to look out for, rounded up to a power of two: every answer comes to its end, one
        token after another, and a new outlook for each would be work for little."""
        longest = scratch.deepest
        return (
            min(self.max_levels, 1 << (longest - 1).bit_length())
            if batch.has_model and longest > 0
            else 0
        )

    def _look_out(self, batch: BatchState, scratch: _Scratch) -> Outlook:
        size, drafting, levels = batch.size, scratch.drafting, self._max_levels(batch, scratch)
        widths: tuple[int, ...] = WIDTHS
        if drafting > SMALL:
            levels, widths = min(levels, FEW_LEVELS), WIDTHS[:2]
        children = self.forecast.children(np.array(scratch.kinds) / size)
        columns = drafting * max(
            children.shape[1] * (1 + (max(levels, 1) - 1) * widths[-1]), len(self.forecast.free)
        )
        verify = self._verify(batch, scratch, columns + 1)
        prices = self.cost.draft_seconds(np.arange(1 + WIDTHS[-1] * drafting), scratch.context)
        first = self._first_level(batch, scratch.context)[0]
        beside, more = self._overhead.of(size)
        overhead, plain = beside + more, beside + float(verify[0])
        limit = self._limit(size, plain)
        values: dict[Option, float] = {}
        if batch.has_free:
            gains = np.repeat(-np.sort(-self.forecast.free), drafting)
            values[FREE_ONLY] = best_size(gains, size, overhead, verify[: len(gains) + 1], limit)[1]
        for wide in widths if levels else ():
            losses = np.repeat(np.sort(-grow(children, levels, wide), axis=1), drafting, axis=1)
            sunk: FloatArray = (
                overhead
                + first
                + np.arange(levels, dtype=np.float64) * float(prices[wide * drafting])
            )
            rates = best_rates(losses, size, sunk, verify[: losses.shape[1] + 1], limit)
            values.update(
                {(level, wide): float(rates[level - 1]) for level in range(1, levels + 1)}
            )
        foresight = math.exp(self._foresight.get(about(size), 0.0))
        return Outlook(
            size,
            first,
            plain,
            overhead,
            values,
            foresight,
            verify,
            prices,
            LookAhead(children),
        )

    def _probe(self, outlook: Outlook, believed: Option | None) -> Option | None:
        """Another mode than the believed one; where there are two, they take turns."""
        free = FREE_ONLY if FREE_ONLY in outlook.values else None
        model = None if believed is not None and believed[0] else outlook.best_with_model
        others = [o for o in dict.fromkeys((None, free, model)) if o != believed] or [believed]
        return others[self._runs % len(others)]

    def _catch_up(self, batch: BatchState, scratch: _Scratch, option: Option | None) -> float:
        """Seconds of catching up that a plan does not charge to a single round, but a probe partly:
        where it turns out well, further rounds share them. (What a probe really loses is taken from
        the budget afterwards, in full.)"""
        if option is None or not option[0]:
            return 0.0
        charged, whole = self._first_level(batch, scratch.context)
        return (whole - charged) / PROBE_SHARE

    def _first_level(self, batch: BatchState, context: float) -> tuple[float, float]:
        """Seconds of the first drafted level: those that it is charged, and all of them.

        A long catch-up (a prompt, a stretch of plain decoding) is an investment: charged in full to
        one round it would never be made, and grow. So each of the rounds that drafting will
        probably last is charged a part."""
        now, whole = self._first_seconds(batch, context)
        return now + (whole - now) / self._sharing(batch), whole

    def _first_seconds(self, batch: BatchState, context: float) -> tuple[float, float]:
        """Seconds of the first drafted level with what any round has to catch up with, and with all
        that waits."""
        waiting = batch.catch_up_rows
        now, whole = self.cost.first_seconds(
            batch.size, [min(waiting, batch.size), waiting], context
        ).tolist()
        return now, whole

    def _sharing(self, batch: BatchState) -> int:
        """Rounds that share the price of a catch-up."""
        return max(1, min(round(self._lasts), int(batch.remaining.sum()) // (2 * batch.size)))

    def _start(
        self, batch: BatchState, scratch: _Scratch, outlook: Outlook, option: Option | None
    ) -> DraftPlan:
        if option is None:
            self._fade(batch.size)
            return OFF
        levels, wide = option
        scratch.forecast, scratch.sunk = outlook.values[option], outlook.overhead
        if levels == 0:
            return DraftPlan(True, 0, self.children)
        scratch.sunk += outlook.first
        # How deep to go is decided level by level, by frontier(): the plan only bounds it.
        deepest = min(self.max_levels, scratch.deepest)
        growth = self._growth(batch, scratch, outlook, deepest) if self.chooser.grows else None
        return DraftPlan(True, deepest, self.children, wide * scratch.drafting, growth)

    def _growth(
        self, batch: BatchState, scratch: _Scratch, outlook: Outlook, levels: int
    ) -> Growth:
        """What `frontier` would answer, as data."""
        widths, roots = _widths(scratch.drafting), batch.size * self.children
        candidates = LookAhead.columns(roots, WIDTHS[-1] * scratch.drafting, AHEAD)
        drafted = self._drafted(batch, scratch, DraftTrees.empty(batch.size), candidates)
        return Growth(self.chooser, drafted, outlook.ahead, levels, AHEAD, widths, outlook.levels)

    # --- while drafting ---

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        scratch, outlook = self._prepared(batch)
        if level >= plan.levels or not len(trees):
            return None
        widths, ahead = _widths(scratch.drafting), min(AHEAD, plan.levels - level)
        candidates = LookAhead.columns(len(trees), WIDTHS[-1] * scratch.drafting, ahead)
        drafted = self._drafted(batch, scratch, trees, candidates)
        nodes = self.chooser.frontier(drafted, outlook.ahead, level, ahead, widths, outlook.levels)
        drafted.scored = len(trees)
        if not len(nodes):
            return None
        scratch.sunk += float(outlook.levels[len(nodes)])
        return nodes

    # --- after drafting ---

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        scratch, _ = self._prepared(batch)
        if not plan.speculate or not len(trees):
            return np.zeros(0, np.int64)
        drafted = self._drafted(batch, scratch, trees, len(trees))
        kept, value, scratch.expected = self.chooser.select(drafted)
        drafted.scored = len(trees)
        if plan.levels and scratch.forecast > 0 and value > 0:
            key = about(batch.size)
            before = self._foresight.get(key, 0.0)
            error = math.log(value / scratch.forecast) - before
            self._foresight[key] = before + min(max(error, -0.3), 0.3) / 16
        return kept

    def _drafted(
        self, batch: BatchState, scratch: _Scratch, trees: DraftTrees, candidates: int
    ) -> Drafted:
        """The trees with what they are judged by; as many as `candidates` nodes may be verified."""
        assert scratch.outlook is not None
        curve, drafted = self._curve(batch, scratch, candidates), scratch.drafted
        if drafted is None or drafted.trees is not trees:
            limit = self._limit(batch.size, scratch.outlook.plain)
            # A probe verifies at least one node: otherwise a cost believed too high would never be
            # measured again.
            drafted = scratch.drafted = Drafted(
                trees,
                self.calibration,
                scratch.limits,
                scratch.kind,
                self._ends,
                batch.size,
                scratch.sunk,
                curve,
                limit,
                int(scratch.probe),
            )
        drafted.sunk, drafted.verify = scratch.sunk, curve
        return drafted

    def observe(self, round: Round) -> None:
        self._rounds += 1
        scratch = self._planned(round.batch)
        if scratch is None and not (round.plan.speculate or round.batch.prefill_rows):  # resting
            self._observe_rest(round)
            return
        batch, scratch = round.batch, scratch or self._open(round.batch)
        speculated = round.plan.speculate
        beginning = self._rounds - self._began <= BEGINNING or self._on_trial(batch.size)
        early = self._rounds <= BUSY_ROUNDS or (speculated and beginning)
        seldom = self._rounds % (2 if early else SELDOM) != 0
        self._learn_costs(round, scratch, seldom and not scratch.probe)
        if speculated and not (batch.prefill_rows or self._busy):
            self._overhead.observe(batch.size, round.other_seconds, speculated=True)
        self._busy = False
        accepted = self._observe_trees(round, scratch, seldom)
        if round.level_widths and self._on_trial(batch.size):
            self._tried[about(batch.size)] += 1
            if not self._on_trial(batch.size):
                self._learn_now()  # what was measured decides
        seconds = round.verify_seconds + sum(round.level_seconds)
        if scratch.probe:
            self._observe_probe(round, scratch, accepted, seconds)
        elif (
            not batch.prefill_rows
        ):  # the time of prompts pays for no probes, which slow down decoding
            self.prober.ordinary_round(seconds)
        seconds += round.other_seconds
        plain = scratch.outlook.plain if scratch.outlook else seconds
        self.statistics.record(batch.size, accepted, scratch.expected, seconds, plain, speculated)

    def _observe_rest(self, round: Round) -> None:
        size, seconds = round.batch.size, round.verify_seconds
        if not self._busy:
            self._overhead.observe(size, round.other_seconds, speculated=False)
        self._busy = False
        self._rested.append((size, round.batch.context, seconds))
        if not self._drafting:  # else it belongs to a probe, or was not planned
            self.prober.ordinary_round(seconds)
        seconds += round.other_seconds
        self.statistics.record(size, 0, 0.0, seconds, seconds, False)

    def _observe_trees(self, round: Round, scratch: _Scratch, seldom: bool) -> int:
        """Learns from what was drafted, now or later; how many nodes were accepted."""
        trees, accepted = round.trees, 0
        if len(trees):
            if scratch.drafted is None or scratch.drafted.scored != len(
                trees
            ):  # the caller did not ask what to verify
                self.calibration.score(trees, scratch.kind)
            self._unlearned.append((round, scratch.kind))
            accepted = int(np.count_nonzero(round.next_token >= 0))
            self._expected += scratch.expected
            self._surprise += scratch.expected - accepted
        surprised = self._surprise**2 > SURPRISE**2 * self._expected
        if self._unlearned and (not seldom or surprised):
            self._learn()
        if surprised:
            self._outlooks.clear()
        if round.plan.speculate and round.plan.levels == 0:
            self.forecast.observe_free(trees, scratch.limits)
        return accepted

    def _observe_probe(
        self, round: Round, scratch: _Scratch, accepted: int, seconds: float
    ) -> None:
        """Pays for a probe. Whether others follow is another question than what it cost: rows that
        had waited are an investment, and where they were most of the price, the next rounds are
        there to use it. A plain round that did well was luck, or the costs know by now."""
        batch, outlook, drafted = round.batch, scratch.outlook, round.plan.speculate
        assert outlook is not None
        beside = outlook.overhead if drafted else outlook.plain - float(outlook.verify[0])
        loss = seconds + beside - (batch.size + accepted) / scratch.believed
        if not drafted:
            loss = min(
                loss, outlook.plain
            )  # a process that was stopped meanwhile must not lose the probes of hours
            self.prober.probe_round(
                (1 + self._rest) * loss, hopeful=False, clear=loss > CLEAR * seconds
            )
            self._end_run()
            return
        invested = 0.0
        if round.level_widths:
            invested = max(
                0.0, round.level_seconds[0] - self._first_seconds(batch, scratch.context)[0]
            )
        self.prober.probe_round(loss, hopeful=loss < 2 * invested)
        if self.prober.hope <= 0:
            self._end_run()

    def _end_run(self) -> None:
        """After the last of some probes."""
        self._runs += 1
        self._learn_now()

    def _learn_now(self) -> None:
        """What was measured is what the next rounds believe."""
        if self._unlearned:
            self._learn()
        self._outlooks.clear()

    def stats(self) -> dict[str, float]:
        """Running figures for metrics: estimated speedup, share of rounds off, calibration error,
        probing."""
        return {
            **self.statistics.summary(),
            "probe_seconds": self.prober.spent,
            "probes": float(self.prober.count),
        }

    # --- shared ---

    def _planned(self, batch: BatchState) -> _Scratch | None:
        """The scratch of a round that was planned and did not rest."""
        return self._scratch if self._scratch is not None and self._scratch.batch is batch else None

    def _prepared(self, batch: BatchState) -> tuple[_Scratch, Outlook]:
        """This round's scratch; made here for a caller that forces drafting without a plan."""
        scratch = self._scratch = self._planned(batch) or self._open(batch)
        if scratch.outlook is None:
            scratch.outlook = self._current_outlook(batch, scratch)
        return scratch, scratch.outlook

    def _learn(self) -> None:
        """Learns from the last rounds in one go, since every numpy call has its price."""
        self._busy = True  # the next round's time has this in it
        rounds, kinds = zip(*self._unlearned, strict=True)
        self._unlearned.clear()
        self._expected = self._surprise = 0.0
        trees, nodes, chosen = merged(rounds)
        self.calibration.observe(trees, nodes, chosen, np.concatenate(kinds))
        if trees.source.min() == 0:  # nodes of the model drafter
            self.forecast.observe(trees)

    def _curve(self, batch: BatchState, scratch: _Scratch, nodes: int) -> FloatArray:
        """Seconds of a verification of 0, 1, ... nodes, at least up to `nodes`."""
        assert scratch.outlook is not None
        if len(scratch.outlook.verify) <= nodes:
            scratch.outlook.verify = self._verify(batch, scratch, 2 * nodes + 1)
        return scratch.outlook.verify

    def _verify(self, batch: BatchState, scratch: _Scratch, count: int) -> FloatArray:
        """Seconds of a verification of 0, 1, ... count - 1 nodes."""
        return self.cost.verify_curve(batch.size, batch.size, count, scratch.context)

    def _limit(self, size: int, plain: float) -> float:
        """Seconds that a round may last: no bound for a lone request, which gets all the nodes
        itself."""
        return self.max_round_slowdown * plain if size > 1 else math.inf

    def _learn_rests(self) -> None:
        """What the machine has become meanwhile may make drafting pay: one step for each size,
        almost without noise."""
        for size in {size for size, _, _ in self._rested}:
            mine = [
                (context.mean(), seconds) for of, context, seconds in self._rested if of == size
            ]
            context, seconds = np.mean(mine, axis=0).tolist()
            self.cost = self.cost.corrected(
                VerifySample(size, size, context, seconds, rounds=len(mine))
            )
            self._learned_rests.add(size)
        self._rested.clear()

    def _learn_costs(self, round: Round, scratch: _Scratch, seldom: bool) -> None:
        if round.verify_rows and not (seldom and self._rounds % OFTEN):
            sample = VerifySample(
                round.batch.size, round.verify_rows, scratch.context, round.verify_seconds
            )
            self.cost = self.cost.corrected(sample)
        waiting: int | None = round.batch.catch_up_rows  # of the first level
        for width, seconds in (
            () if seldom else zip(round.level_widths, round.level_seconds, strict=True)
        ):
            width -= waiting or 0
            self.cost = self.cost.corrected(DraftSample(width, scratch.context, seconds, waiting))
            waiting = None


@lru_cache(maxsize=1024)
def _widths(drafting: int) -> IntArray:
    """Frontier widths to consider: a quarter of the drafting requests, the surest ones, half of
    them, and multiples."""
    multiples = [width * drafting for width in (WIDTHS if drafting <= SMALL else WIDTHS[:3])]
    return np.array(sorted({max(1, drafting // 4), max(1, drafting // 2), *multiples}), np.int64)
