"""How a model is loaded and what speculates: options that `run`, `chat` and `serve` share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from smart_decoding.cli.arguments import ALLOW_SLOW, THREADS, Option, json_object, key_value
from smart_decoding.drafters import METHODS, check_draft, check_plain
from smart_decoding.errors import ConfigError
from smart_decoding.models.text import chat_template

DTYPES = ("bf16", "bfloat16", "fp32", "float32", "float", "auto", "half", "float16")


def policy_name(name: str) -> str:
    """`name` if it is a policy's; the error lists them."""
    from smart_decoding.core.policies import POLICIES  # imported late: numpy is slow

    if name not in POLICIES:
        known = ", ".join(POLICIES)
        raise argparse.ArgumentTypeError(f"unknown policy {name!r}; choose one of: {known}")
    return name


DTYPE = Option("dtype", str, "bf16", "type of weights and KV cache", DTYPES)
QUANTIZATION = Option(
    "quantization",
    str,
    None,
    "int8, int4: round the weights; off: expand a GGUF file's to bf16 (as the file stores them)",
    ("off", "int8", "int4"),
)
ACTIVATIONS = Option(
    "activations",
    str,
    "auto",
    "activations that meet quantised weights: exact, rounded to int8, or the faster of both",
    ("auto", "exact", "int8"),
)
DEVICE = Option("device", str, "auto", "auto, cpu or cuda")
METHOD = Option(
    "method",
    str,
    None,
    "kind of drafter (the model's own head or MTP layer, else a cached smaller model of its "
    "family, else ngram)",
    METHODS,
)
DRAFT = Option(
    "draft",
    str,
    None,
    "drafter: a head (its folder, GGUF file or hub id), or a smaller model of the same "
    "vocabulary (chosen as for --method)",
)
METHOD_OPTION = Option("method-option", key_value, [], "K=V for the method; may be repeated (none)")
CHAT_TEMPLATE = Option(
    "chat-template",
    str,
    None,
    "template that makes a prompt of a conversation: a file, or vicuna (the model's own)",
)
TRUST_PICKLE = Option(
    "trust-pickle",
    bool,
    False,
    "load pickled models and draft heads (pytorch_model.bin), tensors only (off)",
)
MODEL_OPTIONS = (
    DTYPE,
    QUANTIZATION,
    ACTIVATIONS,
    DEVICE,
    Option("enforce-eager", bool, False, "no CUDA graphs (off)"),
    ALLOW_SLOW,
    THREADS,
    METHOD,
    DRAFT,
    Option(
        "policy",
        policy_name,
        None,
        "rule that sizes the draft trees: off, chain, static, eagle2, paper, smart (smart)",
    ),
    Option("policy-option", key_value, [], "K=V for the policy; may be repeated (none)"),
    METHOD_OPTION,
    Option(
        "speculative-config",
        json_object,
        None,
        "method, drafter and policy in vLLM's JSON, such as "
        '{"method": "ngram", "num_speculative_tokens": 4} (none)',
    ),
    CHAT_TEMPLATE,
    TRUST_PICKLE,
    Option(
        "max-model-len",
        int,
        None,
        "longest prompt plus answer, in tokens (4096, and 16384 for 16 requests at once or more; "
        "the model's and the KV memory at most)",
        aliases=("-c", "--ctx-size"),
    ),
    Option(
        "generation-config",
        str,
        "auto",
        "source of the sampling defaults: auto (the model's generation_config.json or GGUF file), "
        "vllm (no file), or a folder with generation_config.json",
    ),
)


def llm_options(
    args: argparse.Namespace, options: Iterable[Option] = MODEL_OPTIONS
) -> dict[str, Any]:
    """Return the arguments of `LLM` among them, `speculative_config` and chat template checked."""
    from smart_decoding.engine_args import EngineArgs  # imported late: numpy is slow

    if args.chat_template is not None:
        chat_template.read(args.chat_template)
    known = {field.name for field in fields(EngineArgs)}
    taken = [option for option in options if option.dest in known]
    values = {option.dest: getattr(args, option.dest) for option in taken}
    return {
        **values,
        "speculative_config": speculative_config(args),
        **{option.dest: dict(values[option.dest]) for option in taken if option.kind is key_value},
    }


def speculative_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """Return the argument of `LLM`, or None without any of these options.

    Raises ConfigError for unknown options and bad values.
    """
    policy_options = once_each(args.policy_option)
    method_options = once_each(args.method_option)
    if args.speculative_config is not None:
        if args.method or args.policy or args.draft or policy_options or method_options:
            raise ConfigError(
                "--speculative-config takes the place of --method, --draft, --policy and their "
                "options: leave out one or the other"
            )
        return dict(args.speculative_config)
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


def once_each(options: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dict. Raises ConfigError for a name that is given twice."""
    values = dict(options)
    if len(values) < len(options):
        names = [name for name, _ in options]
        raise ConfigError(f"option {max(names, key=names.count)!r} is given more than once")
    return values
