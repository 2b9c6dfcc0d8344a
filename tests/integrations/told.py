"""Blocks by the seconds that a fake server tells: a busy machine would blur its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from smart_decoding.integrations.tuning import busy
from smart_decoding.integrations.tuning.settings import Trial

_trial = busy.trial


def trial_as_told(prompts: Sequence[Any], load: int, ask: Callable[[Any], busy.Answered]) -> Trial:
    """A block by the seconds that the server tells of each answer."""
    told: list[busy.Answered] = []
    _trial(prompts, load, lambda prompt: told.append(ask(prompt)) or told[-1])
    seconds = sum(answer.decoding or 0.0 for answer in told) / load
    drafted, accepted = (sum(getattr(a, name) for a in told) for name in ("drafted", "accepted"))
    return Trial(sum(answer.tokens for answer in told), seconds, drafted, accepted)
