"""`generate`: a decoding method for transformers' `model.generate(custom_generate=...)`.

transformers has prepared everything (inputs, processors, criteria, lengths); the engine then runs
the batch as it runs any other, with the model as its target. Rows of the batch may be at different
places: none waits for the slowest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.transformers.checks import check
from smart_decoding.integrations.transformers.drafting import borrowed, options_of, source_for
from smart_decoding.integrations.transformers.sequences import (
    SLACK,
    Host,
    HostParams,
    HostSequence,
    HostStop,
    Stream,
)
from smart_decoding.integrations.transformers.state import Report, layers_of, layout_of, state_of
from smart_decoding.integrations.transformers.target import HostTarget
from smart_decoding.models.cpu.kernel_check import warn_if_missing
from smart_decoding.models.target import pages_for

if TYPE_CHECKING:
    from smart_decoding.engine.request import Request
    from smart_decoding.integrations.transformers.sources import Drafting

PREFILL_ROWS = 4096  # prompt tokens of one forward


def generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generation_config: GenerationConfig | None = None,
    synced_gpus: bool = False,
    streamer: Any = None,
    speculative_config: Mapping[str, Any] | bool | None = None,
    **model_inputs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """Pass it to `model.generate` as `custom_generate`; never call it directly.

    speculative_config: then an argument of `model.generate`, such as {"method": "ngram", "policy":
    "smart"}; False decodes plainly. Raises ConfigError or ModelError, before any forward, for calls
    in the list of docs/transformers.md."""
    assert generation_config is not None, "pass it to model.generate as custom_generate"
    options = options_of(speculative_config)
    inputs = {**model_inputs, "assistant_model": _of_caller("assistant_model")}
    check(model, generation_config, logits_processor, inputs)
    warn_if_missing(model.device)
    prompts = _prompts(input_ids, model_inputs)
    layers = layers_of(model, model_inputs)
    source = source_for(model, options, generation_config.max_length)
    host = _host(generation_config, logits_processor, stopping_criteria, len(prompts))
    tree = layout_of(model, layers) == "tree"
    target = HostTarget(model, layers, tree, _eos(generation_config), host)
    sequences = [_sequence(i, ids, generation_config.max_length) for i, ids in enumerate(input_ids)]
    streamer = streamer if streamer is not None else _of_caller("streamer")
    stream = Stream(streamer, input_ids.shape[1], _pad(generation_config))
    with borrowed(options, target, len(prompts), source) as drafting:
        engine = _engine(target, drafting, generation_config, prompts)
        requests = _requests(engine, host, sequences, prompts, generation_config)
        try:
            _run(engine, host, requests, sequences, stream)
        finally:
            state_of(model).last = _report(drafting, target, requests)
    stream.end()
    return _output(input_ids, sequences, host, generation_config)


def _run(
    engine: Engine,
    host: Host,
    requests: Sequence[Request],
    sequences: Sequence[HostSequence],
    stream: Stream,
) -> None:
    """Step the engine until all requests have ended."""
    try:
        while engine.has_unfinished_requests:
            engine.step()
            for request, sequence in zip(requests, sequences, strict=True):
                if host.length is not None and sequence.length >= host.length:
                    engine.abort(request.id)
            stream.advance(sequences, [request.finished for request in requests], host.length)
    finally:
        for request in requests:
            engine.abort(request.id)


def last_report(model: PreTrainedModel) -> Report | None:
    """Return the counts of the last call on this model, or None before the first."""
    return state_of(model).last


def _prompts(ids: torch.Tensor, inputs: Mapping[str, Any]) -> list[list[int]]:
    """Return each row's tokens without its left padding."""
    mask = inputs.get("attention_mask")
    positions = inputs.get("position_ids")
    rows = []
    for i, row in enumerate(ids.tolist()):
        real = [1] * len(row) if mask is None else mask[i].tolist()
        start = real.index(1) if 1 in real else len(real)
        if len(real) != len(row) or real[start:] != [1] * (len(row) - start):
            raise ConfigError(
                "attention_mask must be ones after left padding: set padding_side='left'"
            )
        prompt = row[start:]
        if positions is not None:
            position = positions[i if len(positions) > 1 else 0].tolist()
            if position[start:] != list(range(len(prompt))):
                raise ConfigError(
                    "position_ids other than 0, 1, 2, ... are not supported: leave them out"
                )
        rows.append(prompt)
    return rows


def _host(config: GenerationConfig, processors: Any, criteria: Any, batch: int) -> Host:
    seed = 0
    if config.do_sample:  # a draw, so that torch.manual_seed repeats an answer
        seed = int(torch.randint(2**62, ()))
    whole = bool(config.return_dict_in_generate)
    return Host(
        processors,
        criteria,
        batch,
        limit=config.max_length,
        do_sample=config.do_sample,
        seed=seed,
        keep_scores=bool(whole and config.output_scores),
        keep_logits=bool(whole and config.output_logits),
    )


def _params(config: GenerationConfig, host: Host, prompt: int) -> SamplingParams:
    """Return parameters whose temperature is for the policy; the processors apply the real one.

    prompt: length with padding."""
    temperature = min(2.0, max(1e-4, config.temperature or 1.0)) if config.do_sample else 0.0
    make = SamplingParams if host.plain_greedy else HostParams
    return make(temperature=temperature, max_tokens=config.max_length - prompt, seed=host.seed)


def _engine(
    target: HostTarget,
    drafting: Drafting,
    config: GenerationConfig,
    prompts: Sequence[Sequence[int]],
) -> Engine:
    batch = len(prompts)
    longest = config.max_length + 1
    # Many pages cost nothing: memory grows only as they come into use.
    pages = pages_for((longest + SLACK) * batch, batch)
    chunk = config.prefill_chunk_size or min(sum(map(len, prompts)), PREFILL_ROWS)
    engine_config = EngineConfig(pages, longest, batch, chunk, prefix_caching=False)
    drafter = drafting.drafter(pages, longest, target.tree)
    return Engine(target, drafting.policy, drafter, engine_config, lambda _: lambda _: "")


def _sequence(index: int, ids: torch.Tensor, max_length: int) -> HostSequence:
    tokens = ids.new_zeros(max_length + SLACK)
    tokens[: len(ids)] = ids
    return HostSequence(index, tokens, len(ids))


def _requests(
    engine: Engine,
    host: Host,
    sequences: Sequence[HostSequence],
    prompts: Sequence[list[int]],
    config: GenerationConfig,
) -> list[Request]:
    """Submit a request for each row to the engine; return the requests."""
    requests = []
    for sequence, prompt in zip(sequences, prompts, strict=True):
        params = _params(config, host, sequence.length)
        (request,) = engine.add_request(str(sequence.index), prompt, params)
        request.sample = sequence.index
        request.history = sequence
        request.stop = HostStop(params, host, sequence)
        requests.append(request)
    return requests


def _eos(config: GenerationConfig) -> tuple[int, ...]:
    eos = config.eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(int(token) for token in eos)


def _pad(config: GenerationConfig) -> int:
    pad = getattr(config, "_pad_token_tensor", None)
    return 0 if pad is None else int(pad)


def _of_caller(name: str) -> Any:
    """Return an argument that the running `model.generate` does not pass on."""
    frame = sys._getframe(2)
    return frame.f_locals.get(name) if frame.f_code.co_name == "generate" else None


def _report(drafting: Drafting, target: HostTarget, requests: Sequence[Request]) -> Report:
    metrics = [request.metrics for request in requests]
    return Report(
        drafter=drafting.method,
        policy=drafting.policy.name,
        layout="tree" if target.tree else "chain",
        tokens=sum(len(request.output) for request in requests),
        rounds=max(m.rounds for m in metrics),
        drafted=sum(m.drafted for m in metrics),
        verified=sum(m.verified for m in metrics),
        accepted=sum(m.accepted for m in metrics),
    )


def _output(
    ids: torch.Tensor,
    sequences: Sequence[HostSequence],
    host: Host,
    config: GenerationConfig,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    length = host.length or max(sequence.length for sequence in sequences)
    lengths = [min(length, sequence.length) for sequence in sequences]
    out = ids.new_full((len(sequences), length), _pad(config))
    for row, sequence, n in zip(out, sequences, lengths, strict=True):
        row[:n] = sequence.tokens[:n]
    if not config.return_dict_in_generate:
        return out
    steps = [n - ids.shape[1] for n in lengths]
    scores = _steps([s.scores for s in sequences], steps) if host.keep_scores else None
    logits = _steps([s.logits for s in sequences], steps) if host.keep_logits else None
    return GenerateDecoderOnlyOutput(sequences=out, scores=scores, logits=logits)  # type: ignore[arg-type]


def _steps(
    kept: Sequence[Sequence[torch.Tensor]], steps: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """Return [batch, vocab] for each step; zeros where a row has ended."""
    blank = torch.zeros_like(next(rows[0] for rows in kept if rows))
    return tuple(
        torch.stack([rows[t] if t < n else blank for rows, n in zip(kept, steps, strict=True)])
        for t in range(max(steps))
    )
