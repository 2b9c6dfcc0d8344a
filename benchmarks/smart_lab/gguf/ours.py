"""Our engine on a GGUF file: plain decoding, `smart` with several drafters, and forwards.

Needed by `gguf-speed`, whose files are the README's first table.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding import LLM, SamplingParams
from smart_decoding.drafters import METHODS
from smart_decoding.errors import ConfigError
from smart_decoding.kernels.weights import Arena, fastest_hint, read_seconds
from smart_decoding.profiling.measure import verification
from smart_lab.gguf.rates import Reply, Span, reply

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

# How weights are held -> the engine's options for it.
HELD: Mapping[str, Mapping[str, Any]] = {
    "auto": {},
    "exact": {"activations": "exact"},
    "expanded": {"quantization": "off"},
}
PLAIN = "plain"
READ = 1 << 29  # bytes of memory whose speed is measured, far more than caches hold


def speculative_configs(smart: Sequence[str], draft: Path | None) -> dict[str, dict[str, Any]]:
    """Name of a drafter -> its speculative_config. smart: names of methods, or such configs as
    JSON. Raises ConfigError for something else, and for a draft model without --draft."""
    found = {}
    for text in smart:
        config = _config(text)
        if config["method"] == "draft_model" and "model" not in config and draft is None:
            raise ConfigError(f"--smart {text} needs a draft model: give --draft FILE")
        if config["method"] in ("draft_model", "union") and draft is not None:
            config.setdefault("model", str(draft))
        found[text if text in METHODS else _short(config)] = config
    return found


def without_folders(text: str) -> str:
    """Return a method or config with only the name of a model's file."""
    config = _config(text)
    if text in METHODS or "model" not in config:
        return text
    return json.dumps({**config, "model": Path(config["model"]).name})


def _config(text: str) -> dict[str, Any]:
    if text in METHODS:
        return {"method": text}
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict) or config.get("method") not in METHODS:
        raise ConfigError(
            f"--smart {text} is neither one of {', '.join(METHODS)} nor a speculative_config in "
            'JSON such as {"method": "union"}'
        )
    return config


def _short(config: Mapping[str, Any]) -> str:
    """'union, policy=smart': no folders of this machine."""
    others = (
        f"{name}={Path(value).name if name == 'model' else value}"
        for name, value in config.items()
        if name != "method"
    )
    return ", ".join([config["method"], *others])


class Ours:
    """One way of holding the weights: an engine for plain decoding, and others that share them."""

    def __init__(
        self, model: Path, held: str, configs: Mapping[str, Any], slots: int, context: int
    ) -> None:
        self.held = held
        self.llm = LLM(
            model,
            speculative_config=False,
            max_num_seqs=slots,
            max_model_len=context,
            enable_prefix_caching=False,
            **HELD[held],
        )
        self._engines = {PLAIN: self.llm.engine}
        for name, config in configs.items():
            self._engines[f"smart {name}"] = self.llm.sharing_weights(config).engine

    def contestants(
        self, places: int
    ) -> dict[str, Callable[[Sequence[Sequence[int]], int], Reply]]:
        """Return name -> a function that answers a chunk of prompts, so many at once."""
        return {
            f"{self.held} {name}": partial(answer, engine, places)
            for name, engine in self._engines.items()
        }

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that a forward reads."""
        return self.llm.target.decoder.bytes_read

    @staticmethod
    def read_rate(calls: int) -> float:
        """Return the median bytes per second at which the kernels read memory like weights."""
        memory = Arena(READ).take(READ).fill_(1)
        return READ / statistics.median(read_seconds(memory, fastest_hint()) for _ in range(calls))

    def first_token(self, prompt: Sequence[int]) -> float:
        """Return seconds from a prompt to its first token."""
        return answer(self._engines[PLAIN], 1, [prompt], 1).prefill_seconds

    def forwards(self, rows: Sequence[int], context: int, turns: int) -> dict[int, float]:
        """Return rows of one sequence, all with logits -> the median seconds of a forward."""
        pages = self.llm.engine.config.pages
        found: dict[int, list[float]] = {count: [] for count in rows}
        runs = {}
        for count in rows:
            run = verification(self.llm.target, 1, count, context, pages)
            if run is None:
                raise ConfigError(f"{count} rows at {context} tokens do not fit into the KV memory")
            runs[count] = run
        for turn in range(turns + 1):  # the first one warms up
            for count, run in runs.items():
                start = time.perf_counter()
                run()
                found[count] += [time.perf_counter() - start] if turn else []
        return {count: sorted(seconds)[len(seconds) // 2] for count, seconds in found.items()}


class TimedRequest:
    """A request, and when it got its place, its first token and its end."""

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self._placed, self._first, self._end = now, math.nan, math.nan
        self._before = 0  # tokens of its first round

    def look(self, now: float) -> None:
        """Note the times after a step."""
        if math.isnan(self._first) and self.request.output:
            self._first, self._before = now, len(self.request.output)
        if self.request.finished:
            self._end = now

    @property
    def span(self) -> Span:
        """The times of a request that has ended."""
        later = len(self.request.output) - self._before
        return Span(self._first - self._placed, self._end - self._first, later)


def answer(
    engine: Engine,
    places: int,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Reply:
    """Answer prompts greedily, `places` at once, up to `tokens` tokens each."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    started = clock()
    requests: list[TimedRequest] = []
    running: list[TimedRequest] = []
    while running or len(requests) < len(prompts):
        for prompt in prompts[len(requests) :][: places - len(running)]:
            (request,) = engine.add_request(f"gguf-{len(requests)}", prompt, params)
            requests.append(TimedRequest(request, clock()))
            running.append(requests[-1])
        engine.step()
        now = clock()
        for each in running:
            each.look(now)
        running = [each for each in running if not each.request.finished]
    return reply(
        [each.span for each in requests],
        clock() - started,
        sum(each.request.metrics.rounds for each in requests),
        [list(each.request.output) for each in requests],
    )
