"""`model.generate(custom_generate="OWNER/REPOSITORY", trust_remote_code=True)`: SMART for any
causal language model."""

from __future__ import annotations

from typing import Any


def generate(model: Any, **arguments: Any) -> Any:
    """Return the answer. arguments: of `model.generate`, and speculative_config."""
    from smart_decoding.integrations.transformers import generate as smart_generate

    # In a model's own repository `model.generate` is a partial of this very function.
    return type(model).generate(model, custom_generate=smart_generate, **arguments)
