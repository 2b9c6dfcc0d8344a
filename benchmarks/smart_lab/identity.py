"""Are the tokens of the real model the same under every policy, batch size and temperature?

Sixteen prompts of three tasks, 32 tokens each; every policy at every batch size against plain
decoding one by one, greedy and at temperature 0.8; with --expanded, against that of the same file
expanded to bf16. Printed are the answers compared, the number that differ, and the drafted nodes
verified and accepted: a run that drafts nothing would prove nothing.

Needed by LOG's "held-out identity", which a change of the core or the kernels must pass.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from smart_decoding import LLM, SamplingParams
from smart_decoding.core.policies import POLICIES
from smart_decoding.measuring.tasks import DEFAULT_TASKS, load_task

COUNT, TOKENS = 16, 32
Answers = list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The batch sizes, the model and the type of the weights."""
    parser.add_argument("batches", type=int, nargs="*", default=[1, 4, 16], metavar="BATCH")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--method", default="eagle", help="what drafts (eagle)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--expanded", action="store_true", help="against expanded quants, bfloat16")


def main(args: argparse.Namespace) -> int:
    """Print a line for each comparison; 1 if any answer differs."""
    options = {
        "speculative_config": False,
        "dtype": "bfloat16" if args.expanded else args.dtype,
        "max_num_seqs": max(args.batches),
        "enable_prefix_caching": False,
        "activations": "exact" if args.expanded else "auto",
    }
    plain = LLM(args.model, **options)
    reference = LLM(args.model, quantization="off", **options) if args.expanded else plain
    texts = [text for task in DEFAULT_TASKS for text in load_task(task, 6)][:COUNT]
    prompts = [plain.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    wrong = 0
    for temperature in (0.0, 0.8):
        params = [
            SamplingParams(temperature=temperature, max_tokens=TOKENS, seed=i) for i in range(COUNT)
        ]
        single, _ = answers(reference, prompts, params, 1)
        for policy in POLICIES if args.expanded else [name for name in POLICIES if name != "off"]:
            llm = plain.sharing_weights({"method": args.method, "policy": policy})
            for batch in args.batches:
                found, counts = answers(llm, prompts, params, batch)
                differ = sum(a != b for a, b in zip(single, found, strict=True))
                wrong += differ
                print(
                    f"T={temperature:g} {policy:12s} batch {batch:2d}: "
                    f"{differ} of {COUNT} answers differ; {counts}",
                    flush=True,
                )
    return int(wrong > 0)


def answers(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams], batch: int
) -> tuple[Answers, str]:
    """Return token ids of each prompt's answer, and the counts of their drafts."""
    found: Answers = []
    verified = 0
    accepted = 0
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        for output in llm.generate(list(prompts[part]), list(params[part])):
            answer = output.outputs[0]
            found.append(list(answer.token_ids))
            verified += answer.metrics.verified
            accepted += answer.metrics.accepted
    return found, f"{verified} nodes verified, {accepted} accepted"
