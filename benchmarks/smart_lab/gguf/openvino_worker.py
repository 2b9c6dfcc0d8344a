"""OpenVINO GenAI, plain or with its prompt lookup, of a GGUF file that it reads itself.

Needed by `gguf-speed --openvino`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smart_lab.gguf.worker import Answer, Settings, answered, serve

CACHE = 1  # GB of the KV cache
LONGEST_NGRAM = 3  # that prompt lookup looks for


class OpenvinoSteps:
    """Its pipeline, for requests with the same config. tensor: makes its input of token ids."""

    def __init__(self, pipeline: Any, config: Any, tensor: Callable[[list[int]], Any]) -> None:
        self._pipeline, self._config, self._tensor = pipeline, config, tensor
        self._running: dict[int, tuple[Any, list[int]]] = {}

    def add(self, number: int, prompt: list[int]) -> None:
        """One more request."""
        handle = self._pipeline.add_request(number, self._tensor(prompt), self._config)
        self._running[number] = handle, []

    def step(self) -> list[tuple[int, list[int], bool]]:
        """Number of a request, its tokens so far, and whether it ended. Raises MemoryError for one
        that it gave up."""
        self._pipeline.step()
        found = []
        for number, (handle, tokens) in list(self._running.items()):
            while handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
            status = handle.get_status().name
            if status not in ("RUNNING", "FINISHED"):
                raise MemoryError(f"a request was given up: {status}")
            if status == "FINISHED":
                del self._running[number]
            found.append((number, list(tokens), status == "FINISHED"))
        return found


def load(settings: Settings) -> tuple[dict[str, str], Answer]:
    """Loads the file; answers end at the tokens `stops`."""
    import numpy
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = settings["sequences"]
    scheduler.cache_size = CACHE
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        settings["weights"],
        scheduler,
        "CPU",
        properties={"prompt_lookup": True} if settings["ahead"] else {},
    )

    def tensor(prompt: list[int]) -> Any:
        return openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))

    def answer(prompts: list[list[int]], tokens: int, places: int, ahead: int) -> dict[str, Any]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.do_sample = False
        config.stop_token_ids = set(settings["stops"])
        if ahead:
            config.num_assistant_tokens = ahead
            config.max_ngram_size = LONGEST_NGRAM
        return answered(OpenvinoSteps(pipeline, config, tensor), prompts, places)

    return {"version": openvino_genai.__version__}, answer


if __name__ == "__main__":
    serve(load)
