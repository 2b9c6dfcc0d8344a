"""Milliseconds of verification forwards, as rounds perform them.

    python benchmarks/forwards.py [sequences,context,tree nodes ...]

Medians of 12 in each of three turns over all of them, since machines drift. Compare two versions by
running their commands in turn.
"""

import sys
import time

import numpy as np

from smart_decoding import LLM
from smart_decoding.profiling.measure import verification

USUAL = (
    "1,150,0 1,150,10 4,150,0 4,150,2 8,150,0 8,150,1 8,150,3 8,1000,0 16,150,0 16,150,1 32,150,0"
)


def main() -> None:
    shapes = [tuple(map(int, text.split(","))) for text in sys.argv[1:] or USUAL.split()]
    llm = LLM("smollm2-135m", speculative_config=False, max_num_seqs=32)
    pages = llm.engine.config.pages
    runs = {
        shape: verification(llm.target, shape[0], shape[0] * (1 + shape[2]), shape[1], pages)
        for shape in shapes
    }
    found: dict[tuple[int, ...], list[float]] = {shape: [] for shape in shapes}
    for _ in range(3):
        for shape, run in runs.items():
            assert run is not None, f"{shape} does not fit into the cache"
            seconds = []
            for _ in range(14):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
            found[shape].append(float(np.median(seconds[2:])) * 1e3)
    for shape, medians in found.items():
        print(f"{shape}: " + " ".join(f"{ms:.2f}" for ms in sorted(medians)))


if __name__ == "__main__":
    main()
