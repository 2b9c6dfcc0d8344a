"""Are the tokens of the real model in float32 the same under every policy, batch size and
temperature?

    python benchmarks/identity.py [batch ...]     default: 1 4 16

Sixteen prompts of three tasks, 32 tokens each; every policy at every batch size against plain
decoding one by one, greedy and at temperature 0.8. Printed: answers compared, those that differ,
and how many drafted nodes were verified and accepted: a run that drafts nothing would show nothing.
"""

import sys

from smart_decoding import LLM, SamplingParams
from smart_decoding.bench.data import load_task
from smart_decoding.core.policies import POLICIES

COUNT, TOKENS = 16, 32


def main(batches: list[int]) -> int:
    plain = LLM(
        "smollm2-135m",
        speculative_config=False,
        dtype="float32",
        max_num_seqs=max(batches),
        enable_prefix_caching=False,
    )
    texts = [text for task in ("code", "maths", "general") for text in load_task(task, 6)][:COUNT]
    prompts = [plain.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    wrong = 0
    for temperature in (0.0, 0.8):
        params = [
            SamplingParams(temperature=temperature, max_tokens=TOKENS, seed=i) for i in range(COUNT)
        ]
        alone = [
            plain.generate([p], s)[0].outputs[0].token_ids
            for p, s in zip(prompts, params, strict=True)
        ]
        for policy in [name for name in POLICIES if name != "off"]:
            llm = plain.sharing_weights({"method": "eagle", "policy": policy})
            for batch in batches:
                found, verified, accepted = [], 0, 0
                for start in range(0, COUNT, batch):
                    for output in llm.generate(
                        prompts[start : start + batch], params[start : start + batch]
                    ):
                        answer = output.outputs[0]
                        found.append(answer.token_ids)
                        verified += answer.metrics.verified
                        accepted += answer.metrics.accepted
                differ = sum(a != b for a, b in zip(alone, found, strict=True))
                wrong += differ
                print(
                    f"T={temperature:g} {policy:12s} batch {batch:2d}: {differ} of {COUNT} answers differ; "
                    f"{verified} nodes verified, {accepted} accepted",
                    flush=True,
                )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main([int(word) for word in sys.argv[1:]] or [1, 4, 16]))
