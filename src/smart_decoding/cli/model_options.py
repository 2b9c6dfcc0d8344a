"""How a model is loaded and what drafts: options that `run`, `chat` and `serve` share."""

from __future__ import annotations

from argparse import Namespace, _ActionsContainer
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from smart_decoding.cli.arguments import add_threads
from smart_decoding.drafters import METHODS, check_draft, check_plain
from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import ConfigError
from smart_decoding.models.text import chat_template
from smart_decoding.options import add_options, given, option

# Options of `EngineArgs` that these commands take.
LOADING = (
    "dtype",
    "quantization",
    "activations",
    "device",
    "enforce_eager",
    "allow_slow",
    "chat_template",
    "trust_pickle",
    "max_model_len",
    "generation_config",
    "speculative_config",
)


@dataclass(frozen=True)
class DraftOptions:
    """What drafts and when, in place of `speculative_config`."""

    method: str | None = option(
        None,
        "kind of drafter",
        usual="the model's own head or MTP layer, else a cached smaller model of its family, else "
        "ngram",
        choices=METHODS,
    )
    draft: str | None = option(
        None,
        "drafter: a head (its folder, GGUF file or hub id), or a smaller model of the same "
        "vocabulary",
        usual="chosen as for --method",
    )
    method_option: Mapping[str, Any] | None = option(None, "option of the method")
    policy: str | None = option(
        None,
        "rule that sizes the draft trees: off, chain, static, eagle2, paper, smart",
        usual="smart",
    )
    policy_option: Mapping[str, Any] | None = option(None, "option of the policy")


def add_model_options(parser: _ActionsContainer) -> None:
    """Add the model, None by default, and how it is loaded."""
    add_options(parser, EngineArgs, ("model",), unset=True)
    add_options(parser, EngineArgs, LOADING)
    add_drafting(parser)


def add_drafting(parser: _ActionsContainer, *, unset: bool = False) -> None:
    """Add what drafts, and --threads. unset: None stands for 'not given'."""
    add_options(parser, DraftOptions, unset=unset)
    add_threads(parser)


def add_allow_slow(parser: _ActionsContainer) -> None:
    """Add --allow-slow and --threads, of every command that loads a model."""
    add_options(parser, EngineArgs, ("allow_slow",))
    add_threads(parser)


def llm_options(args: Namespace, names: Collection[str] = LOADING) -> dict[str, Any]:
    """Return the arguments of `LLM`: those named, or all. Checks `speculative_config` and the chat
    template, and raises ConfigError."""
    if args.chat_template is not None:
        chat_template.read(args.chat_template)
    return {**given(args, EngineArgs, names), "speculative_config": speculative_config(args)}


def speculative_config(args: Namespace) -> Any:
    """Return the argument of `LLM`, or None without any of these options.

    Raises ConfigError for unknown options and bad values.
    """
    policy_options = args.policy_option or {}
    method_options = args.method_option or {}
    if args.speculative_config is not None:
        if args.method or args.policy or args.draft or policy_options or method_options:
            raise ConfigError(
                "--speculative-config takes the place of --method, --draft, --policy and their "
                "options: leave out one or the other"
            )
        return args.speculative_config
    if args.policy or policy_options:
        from smart_decoding.core.policies import check_policy  # imported late: numpy is slow

        check_policy(args.policy or "smart", policy_options)
    both = sorted(set(policy_options) & set(method_options))
    if both:
        raise ConfigError(
            f"option {both[0]!r} is given for the policy and for the method: give it once"
        )
    if args.draft and "model" in method_options:
        raise ConfigError(
            "the model to draft with is given by --draft and by --method-option: give it once"
        )
    check_plain(args.method, args.policy)
    check_draft(args.method, args.draft or method_options.get("model"), "--draft MODEL")
    named = {"method": args.method, "policy": args.policy, "model": args.draft}
    chosen = {name: value for name, value in named.items() if value is not None}
    return {**chosen, **policy_options, **method_options} or None
