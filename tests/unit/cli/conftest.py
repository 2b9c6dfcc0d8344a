"""`smart_decoding.llm` with a scripted LLM, and a machine without Ollama."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).parent))

from scripted import FakeLLM


@pytest.fixture(autouse=True)
def no_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama has no models here, whatever this machine's has."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "no-ollama"))


@pytest.fixture(autouse=True)
def steps_of_a_terminal() -> Iterator[None]:
    """What a command shows on a terminal is shown to no other test."""
    logger = logging.getLogger("smart.memory")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """`smart_decoding.llm` is a module that holds FakeLLM only."""
    module = ModuleType("smart_decoding.llm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smart_decoding.llm", module)
    FakeLLM.made = []
    FakeLLM.failure = None
    return FakeLLM
