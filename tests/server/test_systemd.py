"""The unit in docs/serving.md, as systemd itself reads it (Debian: systemd)."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from smart_decoding.cli.serve_options import read_config
from smart_decoding.options import offered
from smart_decoding.server.settings import ServerSettings

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
if not PAGE.is_file():
    pytest.skip("the docs are not in the source distribution", allow_module_level=True)
TEXT = PAGE.read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "smart.service"
    for program, fine in (("/bin/true", True), ("/opt/there/is/none", False)):
        unit.write_text(block("ini").replace("/opt/smart/bin/smart", program))
        line = ["systemd-analyze", "verify", "--man=no", unit]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert (done.returncode == 0 and done.stderr == "") == fine, done.stderr


def test_the_unit_leaves_time_to_drain() -> None:
    timeout = int(re.search(r"^TimeoutStopSec=(\d+)$", block("ini"), re.MULTILINE)[1])  # type: ignore[index]
    (option,) = offered(ServerSettings, ["shutdown_timeout"])
    assert timeout > option.default + 10  # and the engine's last round


def test_the_configuration_shown_is_one(tmp_path: Path) -> None:
    file = tmp_path / "smart.toml"
    file.write_text(block("toml"))
    found = read_config(file)
    assert found["api_keys"] == tomllib.loads(block("toml"))["api-key"]
    assert found["policy_option"] == {"max_levels": 6}
