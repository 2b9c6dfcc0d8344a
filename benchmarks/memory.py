"""Memory above the loaded model: 16 requests of 2,048 tokens of context in bf16, with speculation.

    python benchmarks/memory.py

Resident memory after loading (KV memory is reserved, but not touched yet), and at the peak of
prefill and 64 rounds.
"""

from smart_decoding import LLM, SamplingParams
from smart_decoding.bench.data import load_task
from smart_decoding.bench.peak import forget_peak, peak_gib

BATCH, CONTEXT, TOKENS = 16, 2048, 64


def main() -> None:
    llm = LLM(
        "smollm2-135m",
        max_num_seqs=BATCH,
        max_model_len=CONTEXT,
        kv_cache_tokens=BATCH * CONTEXT,
        enable_prefix_caching=False,
    )
    stream = [token for text in load_task("code", 160) for token in llm.tokenizer.encode(text)]
    length = CONTEXT - TOKENS
    prompts = [stream[i * 977 : i * 977 + length] for i in range(BATCH)]
    assert min(map(len, prompts)) == length
    llm.generate([prompts[0][:32]], SamplingParams(temperature=0, max_tokens=4))
    forget_peak()
    before = peak_gib() or 0.0
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    )
    verified = sum(output.outputs[0].metrics.verified for output in outputs)
    kv = llm.target.kv_bytes / 2**30  # resident from the start
    print(
        f"loaded {before:.2f} GiB with {kv:.2f} of KV memory, peak {peak_gib() or 0.0:.2f} GiB; "
        f"{verified} nodes verified"
    )


if __name__ == "__main__":
    main()
