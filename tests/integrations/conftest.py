import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for chain_world.py


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
