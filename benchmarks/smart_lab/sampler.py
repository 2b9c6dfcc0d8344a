"""Times the sampler on one CPU thread: a table, then one line of JSON (microseconds)."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smart_decoding.engine.history import SampleSpec, TokenHistory
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.models.sampler import Sampler

VOCAB, ROWS = 49152, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "temperature_0.8": {},
    "temperature_1.0": {"temperature": 1.0},
    "top_p_0.95": {"top_p": 0.95},
    "top_k_50": {"top_k": 50},
    "min_p_0.05": {"min_p": 0.05},
    "repetition_1.1": {"repetition_penalty": 1.1},
    "everything": {
        "top_p": 0.95,
        "top_k": 50,
        "min_p": 0.02,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The logits to draw from."""
    told = "logits to take rows of, [rows, vocabulary] (default: made up)"
    parser.add_argument("logits", type=Path, nargs="?", metavar="FILE.npy", help=told)


def median_us(call: Callable[[int], object], repeats: int = 200) -> float:
    """The median of repeated calls, each told its number."""
    call(0)
    times = []
    for i in range(repeats):
        start = time.perf_counter()
        call(i)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e6


def logits_like_a_model(path: Path | None) -> torch.Tensor:
    """[ROWS, VOCAB]: a broad bulk and a few likely tokens, or rows of a file."""
    if path is not None:
        rows = torch.from_numpy(np.load(path))
        return rows[torch.linspace(2, len(rows) - 1, ROWS).long()].contiguous()
    torch.manual_seed(0)
    logits = torch.randn(ROWS, VOCAB) * 2.5
    logits[:, :200] += torch.linspace(14, 0, 200)
    return logits


def main(args: argparse.Namespace) -> int:
    """Prints the table and the line."""
    torch.set_num_threads(1)
    logits = logits_like_a_model(args.logits)
    sampler = Sampler()
    history = TokenHistory(range(0, 600, 2), range(300))
    results = {"argmax_16_rows": median_us(lambda i: sampler.argmax(logits))}
    for name, options in OPTIONS.items():
        params = SamplingParams(**{"temperature": 0.8, **options})

        def one(i: int, params: SamplingParams = params) -> object:
            spec = SampleSpec(params, seed=1, position=i, history=history, path=(5, 9, 700))
            return sampler.sample(logits, np.array([i % ROWS]), [spec])

        results[name + "_1_row"] = median_us(one)
    for name, value in results.items():
        print(f"{name:24s} {value:8.0f} us")
    rounded = {name: round(value, 1) for name, value in results.items()}
    print(json.dumps({"benchmark": "sampler", "vocab": logits.shape[1], **rounded}))
    return 0
