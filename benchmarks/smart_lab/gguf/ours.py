"""Our engine on a GGUF file: plain decoding, `smart` with several drafters, and forwards."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding import LLM, SamplingParams
from smart_decoding.drafters import METHODS
from smart_decoding.errors import ConfigError
from smart_decoding.profiling.measure import verification
from smart_lab.gguf.rates import Reply, Span, decode_rate

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

# How weights are held -> the engine's options for it.
HELD: Mapping[str, Mapping[str, Any]] = {
    "as-stored": {},
    "int8": {"activations": "int8"},
    "expanded": {"quantization": "off"},
}
PLAIN = "plain"


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
    """A method or config as it was given, of a model's file the name alone."""
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

    def contestants(self) -> dict[str, Callable[[Sequence[Sequence[int]], int], Reply]]:
        """Name -> what answers a chunk of prompts."""
        return {
            f"{self.held} {name}": partial(answer, engine) for name, engine in self._engines.items()
        }

    def forwards(self, rows: Sequence[int], context: int, turns: int) -> dict[int, float]:
        """Rows of one sequence, all of which give logits -> the median seconds of a forward."""
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


def answer(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Reply:
    """All prompts at once, greedy, up to so many tokens each."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    started = clock()
    requests = [
        engine.add_request(f"gguf-{i}", prompt, params)[0] for i, prompt in enumerate(prompts)
    ]
    begin = math.nan  # when each has a token
    before = [0] * len(requests)
    ends: dict[str, float] = {}
    while engine.has_unfinished_requests:
        engine.step()
        now = clock() - started
        ends |= {r.id: now for r in requests if r.finished and r.id not in ends}
        if math.isnan(begin) and all(r.output or r.finished for r in requests):
            begin, before = now, [len(request.output) for request in requests]
    seconds = clock() - started
    spans = [
        Span(begin, ends[request.id], len(request.output) - count)
        for request, count in zip(requests, before, strict=True)
    ]
    return Reply(
        decode_rate(spans),
        sum(len(request.output) for request in requests) / seconds,
        begin,
        _per_round(requests),
        [list(request.output) for request in requests],
    )


def _per_round(requests: Sequence[Request]) -> float:
    rounds = sum(request.metrics.rounds for request in requests)
    later = sum(len(request.output) - 1 for request in requests)
    return later / rounds if rounds else math.nan
