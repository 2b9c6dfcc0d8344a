"""`python -m smart_lab profile` takes what `smart run` takes to draft."""

from __future__ import annotations

import pytest

from smart_decoding.cli import main as cli
from smart_decoding.cli.model_options import speculative_config
from smart_lab.__main__ import LAB


def test_profile_takes_what_run_takes_to_draft() -> None:
    parser = cli.build_parser("profile", LAB)
    for words, drafts in (
        ("", {}),
        ("--draft folder", {"model": "folder"}),
        ("--method draft_model --draft small", {"method": "draft_model", "model": "small"}),
        ("--method ngram", {"method": "ngram"}),
    ):
        config = speculative_config(parser.parse_args(["profile", *words.split()]))
        assert config == {"policy": "smart", **drafts}


def test_profile_needs_a_draft_model_for_that_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "--method", "draft_model"], LAB) == 2
    assert "give --draft MODEL" in capsys.readouterr().err
