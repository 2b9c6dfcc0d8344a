"""The command `smart`. A subcommand's module is imported only when it runs: --help is quick.

Exit codes: 0; 2 for an error of the user's (one line on stderr); 130 after Ctrl-C; 1 for a defect
of ours or a check that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from smart_decoding import __version__
from smart_decoding.cli import habits
from smart_decoding.cli.arguments import use_threads
from smart_decoding.cli.terminal import shown
from smart_decoding.errors import ConfigError, SmartError
from smart_decoding.files import errno_of

_SUMMARIES = {
    "run": "answer one prompt, or those of a file",
    "chat": "talk to a model",
    "serve": "serve a model to OpenAI's clients",
    "demo": "watch the default model speculate: its trees and the speedup",
    "bench": "compare policies on natural prompts",
    "train": "train a draft head for a model",
    "export": "write a draft head in another engine's layout",
    "info": "which CPU kernels run here and why, the machine, the cache, versions",
    "models": "list, fetch and remove models",
    "tune": "find out whether speculation pays in your llama.cpp, vLLM or SGLang, and how",
}
# Subcommand: (what it does, the module with its add_arguments(parser) and main(args)).
COMMANDS = {name: (summary, f"smart_decoding.cli.{name}") for name, summary in _SUMMARIES.items()}
INTERRUPTED = 130  # as the shell reports SIGINT
BROKEN_PIPE = 141  # and SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Program:
    """A command line: its name, what it is, its subcommands as in COMMANDS, and other programs'
    names of them."""

    name: str
    description: str
    commands: Mapping[str, tuple[str, str]]
    meant: Mapping[str, str] = field(default_factory=dict)


SMART = Program(
    "smart",
    "Speculative decoding with draft trees sized by their cost.",
    COMMANDS,
    habits.COMMANDS,
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        program = self.prog.split()[0]
        print(f"{program}: error: {_one_line(message)} (see: {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices or ())
            raise

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raise errors for unknown arguments here, where a subcommand can suggest its own."""
        known, unknown = super().parse_known_args(args, namespace)
        if hasattr(known, "words") and not any(map(_is_option, unknown)):
            known.words += [word for word in unknown if word != "--"]  # argparse takes one place's
            unknown = []
        if unknown:
            option = unknown[0].partition("=")[0]
            if option in habits.INSTEAD:
                self.error(f"there is no {option} here: {habits.INSTEAD[option]}")
            hint = self._hint(unknown[0])
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return known, unknown

    def _hint(self, unknown: str) -> str:
        """Return a suggestion in place of an unknown argument."""
        if unknown.startswith("-"):
            if not unknown.startswith("--"):
                return ""
            return did_you_mean(unknown.partition("=")[0], self._listed())
        from smart_decoding.models.checkpoints.registry import names_model  # late: it takes a while

        if "--model" in self._option_string_actions and names_model(unknown):
            return "; a model is given by --model"
        takes_text = any(action.dest == "words" for action in self._actions)
        return "; put a text of several words in quotes" if takes_text else ""

    def _get_option_tuples(self, option_string: str) -> Any:
        """Read -n64 as -n 64; but -md is no -m d, as it is an option of other programs. Options
        that --help does not list have no short forms."""
        if option_string[:2] != "--" and not option_string[2:].lstrip("=").isdecimal():
            return []
        found = super()._get_option_tuples(option_string)
        return [each for each in found if each[1] in self._listed()]

    def _listed(self) -> list[str]:
        """Return the options that --help lists."""
        listed = (each for each in self._actions if each.help != argparse.SUPPRESS)
        return [option for action in listed for option in action.option_strings]


def _is_option(word: str) -> bool:
    """Return whether a word is an option; `-`, `--`, numbers and texts with a dash are not."""
    return word.startswith("-") and word.strip("-")[:1].isalpha() and " " not in word


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint for an error about an unknown word; empty where no known word is like it."""
    close = get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def main(argv: Sequence[str] | None = None, program: Program = SMART) -> int:
    """Run one command line; return its exit code.

    Wrong arguments, --help and --version raise SystemExit.
    """
    try:
        try:
            return _guarded(argv, program)
        except KeyboardInterrupt:
            return _interrupted(program, argv is None)
    except KeyboardInterrupt:  # a second one, before the first was handled
        return _interrupted(program, argv is None)


def _interrupted(program: Program, ends: bool) -> int:
    """Report the interrupt. ends: exit at once: Python's own exit takes up to a second, in which
    Ctrl-C prints a traceback."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\n{program.name}: interrupted", file=sys.stderr, flush=True)
        sys.stdout.flush()
    if ends:
        os._exit(INTERRUPTED)
    return INTERRUPTED


def _guarded(argv: Sequence[str] | None, program: Program) -> int:
    """Return the exit code. Every error but Ctrl-C becomes one line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):  # a model may write what the terminal's encoding lacks
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        if sys.stdout is None:
            raise ConfigError("standard output is closed: >/dev/null discards what is printed")
        code = _run(arguments, program)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # else the interpreter complains at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except Exception as error:
        code, message = _described(error, debug)
        if debug:
            traceback.print_exception(error)
        print(f"{program.name}: error: {shown(_one_line(message), sys.stderr)}", file=sys.stderr)
        return code


def _open_closed_streams() -> None:
    """Put /dev/null in place of closed standard streams, as behind 2>&-: else files that are opened
    later get their numbers, and with them what libraries print. Standard output stays None."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            os.set_inheritable(descriptor, True)
        os.close(descriptor)
        if sys.stderr is None:  # print() would take standard output instead
            sys.stderr = os.fdopen(2, "w")


def _described(error: Exception, debug: bool) -> tuple[int, str]:
    """Return the exit code and the message of an error."""
    if isinstance(error, SmartError):
        return 2, str(error)
    if os.strerror(errno.EMFILE) in str(error):  # an ImportError, too
        return 2, "too many open files: allow more, such as ulimit -n 1024"
    if isinstance(error, OSError):  # a full disk, a file that cannot be read
        return 2, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    for each in (error, error.__context__):  # torch hides the system's error
        number = None if each is None else errno_of(each)
        if number in _FULL:
            return 2, f"cannot write a file: {os.strerror(number)}: make room there"
    message = f"{type(error).__name__}: {error}"
    if not debug:
        message += "; this is a defect: run again with --debug and report the traceback"
    return 1, message


def build_parser(command: str | None = None, program: Program = SMART) -> argparse.ArgumentParser:
    """Return the parser, with the arguments of `command` filled in."""
    parser = Parser(prog=program.name, description=program.description)
    parser.add_argument("--version", action="version", version=f"{program.name} {__version__}")
    common = Parser(add_help=False)
    for each in (parser, common):
        each.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (summary, module) in program.commands.items():
        sentence = f"{summary[0].upper()}{summary[1:]}."
        sub = commands.add_parser(name, help=summary, description=sentence, parents=[common])
        if name == command:
            import_module(module).add_arguments(sub)
            habits.take(sub)
    return parser


def _run(arguments: Sequence[str], program: Program) -> int:
    # Options before it take no values.
    command = next((word for word in arguments if word in program.commands), None)
    parser = build_parser(command, program)
    if not arguments:
        parser.print_help()
        return 0
    first = next((word for word in arguments if not word.startswith("-")), None)
    if first is not None and first not in program.commands:
        close = get_close_matches(first, {**program.commands, **program.meant}, 1)
        if close:
            meant = program.meant.get(close[0], close[0])
            parser.error(f"no command {first!r}; did you mean '{program.name} {meant}'?")
    args = parser.parse_args(arguments)
    use_threads(getattr(args, "threads", None))
    return import_module(program.commands[args.command][1]).main(args) or 0


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
