"""One tiny model for all tests here, and one server for those that do not change it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

sys.path.append(str(Path(__file__).parent))

from serving import Running, save_tiny_model, serving, slow

from smart_decoding.llm import LLM
from smart_decoding.profiling import measure, profile

Load = Callable[..., LLM]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Makes LLMs of the tiny model; they speculate, by n-grams, with fixed trees."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))

    def make(**options: Any) -> LLM:
        given = {
            "speculative_config": {"method": "ngram", "policy": "static", "min_n": 1},
            "dtype": "float32",
            "max_model_len": 1024,
            "max_num_seqs": 4,
        }
        return LLM(folder, **{**given, **options})

    return make


@pytest.fixture(scope="session")
def plain(load: Load) -> LLM:
    """Decodes plainly, outside of any server: what the answers must be."""
    return load(speculative_config=False)


@pytest.fixture(scope="session")
def running(load: Load) -> Iterator[Running]:
    with serving(load) as server:
        yield server


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    """The official client, without retries."""
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def slowly(load: Load) -> Iterator[Running]:
    """A server whose rounds take some hundredths of a second more."""
    with serving(lambda: slow(load(), 0.04)) as running:
        yield running


@pytest.fixture(scope="module")
def short_profile() -> Iterator[None]:
    """Profiles of a tenth of a second, which are not kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SECONDS", 0.1)
        patch.setattr(profile, "load_profile", lambda path: None)
        patch.setattr(profile, "save_profile", lambda path, cost, model, busy: None)
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; profiles are measured in a tenth of a second."""
    monkeypatch.setenv("SMART_CACHE", str(tmp_path))
    monkeypatch.setattr(measure, "SECONDS", 0.1)
    return tmp_path
