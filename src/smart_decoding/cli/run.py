"""`smart run`: the answer to one prompt, streamed. Everything that can be wrong is checked before a
model is loaded."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.arguments import add_allow_slow
from smart_decoding.drafters import METHODS, check_draft, check_plain
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError
from smart_decoding.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.llm import LLM, CompletionOutput, Prompt
    from smart_decoding.multimodal.prompts import MediaPrompt

DTYPES = ("bf16", "bfloat16", "fp32", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart run`."""
    parser.add_argument("prompt", help="the user's message; - reads it from standard input")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture the message is about, for models that see; may be repeated",
    )
    add_model_arguments(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    group.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass"
    )
    group.add_argument(
        "--top-k", type=int, default=0, help="draw from so many likeliest tokens (0: all)"
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="draw from tokens this likely, relative to the likeliest",
    )
    group.add_argument(
        "--seed",
        type=int,
        help="the same seed gives the same answer under every policy (a new one "
        "each time, which --stats tells)",
    )
    group.add_argument("--max-tokens", type=int, default=256, help="default 256")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--stats", action="store_true", help="one line of speed and rows on standard error"
    )


def key_value(text: str) -> tuple[str, Any]:
    """'k=v' as (k, v), v read as JSON (a number, true, false, a list) or else taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form option=value")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, how it is loaded, and what speculates."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"name, hub id, folder or GGUF file ({DEFAULT_MODEL})")
    group.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of weights and KV cache (bf16)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu or cuda")
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="TOKENS",
        help="longest prompt plus answer (the model's, 4096 at most)",
    )
    group.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs (off)")
    add_allow_slow(group)
    group.add_argument(
        "--method", choices=METHODS, help="what drafts (the model's own head, if it has one)"
    )
    group.add_argument(
        "--draft",
        metavar="MODEL",
        help="what the method drafts with: a head's folder, or for "
        "draft_model any smaller model of the same vocabulary",
    )
    group.add_argument(
        "--trust-pickle",
        action="store_true",
        help="load a draft head that is pickled, tensors only (off: safetensors only)",
    )
    group.add_argument(
        "--policy",
        type=policy_name,
        metavar="POLICY",
        help="what sizes the trees: off, chain, static, eagle2, paper, smart (default)",
    )
    for kind in ("policy", "method"):
        group.add_argument(
            f"--{kind}-option",
            type=key_value,
            action="append",
            default=[],
            metavar="K=V",
            help=f"an option of the {kind}; may be repeated",
        )


def policy_name(name: str) -> str:
    """`name` if it is a policy's; the error lists them."""
    from smart_decoding.core.policies import POLICIES  # imported late: scipy is slow

    if name not in POLICIES:
        raise argparse.ArgumentTypeError(
            f"unknown policy {name!r}; choose one of: {', '.join(POLICIES)}"
        )
    return name


def speculative_config(args: argparse.Namespace) -> dict[str, Any] | None:
    """What `LLM` takes, or None if nothing was asked for. Raises ConfigError for unknown options
    and bad values."""
    policy_options, method_options = _once_each(args.policy_option), _once_each(args.method_option)
    if args.policy or policy_options:
        from smart_decoding.core.policies import check_policy  # imported late: scipy is slow

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
    config = {
        **{k: v for k, v in named.items() if v is not None},
        **policy_options,
        **method_options,
    }
    return config or None


def _once_each(options: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(options)
    if len(given) < len(options):
        names = [name for name, _ in options]
        raise ConfigError(f"option {max(names, key=names.count)!r} is given more than once")
    return given


def main(args: argparse.Namespace) -> None:
    """Streams the answer to standard output."""
    config = speculative_config(args)
    params = SamplingParams(
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        seed=args.seed,
        max_tokens=args.max_tokens,
    )
    drawn = params.seed is None and not params.greedy
    if drawn:  # the engine's own draws are the same in every process
        params = replace(params, seed=secrets.randbits(32))
    text = read_prompt(args.prompt)
    images = read_images(args.image)
    if images:
        check_sees(args.model)
    from smart_decoding.llm import LLM

    model = args.model or DEFAULT_MODEL
    llm = LLM(
        model,
        speculative_config=config,
        dtype=args.dtype,
        device=args.device,
        max_num_seqs=1,
        max_model_len=args.max_model_len,
        trust_pickle=args.trust_pickle,
        enforce_eager=args.enforce_eager,
        allow_slow=args.allow_slow,
    )
    raw: Prompt = {"prompt": text, "multi_modal_data": {"image": images}} if images else text
    answer = stream_answer(llm, raw if args.raw else chat_prompt(llm, text, images), params)
    if args.stats:
        print(stats_line(answer) + (f", seed {params.seed}" if drawn else ""), file=sys.stderr)


def read_prompt(text: str) -> str:
    """The prompt, or standard input for '-'. Raises ConfigError if it is empty or not UTF-8."""
    try:
        text = sys.stdin.read() if text == "-" else text
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"the prompt is not valid UTF-8: {error}") from error
    if not text.strip():
        raise ConfigError("the prompt is empty: give some text")
    return text


def read_images(paths: Sequence[Path]) -> list[Any]:
    """The pictures of some files. Raises ConfigError for the first that cannot be used, naming
    it."""
    from smart_decoding.multimodal.images import Limits, open_image, read_file

    images = []
    limits = Limits()
    for path in paths:
        try:
            images.append(open_image(read_file(path, limits), limits))
        except (OSError, ConfigError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigError(f"{path}: {reason}") from error
    return images


def check_sees(model: str | None) -> None:
    """Raises ConfigError for a model that takes no images, before any weight is loaded; None: the
    default model."""
    from smart_decoding.models.loading import load_checkpoint

    if model is None or load_checkpoint(model).vision is None:
        raise ConfigError(
            f"{model or DEFAULT_MODEL} reads text only: give a --model that sees (docs/vision.md)"
        )


def chat_prompt(llm: LLM, text: str, images: Sequence[Any] = ()) -> MediaPrompt:
    """The prompt of a conversation that consists of one message, its pictures first."""
    parts = [{"type": "image", "image": image} for image in images]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return llm.chat_prompt([{"role": "user", "content": content}])


def stream_answer(llm: LLM, prompt: Prompt, params: SamplingParams) -> CompletionOutput:
    """Answers one prompt, printing the text as rounds yield it."""

    def show(touched: Sequence[Any]) -> None:
        for request in touched:
            print(request.stop.new_text(), end="", flush=True)

    try:
        (output,) = llm.generate(prompt, params, on_step=show)
    finally:
        print(flush=True)
    return output.outputs[0]


def stats_line(answer: CompletionOutput) -> str:
    """Tokens, speed (from the first token on), tokens per round, rows and the time to the first
    token."""
    metrics, count = answer.metrics, len(answer.token_ids)
    ttft = metrics.ttft or 0.0
    seconds = (metrics.finished or 0.0) - (metrics.first_token or 0.0)
    speed = f"{(count - 1) / seconds:.1f}" if count > 1 and seconds > 0 else "-"
    vision = f" (vision {1000 * metrics.vision_seconds:.0f} ms)" if metrics.vision_seconds else ""
    return (
        f"{count} tokens, {speed} tokens/s, {answer.tokens_per_round:.2f} tokens per round, "
        f"{metrics.verified} drafted rows verified ({metrics.wasted_rows} wasted), TTFT {1000 * ttft:.0f} ms{vision}"
    )
