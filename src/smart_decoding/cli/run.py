"""`smart run`: the answer to one prompt, streamed, or to all prompts of a file.

Everything that can be wrong is checked before a model is loaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.model_options import add_model_options, llm_options
from smart_decoding.cli.prompts import (
    check_takes_images,
    model_and_message,
    prompt_texts,
    read_images,
)
from smart_decoding.cli.sampling import add_sampling_options, given_sampling, params_of
from smart_decoding.cli.streaming import StreamedAnswer
from smart_decoding.cli.terminal import shown
from smart_decoding.engine.outputs import CompletionOutput, completion_of
from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL, folder_at_hand, siblings
from smart_decoding.models.text import rendering, tokenizer

if TYPE_CHECKING:
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.messages import Message
    from smart_decoding.multimodal.prompts import MediaPrompt, Prompt

TOGETHER = 32  # answers of a batch that run at a time
MAX_TOKENS = 256  # of an answer, unless the user or the model says otherwise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart run`."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL] PROMPT",
        help="the model, as for --model, and the user's message; text of a file or pipe "
        "follows the message",
    )
    parser.add_argument("-p", "--prompt", metavar="PROMPT", help="the message")
    parser.add_argument(
        "-f", "--file", type=Path, metavar="FILE", help="the message from a file; - from a pipe"
    )
    parser.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help="answer all prompts of a file together: one a line, as text or JSON with 'prompt'; "
        "- reads standard input",
    )
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a picture the message is about, for models that take images; may be repeated",
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model (none)")
    add_model_options(parser.add_argument_group("model"))
    add_sampling_options(parser, MAX_TOKENS)
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without the chat template"
    )
    parser.add_argument(
        "--json", action="store_true", help="print each answer as one line of JSON when it is done"
    )
    parser.add_argument(
        "--stats", action="store_true", help="speed, drafts, and what auto chose, on standard error"
    )


def main(args: argparse.Namespace) -> None:
    """Stream the answer to standard output, or print those of a batch as they come, in order."""
    model, message = model_and_message(args)
    if args.system and args.raw:
        raise ConfigError("--system is for the chat template, which --raw leaves out")
    options = llm_options(args)
    sampling = given_sampling(args)
    texts = prompt_texts(args, message)
    images = read_images(args.image)
    if images:
        check_takes_images(model, args.trust_pickle)
    show_steps()
    one = args.batch is None and not args.json
    with loaded(model or DEFAULT_MODEL, min(len(texts), TOGETHER), options, one) as llm:
        announce_default(llm, options["speculative_config"])
        system = [{"role": "system", "content": args.system}] if args.system else []
        prompts = [prompt_of(llm, text, images, args.raw, system) for text in texts]
        params = params_of(llm, sampling, MAX_TOKENS)
        if one:
            answers = [StreamedAnswer(llm, chat=not args.raw).run(prompts[0], params)]
            if answers[0].finish_reason == "length":
                print("smart: cut at --max-tokens", file=sys.stderr)
        else:
            answers = answer_all(llm, texts, prompts, params, args.json)
        if args.stats:
            drawn = "seed" not in sampling and not params.greedy
            seed = f", seed {params.seed}" if drawn else ""
            believed = beliefs_line(llm.engine.policy.stats())
            print(f"{stats_line(answers)}{seed}; {llm.precision}{believed}", file=sys.stderr)
            if llm.choice is not None and llm.choice.reason:
                print(f"auto: {llm.choice.reason}", file=sys.stderr)
        keep_for_later(llm)


def keep_for_later(llm: LLM) -> None:
    """Store panels and costs for later answers. Ctrl-C leaves them for the next time."""
    with suppress(KeyboardInterrupt):
        llm.keep_panels()
        profile = llm.speculation.profile
        if profile is not None and not profile.known:
            print("smart: costs are measured for later answers; Ctrl-C skips that", file=sys.stderr)
        llm.take_profile()


@contextmanager
def loaded(
    model: str, max_num_seqs: int, options: Mapping[str, Any], draft_later: bool = False
) -> Iterator[LLM]:
    """Return the model. draft_later: for an answer by `StreamedAnswer`.

    Imported and loaded objects are all in use, so garbage collections skip them: they took 0.4 s
    before the first word."""
    gc.disable()
    rendering.begin()
    try:
        folder = folder_at_hand(model, options.get("quantization") != "off")
        if folder is not None:
            tokenizer.begin(folder)
        from smart_decoding.llm import LLM

        llm = LLM(model, draft_later=draft_later, max_num_seqs=max_num_seqs, **options)
        gc.freeze()
    finally:
        gc.enable()
    try:
        yield llm
    finally:
        gc.unfreeze()


def prompt_of(
    llm: LLM, text: str, images: Sequence[Any], raw: bool, system: Sequence[Message] = ()
) -> Prompt:
    """Return the model's prompt, through its chat template unless it is `raw`."""
    if not raw:
        return chat_prompt(llm, text, images, system)
    return {"prompt": text, "multi_modal_data": {"image": images}} if images else text


def answer_all(
    llm: LLM, texts: Sequence[str], prompts: Sequence[Prompt], params: SamplingParams, as_json: bool
) -> list[CompletionOutput]:
    """Answer prompts together; print each answer once it and all earlier ones are done."""
    done: dict[int, CompletionOutput] = {}
    next_one = 0

    def show(touched: Sequence[Any]) -> None:
        nonlocal next_one
        for request in touched:
            if request.finished:
                done[int(request.id.rpartition("-")[2])] = completion_of(
                    request, llm.tokenizer.token_text
                )
        while next_one in done:
            answer = done.pop(next_one)
            text = f"> {texts[next_one]}\n{answer.text}\n"
            if as_json:
                text = json.dumps(record_of(texts[next_one], answer), ensure_ascii=False)
            print(shown(text, sys.stdout), flush=True)
            next_one += 1

    outputs = llm.generate(prompts, params, on_step=show, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def record_of(prompt: str, answer: CompletionOutput) -> dict[str, Any]:
    """Return an answer as --json prints it. Seconds count from the first token."""
    metrics = answer.metrics
    return {
        "prompt": prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "tokens": len(answer.token_ids),
        "tokens_per_s": rate(answer),
        "ttft_s": metrics.ttft,
        "rounds": metrics.rounds,
        "drafts_verified": metrics.verified,
        "drafts_accepted": metrics.accepted,
    }


def rate(*answers: CompletionOutput) -> float | None:
    """Return tokens per second from the first token on; None for a single token each."""
    count = sum(len(answer.token_ids) - 1 for answer in answers)
    last = max(answer.metrics.finished or 0.0 for answer in answers)
    seconds = last - min(answer.metrics.first_token or 0.0 for answer in answers)
    return count / seconds if count > 0 and seconds > 0 else None


def show_steps() -> None:
    """Show the estimate of memory on a terminal, too; long steps always show."""
    logger = logging.getLogger("smart.memory")
    if sys.stderr.isatty() and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("smart: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def announce_default(llm: LLM, config: Mapping[str, Any] | None) -> None:
    """Print on standard error what drafts, unless the user chose it or it is the model's own
    head."""
    from smart_decoding.models.checkpoints.memory import parameters
    from smart_decoding.models.checkpoints.registry import copied_name, shipped_head

    config = config or {}
    model = llm.provenance["model"]
    chosen = {"method", "model"} & set(config) or config.get("policy") == "off"
    if chosen or shipped_head(model) is not None:
        return
    what = llm.speculation.description
    target = llm.target.decoder.config
    lacks = what == "ngram" and shipped_head(copied_name(model)) is None
    smaller = siblings(target.vocab, parameters(target)) if lacks else []
    faster = f"`smart models pull {smaller[0]}` adds a faster one, " if smaller else ""
    choose = f"{faster}--method and --draft choose another"
    print(f"smart: drafts come from {what}; {choose}", file=sys.stderr)


def chat_prompt(
    llm: LLM, text: str, images: Sequence[Any] = (), system: Sequence[Message] = ()
) -> MediaPrompt:
    """Return the prompt of a conversation of one message, its pictures first, behind the
    system's."""
    parts = [{"type": "image", "image": image} for image in images]
    content = [*parts, {"type": "text", "text": text}] if parts else text
    return llm.chat_prompt([*system, {"role": "user", "content": content}])


def beliefs_line(stats: Mapping[str, float]) -> str:
    """Return what the policy believed of its rounds over what they were, by kind; nothing of
    policies that predict nothing."""
    end = "_predicted_seconds"
    parts = [
        f"{key.removesuffix(end)} {ratio:.2f}" for key, ratio in stats.items() if key.endswith(end)
    ]
    if not parts:
        return ""
    speedup = f"{stats['estimated_speedup']:.2f} times plain decoding, as estimated"
    return f"; {speedup}; predicted over real seconds of rounds: {', '.join(parts)}"


def stats_line(answers: Sequence[CompletionOutput]) -> str:
    """Return speed from the first token on, tokens, tokens per round, time to the first token, and
    drafts: of one answer, or of all that were written together."""
    each = [answer.metrics for answer in answers]
    reached = rate(*answers)
    tokens = sum(len(answer.token_ids) for answer in answers)
    rounds = sum(metrics.rounds for metrics in each)
    seconds = sum(metrics.vision_seconds for metrics in each)
    one = len(answers) == 1
    of = "" if one else f" in {len(answers)} answers"
    vision = f" (vision {1000 * seconds:.0f} ms)" if seconds else ""
    first = max(metrics.ttft or 0.0 for metrics in each)
    return (
        f"{'-' if reached is None else f'{reached:.1f}'} tokens/s, "
        f"{(tokens - len(answers)) / max(1, rounds):.2f} tokens per round (plain decoding: 1); "
        f"{tokens} tokens{of}, "
        f"{'first token after' if one else 'first tokens within'} {1000 * first:.0f} ms{vision}, "
        f"{sum(metrics.accepted for metrics in each)} of "
        f"{sum(metrics.verified for metrics in each)} drafts accepted"
    )
