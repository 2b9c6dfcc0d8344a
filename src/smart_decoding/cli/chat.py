"""`smart chat`: a conversation with a model, or with several in turn."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from smart_decoding.cli.arguments import chosen_model
from smart_decoding.cli.chat_input import entries
from smart_decoding.cli.chat_session import (
    LOOP_TOKENS,
    MAX_TOKENS,
    REFUSALS,
    ChatSession,
    ChatState,
)
from smart_decoding.cli.dialogue import Dialogue
from smart_decoding.cli.model_options import add_model_options, llm_options
from smart_decoding.cli.prompts import standard_input
from smart_decoding.cli.run import announce_default, loaded, show_steps
from smart_decoding.cli.sampling import add_sampling_options, given_sampling
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL

if TYPE_CHECKING:
    from smart_decoding.llm import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `smart chat`."""
    parser.add_argument(
        "name", nargs="?", metavar="MODEL", help=f"the model, as for --model ({DEFAULT_MODEL})"
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model (none)")
    add_model_options(parser.add_argument_group("model"))
    add_sampling_options(parser, MAX_TOKENS)


def main(args: argparse.Namespace) -> int:
    """Take the user's entries until their end. Return 2 if one of standard input was refused.

    A model that cannot be loaded leaves the one before."""
    wanted: str | None = chosen_model(args) or DEFAULT_MODEL
    options = {**llm_options(args), "stop_at_loops": LOOP_TOKENS}
    state = ChatState(Dialogue(args.system), given_sampling(args))
    show_steps()
    typed = standard_input().isatty()
    entered = entries()
    present = None
    while wanted is not None:
        if sys.stderr.isatty():  # the next line comes in seconds
            print(f"smart: loading {wanted} ...", file=sys.stderr, flush=True)
        try:
            with loaded(wanted, 1, options) as llm:
                if present is not None:
                    print(f"smart: {wanted} answers now", file=sys.stderr)
                present = wanted
                announce_default(llm, options["speculative_config"])
                llm.engine_thread.start()  # costs are measured while the first message is typed
                wanted = converse(llm, state, entered)
            if wanted is not None:  # which needs the memory
                llm.engine_thread.stop()
                del llm
                gc.collect()
        except (*REFUSALS, KeyboardInterrupt) as error:
            if present in (None, wanted):
                raise
            state.refuse(str(error) or f"{wanted} is not loaded")
            wanted = present
    return 2 if state.failed and not typed else 0


def converse(llm: LLM, state: ChatState, entered: Iterator[str]) -> str | None:
    """Take entries until the user leaves or wants another model; return that model."""
    session = ChatSession(llm, state)
    for entry in entered:
        if not session.take(entry):
            break
    return session.following
