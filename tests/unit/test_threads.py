"""How threads wait for each other, as OpenMP itself says once it is loaded."""

import os
import re
import subprocess
import sys

import pytest

from smart_decoding import SPINS


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
