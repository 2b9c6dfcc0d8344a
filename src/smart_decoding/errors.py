"""Every error a user can cause: one small tree, one clear line each.

The command line prints the line and exits with 2.
"""


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
