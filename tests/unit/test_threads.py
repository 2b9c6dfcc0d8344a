"""How threads wait for each other, as OpenMP itself says once it is loaded."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from smart_decoding import SPINS
from smart_decoding.errors import ConfigError
from smart_decoding.kernels import library, limits


@pytest.mark.parametrize(
    ("given", "spins"), [({}, SPINS), ({"GOMP_SPINCOUNT": "77"}, "77")], ids=["ours", "own"]
)
def test_waiting_threads_sleep_soon(given: dict[str, str], spins: str) -> None:
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    environment.pop("GOMP_SPINCOUNT", None)  # this process has set it
    line = [sys.executable, "-c", "import smart_decoding, torch"]
    done = subprocess.run(
        line, env={**environment, **given}, capture_output=True, text=True, check=True, timeout=60
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("this torch has another OpenMP than GCC's")
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)) == {spins}


WAITING = """
import time
import torch
{loaded}
torch.set_num_threads(2)
one = torch.ones(1 << 16)
one.add_(1)
start = time.process_time()
for _ in range(50):
    one.add_(1)  # then the second thread waits
    time.sleep(0.005)
print(time.process_time() - start)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is nobody to wait for")
def test_waiting_threads_sleep_soon_where_torch_was_imported_first() -> None:
    """Seconds of CPU time, waiting included: measured 0.5 and 0.01."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("GOMP_SPINCOUNT", None)
    seconds = []
    for loaded in ("", "from smart_decoding.kernels import library; library.library()"):
        line = [sys.executable, "-c", WAITING.format(loaded=loaded)]
        done = subprocess.run(
            line, env=environment, capture_output=True, text=True, check=True, timeout=60
        )
        seconds.append(float(done.stdout))
    assert seconds[1] < seconds[0] / 3


class OpenMP:
    """Records the teams that are asked for."""

    def __init__(self) -> None:
        self.teams: list[int] = []

    def GOMP_parallel(self, _function: object, _data: object, count: int, _flags: int) -> None:  # noqa: N802
        self.teams.append(count)


def test_the_team_that_sleeps_is_one_more_than_the_cpus_of_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    openmp = OpenMP()
    library._make_waiting_short(openmp)  # type: ignore[arg-type]
    assert openmp.teams == [3]
    library._make_waiting_short(object())  # type: ignore[arg-type]  # another OpenMP than GCC's


@pytest.mark.parametrize("short", ["user", "container"])
def test_no_team_is_started_where_threads_are_short(
    short: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if short == "user":
        monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (20, 20))
    else:
        monkeypatch.setattr(limits, "GROUPS", tmp_path)
        monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "none")
        (tmp_path / "pids.max").write_text("120\n")
        (tmp_path / "pids.current").write_text("100\n")
    openmp = OpenMP()
    library._make_waiting_short(openmp)  # type: ignore[arg-type]
    assert openmp.teams == []


@pytest.fixture
def threads() -> Iterator[int]:
    """As many as there were, then again."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("environment", "limit", "expected"),
    [
        ({"SMART_NUM_THREADS": "3"}, "100000 100000", 3),
        ({}, "max 100000", 4),
        ({}, "150000 100000", 2),
        ({}, "nonsense", 4),
        ({"OMP_NUM_THREADS": "4"}, "100000 100000", 4),
    ],
    ids=["asked for", "no limit", "a container's limit", "unreadable", "OpenMP's own"],
)
def test_how_many_threads_compute(
    environment: dict[str, str],
    limit: str,
    expected: int,
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(limits, "GROUPS", tmp_path)
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "none")
    (tmp_path / "cpu.max").write_text(limit)
    library.set_threads()
    assert torch.get_num_threads() == expected


def test_more_threads_than_cpus_are_told_once_and_thousands_are_refused(
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(limits, "GROUPS", tmp_path)
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "none")
    (tmp_path / "cpu.max").write_text("100000 100000")
    for number in ("1", "16", "16"):
        monkeypatch.setenv("SMART_NUM_THREADS", number)
        library.set_threads()
    assert caplog.messages == ["16 threads for 1 CPUs wait for each other: fewer are faster"]
    monkeypatch.setenv("SMART_NUM_THREADS", "17")
    with pytest.raises(ConfigError, match="17 threads are not allowed: this process may use 1 CPU"):
        library.set_threads()
    assert torch.get_num_threads() == 16


@pytest.mark.parametrize("wrong", ["0", "-1", "two"])
def test_a_number_of_threads_that_cannot_be_is_refused(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMART_NUM_THREADS", wrong)
    with pytest.raises(ConfigError, match=f"SMART_NUM_THREADS='{wrong}' is not allowed"):
        library.set_threads()
