"""How `run` and `chat` sample: as the user says, else as the model recommends, else greedily."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smart_decoding.cli import habits
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.options import add_options, given, offered

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

SAMPLING = offered(SamplingParams)

# Names that /set of `smart chat` takes, Ollama's among them: ours.
PARAMETERS = {each.name: each for each in SAMPLING}
PARAMETERS |= {
    theirs.lstrip("-").replace("-", "_"): PARAMETERS[name]
    for theirs, ours in habits.SAME.items()
    if (name := ours.lstrip("-").replace("-", "_")) in PARAMETERS
}
PARAMETERS["num_predict"] = PARAMETERS["max_tokens"]


def _defaults(max_tokens: int) -> dict[str, Any]:
    """Return what stands where neither user nor model says anything, unlike in `smart serve`: most
    people who ask a model once want its likeliest answer."""
    return {"temperature": 0.0, "max_tokens": max_tokens}


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the options of SamplingParams. max_tokens: shown as the default, as for `params_of`."""
    defaults = {each.name: each.default for each in SAMPLING} | _defaults(max_tokens)
    usual = {name: f"the model's, else {value}" for name, value in defaults.items()}
    usual["seed"] = "a new one each time, which --stats names"
    group = parser.add_argument_group("sampling")
    add_options(group, SamplingParams, unset=True, usual=usual)


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters that the command line gives. Raises ConfigError for a bad value."""
    return checked(given(args, SamplingParams))


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as `SamplingParams` takes them. Raises ConfigError for a bad value."""
    values = dict(values)
    if values.get("max_tokens") == -1:  # as in llama.cpp: up to the context's end
        values["max_tokens"] = None
    if values.get("seed") == -1:  # likewise: a new one for each answer
        del values["seed"]
    SamplingParams(**values)
    return values


def params_of(llm: LLM, values: Mapping[str, Any], max_tokens: int) -> SamplingParams:
    """Return the parameters of one answer. Draws without a seed get a new one.

    values: what the user gives; the model's own defaults give the rest, then `max_tokens`."""
    defaults = {**_defaults(max_tokens), **llm.default_sampling_params}
    params = SamplingParams(**{**defaults, **values})
    if params.seed is None and not params.greedy:
        # the engine's own draws are the same in every process
        params = replace(params, seed=secrets.randbits(32))
    return params
