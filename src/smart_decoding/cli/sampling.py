"""How `run` and `chat` sample: as the user says, else as the model recommends, else greedily."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.arguments import Option
from smart_decoding.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

SAMPLING = (
    Option(
        "temperature",
        float,
        None,
        "0 takes the likeliest token, more draws more freely (the model's, else 0)",
        aliases=("--temp",),
    ),
    Option(
        "top-p",
        float,
        None,
        "draw from the likeliest tokens of this probability (the model's, else 1.0)",
    ),
    Option("top-k", int, None, "draw from this many likeliest tokens (the model's, else 0: all)"),
    Option(
        "min-p",
        float,
        None,
        "draw from tokens of at least this part of the likeliest one's probability (the model's, "
        "else 0.0)",
    ),
    Option(
        "repetition-penalty",
        float,
        None,
        "lower the scores of tokens in prompt and answer by this factor (the model's, else 1.0)",
        aliases=("--repeat-penalty",),
    ),
    Option(
        "seed",
        int,
        None,
        "the same seed gives the same answer under every policy (a new one each time, which "
        "--stats names)",
    ),
    Option(
        "max-tokens", int, None, "longest answer, -1: to the end of the context", aliases=("-n",)
    ),
)

# Names that /set of `smart chat` takes, Ollama's among them
PARAMETERS = {
    flag.lstrip("-").replace("-", "_"): option
    for option in SAMPLING
    for flag in (option.name, *option.aliases)
}
PARAMETERS["num_predict"] = PARAMETERS["max_tokens"]


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add SAMPLING. max_tokens: shown as the default, as for `params_of`."""
    group = parser.add_argument_group("sampling")
    for option in SAMPLING:
        if option.dest == "max_tokens":
            option = replace(option, default=max_tokens)
        option.add_to(group, unset=True)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters that the command line gives. Raises ConfigError for a bad value."""
    values = {option.dest: getattr(args, option.dest) for option in SAMPLING}
    return checked({name: value for name, value in values.items() if value is not None})


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

    values: what the user gives. The model's own defaults give the rest, as in `smart serve`. A
    model that recommends no temperature is decoded greedily, unlike there: most people
    who ask it once want its likeliest answer. max_tokens: where neither has it."""
    defaults = {"temperature": 0.0, "max_tokens": max_tokens, **llm.default_sampling_params}
    params = SamplingParams(**{**defaults, **values})
    if params.seed is None and not params.greedy:
        # the engine's own draws are the same in every process
        params = replace(params, seed=secrets.randbits(32))
    return params
