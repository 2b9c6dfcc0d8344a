"""`smart demo`: the default model answers, its last trees, and the measured speedup."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.arguments import add_allow_slow
from smart_decoding.cli.run import chat_prompt
from smart_decoding.core.tree_picture import TreeStyle, draw_tree, legend, wants_colour
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.models.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.engine.engine import RoundRecord
    from smart_decoding.llm import LLM

PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "A shop sells pens at 3 dollars each. How much do 12 pens cost with a discount of 10 percent? "
    "Think step by step.",
)
ALTERNATIONS = 3
_ROOT_TOKENS = 8  # of the text before a tree
_WARM_UP = SamplingParams(temperature=0.0, max_tokens=8)
NEXT = """what to try next:
  smart run --stats "your question"                  ask it something
  smart run --policy off --stats "your question"     the same answer, decoded plainly
  smart run --temperature 0.8 --seed 1 "a question"  sampling: the same tokens under every policy
  smart bench --help                                 compare policies on benchmark prompts"""


@dataclass(frozen=True, slots=True)
class VerifiedTree:
    """A round of one request, kept for its picture. before: the tokens just before the tree."""

    record: RoundRecord
    before: list[int]


@dataclass(frozen=True, slots=True)
class Timing:
    """One pass over the prompts: tokens per second from end to end, and the answers' tokens."""

    tokens_per_s: float
    answers: list[list[int]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--max-tokens and --allow-slow; all else is fixed."""
    parser.add_argument("--max-tokens", type=int, default=96, help="of each answer (96)")
    add_allow_slow(parser)


def main(args: argparse.Namespace) -> None:
    """Streams, draws, measures."""
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    smart = load({"policy": "smart"}, args.allow_slow)
    trees = show_answers(smart, params)
    show_trees(smart, trees)
    print("\nmeasuring plain decoding and smart in turn ...", flush=True)
    plain = load(False, args.allow_slow)
    print(summary(*measure(plain, smart, params)))
    model = smart.provenance.get("model", DEFAULT_MODEL)
    weights = smart.provenance.get("weights", "unknown")
    print(f"model: {model}, weights: {weights}\n{kernels()}\n\n{NEXT}")


def kernels() -> str:
    """What computed: the kernels' variant on a CPU, plain torch where there are none."""
    from smart_decoding.kernels import library
    from smart_decoding.models.target import device_of

    device = device_of("auto")  # as LLM takes it
    if device.type != "cpu":
        return f"device: {device}"
    reason = library.unavailable()
    return f"CPU kernels: {library.chosen() if reason is None else f'none, plain torch ({reason})'}"


def load(speculative_config: dict[str, Any] | bool, allow_slow: bool) -> LLM:
    """The default model for one request at a time.

    No prefix cache: a second pass must cost as much as the first.
    """
    from smart_decoding.llm import LLM

    return LLM(
        DEFAULT_MODEL,
        speculative_config=speculative_config,
        max_model_len=1024,
        max_num_seqs=1,
        enable_prefix_caching=False,
        allow_slow=allow_slow,
    )


def show_answers(llm: LLM, params: SamplingParams) -> list[VerifiedTree]:
    """Streams the answers to standard output; returns the last two rounds that verified a tree."""
    trees: deque[VerifiedTree] = deque(maxlen=2)

    def after_round(touched: Sequence[Any]) -> None:
        for request in touched:
            print(request.stop.new_text(), end="", flush=True)
        record = llm.engine.last_round
        if touched and record is not None and len(record.round.kept):
            end = len(touched[0].tokens) - record.emitted  # the only request of the batch
            trees.append(VerifiedTree(record, touched[0].tokens[max(0, end - _ROOT_TOKENS) : end]))

    for prompt in PROMPTS:
        print(f"> {prompt}", flush=True)
        llm.generate(chat_prompt(llm, prompt), params, on_step=after_round)
        print("\n")
    return list(trees)


def show_trees(llm: LLM, trees: Sequence[VerifiedTree]) -> None:
    """Prints the pictures, or why there are none."""
    if not trees:
        print("no tree to show: every round was decoded plainly")
        return
    print(f"the last {len(trees)} verified trees" if len(trees) > 1 else "the last verified tree")
    nodes = [tree.record.round.trees.take(tree.record.round.kept) for tree in trees]
    rules = [tree.record.round.rule for tree in trees]
    print(legend(all(rule is not None and rule.scores is not None for rule in rules)))

    def text_of(token: int) -> str:
        return llm.tokenizer.decode([token], False)

    style = TreeStyle(text_of, colour=wants_colour(sys.stdout))
    for tree, drafted in zip(trees, nodes, strict=True):
        accepted = tree.record.acceptance
        assert accepted is not None  # a round with nodes has verified them
        root = llm.tokenizer.decode(tree.before, False)
        bonus_token = accepted.emitted[0][-1]
        print()
        print(draw_tree(drafted, 0, accepted.path[0], style, root=root, bonus_token=bonus_token))


def measure(plain: LLM, smart: LLM, params: SamplingParams) -> tuple[list[Timing], list[Timing]]:
    """Passes of both over the same prompts, taking turns, the order reversed each time."""
    timings: dict[int, list[Timing]] = {id(plain): [], id(smart): []}
    plain.generate(chat_prompt(plain, PROMPTS[0]), _WARM_UP)  # smart is warm from streaming
    for turn in range(ALTERNATIONS):
        for llm in (plain, smart) if turn % 2 == 0 else (smart, plain):
            timings[id(llm)].append(_timed(llm, params))
    return timings[id(plain)], timings[id(smart)]


def summary(plain: Sequence[Timing], smart: Sequence[Timing]) -> str:
    """One line: medians, and the median of the turns' ratios."""
    speeds = [statistics.median(t.tokens_per_s for t in timings) for timings in (plain, smart)]
    speedup = statistics.median(
        s.tokens_per_s / p.tokens_per_s for p, s in zip(plain, smart, strict=True)
    )
    same = all(timing.answers == plain[0].answers for timing in (*plain, *smart))
    figures = f"plain {speeds[0]:.1f} tok/s, smart {speeds[1]:.1f} tok/s, speedup {speedup:.2f}"
    identical = "yes" if same else "no, see: python -m smart_lab divergence"
    return f"{figures} (identical output: {identical})"


def _timed(llm: LLM, params: SamplingParams) -> Timing:
    start = time.perf_counter()
    outputs = [llm.generate(chat_prompt(llm, prompt), params)[0].outputs[0] for prompt in PROMPTS]
    answers = [output.token_ids for output in outputs]
    return Timing(sum(map(len, answers)) / (time.perf_counter() - start), answers)
