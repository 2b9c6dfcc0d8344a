"""Options of `smart train` that have another name now."""

from __future__ import annotations

import pytest

from smart_decoding.cli import main as cli


@pytest.mark.parametrize("given", [["--taps", "4,15,30"], ["--taps=4,15,30"], ["--taps"]])
def test_the_old_name_of_an_option_says_the_new_one(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--output", "head", *given])
    assert stopped.value.code == 2
    assert "--taps is called --aux-layers now" in capsys.readouterr().err
