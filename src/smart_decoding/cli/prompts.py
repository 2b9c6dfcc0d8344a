"""Prompts of `smart run`: words, files, pipes and pictures, checked before a model is loaded."""

from __future__ import annotations

import json
import os
import re
import select
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL, names_model, unknown_model

if TYPE_CHECKING:
    import argparse

# Names like those of Ollama's models, llama3.2 and qwen3:8b, which are hardly prompts.
_TAG = re.compile(r"(?=.*\d)(?=.*[.:-])[a-z][\w.-]*(:[\w.-]+)?")
PATIENCE = 1.0  # seconds until a message says that standard input is read


def model_and_message(args: argparse.Namespace) -> tuple[str | None, str | None]:
    """Return the model and the message, by options or by position: MODEL PROMPT, or one of them.
    Behind a model's name the words of a message need no quotes, as for Ollama. Raises ConfigError
    for several messages."""
    words = args.words
    named = bool(words) and not args.model and names_model(words[0])
    model = words[0] if named else args.model
    messages = list(words[named:])
    if model:
        messages = [" ".join(messages)] if messages else []
    if args.prompt is not None:
        messages.append(args.prompt)
    if words and not named and not args.model and _TAG.fullmatch(words[0]):
        raise ConfigError(
            f"no model {words[0]!r} is known{unknown_model(words[0])}: smart models list shows the "
            "built-in ones, a hub id has a slash; -p takes such a word as the prompt"
        )
    if len(messages) > 1:
        raise ConfigError(
            f"several prompts are given, {messages[0]!r} and {messages[1]!r}: put a text of "
            f"several words in quotes; if {messages[0]!r} is a model, none is known by this name: "
            f"give a hub id, a folder or a GGUF file{unknown_model(messages[0])}"
        )
    return model, messages[0] if messages else None


def prompt_texts(args: argparse.Namespace, message: str | None) -> list[str]:
    """Return one prompt, joined of message, file and pipe, or the prompts of a batch. Raises
    ConfigError."""
    if args.batch is not None:
        for option, value in (("--image", args.image), ("-f", args.file), ("a prompt", message)):
            if value:
                raise ConfigError(f"{option} cannot be given with --batch")
        return read_prompts(args.batch)
    parts = [] if message in (None, "-") else [message]
    if args.file not in (None, Path("-")):
        parts.append(read_text(args.file))
    if message == "-" or args.file == Path("-") or _piped(required=not parts):
        parts.append(_read_pipe())
    if args.words and message is None and not any(map(str.strip, parts)):
        raise ConfigError(
            f"there is no prompt, as {args.words[0]!r} is taken for the model: give one behind it, "
            "or -p for that one; smart chat talks"
        )
    if not parts:
        raise ConfigError("there is no prompt: give one, or -f FILE, or one through a pipe")
    return [checked_prompt("\n\n".join(part for part in parts if part.strip()))]


def _piped(required: bool) -> bool:
    """Return whether to read standard input: any but a terminal if `required` for lack of another
    prompt, else a pipe or a file."""
    if required:
        return sys.stdin is not None and not sys.stdin.isatty()
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is none, or it is no file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def standard_input() -> TextIO:
    """Return standard input. Raises ConfigError where it is closed, as behind <&-."""
    if sys.stdin is None:
        raise ConfigError("there is no standard input to read a prompt from")
    return sys.stdin


def _read_pipe() -> str:
    """Return standard input until its end; after PATIENCE a message says that it is read."""
    stream = standard_input()
    with suppress(OSError, ValueError):
        if not select.select([stream], [], [], PATIENCE)[0]:
            print("smart: reading standard input (</dev/null leaves it out)", file=sys.stderr)
    try:
        return stream.read()
    except UnicodeError as error:
        raise ConfigError(f"the prompt is not valid UTF-8: {error}") from error


def checked_prompt(text: str) -> str:
    """Return the prompt. Raises ConfigError if it is empty or not UTF-8."""
    try:
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"the prompt is not valid UTF-8: {error}") from error
    if not text.strip():
        raise ConfigError("the prompt is empty: give some text")
    return text


def read_text(path: Path) -> str:
    """Return the text of a file, or of standard input for '-'. Raises ConfigError for other
    content."""
    if path == Path("-"):
        return _read_pipe()
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from error


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, or of standard input for '-': a line each that is not empty, or
    a JSON object with 'prompt'. Raises ConfigError if there is none, or the file is not text."""
    text = read_text(path)
    prompts = []
    # not splitlines: U+2028 and the like may stand within a prompt
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if line.strip().startswith("{"):
            try:
                prompt = json.loads(line)["prompt"]
                if not isinstance(prompt, str):
                    raise ValueError("a prompt is a text")
                prompt.encode()  # JSON can spell half a surrogate pair
            except (ValueError, KeyError, RecursionError) as error:
                raise ConfigError(
                    f"{path}, line {number}: no JSON object with a text as 'prompt'"
                ) from error
            prompts.append(prompt)
        elif line.strip():
            prompts.append(line.strip())
    if not prompts:
        raise ConfigError(f"{path} holds no prompt: give one a line")
    return prompts


def read_images(paths: Sequence[Path]) -> list[Any]:
    """Return the pictures in some files. Raises ConfigError for the first unusable one."""
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
    """Raise ConfigError for a model of text only (None: the default), before weights are read."""
    from smart_decoding.models.checkpoints.loading import load_checkpoint

    if (
        model is None
        or load_checkpoint(model, quantization=None, trust_pickle=trust_pickle).vision is None
    ):
        name = model or DEFAULT_MODEL
        raise ConfigError(
            f"{name} reads text only: give a --model that takes images (docs/vision.md)"
        )
