"""What Ollama, llama.cpp and vLLM call things, in words that our commands take or explain."""

from __future__ import annotations

from argparse import SUPPRESS, Action, ArgumentParser

# Their subcommands: ours.
COMMANDS = {
    "generate": "run",
    "complete": "run",
    "cli": "run",
    "server": "serve",
    "list": "models list",
    "ls": "models list",
    "pull": "models pull",
    "download": "models pull",
    "rm": "models rm",
    "show": "info",
    "help": "--help",
    "version": "--version",
}
# Their options: ours of the same meaning, which take the same values.
SAME = {
    "-m": "--model",
    "-hf": "--model",
    "--hf-repo": "--model",
    "-md": "--draft",
    "--model-draft": "--draft",
    "-c": "--max-model-len",
    "--ctx-size": "--max-model-len",
    "-t": "--threads",
    "-np": "--max-num-seqs",
    "--parallel": "--max-num-seqs",
    "-n": "--max-tokens",
    "--predict": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--temp": "--temperature",
    "--repeat-penalty": "--repetition-penalty",
    "-sys": "--system",
    "--system-prompt": "--system",
    "-no-cnv": "--raw",
    "--no-conversation": "--raw",
    "-a": "--served-model-name",
    "--alias": "--served-model-name",
    "--chat-template-file": "--chat-template",
    "--mm-processor-option": "--mm-processor-kwargs",  # our own, of before
}
# Those that --help lists beside ours.
LISTED = ("-m", "-hf", "-c", "--ctx-size", "-t", "-n", "--temp", "--repeat-penalty")
_DEVICE = "leave it out, as all layers run on one device (--device)"
_MEMORY = "leave it out, as the system decides what stays in memory"
_TALK = "leave it out, as smart chat is a conversation, and smart run one answer"
_SPEED = "leave it out, as the fastest is chosen by itself"
_THINKING = "leave it out, as reasoning stays in the text, where the model writes it"
_RAW = "smart run --raw continues a text"
# Their options without a like here: what to do.
INSTEAD = {
    "-ngl": _DEVICE,
    "--gpu-layers": _DEVICE,
    "--n-gpu-layers": _DEVICE,
    "--mlock": _MEMORY,
    "--mmap": _MEMORY,
    "--no-mmap": _MEMORY,
    "-cnv": _TALK,
    "--conversation": _TALK,
    "-st": _TALK,
    "--single-turn": _TALK,
    "-i": _TALK,
    "--interactive": _TALK,
    "-no-cnv": _RAW,
    "--no-conversation": _RAW,
    "-fa": _SPEED,
    "--flash-attn": _SPEED,
    "-b": _SPEED,
    "--batch-size": _SPEED,
    "-ub": _SPEED,
    "--ubatch-size": _SPEED,
    "-tb": "--threads is for prompts, too",
    "--threads-batch": "--threads is for prompts, too",
    "--keepalive": "leave it out, as smart serve keeps its model loaded",
    "--reasoning-parser": _THINKING,
    "--reasoning-format": _THINKING,
    "--think": "smart serve takes it by request, in chat_template_kwargs",
}


class _Nothing(Action):
    """An option that is taken, with its value if it has one, and changes nothing."""

    def __call__(self, *_: object) -> None:
        """Do nothing."""


def take(parser: ArgumentParser) -> None:
    """Have a command take the options of other programs that mean the same as its own."""
    actions = parser._option_string_actions
    for theirs, ours in SAME.items():
        if ours in actions and theirs not in actions:
            action = actions[theirs] = actions[ours]
            if theirs in LISTED:
                action.option_strings = [*action.option_strings, theirs]


def take_without_effect(parser: ArgumentParser) -> None:
    """Add options of other servers for what `smart serve` does anyway: it reads tools and calls of
    every model, uses chat templates, and never logs what requests hold."""
    switches = (
        "--disable-log-requests",
        "--no-enable-log-requests",
        "--enable-auto-tool-choice",
        "--jinja",
    )
    parser.add_argument(*switches, action=_Nothing, nargs=0, dest=SUPPRESS, help=SUPPRESS)
    parser.add_argument("--tool-call-parser", action=_Nothing, dest=SUPPRESS, help=SUPPRESS)
