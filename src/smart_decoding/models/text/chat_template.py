"""Chat templates: the Jinja program a model ships that turns a conversation into its prompt.

A model without one can be given one: a file, or one of those built in here.
Templates come with downloaded models, so they run in Jinja's sandbox, with the environment that
transformers gives them, and get plain JSON data only. A process with bounds compiles and renders
them: `rendering`'s, or in the server that of server/preparation.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from smart_decoding.errors import ConfigError
from smart_decoding.files import expanded, read_json, read_text, reading, reason_of
from smart_decoding.models.text import rendering

if TYPE_CHECKING:
    import jinja2

# FastChat's conversation "vicuna_v1.1", of Vicuna 1.1 to 1.5; the tokenizer begins it
_VICUNA = (
    "{% if messages and messages[0].role == 'system' %}"
    "{{ messages[0].content }} {% set turns = messages[1:] %}"
    "{% else %}"
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. {% set turns = messages %}"
    "{% endif %}"
    "{% for message in turns %}"
    "{% if message.role == 'user' %}USER: {{ message.content }} "
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}</s>"
    "{% else %}{{ raise_exception('Vicuna knows user and assistant, after one system message') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
BUILT_IN = {"vicuna": _VICUNA}


def read(chosen: str | Path) -> str:
    """Return the template that is meant: a built-in name, a file, or the text itself (one that has
    braces or line breaks, as no file's name has).

    Raises ConfigError for a file that is missing and for a template that does not parse."""
    text = str(chosen)
    if text in BUILT_IN:
        return BUILT_IN[text]
    given = "the chat template"
    if not set(text) & set("{}\n"):
        given += f" {text}"
        try:
            text = expanded(text).read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            known = ", ".join(BUILT_IN)
            raise ConfigError(f"cannot read {given}: {reason}; built in: {known}") from error
    try:
        rendering.run(text, None)
    except ConfigError as error:
        raise ConfigError(f"{given} is no Jinja template: {error}") from error
    return text


def hint(folder: Path, name: str) -> str:
    """Return which built-in template a model without one seems to need, by its name and
    config.json; empty if that is not known."""
    path = folder / "config.json"
    config = read_text(path) if path.is_file() else ""
    fitting = [known for known in BUILT_IN if known in f"{name} {config}".lower()]
    if not fitting:
        return ""
    return (
        f"{name} has no chat template and seems to be a model of the kind {fitting[0]}: "
        f"take --chat-template {fitting[0]} (chat_template={fitting[0]!r})"
    )


def find(folder: Path) -> str | None:
    """Return a folder's template: chat_template.jinja, the entry of tokenizer_config.json, or that
    of a processor. Raises ModelError."""
    if (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        path = folder / name
        found = _entry(path) if path.exists() else None
        if found is not None:
            return found
    return None


def _entry(path: Path) -> str | None:
    with reading(path):
        found = read_json(path).get("chat_template")
        if isinstance(found, list):  # several named templates
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if not isinstance(found, str | None):
            raise TypeError("chat_template is no text")
        return found


def render(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """Return the prompt text. Raises ConfigError for a template that is malformed, refuses the
    messages or breaks a bound, CapacityError where its process is killed."""
    given = [
        {name: value for name, value in message.items() if value is not None}
        for message in messages
    ]
    for message in given:
        if "tool_calls" in message:  # templates add to what an answer that only calls says: nothing
            message.setdefault("content", "")
    try:
        plain = json.dumps({**variables, "messages": given}, default=_type_name)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"the chat template takes JSON only: {reason_of(error)}") from error
    return rendering.run(template, plain)


def fill(template: str, variables: str | None) -> str:
    """Compile and render here, without bounds. variables: JSON; None: the template is only
    compiled, which computes its constants. Raises ConfigError."""
    import jinja2

    try:
        compiled = _compile(template)
        return "" if variables is None else compiled.render(json.loads(variables))
    except MemoryError:
        raise
    except Exception as error:  # a template is a program, which can fail in any way
        if variables is not None:
            reason = str(error) if isinstance(error, jinja2.TemplateError) else reason_of(error)
            raise ConfigError(f"the chat template refuses these messages: {reason}") from error
        where = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ConfigError(f"{where}{reason_of(error)}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: what training learns from; nothing here."""

        tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = [loopcontrols, Generation]
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    """JSON as it is; Jinja's own filter escapes it for HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _type_name(value: Any) -> str:
    """Stands for pictures and the like, which templates only look for."""
    return f"<{type(value).__name__}>"


def _raise_exception(message: str) -> NoReturn:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
