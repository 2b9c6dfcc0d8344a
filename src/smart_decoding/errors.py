"""Every error a user can cause: one small tree, one clear line each.

The command line prints the line and exits with 2.
"""

from __future__ import annotations


class SmartError(Exception):
    """Base of all errors that smart_decoding raises on purpose; the message is one line that says
    what to do."""


class ConfigError(SmartError, ValueError):
    """An option, parameter or request that cannot be honoured."""


class ModelError(SmartError):
    """A model, head or tokenizer that is missing, corrupt, unsupported or does not fit."""


class DownloadError(ModelError):
    """A file that could not be fetched, or arrived with the wrong checksum."""


class CapacityError(SmartError):
    """A request that can never fit (context or KV memory), or no memory or disk left."""


class EngineStoppedError(SmartError):
    """A request to an engine that was shut down, or that has failed for good."""


def require_finite(finite: object) -> None:
    """Raise ModelError unless `finite` is true: whether all maxima of a model's rows are."""
    if not finite:
        raise ModelError(
            "the model's logits are NaN or infinite: check the weights, or use dtype float32"
        )
