"""vLLM's CPU build in an environment of its own, with nothing of ours beside it: plain, or with its
n-gram drafter. Needed by gguf/vllm.py, which starts it by its path.

It speaks JSON lines. In: a line of settings, then a line per job {"prompts": [[id, ...], ...],
"tokens": count, "places": count}. Out: a line that says it is ready, with its version, then one per
job.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]
Answer = Callable[..., dict[str, Any]]


def serve(load: Callable[[Settings], tuple[dict[str, str], Answer]]) -> None:
    """Loads once, then answers until there are no more lines. What libraries print goes to standard
    error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        about, answer = load(json.loads(sys.stdin.readline()))
        say(about)
        for line in sys.stdin:
            say(answer(**json.loads(line)))
    except Exception as error:  # whatever vLLM raises is its result
        say({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        raise


def load(settings: Settings) -> tuple[dict[str, str], Answer]:
    """Loads vLLM; answers end at the tokens `stops`."""
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
        dtype="bfloat16",
        max_model_len=settings["context"],
        enable_prefix_caching=False,
        max_num_seqs=settings["sequences"],
        skip_tokenizer_init=True,
        speculative_config=drafter if ngram else None,
    )

    def answer(prompts: list[list[int]], tokens: int, places: int) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            stop_token_ids=settings["stops"],
            detokenize=False,
        )
        return stepped(model.llm_engine, prompts, params, places)

    return {"version": vllm.__version__}, answer


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
