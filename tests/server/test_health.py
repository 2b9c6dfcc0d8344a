"""Docker's health check: the server's own address, no proxy, and alive while a model is fetched."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from smart_decoding.cli import health

DOCKERFILE = Path(__file__).parents[2] / "Dockerfile"


def command(path: Path, *words: str) -> Path:
    path.write_text("".join(f"{word}\0" for word in ("python", "/bin/smart", "serve", *words)))
    return path


@pytest.mark.parametrize("by_file", [False, True])
def test_a_server_is_healthy_while_it_loads(
    by_file: bool, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    go = threading.Event()

    def fetched() -> Any:
        assert go.wait(60)
        return load()

    with serving(fetched, ready=False) as running:
        port = running.url.rpartition(":")[2]
        words = ["tiny", "--host", "0.0.0.0", "--port", port]
        if by_file:
            (tmp_path / "smart.toml").write_text(f"host = '0.0.0.0'\nport = {port}\n")
            words = ["--config", str(tmp_path / "smart.toml"), "tiny"]
        line = command(tmp_path / "cmdline", *words)
        assert health.main(line) == 0
        go.set()
    assert health.main(line) == 1


def test_a_server_that_could_not_load_is_not_healthy(tmp_path: Path) -> None:
    def broken() -> Any:
        raise ValueError("no model")

    with serving(broken, ready=False) as running:
        port = running.url.rpartition(":")[2]
        running.worker._thread.join(60)
        line = command(tmp_path / "cmdline", "--port", port)
        assert health.main(line) == 1


@pytest.mark.skipif(not DOCKERFILE.exists(), reason="of a clone")
def test_the_image_calls_it() -> None:
    (found,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert json.loads(found) == ["python", "-m", health.__name__]
