"""What only a CUDA device runs, by the calls that it makes: torch.cuda's objects are fakes here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from smart_decoding.models.target import TorchTarget
from smart_decoding.models.torch.device_draft import DeviceDraft
from smart_decoding.models.torch.graphs import CudaRecorder, GraphedLayers, layers_on

CUDA = torch.device("cuda")


class Stream:
    """A stream that tells what is done to it."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name = name
        self.device = CUDA
        self._seen = seen

    def wait_stream(self, other: Stream) -> None:
        self._seen.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self._seen.append(f"host waits for {self.name}")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch.cuda was asked for, in order."""
    found: list[str] = []
    current = Stream("current", found)

    class Graph:
        def capture_begin(self, pool: str, capture_error_mode: str) -> None:
            found.append(f"begin in {pool}, {capture_error_mode}")

        def capture_end(self) -> None:
            found.append("end")

        def replay(self) -> None:
            found.append("replay")

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        found.append(f"on {chosen.name}")
        yield
        found.append("back")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Stream", lambda device: Stream("own", found))
    monkeypatch.setattr(cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "stream", stream)
    return found


def test_a_recording_is_made_on_a_stream_of_its_own_after_a_first_run(seen: list[str]) -> None:
    replay = CudaRecorder(CUDA)(lambda: seen.append("run"))
    before = ["own waits for current", "on own", "run"]
    made = ["begin in a pool, thread_local", "run", "end", "back", "current waits for own"]
    assert seen == before + made
    replay()
    assert seen[-1] == "replay"


def test_a_recording_that_fails_is_ended(seen: list[str]) -> None:
    def run() -> None:
        if "begin in a pool, thread_local" in seen:
            raise RuntimeError("not allowed while capturing")

    with pytest.raises(RuntimeError, match="while capturing"):
        CudaRecorder(CUDA)(run)
    assert seen[-1] == "end"


def test_cuda_has_graphs_unless_they_are_declined(
    seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smart_decoding.models.torch.graphs.ops_for", lambda device: None)
    assert isinstance(layers_on(CUDA, [], True), GraphedLayers)
    assert not isinstance(layers_on(CUDA, [], False), GraphedLayers)
    assert not isinstance(layers_on(torch.device("cpu"), [], True), GraphedLayers)


def test_levels_are_timed_by_the_devices_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        made: ClassVar[list[Event]] = []

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = 0.0

        def record(self, stream: object) -> None:
            assert stream == "the stream of cuda"
            self.made.append(self)
            self.at = float(len(self.made)) ** 2

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    growth: Any = SimpleNamespace(_tokens=SimpleNamespace(device=CUDA))
    growth._marks = [DeviceDraft._mark(growth) for _ in range(3)]
    assert DeviceDraft._seconds(growth) == pytest.approx([0.003, 0.005])


def test_a_picture_is_there_before_it_is_said_to_be(seen: list[str]) -> None:
    target: Any = SimpleNamespace(
        device=CUDA, _tower=SimpleNamespace(encode_image=lambda pixels: np.ones(3))
    )
    assert TorchTarget.encode_image(target, None) is not None  # type: ignore[arg-type]
    assert seen == ["host waits for current"]
