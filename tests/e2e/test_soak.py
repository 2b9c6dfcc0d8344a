"""`make soak` in its shortest form, on the default model: two real servers, many clients, answers
asked for again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.model

TOOL = Path(__file__).parents[2] / "tools" / "soak.py"
if not TOOL.is_file():
    pytest.skip("the tools are not in the source distribution", allow_module_level=True)


@pytest.mark.slow
def test_a_short_soak_of_the_default_model(tmp_path: Path) -> None:
    """Nothing fails, hangs, leaks or differs. How fast it was is for `make soak`: here others may
    share the machine."""
    line = [
        sys.executable,
        TOOL,
        "--json",
        tmp_path / "soak.json",
        "--seconds",
        "3",
        "--blocks",
        "2",
        "--pause",
        "10",
        "--seed",
        "3",
        "--checked",
        "0.2",
        "--max-gap",
        "5",
        "--option=--max-model-len=1024",
        "--option=--kv-cache-tokens=4096",
    ]
    one_thread = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # two servers and 64 clients on what may be two cores
    done = subprocess.run(line, env=one_thread, capture_output=True, text=True, timeout=240)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads((tmp_path / "soak.json").read_text())
    assert ("PASS" in done.stdout) == (result["faults"] == []) == (done.returncode == 0)
    for policy, found in result["policies"].items():
        assert found["wrong"] == []
        assert set(found["ends"]) - {"refused"} == {"read", "cancelled"}  # who is hostile
        assert found["ends"]["read"] > 15
        assert found["checked"] > 2
        assert (found["rounds_off"] == 1.0) == (policy == "off")
        after_a_fifth, at_the_end = found["memory_mib"]
        assert at_the_end < 1.25 * after_a_fifth
    assert result["policies"]["smart"]["tokens"] == result["policies"]["off"]["tokens"]
