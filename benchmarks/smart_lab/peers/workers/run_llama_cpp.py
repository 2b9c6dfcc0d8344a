"""llama.cpp through llama-cpp-python: a batched greedy loop over its C interface, or its own loop
with prompt lookup.

The batched loop is leaner than the package's: one decode call and one argmax per token. Prompt
lookup exists only in the package's loop, for one sequence."""

from __future__ import annotations

import time
from typing import Any

from lines import Answer, Settings, serve

CHUNK = 512  # prompt tokens of a decode call
# token, position, sequence, is its next token wanted
Row = tuple[int, int, int, bool]


def load(settings: Settings) -> tuple[dict[str, str], Answer]:
    import llama_cpp

    about = {"version": llama_cpp.__version__, "precision": settings["precision"]}
    return about, _with_lookup(llama_cpp, settings) if settings.get("lookup") else _batched(
        llama_cpp, settings
    )


def _with_lookup(llama_cpp: Any, settings: Settings) -> Answer:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    model = llama_cpp.Llama(
        settings["weights"],
        n_ctx=settings["context"],
        n_threads=settings["threads"],
        verbose=False,
        n_threads_batch=settings["threads"],
        draft_model=LlamaPromptLookupDecoding(num_pred_tokens=settings["lookup"]),
    )

    def answer(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        (prompt,) = prompts
        model.reset()
        started = time.perf_counter()
        at, answer = 0.0, []
        for token in model.generate(prompt, temp=0.0):
            answer.append(int(token))
            at = at or time.perf_counter()
            if len(answer) == tokens:
                break
        return {
            "seconds": time.perf_counter() - at,
            "tokens": tokens - 1,
            "answers": [answer],
            "prefill_seconds": at - started,
        }

    return answer


def _batched(llama_cpp: Any, settings: Settings) -> Answer:
    import numpy as np

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        settings["weights"].encode(), llama_cpp.llama_model_default_params()
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch = settings["context"] * settings["sequences"], CHUNK
    params.n_seq_max = settings["sequences"]
    params.n_threads = params.n_threads_batch = settings["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(max(CHUNK, settings["sequences"]), 0, 1)

    def decode(rows: list[Row]) -> list[int]:
        """The next tokens of the rows that want one, in order."""
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, int(wanted)
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        ends = [i for i, row in enumerate(rows) if row[3]]
        return [
            int(
                np.ctypeslib.as_array(
                    llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)
                ).argmax()
            )
            for i in ends
        ]

    def answer(prompts: list[list[int]], tokens: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = time.perf_counter()
        last = []
        for sequence, prompt in enumerate(prompts):
            rows = [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]
            for start in range(0, len(rows), CHUNK):
                found = decode(rows[start : start + CHUNK])
            last += found
        at = time.perf_counter()
        answers = [[token] for token in last]
        for step in range(tokens - 1):
            rows = [
                (a[-1], len(p) + step, i, True)
                for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
            ]
            for a, token in zip(answers, decode(rows), strict=True):
                a.append(token)
        return {
            "seconds": time.perf_counter() - at,
            "tokens": (tokens - 1) * len(prompts),
            "answers": answers,
            "prefill_seconds": at - started,
        }

    return answer


if __name__ == "__main__":
    serve(load)
