"""`smart demo`: the default model answers, with SMART and plainly; both are shown as a race.

Nothing is printed while an answer is timed: the race is a replay at the measured speeds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.arguments import program_here
from smart_decoding.cli.model_options import add_allow_slow
from smart_decoding.cli.run import chat_prompt, show_steps
from smart_decoding.cli.tree_picture import draw_tree, legend, wants_colour
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.engine.engine import RoundRecord
    from smart_decoding.llm import LLM

# Questions that the default model answers right.
PROMPTS = (
    "List the months of the year.",
    "Write a Python function is_even(n) with a docstring.",
    "Count from 1 to 20.",
)
_ROOT_TOKENS = 8  # of the text before a tree
_ROWS = 8  # of text in a lane
_NARROWEST = 60  # columns in which two lanes can be read
_FRAME = 0.05  # seconds
_END = 0.5  # seconds that the end is held
_COLOURS = {"smart": "\x1b[32m", "plain": "\x1b[33m"}
NEXT = {
    "smart serve": "a chat in a browser, with this race",
    'smart run --stats "a question"': "ask it something",
    'smart run --policy off "a question"': "the same answer, decoded plainly",
    'smart run --temperature 0.8 --seed 1 "…"': "the same tokens under every policy",
    "smart bench --quick": "how much it brings, in three minutes",
}


@dataclass(frozen=True, slots=True)
class VerifiedTree:
    """A round of one request, kept for its picture. before: the tokens just before the tree."""

    record: RoundRecord
    before: list[int]


@dataclass(slots=True)
class TimedAnswer:
    """One timed answer.

    pieces: of each round: seconds since the first one, text, tokens so far.
    """

    pieces: list[tuple[float, str, int]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trees: list[VerifiedTree] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds from the first piece to the last."""
        return self.pieces[-1][0]

    @property
    def timed(self) -> int:
        """Tokens that came within `seconds`."""
        return self.pieces[-1][2] - self.pieces[0][2]

    @property
    def text(self) -> str:
        """The whole answer."""
        return "".join(text for _, text, _ in self.pieces)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --max-tokens and --allow-slow; all else is fixed."""
    parser.add_argument("--max-tokens", type=int, default=128, help="of each answer (128)")
    add_allow_slow(parser)


def main(args: argparse.Namespace) -> None:
    """Time each answer, show the races and a tree, and sum up."""
    show_steps()
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens)
    smart = load(args.allow_slow)
    engines = {"smart": smart, "plain": smart.sharing_weights(False)}
    print("Each question is answered twice with SMART and twice plainly, in turns.")
    print("You see the faster answer of each, side by side, at the speed it had.", flush=True)
    races = []
    answers = []
    for prompt in PROMPTS:
        print(f"\n> {prompt}", flush=True)
        runs = measure(engines, prompt, params)
        answers.append([run.tokens for each in runs.values() for run in each])
        races.append({name: min(each, key=lambda run: run.seconds) for name, each in runs.items()})
        show_race(races[-1])
    show_tree(smart, [tree for race in races for tree in race["smart"].trees])
    print("\n" + summary(races, all(each == same[0] for same in answers for each in same)))
    model = smart.provenance.get("model", DEFAULT_MODEL)
    weights = smart.provenance.get("weights", "unknown")
    print(f"model: {model}\n{textwrap.fill(f'weights: {weights}', 79)}\n{kernels()}\n")
    print(what_next())


def what_next() -> str:
    """Return what to try next, first how to have `smart` on the path where it is not."""
    first = {f". {program_here('activate')}": "puts smart on the path"}
    commands = NEXT if program_here("smart") == "smart" else first | NEXT
    width = max(map(len, NEXT))
    lines = (f"  {command:<{width}}  {result}" for command, result in commands.items())
    return "\n".join(["what to try next:", *lines])


def kernels() -> str:
    """Return the kernels' variant on a CPU; plain torch where there are none."""
    from smart_decoding.kernels import library
    from smart_decoding.models.target import device_of

    device = device_of("auto")  # as LLM takes it
    if device.type != "cpu":
        return f"device: {device}"
    reason = library.unavailable()
    return f"CPU kernels: {library.chosen() if reason is None else f'none, plain torch ({reason})'}"


def load(allow_slow: bool) -> LLM:
    """Return the default model for one request at a time.

    No prefix cache: a second answer must cost as much as the first.
    """
    from smart_decoding.llm import LLM

    return LLM(
        DEFAULT_MODEL,
        speculative_config={"policy": "smart"},
        max_model_len=1024,
        max_num_seqs=1,
        enable_prefix_caching=False,
        allow_slow=allow_slow,
    )


def measure(
    engines: dict[str, LLM], prompt: str, params: SamplingParams
) -> dict[str, list[TimedAnswer]]:
    """Return two answers of each engine, in turns, in reversed order the second time."""
    runs: dict[str, list[TimedAnswer]] = {name: [] for name in engines}
    for name in [*engines, *reversed(engines)]:
        runs[name].append(ask(engines[name], prompt, params))
    return runs


def ask(llm: LLM, prompt: str, params: SamplingParams) -> TimedAnswer:
    """Return one answer, with the time of each round."""
    answer = TimedAnswer()
    started = 0.0

    def after_round(touched: Sequence[Any]) -> None:
        nonlocal started
        for request in touched:  # there is only one
            now = time.perf_counter()
            started = started or now
            piece = (now - started, request.stop.new_text(), len(request.output))
            answer.pieces.append(piece)
            record = llm.engine.last_round
            if record is not None and len(record.round.kept):
                end = len(request.tokens) - record.emitted
                before = request.tokens[max(0, end - _ROOT_TOKENS) : end]
                answer.trees.append(VerifiedTree(record, before))

    chat = chat_prompt(llm, prompt)
    (output,) = llm.generate(chat, params, on_step=after_round, use_tqdm=False)
    answer.tokens = list(output.outputs[0].token_ids)
    return answer


def show_race(race: dict[str, TimedAnswer]) -> None:
    """Replay both on a terminal that is wide enough; then, or instead, the answer and speeds."""
    width = min(100, shutil.get_terminal_size().columns)
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and width >= _NARROWEST:
        with _redrawing() as draw:
            started = time.perf_counter()
            now = 0.0
            while now < _END + max(answer.seconds for answer in race.values()):
                now = time.perf_counter() - started
                draw(_frame(race, now, width))
                time.sleep(_FRAME)
    print(race["smart"].text)
    fastest = max(_speed(answer) for answer in race.values())
    for name, answer in race.items():
        bar = _bar(_speed(answer) / fastest if fastest else 0.0, 30).ljust(30)
        words = f"{_speed(answer):6.1f} tok/s, {len(answer.pieces)} passes for {len(answer.tokens)}"
        print(f"  {name}  {_painted(name, bar)}  {words} tokens", flush=True)


@contextmanager
def _redrawing() -> Iterator[Any]:
    """Yield a function that draws lines over the last ones; erase them at the end."""
    height = 0

    def draw(lines: Sequence[str]) -> None:
        nonlocal height
        up = f"\x1b[{height}A" if height else ""
        sys.stdout.write(up + "".join(f"{line}\x1b[K\n" for line in lines))
        sys.stdout.flush()
        height = len(lines)

    sys.stdout.write("\x1b[?25l")  # no cursor
    try:
        yield draw
    finally:
        sys.stdout.write((f"\x1b[{height}A\x1b[J" if height else "") + "\x1b[?25h")
        sys.stdout.flush()


def _frame(race: dict[str, TimedAnswer], now: float, width: int) -> list[str]:
    lanes = [_lane(name, answer, now, width // 2 - 2) for name, answer in race.items()]
    return [" │ ".join(row).rstrip() for row in zip(*lanes, strict=True)]


def _lane(name: str, answer: TimedAnswer, now: float, width: int) -> list[str]:
    """Return a name and speed, a bar, and the end of the text so far, each line `width` wide."""
    come = [piece for piece in answer.pieces if piece[0] <= now]
    tokens = come[-1][2]
    spent = min(now, answer.seconds)
    speed = f"{(tokens - come[0][2]) / spent:.0f} tok/s" if spent > 0 else ""
    title = f"{name:<{width - 23}}{tokens:>4} tokens {speed:>11}"
    bar = _bar(tokens / answer.pieces[-1][2], width).ljust(width)
    text = "".join(text for _, text, _ in come)
    lines = [
        "".join(char if char.isprintable() else " " for char in line[start : start + width])
        for line in text.expandtabs(4).split("\n")
        for start in range(0, max(1, len(line)), width)
    ]
    rows = [*lines[-_ROWS:], *[""] * _ROWS][:_ROWS]
    return [_painted(name, title), _painted(name, bar), *(row.ljust(width) for row in rows)]


def _bar(share: float, width: int) -> str:
    eighths = round(8 * share * width)
    part = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return "█" * (eighths // 8) + part


def _painted(name: str, text: str) -> str:
    return f"{_COLOURS[name]}{text}\x1b[0m" if wants_colour(sys.stdout) else text


def _speed(answer: TimedAnswer) -> float:
    return answer.timed / answer.seconds if answer.seconds > 0 else 0.0


def show_tree(llm: LLM, trees: Sequence[VerifiedTree]) -> None:
    """Print the largest tree, or why there is none."""
    if not trees:
        print("\nno tree to show: every round was decoded plainly")
        return
    tree = max(trees, key=lambda tree: (len(tree.record.round.kept), tree.record.emitted))
    done = tree.record.round
    accepted = tree.record.acceptance
    assert accepted is not None  # a round with nodes has verified them

    def text_of(token: int) -> str:
        return llm.tokenizer.decode([token], False)

    print("\nthe largest tree of drafts, all checked in one pass:")
    colour = wants_colour(sys.stdout)
    nodes = done.trees.take(done.kept)
    root = llm.tokenizer.decode(tree.before, False)
    bonus_token = accepted.emitted[0][-1]
    path = accepted.path[0]
    print(draw_tree(nodes, 0, path, text_of, colour=colour, root=root, bonus_token=bonus_token))
    shown = legend(done.rule is not None and done.rule.scores is not None)
    print(shown.replace("; ", "\n"))


def summary(races: Sequence[dict[str, TimedAnswer]], same: bool) -> str:
    """Return one line: speeds over all questions, after the first tokens, and whether all answers
    agree."""
    tokens = {name: sum(race[name].timed for race in races) for name in ("plain", "smart")}
    seconds = {name: sum(race[name].seconds for race in races) for name in tokens}
    plain, smart = (tokens[name] / max(seconds[name], 1e-9) for name in ("plain", "smart"))
    figures = f"plain {plain:.1f} tok/s, smart {smart:.1f} tok/s, speedup {smart / plain:.2f}"
    identical = "yes" if same else "no, see docs/exactness.md"
    return f"{figures} (identical output: {identical})"
