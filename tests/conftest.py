"""What tests of several packages share."""

import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers of pytest-xdist divide the cores among themselves: OpenMP reads this when torch is loaded.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // workers)))

from smart_decoding.kernels import library

# A shell starts its background with SIGINT ignored, which all that is started here would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # while modules are imported: what they make stays
logging.getLogger("smart.steps").setLevel(logging.WARNING)  # long steps are silent here
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))  # for smart_lab


@pytest.fixture(scope="module", params=library.runnable() or ["none"])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each variant of the CPU kernels that this CPU can run, one after another; none is a
    failure."""
    assert request.param != "none", library.unavailable()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "chosen", lambda: request.param)
        yield request.param


def pytest_collection_finish() -> None:
    """No collection looks through what was imported again."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """SMART_NO_SKIPS=1: a test that is skipped fails the run, as in targets that install all that
    is needed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if (
        os.environ.get("SMART_NO_SKIPS")
        and reporter.stats.get("skipped")
        and not session.exitstatus
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
