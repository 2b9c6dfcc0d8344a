"""A conversation: system prompt and messages, shortened, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError
from smart_decoding.files import expanded, whole

Message = dict[str, Any]
_KEYS = {"role", "content"}  # of a message; what has more, as calls of tools, is not ours


class Dialogue:
    """The system prompt (None: none) and the messages behind it, in OpenAI's form."""

    def __init__(self, system: str | None = None, messages: Sequence[Message] = ()) -> None:
        self.system = system
        self.messages = list(messages)

    @property
    def all(self) -> list[Message]:
        """The messages with the system prompt."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]

    @property
    def turns(self) -> int:
        """Number of the user's messages."""
        return sum(message["role"] == "user" for message in self.messages)

    def with_message(self, role: str, content: str) -> Dialogue:
        """Return the conversation with another message at its end."""
        return Dialogue(self.system, [*self.messages, {"role": role, "content": content}])

    def without_first_turn(self) -> Dialogue:
        """Return a conversation that begins with the second message of the user."""
        later = [n for n, each in enumerate(self.messages) if n and each["role"] == "user"]
        return Dialogue(self.system, self.messages[later[0] :] if later else ())

    def save(self, name: str) -> None:
        """Write a file of JSON, whole or not at all. Raises ConfigError where that cannot be, and
        for a file that is there and holds something else."""
        path = expanded(name)
        text = json.dumps(self.all, ensure_ascii=False, indent=1)
        try:
            if path.exists():
                _read(path)
            with whole(path) as scratch:
                scratch.touch(0o600)  # as the history: a conversation is its owner's
                scratch.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def load(cls, name: str) -> Dialogue:
        """Return the conversation in a file. Raises ConfigError if there is none."""
        messages = _read(expanded(name))
        system = None
        if messages and messages[0]["role"] == "system":
            system = messages.pop(0)["content"]
        return cls(system, messages)


def _read(path: Path) -> list[Message]:
    try:
        if path.exists() and not path.is_file():  # reading a device may never end
            raise ValueError("no regular file")
        messages: list[Message] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(messages, list) or any(set(each) != _KEYS for each in messages):
            raise ValueError("no list of roles and contents")
        if not all(isinstance(each["content"], str) for each in messages):
            raise ValueError("a content is no text")
        roles = [each["role"] for each in messages]
        if not set(roles[roles[:1] == ["system"] :]) <= {"user", "assistant"}:
            raise ValueError("an unknown role")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} holds no conversation: a JSON list of messages, as /save writes it"
        ) from error
    return messages
