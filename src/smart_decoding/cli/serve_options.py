"""The options of `smart serve`: from the command line, else a TOML file, else their defaults."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smart_decoding.cli.arguments import Option, json_object, key_value
from smart_decoding.cli.model_options import MODEL_OPTIONS
from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL

KEY_VARIABLE = "SMART_API_KEY"
OPTIONS = {
    "model": (
        *MODEL_OPTIONS,
        Option("max-num-seqs", int, 32, "answers that run at once"),
        Option("max-num-batched-tokens", int, None, "prompt tokens in a round (256, on CUDA 2048)"),
        Option(
            "kv-cache-tokens",
            int,
            None,
            "KV memory, in tokens over all requests (16 requests of 2048 tokens)",
        ),
        Option(
            "gpu-memory-utilization", float, 0.9, "part of a GPU's memory for weights and KV memory"
        ),
        Option("enable-prefix-caching", bool, True, "keep the beginnings of earlier prompts"),
        Option("seed", int, 0, "number that the seeds of requests without one derive from (0)"),
        Option(
            "override-generation-config",
            key_value,
            [],
            "K=V in place of a sampling default, such as temperature=0; may be repeated (none)",
        ),
    ),
    "pictures": (
        Option(
            "allowed-local-media-path", str, None, "folder of files that messages may name (none)"
        ),
        Option(
            "limit-mm-per-prompt",
            key_value,
            [],
            "pictures of one prompt, image=N or video=N; may be repeated (image=16, video=1)",
        ),
        Option(
            "mm-processor-option",
            key_value,
            [],
            "K=V for the image processor, such as max_pixels; may be repeated (none)",
        ),
        Option("max-image-pixels", int, 50_000_000, "largest picture, in pixels as it is sent"),
    ),
    "server": (
        Option("host", str, "127.0.0.1", "address to listen on; any but loopback needs an API key"),
        Option("port", int, 8000, "port to listen on; 0 takes a free one"),
        Option("served-model-name", str, None, "the name that clients ask for (MODEL)"),
        Option(
            "api-key",
            str,
            [],
            f"key that clients must send; may be repeated (${KEY_VARIABLE}, else none)",
        ),
        Option(
            "allowed-origins",
            str,
            [],
            "origin of web pages whose scripts may ask, '*' for all; may be repeated (none)",
        ),
        Option(
            "log-level",
            str,
            "info",
            "least severe messages to log",
            ("debug", "info", "warning", "error"),
        ),
        Option("shutdown-timeout", float, 30.0, "seconds for running answers to end after SIGTERM"),
    ),
    "limits": (
        Option("max-queue", int, 256, "most answers that wait; status 429 beyond"),
        Option(
            "queue-timeout", float, 60.0, "longest wait of an answer, in seconds; status 503 beyond"
        ),
        Option(
            "max-body", int, 4 * 2**20, "largest body of a request, in bytes; status 413 beyond"
        ),
        Option(
            "body-timeout",
            float,
            30.0,
            "longest time for a body to arrive, in seconds; status 408 beyond",
        ),
        Option(
            "head-timeout",
            float,
            10.0,
            "longest time for a request's head to arrive, in seconds; status 408 beyond",
        ),
        Option(
            "max-connections", int, 512, "most connections; beyond, the oldest idle one is closed"
        ),
        Option("max-n", int, 8, "most answers to one prompt"),
    ),
}
_MODEL = Option("model", str, DEFAULT_MODEL, "as of the command line")
_NO_KEY = Option("no-api-key", bool, False, "as of the command line (off)")
_ALL = {each.name: each for group in ((_MODEL, _NO_KEY), *OPTIONS.values()) for each in group}


def read_config(path: Path) -> dict[str, Any]:
    """Return the options of a TOML file. Raises ConfigError for unknown names and wrong values."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    named = {name.replace("_", "-"): value for name, value in content.items()}
    return {name: _checked(path, name, value) for name, value in named.items()}


def _checked(path: Path, name: str, value: Any) -> Any:
    if name not in _ALL:
        known = ", ".join(_ALL)
        raise ConfigError(f"{path} has an unknown option {name!r}; the options: {known}")
    option = _ALL[name]
    if option.kind is key_value:
        return list(value.items()) if isinstance(value, Mapping) else _refuse(path, name, value)
    if option.kind is json_object and isinstance(value, Mapping):
        return dict(value)
    values = value if option.many and isinstance(value, list) else [value]
    for each in values:
        if not _fits(option, each):
            _refuse(path, name, each)
    if option.kind is bool:
        return value
    try:
        parsed = [option.kind(each) for each in values]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return parsed if option.many else parsed[0]


def _fits(option: Option, value: Any) -> bool:
    if option.kind is bool or isinstance(value, bool):
        return option.kind is bool and isinstance(value, bool)
    if option.kind is int:
        return isinstance(value, int)
    if option.kind is float:
        return isinstance(value, int | float)
    return isinstance(value, str) and value in (option.choices or (value,))


def _refuse(path: Path, name: str, value: Any) -> Any:
    choices = _ALL[name].choices
    hint = f"; choose one of: {', '.join(choices)}" if choices else ""
    raise ConfigError(f"{path}: {name} = {value!r} is not allowed{hint}")


def merge(args: argparse.Namespace, file: Mapping[str, Any]) -> None:
    """Fill in what the command line left open."""
    for option in _ALL.values():
        if getattr(args, option.dest) is None:
            setattr(args, option.dest, file.get(option.name, option.default))
