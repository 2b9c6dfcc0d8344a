"""The entries of `smart chat`: commands are obeyed, messages answered."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smart_decoding.cli.chat_input import hidden_keys, unquoted
from smart_decoding.cli.dialogue import Dialogue
from smart_decoding.cli.main import did_you_mean
from smart_decoding.cli.run import rate
from smart_decoding.cli.sampling import PARAMETERS, SAMPLING, checked, params_of
from smart_decoding.cli.streaming import StreamedAnswer
from smart_decoding.cli.terminal import shown
from smart_decoding.engine.loops import loop_start
from smart_decoding.engine.stopping import LOOP
from smart_decoding.errors import CapacityError, ConfigError, SmartError
from smart_decoding.models.checkpoints.registry import names_model, unknown_model
from smart_decoding.options import parser_of

if TYPE_CHECKING:
    from smart_decoding.engine.outputs import CompletionOutput
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.prompts import MediaPrompt

MAX_TOKENS = 1024  # of an answer, unless the user or the model says otherwise
# Of nothing but repetition: they end an answer. A 10x10 grid of zeros has 310, a table of 20 equal
# rows 280, and no repetition in 12,000 windows of 1,024 tokens of code, data and prose over 151.
LOOP_TOKENS = 400
LOOP_HINT = (
    "the answer repeats itself, so it was ended: a larger model (/model NAME) helps, or "
    "/set repeat_penalty 1.2"
)
# Errors that end an entry and leave the conversation: of a file, or of a text that is not UTF-8.
REFUSALS = (SmartError, OSError, UnicodeError)
_COMMAND = re.compile(r"/(\?|[a-zA-Z]+)(?=\s|$)")
_USES = {
    "/set": ("/set NAME VALUE", "set temperature, top_p, ... or system; /show lists them"),
    "/show": ("/show", "the model, its parameters, the length of the conversation"),
    "/clear": ("/clear", "forget the conversation"),
    "/save": ("/save FILE", "write the conversation to a file, as JSON"),
    "/load": ("/load FILE", "go on with the conversation in a file"),
    "/model": ("/model NAME", "go on with another model"),
    "/bye": ("/bye", "leave (also /exit, /quit and Ctrl-D)"),
    "/help": ("/help", "this list (also /?)"),
}
_SAME = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
# Commands of before and of other programs: ours.
_MEANT = {"/reset": "/clear", "/system": "/set system TEXT"}
HELP = "\n".join(
    [f"{use:<16} {what}" for use, what in _USES.values()]
    + [
        '"""              before and behind a message of several lines',
        "Ctrl-C           ends an answer",
    ]
)


@dataclass
class ChatState:
    """What stays from one model to the next. values: parameters that the user gave. failed: whether
    an entry was refused."""

    conversation: Dialogue
    values: dict[str, Any]
    failed: bool = False

    def refuse(self, reason: str) -> None:
        """Print why an entry, or a model, cannot be used."""
        self.failed = True
        print(f"smart: error: {shown(reason, sys.stderr)}", file=sys.stderr)


class ChatSession:
    """One model's part of a chat. following: the model that the user wants next, None for none."""

    def __init__(self, llm: LLM, state: ChatState) -> None:
        self._llm = llm
        self._state = state
        self.following: str | None = None

    def take(self, entry: str) -> bool:
        """Obey a command or answer a message; return false when this model's part is over.

        A command is a slash with letters at an entry's beginning. What has a second slash, as a
        path, is a message, and so is what begins with a blank or has several lines."""
        command = _COMMAND.match(entry)
        several = "\n" in entry.strip()
        try:
            if command is not None and (not several or command[0] == "/set"):
                return self._obey(command[0].lower(), entry[command.end() :].strip())
            if text := unquoted(entry):
                self._answer(text)
        except BrokenPipeError:  # nobody reads the answers any more
            raise
        except REFUSALS as error:
            self._state.refuse(str(error))
        except KeyboardInterrupt:  # behind an answer's end: it was to end the answer
            print(file=sys.stderr)
        return True

    def _obey(self, command: str, rest: str) -> bool:
        command = _SAME.get(command, command)
        if command not in _USES:
            meant = _MEANT.get(command)
            hint = f"; did you mean {meant}?" if meant else did_you_mean(command, _USES)
            raise ConfigError(f"no command {command} (a blank before it makes it a message){hint}")
        use, _ = _USES[command]
        if " " in use and not rest:
            raise ConfigError(f"{command} needs more: {use}")
        if command == "/bye":
            return False
        if command == "/model":
            if not names_model(rest):
                known = "smart models lists the built-in ones"
                raise ConfigError(f"no model {rest!r} is known{unknown_model(rest)}; {known}")
            self.following = rest
            return False
        print(self._reply(command, rest), file=sys.stderr)
        return True

    def _reply(self, command: str, rest: str) -> str:
        """Obey a command that this model survives; return what to print."""
        state = self._state
        if command == "/clear":
            state.conversation = Dialogue(state.conversation.system)
            return "the conversation is forgotten"
        if command == "/save":
            state.conversation.save(rest)
            return f"{counted(state.conversation)} in {rest}"
        if command == "/load":
            state.conversation = Dialogue.load(rest)
            return f"{counted(state.conversation)} read from {rest}"
        if command == "/set":
            return self._set(rest)
        return self._shown() if command == "/show" else HELP

    def _set(self, rest: str) -> str:
        """Set a parameter or the system prompt; return what is set. Raises ConfigError."""
        name, _, value = rest.removeprefix("parameter ").strip().partition(" ")
        name = name.replace("-", "_")
        if name == "system":
            system = self._state.conversation.system = unquoted(value) or None
            return f"system: {system or 'none'}"
        if name == "num_ctx":
            raise ConfigError("the context's length is chosen at the start, by --max-model-len")
        option = PARAMETERS.get(name)
        if option is None:
            names = ", ".join([*(each.name for each in SAMPLING), "system"])
            hint = did_you_mean(name, [*PARAMETERS, "system"])
            raise ConfigError(f"no parameter {name!r}{hint}; there are {names}")
        try:
            number = parser_of(option)(value)
        except ValueError as error:
            raise ConfigError(f"{name} takes a number: /set {name} VALUE") from error
        self._state.values = checked({**self._state.values, option.name: number})
        return f"{option.name}: {number}"

    def _shown(self) -> str:
        """Return what /show prints."""
        conversation = self._state.conversation
        context = self._llm.engine.config.max_model_len
        tokens = len(self._llm.chat_prompt(conversation.all).tokens) if conversation.turns else 0
        rows = {
            "model": f"{self._llm.provenance['model']}, {self._llm.precision}",
            "system": conversation.system or "none",
            "conversation": f"{counted(conversation)}, {tokens} of {context} tokens",
        }
        params = params_of(self._llm, self._state.values, MAX_TOKENS)
        for option in SAMPLING:
            rows[option.name] = str(getattr(params, option.name))
        if "seed" not in self._state.values:
            rows["seed"] = "a new one for each answer"
        return "\n".join(f"{name:<19} {value}" for name, value in rows.items())

    def _answer(self, text: str) -> None:
        """Answer a message. Ctrl-C ends the answer and keeps what is there. Raises REFUSALS, which
        leave the conversation as it was."""
        asked = self._state.conversation.with_message("user", text)
        answer = StreamedAnswer(self._llm, chat=True)
        try:
            with hidden_keys():
                params = params_of(self._llm, self._state.values, MAX_TOKENS)
                asked, prompt = self._fitting(asked, params)
                output = answer.run(prompt, params)
        except KeyboardInterrupt:
            if self._keep(asked, answer.text):
                print("(ended; the answer is kept as far as it goes)", file=sys.stderr)
            return
        said = answer.text
        if output.stop_reason == LOOP:
            start = loop_start(output.token_ids, LOOP_TOKENS)
            said = said.removesuffix(self._llm.tokenizer.decode(output.token_ids[start:]))
        self._keep(asked, said)
        print(figures(output, params), file=sys.stderr)
        if output.stop_reason == LOOP:
            print(f"smart: {LOOP_HINT}", file=sys.stderr)

    def _keep(self, asked: Dialogue, said: str) -> bool:
        """Keep a question and its answer; return whether there is an answer. Without one the
        conversation stays as it was: many chat templates demand that question and answer alternate,
        and an empty answer would be read by the model from then on."""
        if not said.strip():
            print("(no word came, so the question is not kept either)", file=sys.stderr)
            return False
        self._state.conversation = asked.with_message("assistant", said)
        return True

    def _fitting(
        self, conversation: Dialogue, params: SamplingParams
    ) -> tuple[Dialogue, MediaPrompt]:
        """Return the conversation and its prompt, without the first turns if it is too long. Raises
        CapacityError if its last message alone is.

        A quarter of the context, or max_tokens if that is less, stays free for the answer. What is
        too long is cut to half of the context, so that the next turns find it in the cache."""
        context = self._llm.engine.config.max_model_len
        most = context - min(params.max_tokens or context, context // 4)
        before = conversation.turns
        prompt = self._prompt(conversation)
        while conversation.turns > 1 and (prompt is None or len(prompt.tokens) > most):
            most = context // 2
            conversation = conversation.without_first_turn()
            prompt = self._prompt(conversation)
        if prompt is None or len(prompt.tokens) >= context:
            raise CapacityError(
                f"the message is longer than the context of {context} tokens: shorten it, or start "
                "with a larger --max-model-len"
            )
        if left := before - conversation.turns:
            print(
                f"smart: the conversation outgrew the context of {context} tokens: "
                f"the first {left} of its {before} turns are forgotten",
                file=sys.stderr,
            )
        return conversation, prompt

    def _prompt(self, conversation: Dialogue) -> MediaPrompt | None:
        """Return the prompt; None if it is far too long."""
        try:
            return self._llm.chat_prompt(conversation.all)
        except CapacityError:
            return None


def counted(conversation: Dialogue) -> str:
    """Return the number of turns in words."""
    return "1 turn" if conversation.turns == 1 else f"{conversation.turns} turns"


def figures(answer: CompletionOutput, params: SamplingParams) -> str:
    """Return the line below an answer: speed, what drafts bring, and tokens."""
    reached = rate(answer)
    speed = [] if reached is None else [f"{reached:.1f} tok/s"]
    if answer.metrics.verified:
        speed.append(f"{answer.tokens_per_round:.1f} tokens per round (plain decoding: 1)")
    count = len(answer.token_ids)
    cut = ""
    if answer.finish_reason == "length":
        cut = ", cut at max_tokens" if count == params.max_tokens else ", cut at the context's end"
    begin = f"{', '.join(speed)}; " if speed else ""
    return f"[{begin}{count} tokens{cut}]"
