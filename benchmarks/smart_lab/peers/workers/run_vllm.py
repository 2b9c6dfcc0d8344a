"""vLLM's CPU build: plain, or with its n-gram drafter. What decoding takes is the whole less a
run of one token; where answers may end, at tokens `stops`, each one's end is told."""

from __future__ import annotations

import os
import time
from typing import Any

from lines import Answer, Settings, serve


def load(settings: Settings) -> tuple[dict[str, str], Answer]:
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=settings["cores"],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    import vllm

    ngram = settings.get("ngram")
    drafter = {
        "method": "ngram",
        "num_speculative_tokens": ngram,
        "prompt_lookup_max": 4,
        "prompt_lookup_min": 2,
    }
    model = vllm.LLM(
        settings["weights"],
        dtype={"bf16": "bfloat16", "fp32": "float32"}[settings["dtype"]],
        max_model_len=settings["context"],
        enable_prefix_caching=False,
        max_num_seqs=settings["sequences"],
        skip_tokenizer_init=True,
        speculative_config=drafter if ngram else None,
    )

    def timed(prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        out = model.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return time.perf_counter() - start, [list(each.outputs[0].token_ids) for each in out]

    def answer(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        first, _ = timed(prompts, 1)
        whole, answers = timed(prompts, tokens)
        return {
            "seconds": whole - first,
            "tokens": sum(len(a) - 1 for a in answers),
            "answers": answers,
            "prefill_seconds": first,
        }

    def ended(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            stop_token_ids=settings["stops"],
            detokenize=False,
        )
        return stepped(model.llm_engine, prompts, params)

    about = {"version": vllm.__version__, "precision": settings["dtype"]}
    return about, ended if "stops" in settings else answer


def stepped(engine: Any, prompts: list[list[int]], params: Any) -> dict[str, Any]:
    """Answers all at once. ends: seconds from sending to each one's last token; began: those until
    all have one, and `before` how many tokens each had then; steps: those that gave it tokens."""
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
    answers: list[list[int]] = [[] for _ in prompts]
    before: list[int] = []
    began = 0.0
    ends = [0.0] * len(prompts)
    steps = [0] * len(prompts)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            index = int(output.request_id)
            steps[index] += 1
            ends[index] = now
            answers[index] = list(output.outputs[0].token_ids)
        if not before and all(answers):
            began = now
            before = [len(answer) for answer in answers]
    seconds = time.perf_counter() - started
    found = {"began": began, "before": before, "ends": ends, "steps": steps}
    return {**found, "answers": answers, "seconds": seconds}


if __name__ == "__main__":
    serve(load)
