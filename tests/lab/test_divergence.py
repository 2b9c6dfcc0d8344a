"""`divergence`: first differences are near-ties or they are not, from scripted answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from smart_decoding import Logprob
from smart_decoding.cli.main import main
from smart_lab import divergence
from smart_lab.__main__ import LAB

LLM: Any = SimpleNamespace(
    provenance={"model": "m", "weights": "fake weights"},
    tokenizer=SimpleNamespace(decode=lambda ids, skip=True: "?"),
)


def answer(tokens: list[int], gaps: list[float], verified: int = 9) -> Any:
    """At each position `token` leads by `gap` over token 60 - token; two other tokens follow far
    behind."""
    logprobs = [
        {
            token: Logprob(-0.1, 1),
            60 - token: Logprob(-0.1 - gap, 2),
            98: Logprob(-20.0, 3),
            99: Logprob(-20.0, 4),
        }
        for token, gap in zip(tokens, gaps, strict=True)
    ]
    return SimpleNamespace(
        token_ids=tokens, logprobs=logprobs, metrics=SimpleNamespace(verified=verified)
    )


def test_a_near_tie_is_recognised() -> None:
    report = divergence.Report()
    divergence.record(
        report,
        0,
        answer([1, 2, 29, 4], [3.0, 2.0, 0.01, 1.0]),
        answer([1, 2, 31, 7], [3.05, 2.0, 0.02, 1]),
    )
    (difference,) = report.differences
    assert (difference.position, difference.plain, difference.other) == (2, 29, 31)
    assert difference.gap == pytest.approx(0.01)
    assert difference.spec_gap == pytest.approx(0.02)
    assert report.rounding == pytest.approx(0.05)
    assert report.passed
    text = divergence.render(report, LLM)
    assert "differ under speculation: 1 of 1" in text
    assert text.endswith(": near-tie")


def test_a_difference_beyond_rounding_fails_the_check() -> None:
    report = divergence.Report()
    divergence.record(report, 3, answer([1, 29], [3.0, 0.4]), answer([1, 31], [3.1, 0.4]))
    assert not report.passed
    assert "NOT a near-tie" in divergence.render(report, LLM)


def test_a_token_that_was_no_rival_is_not_a_near_tie() -> None:
    report = divergence.Report()
    divergence.record(report, 0, answer([1, 2], [3.0, 0.0]), answer([1, 70], [9.0, 0.0]))
    assert report.differences[0].gap == float("inf")
    assert not report.passed


def test_equal_answers_pass_only_if_something_was_verified() -> None:
    report = divergence.Report()
    divergence.record(report, 0, answer([1, 2], [3.0, 2.0]), answer([1, 2], [3.0, 2.0], verified=0))
    assert not report.differences
    assert not report.passed
    assert "nothing was tested" in divergence.render(report, LLM)
    divergence.record(report, 1, answer([1, 2], [3.0, 2.0]), answer([1, 2], [3.0, 2.0]))
    assert report.passed
    assert (report.answers, report.tokens, report.rounding) == (2, 4, 0.0)


@pytest.mark.parametrize(
    ("prompts", "message"), [("1000", "--prompts 1000 is too many"), ("0", "at least 1")]
)
def test_more_prompts_than_there_are_are_refused_before_a_model_is_loaded(
    prompts: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []
    monkeypatch.setattr("smart_decoding.llm.LLM", made.append)
    assert main(["divergence", "--prompts", prompts], LAB) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("smart_lab: error: ")
    assert message in err
    assert not made
