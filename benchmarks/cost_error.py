"""How well the cost model predicts real rounds of another process than the one that took the
profile.

    python benchmarks/cost_error.py [prompts per task]

Batch sizes, contexts and tree shapes are those that real answers bring, most of them absent from
the profile. Prints, for the model as the policy uses it (with its online correction) and for the
bare profile, the median and the 90th percentile of |predicted / measured - 1| of verifications and
of drafted levels; and the machine's own noise beside them: the same forward again and again against
its median.
"""

import sys
import time

import numpy as np

from smart_decoding import LLM, SamplingParams
from smart_decoding.bench.data import load_task
from smart_decoding.core.policies.protocol import Round
from smart_decoding.profiling.measure import fake_rows


def errors(batch: int, prompts: int) -> dict[str, list[float]]:
    llm = LLM(
        "smollm2-135m",
        speculative_config={"method": "eagle", "policy": "smart"},
        max_num_seqs=batch,
    )
    names = ("verify", "verify, bare profile", "draft", "draft, bare profile")
    policy, found = llm.policy, {name: [] for name in names}
    bare, observe = policy.cost, policy.observe

    def watch(done: Round) -> None:
        context = float(done.batch.context.mean())
        if not done.batch.prefill_rows:
            for name, cost in (("verify", policy.cost), ("verify, bare profile", bare)):
                predicted = float(cost.verify_seconds(done.batch.size, done.verify_rows, context))
                found[name].append(predicted / done.verify_seconds - 1)
            for name, cost in (("draft", policy.cost), ("draft, bare profile", bare)):
                predicted = cost.levels_seconds(done.batch.size, done.level_widths, context)
                found[name] += [
                    p / s - 1 for p, s in zip(predicted, done.level_seconds, strict=True)
                ]
        observe(done)

    policy.observe = watch
    texts = [text for task in ("code", "maths", "general") for text in load_task(task, prompts)]
    chats = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    llm.generate(chats, SamplingParams(temperature=0, max_tokens=96))
    return found


def noise() -> list[float]:
    llm = LLM("smollm2-135m", speculative_config=False, max_num_seqs=4)
    rows = fake_rows(1, 6, 200, llm.engine.config.pages)
    seconds = []
    for _ in range(400):
        start = time.perf_counter()
        llm.target.verify(rows, ())
        seconds.append(time.perf_counter() - start)
    return list(np.array(seconds) / np.median(seconds) - 1)


def main() -> None:
    prompts = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    pooled: dict[str, list[float]] = {}
    for batch in (1, 3, 6, 12):
        for name, values in errors(batch, prompts).items():
            pooled.setdefault(name, []).extend(values)
    pooled["the machine against itself"] = noise()
    for name, values in pooled.items():
        size = np.abs(values)
        print(
            f"{name:28} median {np.median(size):6.1%}  p90 {np.percentile(size, 90):6.1%}  n {len(size)}"
        )


if __name__ == "__main__":
    main()
