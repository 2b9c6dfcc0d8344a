"""The drafters. Here are the methods' names, which a command line needs without loading a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy

METHODS = ("eagle", "mtp", "draft_model", "ngram", "union", "none")


def check_draft(method: str | None, draft: object, how: str) -> None:
    """Raise ConfigError if the method needs a draft model and there is none. how: the option that
    names one."""
    if method == "draft_model" and not draft:
        raise ConfigError(
            f"method 'draft_model' needs a smaller model of the same vocabulary: give {how}"
        )


def check_plain(method: str | None, policy: str | Policy | None) -> None:
    """Raise ConfigError if nothing drafts, but a policy is set that decides about drafts."""
    if method == "none" and policy not in (None, "off"):
        name = policy if isinstance(policy, str) else policy.name
        raise ConfigError(
            f"method 'none' decodes plainly, but policy {name!r} is given: leave out one of them"
        )
