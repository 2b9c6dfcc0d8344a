"""A model's forwards as they are, with a recording's acceptance: `smart` beside fixed chains.

    python -m smart_lab random-gguf qwen3-30b-a3b --layers 12 model.gguf
    python -m smart_lab replayed model.gguf answers.smart --batch-sizes 1,4,8
    python -m smart_lab random-gguf qwen3.5-4b --mtp model-mtp.gguf
    python -m smart_lab replayed model-mtp.gguf --first-accepted 0.8

Every forward is computed and takes its time, of the model and of its layer for multi-token
prediction, or else of a draft head with random weights. What drafts and answers say comes from the
recording, whose vocabulary must fit the model's, or is drawn. So a model is measured of which only
the sizes are at hand.

Needed by LOG.md's figures of mixtures and of multi-token prediction.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.cli.arguments import whole_numbers
from smart_decoding.errors import ConfigError
from smart_decoding.files import write_json
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.heads.vocabulary import USUAL_SIZE
from smart_lab.options import LabOptions
from smart_lab.provenance import check_outputs
from smart_lab.replayed_run import PROFILE_SECONDS, Replay
from smart_lab.synthetic import synthetic_mtp
from smart_lab.trace import Trace, read_trace

DRAWN = 64  # tokens of a drawn answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files, and what is compared."""
    add = parser.add_argument
    add("model", type=Path, help="a GGUF file, or a folder of safetensors")
    add("trace", type=Path, nargs="?", help="a recording by `bench --record`")
    drawn = (
        "instead of a recording: first proposals are right with probability P, others less often"
    )
    add("--first-accepted", type=float, metavar="P", help=drawn)
    tokens = f"that the layer for multi-token prediction proposes ({USUAL_SIZE})"
    add("--draft-vocab-size", type=int, metavar="N", help=tokens)
    add("--batch-sizes", type=whole_numbers, default=(1, 4, 8), metavar="1,4")
    chains = "lengths of chains beside `smart`"
    add("--chains", type=whole_numbers, default=(1, 2, 3), metavar="1,2", help=chains)
    add("--seconds", type=float, default=60.0, help="of each batch size (60)")
    add("--limit", type=int, default=24, help="of the recorded answers (24)")
    add("--json", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """Print a line for each contestant and batch size. Raises ConfigError for a recording of
    another vocabulary, and unless there is either a recording or what is to be drawn."""
    check_outputs((args.json,))
    if (args.trace is None) == (args.first_accepted is None):
        raise ConfigError("give either a recording or --first-accepted")
    if args.trace is None:
        recording = synthetic_mtp(args.first_accepted, answers=args.limit, length=DRAWN)
        trace = Trace(recording, {"temperature": 0.0})
    else:
        trace = read_trace(args.trace)
    checkpoint = load_checkpoint(args.model, quantization=None)
    said = [int(answer.tokens.max()) for answer in trace.recording.answers]
    most = max(*said, *trace.eos_token_ids)
    if most >= checkpoint.config.vocab:
        raise ConfigError(
            f"the recording has the token {most}, but {args.model.name} has "
            f"{checkpoint.config.vocab}: take a recording of a model with its vocabulary"
        )
    options = LabOptions(
        policies=(BASELINE, OURS, "chain"),
        policy_options=[f"chain:length={length}" for length in args.chains],
        batch_sizes=args.batch_sizes,
        limit=args.limit,
    )
    replay = Replay(
        options, trace, checkpoint.config, PROFILE_SECONDS, checkpoint, args.draft_vocab_size
    )
    runs = []
    for size in args.batch_sizes:
        found = [run for run in replay.runs(size, args.seconds) if run["task"] == "all"]
        runs += found
        for run in found:
            ratio = f"{run['speedup']:.3f} ({run['speedup_low']:.3f}-{run['speedup_high']:.3f})"
            print(
                f"batch {size:2} {run['policy']:20} {run['tokens_per_s']:8.1f} tok/s, {ratio} of "
                f"plain, {run['rows_per_round']:.1f} rows a round, {run['off_share']:.0%} off",
                flush=True,
            )
    if args.json is not None:
        write_json(args.json, {"cost": replay.cost.to_dict(), "runs": runs})
    return 0
