"""`smart serve`: an OpenAI-compatible server. Options come from the command line, else from
--config, else defaults."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smart_decoding.bench.arguments import ALLOW_SLOW
from smart_decoding.cli.run import DTYPES, key_value, policy_name, speculative_config
from smart_decoding.drafters import METHODS
from smart_decoding.errors import ConfigError
from smart_decoding.models.registry import DEFAULT_MODEL

KEY_VARIABLE = "SMART_API_KEY"
SPINS = "1000"  # looks at a barrier before a thread sleeps; libgomp's own 300,000 take milliseconds


@dataclass(frozen=True, slots=True)
class Option:
    """One option: `--name`, or `name = value` in a configuration file. `many`: may be given several
    times."""

    name: str
    kind: Callable[[str], Any]
    default: Any
    help: str
    choices: tuple[str, ...] | None = None
    many: bool = False
    shown: str = ""  # the default in words

    @property
    def dest(self) -> str:
        return self.name.replace("-", "_")


OPTIONS = {
    "model": (
        Option("dtype", str, "bf16", "of weights and KV cache", DTYPES),
        Option("device", str, "auto", "auto, cpu or cuda"),
        Option("enforce-eager", bool, False, "no CUDA graphs", shown="off"),
        Option("allow-slow", bool, False, ALLOW_SLOW, shown="off: an error"),
        Option(
            "method",
            str,
            None,
            "what drafts",
            METHODS,
            shown="the model's own head if it has one, else ngram",
        ),
        Option(
            "draft", str, None, "the head's folder or the draft model", shown="the model's own head"
        ),
        Option(
            "policy",
            policy_name,
            None,
            "what sizes the trees: off, chain, static, eagle2, paper, smart",
            shown="smart",
        ),
        Option(
            "policy-option",
            key_value,
            [],
            "K=V for the policy; may be repeated",
            many=True,
            shown="none",
        ),
        Option(
            "method-option",
            key_value,
            [],
            "K=V for the method; may be repeated",
            many=True,
            shown="none",
        ),
        Option(
            "trust-pickle",
            bool,
            False,
            "load draft heads that are pickled (pytorch_model.bin), tensors only",
            shown="off",
        ),
        Option("max-num-seqs", int, 32, "answers that run at a time"),
        Option("max-num-batched-tokens", int, 256, "prompt tokens in a round"),
        Option(
            "max-model-len",
            int,
            None,
            "longest prompt plus answer, in tokens",
            shown="the model's, 4096 and the KV memory at most",
        ),
        Option(
            "kv-cache-tokens",
            int,
            None,
            "KV memory, in tokens over all requests",
            shown="16 requests of 2048 tokens",
        ),
        Option("seed", int, 0, "what the seeds of requests without one are drawn from"),
    ),
    "pictures": (
        Option(
            "allowed-local-media-path",
            str,
            None,
            "folder of files that messages may name",
            shown="none",
        ),
        Option(
            "limit-mm-per-prompt",
            key_value,
            [],
            "image=N or video=N, of one prompt; may be repeated",
            many=True,
            shown="image=16, video=1",
        ),
        Option(
            "mm-processor-option",
            key_value,
            [],
            "K=V for the image processor, such as max_pixels; may be repeated",
            many=True,
            shown="none",
        ),
        Option(
            "max-image-pixels", int, 50_000_000, "of one picture as it is sent; more are refused"
        ),
    ),
    "server": (
        Option("host", str, "127.0.0.1", "address to listen on; any but loopback needs an API key"),
        Option("port", int, 8000, "port to listen on; 0 takes a free one"),
        Option("served-model-name", str, None, "the name that clients ask for", shown="MODEL"),
        Option(
            "api-key",
            str,
            [],
            "key that clients must send; may be repeated",
            many=True,
            shown=f"${KEY_VARIABLE}, else none",
        ),
        Option(
            "log-level",
            str,
            "info",
            "debug, info, warning or error",
            ("debug", "info", "warning", "error"),
        ),
        Option(
            "shutdown-timeout", float, 30.0, "seconds that running answers get to end after SIGTERM"
        ),
    ),
    "limits": (
        Option("max-queue", int, 256, "answers that may wait beyond the running ones; then 429"),
        Option("queue-timeout", float, 60.0, "seconds that an answer may wait; then 503"),
        Option("max-body", int, 4 * 2**20, "bytes of a request's body; then 413"),
        Option("body-timeout", float, 30.0, "seconds that a body may take to arrive; then 408"),
        Option(
            "head-timeout",
            float,
            10.0,
            "seconds that a request's head may take to arrive; then 408",
        ),
        Option("max-connections", int, 512, "connections that may be open at a time; then 503"),
        Option("max-n", int, 8, "answers to one prompt"),
    ),
}
_ALL = {option.name: option for group in OPTIONS.values() for option in group}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart serve`. None stands for 'not given', so that a file can say it."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help=f"name, hub id, folder or GGUF file ({DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file of these options, such as port = 8080; the command line wins (none)",
    )
    parser.add_argument(
        "--no-api-key",
        action="store_true",
        default=None,
        help="serve without a key beyond loopback too, under any host name (off)",
    )
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            shown = option.shown or option.default
            words = f"{option.help} ({shown})"
            if option.kind is bool:
                group.add_argument(
                    f"--{option.name}", action="store_true", default=None, help=words
                )
                continue
            action: dict[str, Any] = {"action": "append"} if option.many else {}
            metavar = "K=V" if option.kind is key_value else option.name.rpartition("-")[2].upper()
            metavar = None if option.choices else metavar
            group.add_argument(
                f"--{option.name}",
                type=option.kind,
                choices=option.choices,
                metavar=metavar,
                help=words,
                **action,
            )


def main(args: argparse.Namespace) -> int:
    """Checks everything that can be checked without the model, then serves."""
    share_cores()
    merge(args, read_config(args.config) if args.config else {})
    config = speculative_config(args)
    try:
        from smart_decoding.server.launch import serve
        from smart_decoding.server.settings import ServerSettings
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"smart serve needs {error.name}: in the clone, pip install -e '.[serve]'"
        ) from error
    names = (
        "host",
        "port",
        "max_queue",
        "queue_timeout",
        "max_body",
        "body_timeout",
        "max_n",
        "shutdown_timeout",
        "log_level",
        "head_timeout",
        "max_connections",
    )
    from_environment = os.environ.get(KEY_VARIABLE) if not args.no_api_key else None
    keys = args.api_key or ([from_environment] if from_environment else [])
    settings = ServerSettings(
        args.served_model_name or args.model,
        api_keys=tuple(keys),
        no_api_key=bool(args.no_api_key),
        **{name: getattr(args, name) for name in names},
    )
    from smart_decoding.llm import LLM
    from smart_decoding.models.kernel_check import require_kernels
    from smart_decoding.models.target import device_of

    require_kernels(
        device_of(args.device), args.allow_slow
    )  # the server loads the model later, on another thread
    return serve(
        lambda: LLM(
            args.model,
            speculative_config=config,
            dtype=args.dtype,
            device=args.device,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            kv_cache_tokens=args.kv_cache_tokens,
            trust_pickle=args.trust_pickle,
            seed=args.seed,
            enforce_eager=args.enforce_eager,
            allow_slow=args.allow_slow,
            allowed_local_media_path=args.allowed_local_media_path,
            max_image_pixels=args.max_image_pixels,
            limit_mm_per_prompt=dict(args.limit_mm_per_prompt),
            mm_processor_kwargs=dict(args.mm_processor_option),
        ),
        settings,
    )


def share_cores() -> None:
    """Lets threads that wait for each other sleep soon: beside one other busy process a server on
    two cores is then twice as fast, and alone as fast as before. Must come before torch, whose
    OpenMP reads it once."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def read_config(path: Path) -> dict[str, Any]:
    """The options of a TOML file, checked. Raises ConfigError for unknown names and values of the
    wrong kind."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return {
        name.replace("_", "-"): _checked(path, name.replace("_", "-"), value)
        for name, value in content.items()
    }


def _checked(path: Path, name: str, value: Any) -> Any:
    if name in ("model", "no-api-key"):
        good = isinstance(value, bool if name == "no-api-key" else str)
        return value if good else _refuse(path, name, value)
    if name not in _ALL:
        known = ", ".join(["model", "no-api-key", *_ALL])
        raise ConfigError(f"{path} has an unknown option {name!r}; the options: {known}")
    option = _ALL[name]
    if option.kind is key_value:
        return list(value.items()) if isinstance(value, Mapping) else _refuse(path, name, value)
    if option.kind is bool:
        return value if isinstance(value, bool) else _refuse(path, name, value)
    values = value if option.many and isinstance(value, list) else [value]
    wanted: tuple[type, ...] = {int: (int,), float: (int, float)}.get(option.kind, (str,))  # type: ignore[call-overload]
    for each in values:
        if (
            not isinstance(each, wanted)
            or isinstance(each, bool)
            or each not in (option.choices or (each,))
        ):
            _refuse(path, name, each)
    try:
        parsed = [option.kind(each) for each in values]
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return parsed if option.many else parsed[0]


def _refuse(path: Path, name: str, value: Any) -> Any:
    choices = _ALL[name].choices if name in _ALL else None
    hint = f"; choose one of: {', '.join(choices)}" if choices else ""
    raise ConfigError(f"{path}: {name} = {value!r} is not allowed{hint}")


def merge(args: argparse.Namespace, file: Mapping[str, Any]) -> None:
    """Fills in what the command line left open."""
    for option in _ALL.values():
        if getattr(args, option.dest) is None:
            setattr(args, option.dest, file.get(option.name, option.default))
    args.model = args.model or file.get("model", DEFAULT_MODEL)
    args.no_api_key = file.get("no-api-key", False) if args.no_api_key is None else args.no_api_key
