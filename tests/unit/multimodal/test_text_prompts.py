"""Prompts as callers give them."""

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.multimodal.text_prompts import as_list, parts_of


@pytest.mark.parametrize("given", [b"a b", b"", bytearray(b"a"), memoryview(b"a"), [b"a", "b"]])
def test_bytes_are_no_token_ids(given: object) -> None:
    with pytest.raises(ConfigError, match="not bytes: decode them"):
        parts_of(as_list(given)[0])


def test_a_prompt_or_several() -> None:
    assert as_list("a") == ["a"]
    assert as_list([1, 2]) == [[1, 2]]
    assert as_list(["a", [1, 2]]) == ["a", [1, 2]]
    assert parts_of((1, 2)) == ([1, 2], {})
