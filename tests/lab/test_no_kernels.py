"""The laboratory stops with one line where the CPU kernels are missing, before anything is
loaded."""

import pytest

from smart_decoding.cli.main import main
from smart_decoding.kernels import library
from smart_decoding.models.checkpoints import loading
from smart_lab.__main__ import LAB


@pytest.mark.parametrize(
    "command",
    [["bench", "--policies", "off"], ["bench", "--record", "trace"]],
)
def test_it_stops_with_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*given: object) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(library, "unavailable", lambda: "none were built")
    monkeypatch.setattr(loading, "resolve", fail)
    assert main(command, LAB) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "none were built" in err
    assert "--allow-slow" in err
