"""`smart run`: the answer to one prompt, streamed.

Everything that can be wrong is checked before a model is loaded.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.arguments import Option, add_options
from smart_decoding.cli.model_options import MODEL_OPTIONS, llm_options
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError
from smart_decoding.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.engine.outputs import CompletionOutput
    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.prompts import MediaPrompt, Prompt

SAMPLING = (
    Option("temperature", float, 0.0, "spread of the draws", shown="0: greedy"),
    Option("top-p", float, 1.0, "draw from the likeliest tokens of this mass"),
    Option("top-k", int, 0, "draw from so many likeliest tokens", shown="0: all"),
    Option("min-p", float, 0.0, "draw from tokens this likely, relative to the likeliest"),
    Option(
        "seed",
        int,
        None,
        "the same seed gives the same answer under every policy",
        shown="a new one each time, which --stats tells",
    ),
    Option("max-tokens", int, 256, "length of the answer at most"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart run`."""
    parser.add_argument("prompt", help="the user's message; - reads it from standard input")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture the message is about, for models that take images; may be repeated",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--model", help=f"name, hub id, folder or GGUF file ({DEFAULT_MODEL})")
    add_options(group, MODEL_OPTIONS)
    add_options(parser.add_argument_group("sampling"), SAMPLING)
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--stats", action="store_true", help="one line of speed and rows on standard error"
    )


def main(args: argparse.Namespace) -> None:
    """Streams the answer to standard output."""
    options = llm_options(args)
    params = SamplingParams(**{option.dest: getattr(args, option.dest) for option in SAMPLING})
    drawn = params.seed is None and not params.greedy
    if drawn:  # the engine's own draws are the same in every process
        params = replace(params, seed=secrets.randbits(32))
    text = read_prompt(args.prompt)
    images = read_images(args.image)
    if images:
        check_takes_images(args.model, args.trust_pickle)
    from smart_decoding.llm import LLM

    show_memory()
    llm = LLM(args.model or DEFAULT_MODEL, max_num_seqs=1, **options)
    announce_default(llm, options["speculative_config"])
    prompt: Prompt
    if not args.raw:
        prompt = chat_prompt(llm, text, images)
    elif images:
        prompt = {"prompt": text, "multi_modal_data": {"image": images}}
    else:
        prompt = text
    answer = stream_answer(llm, prompt, params)
    if args.stats:
        print(stats_line(answer) + (f", seed {params.seed}" if drawn else ""), file=sys.stderr)


def show_memory() -> None:
    """Lets the estimate of a model's memory appear on standard error, on a terminal."""
    logger = logging.getLogger("smart.memory")
    if sys.stderr.isatty() and not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.setLevel(logging.INFO)


def announce_default(llm: LLM, config: Mapping[str, Any] | None) -> None:
    """One line on standard error that says what drafts, unless it was asked for or is the model's
    own head."""
    from smart_decoding.speculation import shipped_head

    asked = {"method", "model"} & set(config or {})
    if not asked and shipped_head(llm.provenance["model"]) is None:
        choose = "--method and --draft choose another"
        print(f"smart: drafts come from {llm.speculation.description}; {choose}", file=sys.stderr)


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
    """The pictures of some files. Raises ConfigError that names the first that cannot be used."""
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


def check_takes_images(model: str | None, trust_pickle: bool = False) -> None:
    """Raises ConfigError for a model of text only (None: the default), before weights are read."""
    from smart_decoding.models.loading import load_checkpoint

    if (
        model is None
        or load_checkpoint(model, quantization=None, trust_pickle=trust_pickle).vision is None
    ):
        name = model or DEFAULT_MODEL
        raise ConfigError(
            f"{name} reads text only: give a --model that takes images (docs/vision.md)"
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
    """Tokens, speed from the first token on, tokens per round, rows, time to the first token."""
    metrics = answer.metrics
    count = len(answer.token_ids)
    ttft = metrics.ttft or 0.0
    seconds = (metrics.finished or 0.0) - (metrics.first_token or 0.0)
    speed = f"{(count - 1) / seconds:.1f}" if count > 1 and seconds > 0 else "-"
    vision = f" (vision {1000 * metrics.vision_seconds:.0f} ms)" if metrics.vision_seconds else ""
    return (
        f"{count} tokens, {speed} tokens/s, {answer.tokens_per_round:.2f} tokens per round, "
        f"{metrics.verified} drafted rows verified ({metrics.wasted_rows} wasted), "
        f"TTFT {1000 * ttft:.0f} ms{vision}"
    )
