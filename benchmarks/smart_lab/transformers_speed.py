"""SMART inside transformers against transformers' own generation, on SmolLM2-135M.

Every method answers the same prompts of the bench tasks in turn, the order rotated from prompt to
prompt; printed is seconds of `generate` / seconds of the method, over all prompts of a repetition:
median and range over the repetitions, then the same as JSON. `--assistant`: a smaller model of the
same vocabulary, for assisted generation and as SMART's draft model; both it and prompt lookup run
at batch 1 only, and answer greedily like all others here.

Needed by docs/transformers.md, "Speed".
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from smart_decoding.integrations.transformers import generate, last_report
from smart_decoding.measuring.tasks import DEFAULT_TASKS, load_task
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_lab.provenance import commit, hardware

PAD = 2


def smart(method: str, **options: Any) -> dict[str, Any]:
    """Arguments of model.generate for one of our methods."""
    return {"custom_generate": generate, "speculative_config": {"method": method, **options}}


def methods(batch: int, assistant: Any) -> dict[str, dict[str, Any]]:
    """Name -> arguments of model.generate."""
    found: dict[str, dict[str, Any]] = {"generate": {}}
    if batch == 1:
        found["prompt lookup, 10 tokens"] = {"prompt_lookup_num_tokens": 10}
        if assistant is not None:
            found["assisted"] = {"assistant_model": assistant}
    found["SMART off"] = {"custom_generate": generate, "speculative_config": False}
    found["SMART ngram"] = smart("ngram")
    found["SMART eagle"] = smart("eagle", model="smollm2-135m")
    if assistant is not None:
        found["SMART draft_model"] = smart("draft_model", model=assistant)
    return found


def padded(tokenizer: Tokenizer, texts: list[str]) -> dict[str, torch.Tensor]:
    """Chats of one message each, to the same length from the left."""
    rows = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        ),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measurement."""
    add = parser.add_argument
    add("--batch", type=int, nargs="+", default=[1, 4])
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--each", type=int, default=2, help="batches of prompts of every task")
    add("--tokens", type=int, default=64)
    add("--repetitions", type=int, default=3)
    add("--assistant", metavar="FOLDER")
    only = "names of methods beside generate, such as 'SMART ngram' (all)"
    add("--only", nargs="+", metavar="NAME", help=only)


def main(args: argparse.Namespace) -> int:
    """Print a table for each batch size, then one line of JSON."""
    folder = load_checkpoint("smollm2-135m").tokenizer_source
    dtype = getattr(torch, args.dtype)
    model = _loaded(folder, dtype)
    assistant = _loaded(args.assistant, dtype) if args.assistant else None
    tokenizer = Tokenizer.load(folder)
    results = {}
    for batch in args.batch:
        texts = [load_task(task, args.each * batch) for task in DEFAULT_TASKS]
        chunks = [task[at : at + batch] for task in texts for at in range(0, len(task), batch)]
        ways = {
            name: way
            for name, way in methods(batch, assistant).items()
            if not args.only or name in ("generate", *args.only)
        }
        results[batch] = compare(model, ways, [padded(tokenizer, chunk) for chunk in chunks], args)
    about = {
        "commit": commit(),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        **hardware(),
    }
    threads = torch.get_num_threads()
    result = {"dtype": args.dtype, "threads": threads, "batch": results, "about": about}
    print(json.dumps(result))
    return 0


def _loaded(folder: Any, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()  # type: ignore[no-untyped-call]


def compare(
    model: Any, ways: dict[str, dict[str, Any]], prompts: list[Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Name -> speedup over `generate` [median, lowest, highest], tokens/s, and what differed."""
    options = {"max_new_tokens": args.tokens, "do_sample": False, "pad_token_id": PAD}
    for way in ways.values():  # a profile is taken at first use
        model.generate(**prompts[0], **{**options, "max_new_tokens": 24}, **way)
    tally = _Tally(list(ways), args.repetitions)
    for repetition in range(args.repetitions):
        for number, prompt in enumerate(prompts):
            turn = list(ways)
            shift = (number + repetition) % len(turn)
            answers = {}
            for name in turn[shift:] + turn[:shift]:
                start = time.perf_counter()
                answers[name] = model.generate(**prompt, **options, **ways[name])
                tally.seconds[name][repetition] += time.perf_counter() - start
                if "custom_generate" in ways[name]:
                    report = last_report(model)
                    assert report is not None
                    tally.accepted[name] += report.accepted
            tally.add(answers, prompt["input_ids"].shape[1])
    count = f"{len(prompts)} x {args.repetitions} answers of up to {args.tokens} tokens"
    print(f"\nbatch {len(prompts[0]['input_ids'])}, {args.dtype}, {count}")
    return {name: tally.figures(name) for name in ways}


class _Tally:
    """Seconds of each way's repetitions, tokens, and answers unlike `generate`'s."""

    def __init__(self, names: list[str], repetitions: int) -> None:
        self.seconds = {name: np.zeros(repetitions) for name in names}
        self.accepted = dict.fromkeys(names, 0)
        self._tokens = dict.fromkeys(names, 0)
        self._unlike = dict.fromkeys(names, 0)

    def add(self, answers: dict[str, torch.Tensor], prompt_length: int) -> None:
        for name, answer in answers.items():
            self._tokens[name] += int((answer[:, prompt_length:] != PAD).sum())
            self._unlike[name] += not torch.equal(answer, answers["generate"])

    def figures(self, name: str) -> dict[str, Any]:
        """Return one way's figures, printed as a line."""
        ratio = self.seconds["generate"] / self.seconds[name]
        rate = float(self._tokens[name] / self.seconds[name].sum())
        bounds = (np.median(ratio), ratio.min(), ratio.max())
        median, low, high = (round(float(bound), 3) for bound in bounds)
        unlike = self._unlike[name]
        print(
            f"{name:28} {median:6.2f} x  ({low:.2f} - {high:.2f})  {rate:7.1f} tokens/s   "
            f"{unlike} answers differ"
        )
        return {
            "speedup": [median, low, high],
            "tokens_per_second": round(rate, 1),
            "accepted_share": round(self.accepted[name] / self._tokens[name], 3),
            "answers_unlike_generate": unlike,
        }
