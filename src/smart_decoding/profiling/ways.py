"""How quants are multiplied on the CPU kernels: the variant, and activations as they are or rounded
to 8 bits.

Where the options leave several ways, a sample of the model's matrices is multiplied in each, in
about a second, before any weights are packed. The way with which `smart` is predicted to be fastest
runs. The seconds are kept in the cache: another start of the same model chooses the same, but for
what was measured beside other work, which counts for an hour.
No option of drafting matters to the choice, since the bits of an answer depend on it.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, inf, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from smart_decoding.core.calibration import HORIZON, KINDS
from smart_decoding.core.costs import LEVEL, CostModel, ExpertCosts
from smart_decoding.core.policies.smart import Shape, Smart
from smart_decoding.kernels import library, ops
from smart_decoding.kernels.limits import preemptions
from smart_decoding.kernels.weights import ALWAYS, NEVER, Arena, pack
from smart_decoding.models.checkpoints.rounding import RoundedWeights
from smart_decoding.models.torch.layers import converted
from smart_decoding.profiling.cache import load, path_of, save
from smart_decoding.profiling.measure import BUSY
from smart_decoding.profiling.profile import ROUND_OVERHEAD

if TYPE_CHECKING:
    from smart_decoding.kernels.weights import Matrix, PackedWeight
    from smart_decoding.models.checkpoints.loading import Checkpoint

log = logging.getLogger("smart.profile")

VERSION = 2  # raise when products change in a way that builds of the kernels do not show
ROWS = (1, 4, 8, 32)  # that are timed
GAIN = 1.05  # a later way must be so much faster: the first ones are more exact
WEIGHTS = 48 << 20  # of a sample: more bytes than caches hold, all ways together
PARTS = 4  # matrices of a kind in a sample, at least: those of some layers have another format
LEAST_ROWS = 128  # of a matrix in a sample, which has a multiple of them or all
TURNS = 4  # at least
MOST_TURNS, SECONDS = 12, 0.4  # of timing

Seconds = Mapping[int, float]  # of a forward, by rows


class Way(NamedTuple):
    """How quants are multiplied. activations: exact or int8, as in EngineArgs."""

    variant: str
    activations: str

    def __str__(self) -> str:
        form = "8 bits" if self.activations == "int8" else "exact"
        return f"{form} on {self.variant}"


@dataclass(frozen=True)
class ChosenWay:
    """The way that runs. reason: for people, empty where there was nothing to choose from."""

    way: Way
    reason: str = ""


def choose(
    checkpoint: Checkpoint, activations: str, size: int, prior: Mapping[str, Any]
) -> ChosenWay:
    """Return the way to multiply a checkpoint's quants, whose variant runs from now on.

    activations: as in EngineArgs; size: requests that the engine is made for; prior: options of
    Smart, which come with the model."""
    ways = _ways(activations)
    if len(ways) == 1:
        return ChosenWay(ways[0])
    path = _path(checkpoint.provenance, ways)
    kept = load(path, partial(Known.of, ways))
    known = kept or Known(*measure(checkpoint, ways), {})
    choice = fastest(known.seconds, size, prior)
    key = f"{size} with {torch.get_num_threads()} threads"
    # To save it again would give what was measured beside other work another hour.
    if known.told.get(key) != choice.reason and not (kept and kept.busy):
        known.told[key] = choice.reason
        save(path, known.to_dict(), checkpoint.provenance["model"], known.busy)
    library.settle(choice.way.variant)
    return choice


class Known(NamedTuple):
    """What is kept of a model: the seconds, whether other processes ran beside, and the reasons of
    choices by numbers of requests and threads."""

    seconds: Mapping[Way, Seconds]
    busy: bool
    told: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "seconds": {str(way): each for way, each in self.seconds.items()},
            "busy": self.busy,
            "told": self.told,
        }

    @classmethod
    def of(cls, ways: Sequence[Way], stored: Mapping[str, Any]) -> Known:
        """Return what `to_dict` made. Raises KeyError, TypeError or ValueError for anything
        else."""
        seconds = {way: _by_rows(stored["seconds"][str(way)]) for way in ways}
        return cls(seconds, bool(stored["busy"]), dict(stored["told"]))


def _ways(activations: str) -> list[Way]:
    """Return the possible ways, the most exact ones first."""
    forms = ("exact", "int8") if activations == "auto" else (activations,)
    variants = library.candidates()
    rounding = [each for each in variants if library.load(each).smart_multiplies_bytes()]
    return [Way(each, f) for f in forms for each in (variants if f == "exact" else rounding)]


def _path(weights: Mapping[str, str], ways: Sequence[Way]) -> Path:
    builds = [(str(way), library.identity(way.variant)) for way in ways]
    return path_of(weights, "ways", VERSION, builds)


def _by_rows(stored: Mapping[str, float]) -> Seconds:
    seconds = {int(rows): float(each) for rows, each in stored.items()}
    if tuple(seconds) != ROWS or not all(0 < each < inf for each in seconds.values()):
        raise ValueError("it has no seconds of such rows")
    return seconds


# --- the prediction ---


def fastest(seconds: Mapping[Way, Seconds], size: int, prior: Mapping[str, Any]) -> ChosenWay:
    """Return the fastest way for `size` requests at once; earlier ones win near-ties."""
    # The drafter multiplies in its own way, so its levels cost the same beside each.
    quickest = min(seconds.values(), key=lambda each: each[1])
    levels = {rows: LEVEL * each for rows, each in quickest.items()}
    rates = {way: predicted_rate(each, levels, size, prior) for way, each in seconds.items()}
    best, *later = rates
    for way in later:
        best = way if rates[way] > GAIN * rates[best] else best
    gains = {way: rates[best] / rates[way] for way in rates if way != best}
    others = ", ".join(f"{gain:.2f} times as fast as {way}" for way, gain in gains.items())
    requests = "one request" if size == 1 else f"{size} requests"
    threads = torch.get_num_threads()
    on = f"{requests} on {threads} thread{'' if threads == 1 else 's'}"
    return ChosenWay(best, f"{best}, predicted for {on} to be {others}")


def predicted_rate(seconds: Seconds, levels: Seconds, size: int, prior: Mapping[str, Any]) -> float:
    """Return tokens per second that `smart` is predicted to reach with a draft head. levels:
    seconds of one drafted level."""
    policy = Smart(CostModel.from_table({1: seconds}, levels, ROUND_OVERHEAD), **prior)
    kinds = (0, size, *[0] * (KINDS - 2))  # all greedy
    shape = Shape(size, size, HORIZON, 0.0, kinds, size, HORIZON, has_model=True, has_free=False)
    return max(policy.predict(shape).rates.values())


# --- the measurement ---


class SampledMatrix(NamedTuple):
    """A matrix of the sample, or its first rows. times: how much of the model it stands for;
    is_expert: whether rows choose it."""

    matrix: Matrix
    times: float
    is_expert: bool


def measure(
    checkpoint: Checkpoint,
    ways: Sequence[Way],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Mapping[Way, Seconds], bool]:
    """Return seconds of a forward in each way: of its products with matrices, the fastest of
    several turns. Return also whether other processes took a core most of the time.

    The ways take turns, so that a slow moment meets all of them, and each one's matrices have left
    the caches."""
    parts = list(sample(checkpoint))
    mixture = checkpoint.config.experts
    experts = None if mixture is None else ExpertCosts(mixture.count, mixture.per_token, 0.0)
    packed = {way: Packed(way, parts, experts) for way in ways}
    found: dict[Way, dict[int, float]] = {way: dict.fromkeys(ROWS, inf) for way in ways}
    end = clock() + SECONDS
    timed = interrupted = 0
    for turn in itertools.count():
        if turn == MOST_TURNS or (turn >= TURNS and clock() > end):
            break
        for rows, way in itertools.product(ROWS, ways):
            before = preemptions()
            found[way][rows] = min(found[way][rows], packed[way].seconds(rows, clock))
            interrupted += preemptions() > before
            timed += 1
    log.info("quants were multiplied in %d ways: %s", len(ways), found)
    return found, interrupted > BUSY * timed


def sample(checkpoint: Checkpoint) -> Iterator[SampledMatrix]:
    """Return parts of the model with its kinds of matrices, in their shares of a forward."""
    kinds: dict[str, list[str]] = defaultdict(list)
    shapes = checkpoint.config.expected_shapes()
    for name, shape in shapes.items():
        is_table = name == "model.embed_tokens.weight" and not checkpoint.config.tie_embeddings
        if len(shape) == 2 and not is_table:
            kinds[re.sub(r"\d+", "", name)].append(name)
    total = sum(prod(shapes[name]) for names in kinds.values() for name in names)
    for names in kinds.values():
        n, k = shapes[names[0]]
        whole = sum(prod(shapes[name]) for name in names)
        share = WEIGHTS * whole / total / k  # rows
        count = min(len(names), max(PARTS, ceil(share / n)))
        rows = min(n, LEAST_ROWS * ceil(share / (count * LEAST_ROWS)))
        taken = [
            _first_rows(checkpoint.weights, names[(2 * i + 1) * len(names) // (2 * count)], rows)
            for i in range(count)
        ]
        times = whole / sum(prod(matrix.shape) for matrix in taken)
        yield from (SampledMatrix(matrix, times, ".experts." in names[0]) for matrix in taken)


def _first_rows(weights: Mapping[str, Matrix], name: str, count: int) -> Matrix:
    if isinstance(weights, RoundedWeights):
        matrix = weights.first_rows(name, count)
    else:
        matrix = weights[name][:count]
    return converted(matrix, torch.bfloat16, torch.device("cpu"))


class Packed:
    """A sample, packed for one way. experts: of a mixture, to know how many are awake."""

    def __init__(
        self, way: Way, parts: Sequence[SampledMatrix], experts: ExpertCosts | None
    ) -> None:
        self._variant = way.variant
        self._experts = experts
        with library.trying(way.variant):
            arena = Arena(WEIGHTS, ALWAYS if way.activations == "int8" else NEVER)
            self._hint = arena.hint
            self._parts = [(pack([part.matrix], arena), part) for part in parts]
        self._inputs = torch.randn(ROWS[-1] * max(each.k for each, _ in self._parts))
        self._out = torch.empty(ROWS[-1] * max(each.n for each, _ in self._parts))

    def seconds(self, rows: int, clock: Callable[[], float]) -> float:
        """Return the seconds of all products in a forward of so many rows."""
        with library.trying(self._variant):
            return sum(self._part(packed, part, rows, clock) for packed, part in self._parts)

    def _part(
        self, packed: PackedWeight, part: SampledMatrix, rows: int, clock: Callable[[], float]
    ) -> float:
        times = part.times
        if part.is_expert and self._experts is not None:  # rows are spread over those awake
            awake = float(self._experts.awake(1, rows))
            times *= awake / self._experts.count
            rows = max(1, round(rows * self._experts.per_row / awake))
        inputs = self._inputs[: rows * packed.k].view(rows, packed.k)
        start = clock()
        ops.multiply(inputs, packed, self._out, self._hint)
        return times * (clock() - start)
