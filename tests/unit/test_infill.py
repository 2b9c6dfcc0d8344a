"""Filling in the middle: which tokens a vocabulary has for it, and prompts made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from smart_decoding.models.text.infill import InfillTokens
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.server.infill import prompt_of, texts_of
from smart_decoding.server.schemas import InfillRequest

QWEN = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>")
DEEPSEEK = (
    "<\uff5cfim\u2581begin\uff5c>",
    "<\uff5cfim\u2581hole\uff5c>",
    "<\uff5cfim\u2581end\uff5c>",
)
GGUF_NAMES = ["fim_pre fim_suf fim_mid", "prefix suffix middle"]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())  # ids 0 to 255


def tokenizer(*names: str, **specials: str) -> Tokenizer:
    backend = Backend(models.BPE(vocab={each: i for i, each in enumerate(LETTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens([AddedToken(name) for name in names])
    return Tokenizer(backend, specials)


def fits(*names: str, **specials: str) -> InfillTokens:
    found = InfillTokens.of(tokenizer(*names, **specials))
    assert found is not None
    return found


def test_tokens_are_known_by_their_names() -> None:
    qwen = fits(*QWEN, "<|file_sep|>", "<|endoftext|>")
    assert (qwen.prefix, qwen.suffix, qwen.middle) == (256, 258, 257)
    assert (qwen.repository, qwen.file, qwen.begin) == (260, 261, ())
    assert set(qwen.ends) == set(range(256, 263))
    assert qwen.prompt([1, 2], [3], [9]) == [9, 256, 1, 2, 258, 3, 257]
    deepseek = fits(*DEEPSEEK)
    assert deepseek.prompt([1], [2]) == [256, 1, 257, 2, 258]
    assert (deepseek.repository, deepseek.file) == (None, None)


@pytest.mark.parametrize("names", [(), QWEN[:2], ("<|im_start|>", "<PRE>", "<SUF>")])
def test_a_vocabulary_without_all_three_has_none(names: tuple[str, ...]) -> None:
    assert InfillTokens.of(tokenizer(*names)) is None


def test_tokens_that_files_name_go_first(tmp_path: Path) -> None:
    named = {"prefix_token": "<a>", "suffix_token": "<b>", "middle_token": "<c>"}
    own = tokenizer(*QWEN, "<a>", "<b>", "<c>", **named)
    own.save(tmp_path)
    found = InfillTokens.of(Tokenizer.load(tmp_path))
    assert found is not None
    assert (found.prefix, found.suffix, found.middle) == (261, 262, 263)


@pytest.mark.parametrize("names", GGUF_NAMES)
def test_tokens_that_gguf_files_name(names: str) -> None:
    tokens = [*LETTERS, "<one>", "<two>", "<three>", "<four>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 4,
        "tokenizer.ggml.merges": [],
        **{f"tokenizer.ggml.{name}_token_id": 257 + i for i, name in enumerate(names.split())},
    }
    found = InfillTokens.of(Tokenizer.from_gguf(metadata))
    assert found is not None
    assert (found.prefix, found.suffix, found.middle) == (257, 258, 259)


def test_what_a_text_begins_with_comes_first() -> None:
    from tokenizers import processors

    begun = tokenizer("<s>", *QWEN)
    begun.backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    found = InfillTokens.of(begun)
    assert found is not None
    assert found.prompt([1], [2]) == [256, 257, 1, 259, 2, 258]


def encoded(body: InfillRequest, tokens: InfillTokens, context: int, limit: int) -> object:
    of_bytes = [list(text.encode()) for text in texts_of(body, tokens, context)[0]]
    prompt, cut = prompt_of(of_bytes, tokens, context, limit)
    text = "".join(chr(token) if token < 256 else f"<{token}>" for token in prompt)
    return text, cut


FILES = [{"text": "x = 1\n", "filename": "a.py", "time": 7}, {"text": "y = 2\n"}]


def test_other_files_come_before_the_prefix() -> None:
    body = InfillRequest(
        input_prefix="def f",
        input_suffix=")",
        prompt="(",
        input_extra=FILES,  # type: ignore[arg-type]
    )
    whole = encoded(body, fits(*QWEN, "<|file_sep|>"), 1000, 10)
    before = "<260>repository\n<261>a.py\nx = 1\n<261>tmp\ny = 2\n<261>filename\n"
    assert whole == (f"{before}<256>def f(<258>)<257>", False)
    snippet = "\n\n--- snippet ---\n\n"
    assert encoded(body, fits(*DEEPSEEK), 1000, 10) == (
        f"{snippet}x = 1\n{snippet}y = 2\n<256>def f(<257>)<258>",
        False,
    )


def test_texts_are_cut_to_the_context() -> None:
    """The end of the text before the gap and the beginning of the text behind it stay."""
    tokens = fits(*DEEPSEEK)
    body = InfillRequest(input_prefix="a" * 500 + "bc", input_suffix="de" + "f" * 500)
    text, cut = encoded(body, tokens, 43, 8)  # type: ignore[misc]
    assert cut
    assert text == f"<256>{'a' * 22}bc<257>de{'f' * 6}<258>"
    small = InfillRequest(input_prefix="bc", input_suffix="de", input_extra=FILES)  # type: ignore[arg-type]
    text, cut = encoded(small, tokens, 43, 8)  # type: ignore[misc]
    assert cut
    assert text.endswith("y = 2\n<256>bc<257>de<258>")
    assert len(text) == 32 + 3 * 5  # each mark is written as five characters
    assert encoded(body, tokens, 8, 8)[0] == "<256><257><258>"  # type: ignore[index]


def test_no_more_is_encoded_than_may_fit() -> None:
    """Of a body of megabytes: the latest texts beside the file, and the ends of the others."""
    extra = [{"text": f"{i}" * 90} for i in range(10)]
    body = InfillRequest(input_prefix="a" * 900, input_suffix="b" * 900, input_extra=extra)  # type: ignore[arg-type]
    for tokens in (fits(*DEEPSEEK), fits(*QWEN, "<|file_sep|>")):
        (before, behind, *beside), cut = texts_of(body, tokens, 20)
        assert cut
        assert not texts_of(body, tokens, 200)[1]
        assert (before, behind) == ("a" * 160, "b" * 160)
        of_extra = "".join(beside).replace("repository\n", "").replace("filename\n", "")
        assert len(of_extra) == 160
        assert "8" in of_extra
        assert "7" not in of_extra


def test_sampling_defaults_of_a_model_are_for_its_chats() -> None:
    recommended = {"temperature": 0.7, "repetition_penalty": 1.3}
    params = InfillRequest(input_prefix="a").params(8, None, recommended)
    assert (params.temperature, params.repetition_penalty) == (0.0, 1.0)
