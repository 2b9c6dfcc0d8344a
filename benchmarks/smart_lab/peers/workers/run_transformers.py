"""transformers' `generate`: plain, or assisted by prompt lookup."""

from __future__ import annotations

import time
from typing import Any

from lines import Answer, Settings, serve


def load(settings: Settings) -> tuple[dict[str, str], Answer]:
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[settings["dtype"]]
    loader: Any = transformers.AutoModelForCausalLM
    model = loader.from_pretrained(settings["weights"], dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # answers have a fixed length
    lookup = {"prompt_lookup_num_tokens": settings["lookup"]} if settings.get("lookup") else {}

    def answer(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        first: list[tuple[float, int]] = []

        def watch(input_ids: Any, scores: Any, **_: Any) -> Any:
            if not first:
                first.append((time.perf_counter(), input_ids.shape[1] - longest))
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=transformers.StoppingCriteriaList([watch]),
                **lookup,
            )
        ended = time.perf_counter()
        answers = [row[longest:].tolist() for row in out]
        at, count = first[0]
        return {
            "seconds": ended - at,
            "tokens": sum(len(a) - count for a in answers),
            "answers": answers,
            "prefill_seconds": at - started,
        }

    about = {
        "version": f"{transformers.__version__}, torch {torch.__version__}",
        "precision": settings["dtype"],
    }
    return about, answer


if __name__ == "__main__":
    serve(load)
