"""Chat templates: the Jinja program a model ships that turns a conversation into its prompt.

Templates come with downloaded models, so they run in Jinja's sandbox, with the environment that
transformers gives them, and get plain JSON data only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from smart_decoding.errors import ConfigError


def find(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """A folder's template: chat_template.jinja, chat_template.json, or the entry of
    tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = tokenizer_config.get("chat_template")
    if found is None and (folder / "chat_template.json").is_file():
        found = json.loads((folder / "chat_template.json").read_text(encoding="utf-8")).get(
            "chat_template"
        )
    if isinstance(found, list):  # several named templates
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def render(
    template: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> str:
    """The prompt text. Raises ConfigError for a malformed template or messages that it refuses."""
    import jinja2

    given = [
        {name: value for name, value in message.items() if value is not None}
        for message in messages
    ]
    try:
        plain = json.loads(json.dumps({**variables, "messages": given}, default=_type_name))
        return str(_compile(template).render(plain))
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ConfigError(f"the chat template refuses these messages: {error}") from error


@lru_cache(maxsize=16)
def _compile(template: str) -> Any:
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
