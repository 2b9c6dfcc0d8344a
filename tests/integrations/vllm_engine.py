"""A process with one vLLM engine: python vllm_engine.py LLM_ARGUMENTS JOB, both JSON; answers with
a last line of JSON.

Job: batches (sizes to generate for), contract (compare names), pretend_ranks (data-parallel size
that the scheduler is told)."""

from __future__ import annotations

import json
import sys
from typing import Any

PROMPTS = [
    "Repeat this line five times: the quick brown fox jumps over the lazy dog.",
    "Write a Python function that returns the sum of a list, "
    "then write it again with a comment on every line.",
    "Why is the sky blue?",
    "List the days of the week, then list them again in reverse.",
]


def main(arguments: dict[str, Any], job: dict[str, Any]) -> None:
    import vllm

    if "pretend_ranks" in job:
        pretend_ranks(job["pretend_ranks"])
    llm = vllm.LLM(**{"disable_log_stats": False, "enable_prefix_caching": False, **arguments})
    params = vllm.SamplingParams(temperature=0.0, max_tokens=96, ignore_eos=True)
    batches = [messages(batch) for batch in job["batches"]]
    outputs = [llm.chat(batch, params, use_tqdm=False) for batch in batches]
    found = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    counts = {n: found.get(f"vllm:spec_decode_num_{n}_tokens", 0) for n in ("draft", "accepted")}
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    controller = getattr(scheduler, "controller", None)
    answer: dict[str, Any] = {
        "tokens": [[list(output.outputs[0].token_ids) for output in batch] for batch in outputs],
        "texts": [[output.outputs[0].text for output in batch] for batch in outputs],
        "vllm": {"drafted": counts["draft"], "accepted": counts["accepted"]},
        "counters": vars(controller.counters) if controller else None,
    }
    if job.get("contract"):
        from smart_decoding.integrations.vllm import seams

        gone = [*seams.missing_attributes(scheduler), *seams.missing()]
        answer |= {"missing": gone, "lookup": type(scheduler.dynamic_sd_lookup).__name__}
    print("\n" + json.dumps(answer), flush=True)


def pretend_ranks(size: int) -> None:
    """Sets the data-parallel size after all has been loaded, just before the scheduler is made."""
    from vllm.v1.engine.core import EngineCore

    original = EngineCore._initialize_kv_caches

    def then(self: Any, vllm_config: Any, *more: Any, **named: Any) -> Any:
        result = original(self, vllm_config, *more, **named)
        vllm_config.parallel_config.data_parallel_size = size
        return result

    EngineCore._initialize_kv_caches = then  # type: ignore[method-assign]


def messages(batch: int) -> list[Any]:
    """The conversations of a batch of that size."""
    return [[{"role": "user", "content": f"{PROMPTS[i % 4]} {i // 4 or ''}"}] for i in range(batch)]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), json.loads(sys.argv[2]))
