"""`python -m smart_lab profile`: measures what forwards cost, prints and draws it, caches it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from smart_decoding.cli.arguments import ALLOW_SLOW, add_options
from smart_decoding.cli.model_options import (
    ACTIVATIONS,
    DEVICE,
    DRAFT,
    DTYPE,
    METHOD,
    QUANTIZATION,
    TRUST_PICKLE,
    speculative_config,
)
from smart_decoding.cli.run import show_steps
from smart_decoding.core.cost import CostModel, Sample, VerifySample
from smart_decoding.models.registry import DEFAULT_MODEL

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
WAITING = (0, 1, 2, 4, 8, 16, 64)
CONTEXT = 128.0  # tokens before what is verified or drafted, in all that is shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what drafts, and the time to measure for."""
    drafting = tuple(method for method in METHOD.choices or () if method != "none")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name, hub id, folder or GGUF file")
    of_model = (DTYPE, QUANTIZATION, ACTIVATIONS, DEVICE, ALLOW_SLOW, TRUST_PICKLE)
    add_options(parser, (*of_model, replace(METHOD, choices=drafting), DRAFT))
    parser.set_defaults(policy="smart", policy_option=[], method_option=[], speculative_config=None)
    parser.add_argument("--seconds", type=float, default=6.0, help="time to measure for")


def main(args: argparse.Namespace) -> int:
    """Measures, shows, saves."""
    from smart_decoding.llm import LLM
    from smart_decoding.profiling.measure import Measurement
    from smart_decoding.speculation import level_drafter

    show_steps()
    given = ("dtype", "quantization", "activations", "device", "trust_pickle", "allow_slow")
    options = {name: getattr(args, name) for name in given}
    options["generation_config"] = "vllm"  # nothing is sampled
    llm = LLM(args.model, speculative_config=speculative_config(args), **options)
    model = llm.speculation.model
    drafter = level_drafter(llm.speculation.drafter)
    limits = llm.engine.config
    profile = llm.speculation.profile
    assert profile is not None  # the policy needs one
    samples = Measurement(
        llm.target, drafter, limits.pages, limits.max_num_seqs, args.seconds
    ).run()
    profile.keep(samples)
    cost = profile.cost
    print(f"seconds of a forward in ms, context {CONTEXT:.0f}, {len(samples)} samples; ", end="")
    print("rows of the whole batch across")
    _show_verification(cost)
    if model is not None:
        _show_drafting(cost)
    _draw(cost)
    median, high = held_out_error(samples)
    print(f"held-out error of the fit: median {100 * median:.1f} %, p90 {100 * high:.1f} %")
    return 0


def held_out_error(samples: Sequence[Sample]) -> tuple[float, float]:
    """Median and 90th percentile of |predicted / measured - 1|: odd verify samples under a fit of
    the even ones."""
    verify = [s for s in samples if isinstance(s, VerifySample)]
    model = CostModel.fit(verify[::2])
    errors = [
        abs(float(model.verify_seconds(s.batch, np.array([s.rows]), s.context)[0]) / s.seconds - 1)
        for s in verify[1::2]
    ]
    return (float(np.median(errors)), float(np.percentile(errors, 90))) if errors else (0.0, 0.0)


def _show_verification(cost: CostModel) -> None:
    print("batch " + "".join(f"{rows:>8}" for rows in ROWS))
    for batch in cost.verify:
        seconds = cost.verify_seconds(batch, np.array(ROWS), CONTEXT)
        cells = [
            "       ." if rows < batch else f"{1e3 * each:8.1f}"
            for rows, each in zip(ROWS, seconds, strict=True)
        ]
        print(f"{batch:>5} " + "".join(cells))


def _show_drafting(cost: CostModel) -> None:
    """Levels by their width, and the first one by the tokens that it has to take in."""
    levels = cost.draft_seconds(np.array(WIDTHS), CONTEXT)
    print("level " + "".join(f"{1e3 * seconds:8.2f}" for seconds in levels))
    print("width " + "".join(f"{width:>8}" for width in WIDTHS))
    firsts = [cost.first_seconds(1, tokens, CONTEXT) for tokens in WAITING]
    print("first " + "".join(f"{1e3 * seconds:8.2f}" for seconds in firsts))
    print("waits " + "".join(f"{tokens:>8}" for tokens in WAITING))


def _draw(cost: CostModel, height: int = 10) -> None:
    """The curve at batch 1, one column a row."""
    values = 1e3 * cost.verify_seconds(1, np.arange(1, 65), CONTEXT)
    top = float(values.max())
    print(f"\nms at batch 1 against rows 1..{len(values)} (top: {top:.0f} ms)")
    for level in range(height, 0, -1):
        print("  |" + "".join("█" if v >= top * (level - 0.5) / height else " " for v in values))
    print("  +" + "-" * len(values))
