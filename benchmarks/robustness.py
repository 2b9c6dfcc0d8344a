"""Drafters that are no good: what do they cost, and how soon is that noticed?

    python benchmarks/robustness.py untrained [batch ...]    a head with random weights against plain decoding
    python benchmarks/robustness.py shuffled                 a good head spoilt in mid-run, then good again

`untrained`: both engines answer the same prompts in turn; printed is the ratio of tokens per second, end to end, median
and range over the repetitions. `shuffled`: the head's tokens are permuted, so that all its proposals are wrong.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from smart_decoding import LLM, SamplingParams
from smart_decoding.bench.data import load_task
from smart_decoding.speculation import shipped_head

GREEDY = SamplingParams(temperature=0, max_tokens=96)


def prompts(llm: LLM, each: int) -> list[list[int]]:
    texts = [text for task in ("code", "maths", "general") for text in load_task(task, each)]
    return [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]


def random_head(folder: Path) -> Path:
    """The shipped head's shape with random weights, and no prior."""
    source = shipped_head("smollm2-135m")
    assert source is not None
    weights = load_file(source / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith("weight") and tensor.ndim == 2:
            weights[name] = (torch.randn(tensor.shape) * 0.02).bfloat16()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((source / "config.json").read_text())))
    return folder


def untrained(batches: list[int]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        head = random_head(Path(scratch))
        for batch in batches:
            plain = LLM("smollm2-135m", speculative_config=False, max_num_seqs=batch, enable_prefix_caching=False)
            smart = LLM("smollm2-135m", speculative_config={"method": "eagle", "model": str(head)},
                        max_num_seqs=batch, enable_prefix_caching=False)  # fmt: skip
            chats = prompts(plain, max(2, batch // 2))
            ratios = []
            for repetition in range(7):
                rates = {}
                for name, llm in (("plain", plain), ("smart", smart))[:: 1 if repetition % 2 else -1]:
                    start = time.perf_counter()
                    outputs = llm.generate(chats, GREEDY)
                    tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
                    rates[name] = tokens / (time.perf_counter() - start)
                if repetition:  # the first one warms up
                    ratios.append(rates["smart"] / rates["plain"])
            print(f"batch {batch:2}: {np.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")


def shuffled(rounds: int = 500) -> None:
    llm = LLM("smollm2-135m", speculative_config={"method": "eagle"}, max_num_seqs=1, enable_prefix_caching=False)
    head, engine = llm.speculation.model, llm.engine
    good = head.draft_ids
    spoilt = good[torch.randperm(len(good), generator=torch.Generator().manual_seed(0))]
    chats, used, log = prompts(llm, 40), 0, {}
    for phase, ids in (("good", good), ("shuffled", spoilt), ("good again", good)):
        head.draft_ids = ids
        seen = log[phase] = []
        while len(seen) < rounds:
            if not engine.has_unfinished_requests:
                engine.add_request(f"r{used}", chats[(7 * used) % len(chats)], GREEDY)
                used += 1
            engine.step()
            last = engine.last_round
            if not last.round.batch.prefill_rows:
                seen.append((last.emitted, last.seconds, bool(last.round.plan.speculate)))
    before = np.array(log["good"])
    usual = before[:, 0].sum() / before[:, 1].sum()
    off = ~np.array(log["shuffled"])[:, 2].astype(bool)
    noticed = next((i for i in range(len(off) - 16) if off[i : i + 16].mean() > 0.75), None)
    spoilt_rate = np.array(log["shuffled"])
    again = np.array(log["good again"])
    rates = [again[i : i + 96, 0].sum() / again[i : i + 96, 1].sum() for i in range(len(again) - 96)]
    back = next((i for i, rate in enumerate(rates) if rate >= 0.95 * usual), None)
    print(f"good: {usual:.0f} tok/s, {before[:, 2].mean():.0%} of rounds drafted")
    print(f"shuffled: {spoilt_rate[:, 0].sum() / spoilt_rate[:, 1].sum():.0f} tok/s; mostly off after {noticed} rounds")
    print(f"good again: 95 % of the earlier speed (over 96 rounds) from round {back} on; "
          f"last 200 rounds {again[-200:, 0].sum() / again[-200:, 1].sum():.0f} tok/s")  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["shuffled"]:
        shuffled()
    elif sys.argv[1:2] == ["untrained"]:
        untrained([int(batch) for batch in sys.argv[2:]] or [1, 4, 16, 32])
    else:
        sys.exit(__doc__)
