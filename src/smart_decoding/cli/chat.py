"""`smart chat`: a conversation with a model, its history kept."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.arguments import chosen_model
from smart_decoding.cli.model_options import llm_options
from smart_decoding.cli.run import (
    add_model_options,
    announce_default,
    loaded,
    rate,
    show_steps,
    stream_answer,
)
from smart_decoding.cli.sampling import add_sampling_options, given, params_of
from smart_decoding.errors import SmartError
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.engine.outputs import CompletionOutput
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.llm import LLM

MAX_TOKENS = 1024  # of an answer, unless the user or the model says otherwise
HELP = """/reset        forget the conversation
/system TEXT  instructions for the model, from now on; without TEXT none
/bye          leave (also /exit, or Ctrl-D)
Ctrl-C ends an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart chat`."""
    parser.add_argument(
        "name", nargs="?", metavar="MODEL", help=f"the model, as for --model ({DEFAULT_MODEL})"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model (none)")
    add_model_options(parser)
    add_sampling_options(parser, MAX_TOKENS)


def main(args: argparse.Namespace) -> int:
    """Answer each line that is typed, or of standard input, until its end. Return 2 if a line of
    standard input was refused."""
    model = chosen_model(args) or DEFAULT_MODEL
    options = llm_options(args)
    sampling = given(args)
    show_steps()
    with loaded(model, 1, options) as llm:
        announce_default(llm, options["speculative_config"])
        typed = sys.stdin.isatty()
        if typed:
            print("/help lists the commands", file=sys.stderr)
        talk = ChatSession(llm, params_of(llm, sampling, MAX_TOKENS), args.system)
        for line in lines(typed):
            if not talk.take(line.strip()):
                break
        return 2 if talk.failed and not typed else 0


def lines(typed: bool) -> Iterator[str]:
    """Yield the user's lines; Ctrl-C drops the present one. Bytes beyond UTF-8 are replaced."""
    with suppress(AttributeError, ValueError):
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not typed:
        yield from sys.stdin
        return
    import readline  # noqa: F401  (input() then has history and editing)

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("  (/bye or Ctrl-D leaves)")


class ChatSession:
    """The messages so far, and the model that answers. system: its instructions, or None. failed:
    whether a message was refused."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None = None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self.messages: list[dict[str, Any]] = []
        self.failed = False

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; return false when the conversation is over."""
        command, _, rest = line.partition(" ")
        if command in ("/bye", "/exit", "/quit"):
            return False
        if command == "/reset":
            self.messages = []
        elif command == "/system":
            self._system = rest.strip() or None
        elif command == "/help" or (line.startswith("/") and line[1:].isalpha()):
            print(HELP if command == "/help" else f"no command {command}\n{HELP}", file=sys.stderr)
        elif line:
            self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        """Answer a message. An answer that fails or is cut by Ctrl-C is not kept."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt = self._llm.chat_prompt([*system, *messages])
            answer = stream_answer(self._llm, prompt, self._params, chat=True)
        except KeyboardInterrupt:
            print("(interrupted: this message and its answer are forgotten)", file=sys.stderr)
            return
        except SmartError as error:
            print(f"smart: error: {error}; /reset begins anew", file=sys.stderr)
            self.failed = True
            return
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        print(figures(answer), file=sys.stderr)


def figures(answer: CompletionOutput) -> str:
    """Return the line below an answer: tokens, speed, and accepted drafts."""
    reached = rate(answer)
    speed = "" if reached is None else f", {reached:.1f} tok/s"
    metrics = answer.metrics
    drafts = (
        f", {metrics.accepted} of {metrics.verified} drafts accepted" if metrics.verified else ""
    )
    cut = ", cut at --max-tokens" if answer.finish_reason == "length" else ""
    return f"[{len(answer.token_ids)} tokens{speed}{drafts}{cut}]"
