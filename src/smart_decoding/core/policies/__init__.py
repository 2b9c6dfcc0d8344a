"""Policies by name: `make_policy` builds one, refusing unknown names and options. A user's own
policy is passed as an object, or added by `add_policy`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from runpy import run_path
from typing import TYPE_CHECKING, Any

from smart_decoding.core.policies.chain import Chain
from smart_decoding.core.policies.eagle2 import Eagle2
from smart_decoding.core.policies.off import Off
from smart_decoding.core.policies.paper import Paper
from smart_decoding.core.policies.smart import Smart
from smart_decoding.core.policies.static import Static
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy

# Options that only the engine sets.
FROM_THE_ENGINE = ("cost", "calibration", "forecast", "eos_token_ids")
RENAMED_OPTIONS = {"probe_budget": "exploration_budget"}
RENAMED = {"likelihood": "eagle2", "smart_paper": "paper"}
_PARTS = ("name", "cost", "plan", "observe", "stats")
POLICIES: dict[str, type[Any]] = {
    cls.name: cls for cls in (Off, Chain, Static, Eagle2, Paper, Smart)
}


def is_policy(value: object) -> bool:
    """Return whether this is a policy itself, not a name or a class."""
    return not isinstance(value, type) and all(hasattr(value, part) for part in _PARTS)


def add_policy(place: str) -> str:
    """Make a user's policy known, given as FILE.py:CLASS; return its name. Raises ConfigError."""
    file, _, kind = place.rpartition(":")
    if not file.endswith(".py"):
        raise ConfigError(f"policy {place!r} is not of the form FILE.py:CLASS")
    try:
        made = run_path(file)
    except Exception as error:
        raise ConfigError(f"{file} cannot be run: {type(error).__name__}: {error}") from error
    if not isinstance(made.get(kind), type):
        raise ConfigError(f"{file} has no class {kind!r}")
    try:
        policy = made[kind]()
    except TypeError as error:
        raise ConfigError(f"give each argument of {place} a default: {error}") from error
    if not is_policy(policy):
        raise ConfigError(f"{place} is no policy: it needs {', '.join(_PARTS)}")
    if getattr(POLICIES.get(policy.name), "__module__", "").startswith("smart_decoding."):
        raise ConfigError(f"{policy.name!r} is a built-in policy: give {place} another name")
    POLICIES[policy.name] = made[kind]
    return str(policy.name)


def policy_options(name: str | Policy) -> list[str]:
    """Return the options of policy `name`; none for an object. Raises ConfigError for an unknown
    name."""
    if not isinstance(name, str):
        return []
    if name in RENAMED:
        raise ConfigError(f"policy {name!r} is called {RENAMED[name]!r} now")
    if name not in POLICIES:
        raise ConfigError(f"unknown policy {name!r}; choose one of: {', '.join(POLICIES)}")
    if POLICIES[name].__init__ is object.__init__:
        return []
    return list(inspect.signature(POLICIES[name]).parameters)


def user_options(name: str | Policy) -> list[str]:
    """Return the options of policy `name` that a user can set."""
    return [option for option in policy_options(name) if option not in FROM_THE_ENGINE]


def check_policy(name: str | Policy, options: Mapping[str, Any]) -> None:
    """Raise ConfigError if policy `name` cannot be built with a user's `options`."""
    _refuse_unknown(name, options, user_options(name))
    make_policy(name, **options)


def make_policy(
    name: str | Policy, offered: Mapping[str, Any] | None = None, **options: Any
) -> Policy:
    """Build policy `name` with the user's `options`, and with the options that the engine offers
    (`offered`: cost model, calibration, end tokens) as far as the policy has them. An object is
    returned as it is. Raises ConfigError for unknown names and options and for bad values."""
    known = policy_options(name)
    _refuse_unknown(name, options, known)
    if not isinstance(name, str):
        return name
    accepted = {option: value for option, value in (offered or {}).items() if option in known}
    policy: Policy = POLICIES[name](**{**accepted, **options})
    return policy


def _refuse_unknown(policy: str | Policy, options: Mapping[str, Any], known: Sequence[str]) -> None:
    name = policy if isinstance(policy, str) else policy.name
    for old, new in RENAMED_OPTIONS.items():
        if old in options and new in known:
            raise ConfigError(f"option {old!r} of policy {name!r} is called {new!r} now")
    unknown = [option for option in options if option not in known]
    if unknown:
        valid = ", ".join(known) or "none"
        raise ConfigError(f"policy {name!r} has no option {unknown[0]!r}; its options: {valid}")
