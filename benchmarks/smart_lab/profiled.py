"""What a controller knows of a card after a profile: costs fitted to what a profile's points
take by a roofline."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.cost import CostModel, DraftSample, Sample, VerifySample
from smart_decoding.models.rows import BUCKETS
from smart_decoding.profiling.measure import LONG_WIDTHS, ON_CPU, ON_GPU, Grid, verifications

# A card's profile, and the points that were measured on every device before.
RANGES = {"1,024 rows": ON_GPU, "96 rows": ON_CPU}
CONCURRENT = 256  # requests at once


def profiled(truth: CostModel, grid: Grid) -> CostModel:
    """The costs as a profile of these points finds them; nothing is noise."""
    samples: list[Sample] = [
        VerifySample(batch, rows, context, float(truth.verify_seconds(batch, [rows], context)[0]))
        for batch, rows, context in verifications(grid, BUCKETS, CONCURRENT)
    ]
    for widths, context in ((grid.widths, grid.contexts[0]), (LONG_WIDTHS, grid.contexts[-1])):
        seconds = truth.draft_seconds(np.array(widths), context)
        samples += [
            DraftSample(width, context, float(taken))
            for width, taken in zip(widths, seconds, strict=True)
        ]
    return CostModel.fit(samples, truth.overhead_seconds)
