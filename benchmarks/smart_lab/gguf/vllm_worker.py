"""vLLM's CPU build, plain or with its n-gram drafter.

Needed by `gguf-speed --vllm` and so by results/xeon-amx/README.md ("with a queue, and in vLLM").
"""

from __future__ import annotations

import os
from typing import Any

from smart_lab.gguf.worker import Answer, Settings, answered, serve


class VllmSteps:
    """Its engine, for requests with the same parameters."""

    def __init__(self, engine: Any, params: Any) -> None:
        self._engine, self._params = engine, params

    def add(self, number: int, prompt: list[int]) -> None:
        """One more request."""
        self._engine.add_request(str(number), {"prompt_token_ids": prompt}, self._params)

    def step(self) -> list[tuple[int, list[int], bool]]:
        """Number of a request, its tokens so far, and whether it ended."""
        return [
            (int(output.request_id), list(output.outputs[0].token_ids), output.finished)
            for output in self._engine.step()
        ]


def load(settings: Settings) -> tuple[dict[str, str], Answer]:
    """Loads vLLM; answers end at the tokens `stops`."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND=settings["cores"],
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    import vllm

    drafter = {
        "method": "ngram",
        "num_speculative_tokens": settings["ahead"],
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
        speculative_config=drafter if settings["ahead"] else None,
    )

    def answer(prompts: list[list[int]], tokens: int, places: int) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            stop_token_ids=settings["stops"],
            detokenize=False,
        )
        return answered(VllmSteps(model.llm_engine, params), prompts, places)

    return {"version": vllm.__version__}, answer


if __name__ == "__main__":
    serve(load)
