"""vLLM's CPU build: plain, or with its n-gram drafter. What decoding takes is the whole less a
run of one token; where answers may end, at tokens `stops`, each one's times are told."""

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

    def ended(prompts: list[list[int]], tokens: int, places: int) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            stop_token_ids=settings["stops"],
            detokenize=False,
        )
        return stepped(model.llm_engine, prompts, params, places)

    about = {"version": vllm.__version__, "precision": settings["dtype"]}
    return about, ended if "stops" in settings else answer


def stepped(engine: Any, prompts: list[list[int]], params: Any, places: int) -> dict[str, Any]:
    """Answers so many at once, the next one when one has ended. placed, firsts, ends: seconds until
    each got its place, its first tokens, of which there were so many `before` the others, and its
    last one; steps: those that gave it tokens."""
    started = time.perf_counter()
    answers: list[list[int]] = []
    placed: list[float] = []
    firsts = [0.0] * len(prompts)
    ends = [0.0] * len(prompts)
    before = [0] * len(prompts)
    steps = [0] * len(prompts)
    running = 0
    while running or len(placed) < len(prompts):
        for prompt in prompts[len(placed) :][: places - running]:
            engine.add_request(str(len(placed)), {"prompt_token_ids": prompt}, params)
            placed.append(time.perf_counter() - started)
            answers.append([])
            running += 1
        outputs = engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            index = int(output.request_id)
            steps[index] += 1
            firsts[index] = firsts[index] or now
            ends[index] = now
            answers[index] = list(output.outputs[0].token_ids)
            before[index] = before[index] or len(answers[index])
            running -= output.finished
    times = {"placed": placed, "firsts": firsts, "ends": ends, "before": before, "steps": steps}
    return {**times, "answers": answers, "seconds": time.perf_counter() - started}


if __name__ == "__main__":
    serve(load)
