"""Answers in Harmony are split into reasoning, content and calls, however they are cut."""

from __future__ import annotations

import pytest

from smart_decoding.models.text.harmony import HarmonyText, Part, speaks_harmony

ANALYSIS = "<|channel|>analysis<|message|>We think.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Hello <b>|"
CALL = (
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"city": "Oslo"}'
)
CASES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "reasoning and answer": (
        ANALYSIS + FINAL,
        [("reasoning", "We think."), ("content", "Hello <b>|")],
    ),
    "with its last token": (
        ANALYSIS + FINAL + "<|return|>",
        [("reasoning", "We think."), ("content", "Hello <b>|")],
    ),
    "a call": (
        ANALYSIS + CALL,
        [("reasoning", "We think."), ("call", "get_weather"), ("arguments", '{"city": "Oslo"}')],
    ),
    "its tool before the channel": (
        " to=functions.f-2<|channel|>commentary json<|message|>{}<|call|>",
        [("call", "f-2"), ("arguments", "{}")],
    ),
    "commentary to nobody": (
        "<|channel|>commentary<|message|>First I look.<|end|>" + CALL,
        [
            ("content", "First I look."),
            ("call", "get_weather"),
            ("arguments", '{"city": "Oslo"}'),
        ],
    ),
    "a built-in tool": (
        "<|channel|>analysis to=python code<|message|>1 + 1<|end|>" + FINAL,
        [("reasoning", "1 + 1"), ("content", "Hello <b>|")],
    ),
    "plain text": ('{"a": 1} <|', [("content", '{"a": 1} <|')]),
    "text that begins as a marker": ("<|chan", []),
    "a header that is cut": (ANALYSIS + "<|start|>assistant<|chan", [("reasoning", "We think.")]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_answer_is_split_by_its_channels(name: str, size: int) -> None:
    text, expected = CASES[name]
    harmony = HarmonyText()
    found: list[Part] = []
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    for i, piece in enumerate(pieces):
        for part in harmony.feed(piece, i == len(pieces) - 1):
            assert part.text
            if found and found[-1].kind == part.kind != "call":
                found[-1] = Part(part.kind, found[-1].text + part.text)
            else:
                found.append(part)
    assert found == expected
    assert harmony.calls == text.endswith("}")


def test_only_templates_with_channels_speak_it() -> None:
    assert speaks_harmony("{{ '<|start|>assistant<|channel|>final<|message|>' }}")
    assert not speaks_harmony("{{ '<|im_start|>' }}")
    assert not speaks_harmony(None)
