"""SMART inside transformers against transformers' own generation, on SmolLM2-135M.

    python benchmarks/transformers_speed.py [--batch 1 4] [--dtype float32] [--assistant FOLDER]

Every method answers the same prompts of the bench tasks in turn, the order rotated from prompt to
prompt; printed is seconds of `generate` / seconds of the method, over all prompts of a repetition:
median and range over the repetitions, then the same as JSON. `--assistant`: a smaller model of the
same vocabulary, for assisted generation and as SMART's draft model; both it and prompt lookup run
at batch 1 only, and answer greedily like all others here.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from smart_decoding.bench.data import load_task
from smart_decoding.bench.provenance import commit, hardware
from smart_decoding.integrations.transformers import generate, last_report
from smart_decoding.models.loading import load_checkpoint
from smart_decoding.models.tokenizer import Tokenizer

TASKS = ("code", "maths", "general")
PAD = 2


def smart(method: str, **options: Any) -> dict[str, Any]:
    return {"custom_generate": generate, "speculative_config": {"method": method, **options}}


def methods(batch: int, assistant: Any) -> dict[str, dict[str, Any]]:
    """Name -> arguments of model.generate."""
    found = {"generate": {}}
    if batch == 1:
        found["prompt lookup, 10 tokens"] = {"prompt_lookup_num_tokens": 10}
        if assistant is not None:
            found["assisted"] = {"assistant_model": assistant}
    found["SMART off"] = {"custom_generate": generate, "speculative_config": False}
    found["SMART ngram"] = smart("ngram")
    found["SMART ngram + recycling"] = smart("union")
    found["SMART eagle"] = smart("eagle", model="smollm2-135m")
    if assistant is not None:
        found["SMART draft_model"] = smart("draft_model", model=assistant)
    return found


def padded(tokenizer: Tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    rows = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--each", type=int, default=2, help="batches of prompts of every task")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--assistant")
    parser.add_argument(
        "--only", nargs="+", help="names of methods beside generate, such as 'SMART ngram' (all)"
    )
    args = parser.parse_args()
    folder, dtype = load_checkpoint("smollm2-135m").tokenizer_source, getattr(torch, args.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    assistant = None
    if args.assistant:
        assistant = AutoModelForCausalLM.from_pretrained(args.assistant, dtype=dtype).eval()
    results = {}
    for batch in args.batch:
        texts = [load_task(task, args.each * batch) for task in TASKS]
        chunks = [task[at : at + batch] for task in texts for at in range(0, len(task), batch)]
        tokenizer = Tokenizer.load(folder)
        ways = {
            k: v
            for k, v in methods(batch, assistant).items()
            if not args.only or k in ("generate", *args.only)
        }
        results[batch] = compare(model, ways, [padded(tokenizer, chunk) for chunk in chunks], args)
    about = {
        "commit": commit(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        **hardware(),
    }
    print(
        json.dumps(
            {
                "dtype": args.dtype,
                "threads": torch.get_num_threads(),
                "batch": results,
                "about": about,
            }
        )
    )


def compare(
    model: Any, ways: dict[str, dict[str, Any]], prompts: list[Any], args: Any
) -> dict[str, Any]:
    """Name -> speedup over `generate` [median, lowest, highest], tokens/s, and what differed."""
    given = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": PAD}
    batch = len(prompts[0]["input_ids"])
    for way in ways.values():  # a profile is taken at first use
        model.generate(**prompts[0], **{**given, "max_new_tokens": 24}, **way)
    seconds = {name: np.zeros(args.repetitions) for name in ways}
    tokens, unlike = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    accepted = {}
    for repetition in range(args.repetitions):
        for number, prompt in enumerate(prompts):
            turn = list(ways)
            shift = (number + repetition) % len(turn)
            answers = {}
            for name in turn[shift:] + turn[:shift]:
                start = time.perf_counter()
                answers[name] = model.generate(**prompt, **given, **ways[name])
                seconds[name][repetition] += time.perf_counter() - start
                tokens[name] += int((answers[name][:, prompt["input_ids"].shape[1] :] != PAD).sum())
                if "custom_generate" in ways[name]:
                    report = last_report(model)
                    assert report is not None
                    accepted[name] = accepted.get(name, 0) + report.accepted
            for name, answer in answers.items():
                unlike[name] += not torch.equal(answer, answers["generate"])
    print(
        f"\nbatch {batch}, {args.dtype}, {len(prompts)} x {args.repetitions} answers of up to {args.tokens} tokens"
    )
    found = {}
    for name in ways:
        ratio = seconds["generate"] / seconds[name]
        rate = tokens[name] / seconds[name].sum()
        low, median, high = (
            round(float(x), 3) for x in (ratio.min(), np.median(ratio), ratio.max())
        )
        found[name] = {
            "speedup": [median, low, high],
            "tokens_per_second": round(float(rate), 1),
            "accepted_share": round(accepted.get(name, 0) / tokens[name], 3),
            "answers_unlike_generate": unlike[name],
        }
        print(
            f"{name:28} {median:6.2f} x  ({low:.2f} - {high:.2f})  {rate:7.1f} tokens/s   {unlike[name]} answers differ"
        )
    return found


if __name__ == "__main__":
    main()
