"""`smart profile`: measures what forwards cost here, prints the table, draws the curve and caches
the profile."""

from __future__ import annotations

import argparse

from smart_decoding.bench.arguments import add_allow_slow
from smart_decoding.cli.run import speculative_config
from smart_decoding.drafters import METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="smollm2-135m", help="name, hub id, folder or GGUF file")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (bf16) or float32 (fp32)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    add_allow_slow(parser)
    parser.add_argument(
        "--method",
        choices=[method for method in METHODS if method != "none"],
        help="what drafts (the model's own head, if it has one)",
    )
    parser.add_argument(
        "--draft",
        metavar="MODEL",
        help="whose levels are measured: a head's folder, or for "
        "draft_model any smaller model of the same vocabulary",
    )
    parser.set_defaults(
        policy="eagle2", policy_option=[], method_option=[]
    )  # a policy that needs no profile
    parser.add_argument("--seconds", type=float, default=6.0, help="time to measure for")


def main(args: argparse.Namespace) -> int:
    import numpy as np

    from smart_decoding.core.cost import CostModel
    from smart_decoding.llm import LLM
    from smart_decoding.profiling.cache import profile_path, save_profile
    from smart_decoding.profiling.measure import held_out_error, longest_context, measure
    from smart_decoding.speculation import ROUND_OVERHEAD, level_drafter

    config = speculative_config(args)
    llm = LLM(
        args.model,
        dtype=args.dtype,
        device=args.device,
        speculative_config=config,
        allow_slow=args.allow_slow,
    )
    model, target = llm.speculation.model, llm.target
    samples = measure(
        target,
        level_drafter(llm.speculation.drafter),
        llm.engine.config.pages,
        llm.engine.config.max_num_seqs,
        args.seconds,
    )
    cost = CostModel.fit(samples, ROUND_OVERHEAD)
    rows = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96]
    print(
        f"seconds of a forward in ms, context 128, {len(samples)} samples; rows of the whole batch across"
    )
    print("batch " + "".join(f"{r:>8}" for r in rows))
    for batch in cost.verify:
        wanted = [r if r >= batch else None for r in rows]
        cells = [
            "       ."
            if r is None
            else f"{1e3 * cost.verify_seconds(batch, np.array([r]), 128.0)[0]:8.1f}"
            for r in wanted
        ]
        print(f"{batch:>5} " + "".join(cells))
    if model is not None:
        widths = [1, 2, 4, 8, 16, 32, 64]
        print(
            "level "
            + "".join(f"{1e3 * cost.draft_seconds(np.array([w]), 128.0)[0]:8.2f}" for w in widths)
        )
        print("width " + "".join(f"{w:>8}" for w in widths))
        waiting = [0, 1, 2, 4, 8, 16, 64]
        print("first " + "".join(f"{1e3 * cost.first_seconds(1, w, 128.0):8.2f}" for w in waiting))
        print("waits " + "".join(f"{w:>8}" for w in waiting))
    _draw(np.arange(1, 65), 1e3 * cost.verify_seconds(1, np.arange(1, 65), 128.0))
    median, high = held_out_error(samples)
    print(f"held-out error of the fit: median {100 * median:.1f} %, p90 {100 * high:.1f} %")
    shape = str(model and model.shape)
    longest = longest_context(target.max_positions)
    if samples:
        save_profile(
            profile_path(llm.provenance, target.dtype, target.device, shape, longest, target.steps),
            cost,
        )
    return 0


def _draw(rows: object, milliseconds: object, height: int = 10) -> None:
    """The curve at batch 1, one column a row."""
    import numpy as np

    values = np.asarray(milliseconds)
    top = float(values.max())
    print(f"\nms at batch 1 against rows 1..{len(values)} (top: {top:.0f} ms)")
    for level in range(height, 0, -1):
        print("  |" + "".join("█" if v >= top * (level - 0.5) / height else " " for v in values))
    print("  +" + "-" * len(values))
