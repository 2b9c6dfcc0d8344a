"""Is one setting faster than another? The rule, over pairs of fresh processes.

Two processes with the same options differ by up to 17 %, so a process is one observation, however
many prompts it answers. A pair is one process of each setting, in turn, on the same new prompts.
After four, seven and ten pairs Student's t over the logarithms of their ratios decides. The looks
share one error by Bonferroni's rule: of equal settings one seems faster in 1.2 % of verdicts at
most. A load has three verdicts at most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smart_decoding.measuring.statistics import Ratio, student_t

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.settings import Setting

LOOKS = {4: 0.004, 7: 0.003, 10: 0.005}  # pairs -> chance that equal settings seem to differ
LEAST, MOST = 3, max(LOOKS)  # pairs of a verdict
MARGIN = 1.02  # times as fast: less is not worth an option


@dataclass(frozen=True, slots=True)
class Verdict:
    """One setting beside another at a load. ratio: its speed over base's, with the interval of the
    last look; faster: None while it is not decided; lacking: seconds that a decision takes at
    most."""

    load: int
    base: Setting
    setting: Setting
    ratio: Ratio
    faster: bool | None
    lacking: float = 0.0


def decided(ratios: Sequence[float]) -> bool | None:
    """Return whether a setting is faster, from its ratios pair by pair; None: not known yet.

    From `LEAST` pairs on, what is not ahead by `MARGIN` is given up."""
    for count in range(LEAST, len(ratios) + 1):
        found = at_look(ratios[:count])
        if found.value <= MARGIN:
            return False
        if count in LOOKS and found.low > 1.0:
            return True
    return False if len(ratios) >= MOST else None


def at_look(ratios: Sequence[float]) -> Ratio:
    """Return the mean ratio with the interval of the next look; an infinitely wide one of a single
    pair, NaN without any."""
    count = len(ratios)
    if not count:
        return Ratio(math.nan, math.nan, math.nan, 0)
    logs = [math.log(ratio) for ratio in ratios]
    mean = sum(logs) / count
    if count == 1:
        return Ratio(math.exp(mean), 0.0, math.inf, 1)
    error = math.sqrt(sum((each - mean) ** 2 for each in logs) / (count - 1) / count)
    share = next((share for look, share in LOOKS.items() if count <= look), LOOKS[MOST])
    half = student_t(count - 1, 1.0 - share) * error
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), count)
