"""SMART inside Hugging Face transformers:

    model.generate(**inputs, custom_generate=smart_decoding.integrations.transformers.generate)

works for causal language models of transformers 5.12 and later. The answers are those of `generate`
without it; docs/transformers.md lists the refused calls.
"""

from __future__ import annotations

from smart_decoding.errors import ConfigError

try:
    import transformers as _host  # noqa: F401
except ImportError as error:
    raise ConfigError(
        "transformers is not installed: in the clone, pip install -e '.[transformers]'"
    ) from error

from smart_decoding.integrations.transformers.generation import generate, last_report
from smart_decoding.integrations.transformers.state import Report

__all__ = ["Report", "generate", "last_report"]
