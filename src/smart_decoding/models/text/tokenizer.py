"""Text to token ids and back: a thin face on the `tokenizers` library, with chat templates and
streaming.

A tokenizer comes from a folder (tokenizer.json, tokenizer_config.json, chat_template.jinja), or
from the metadata of a GGUF file, which names the kind of byte-pair encoding and lists its tokens
and merges, or SentencePiece's scores in their place.
"""

from __future__ import annotations

import filecmp
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from smart_decoding.errors import CapacityError, ConfigError, ModelError
from smart_decoding.files import read_json, reading, reason_of
from smart_decoding.models.text import chat_template

_LONGEST_PIECE = 256  # characters
_PROBE = "A text, 12 of them.\n"  # some tokenizers load, and can encode nothing
# Special tokens, as tokenizer_config.json and GGUF files call them; the last three are of `infill`.
_SPECIALS = {
    "bos_token": ("bos",),
    "eos_token": ("eos",),
    "unk_token": ("unknown",),
    "pad_token": ("padding",),
    "prefix_token": ("fim_pre", "prefix"),
    "suffix_token": ("fim_suf", "suffix"),
    "middle_token": ("fim_mid", "middle"),
}
# GGUF token types
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
_UNUSED = 5
# From so many characters or tokens on, the library is called by a function that lets other threads
# run. It may start threads of its own, so that later forks warn: not for less.
_LONG = 2048
_CHARACTERS = 8  # a token: texts with more of them are measured by their beginning first
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _OTHERS
_QWEN2_SPLIT = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _OTHERS
_QWEN35_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_O200K_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "llama3": _LLAMA3_SPLIT,
    "tekken": _TEKKEN_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "qwen35": _QWEN35_SPLIT,
    "o200k": _O200K_SPLIT,
}
_OF_TIKTOKEN = ("llama3", "tekken")  # whole words are looked up first, and texts begin with BOS
_PRE_TOKENIZERS = {
    "smollm": "smollm",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "qwen35": "qwen35",
    "tekken": "tekken",
    "gpt-4o": "o200k",
}


@dataclass(slots=True)
class Tokenizer:
    """One model's tokenizer. `specials` maps bos_token, eos_token, ... to their text.

    template: what makes prompts of conversations. template_given: it is not the model's own.
    context: tokens that the model can hold; longer texts are refused half read. file: the
    tokenizer.json that it was loaded from."""

    backend: tokenizers.Tokenizer
    specials: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None
    template_given: bool = False
    context: int | None = None
    file: Path | None = None
    _texts: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a model's folder. Raises ModelError if there is no usable tokenizer in it."""
        begun = _begun.pop(_identity(folder), None)
        return begun.result() if begun else cls._load(folder)

    @classmethod
    def _load(cls, folder: Path) -> Tokenizer:
        path = folder / "tokenizer_config.json"
        specials = {}
        begins = False
        if path.exists():
            with reading(path):
                config = read_json(path)
                known = (name for name in _SPECIALS if config.get(name) is not None)
                specials = {name: _text_of(config[name]) for name in known}
                of_llama = str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
                begins = of_llama and config.get("add_bos_token") is True
        backend = _backend_of(folder)
        if begins and "bos_token" in specials:
            with reading(path):
                _begin_with(backend, specials["bos_token"])
        file = folder / "tokenizer.json"
        template = chat_template.find(folder)
        return cls(backend, specials, template, file=file if file.exists() else None)

    def is_that_of(self, folder: Path) -> bool:
        """Return whether a folder's is the same, byte by byte: loading takes 0.4 s for 150,000
        tokens."""
        theirs = folder / "tokenizer.json"
        if self.file is None or not theirs.exists():
            return False
        with reading(theirs):
            return filecmp.cmp(self.file, theirs, shallow=False)

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], space: bool = True, pre: str | None = None
    ) -> Tokenizer:
        """From GGUF metadata: SentencePiece's BPE, or byte-level BPE of the kinds smollm,
        llama-bpe, tekken, qwen2 and gpt-4o; ModelError for any other. Where the metadata do not say
        it, SentencePiece puts a blank before a text if `space` is true, and byte-level BPE is of
        the kind `pre`."""
        tokens = metadata["tokenizer.ggml.tokens"]
        specials = {}
        for special, names in _SPECIALS.items():
            ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names]
            if found := [id_ for id_ in ids if id_ is not None]:
                specials[special] = tokens[found[0]]
        backend = _gguf_backend(metadata, specials, space, pre)
        return cls(backend, specials, metadata.get("tokenizer.chat_template"))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json; `load` and transformers read them
        back."""
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.specials,
        }
        if self.template is not None:
            config["chat_template"] = self.template
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=1), encoding="utf-8"
        )

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text, if the files name one."""
        text = self.specials.get("eos_token")
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids of a text. `add_special_tokens` puts the beginning token there if this
        model uses one.

        Raises CapacityError for a text of more than eight characters a token of the context whose
        beginning has too many tokens, in seconds that do not grow with its length, and ConfigError
        for a text that this tokenizer cannot encode."""
        if self.context is not None:
            self._refuse_too_long(text, self.context)
        return self._encode(text, add_special_tokens)

    def _refuse_too_long(self, text: str, context: int) -> None:
        length = _CHARACTERS * context
        while length < len(text):
            # The cut may lie within a token and change the few before it, hence the slack.
            if len(self._encode(text[:length], False)) > context + _CHARACTERS**2:
                raise CapacityError(
                    f"the prompt is too long: its first {length} of {len(text)} characters exceed "
                    f"max_model_len={context} tokens: shorten it or raise max_model_len"
                )
            length *= 2

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        given = {"add_special_tokens": add_special_tokens}
        try:
            if len(text) < _LONG:
                return list(self.backend.encode(text, **given).ids)
            (found,) = self.backend.encode_batch_fast([text], **given)
            return list(found.ids)
        except BaseException as error:
            raise _reported(error, "encode this text") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return text of token ids; bytes that are no UTF-8 become U+FFFD. Raises ConfigError for
        ids that this tokenizer cannot decode."""
        given = {"skip_special_tokens": skip_special_tokens}
        try:
            if len(ids) < _LONG:
                return str(self.backend.decode(list(ids), **given))
            (text,) = self.backend.decode_batch([list(ids)], **given)
            return str(text)
        except BaseException as error:
            raise _reported(error, "decode these tokens") from error

    def token_text(self, token: int) -> str:
        """Return a token's text as it reads behind another one: some tokenizers drop the space that
        a text begins with."""
        if token not in self._texts:
            anchor = self.encode("a", add_special_tokens=False)
            known = len(self.decode(anchor, False))
            self._texts[token] = self.decode([*anchor, token], False)[known:]
        return self._texts[token]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Return the prompt text of a conversation, by the model's own template or the one given.

        Raises ConfigError without a template or for messages that it refuses. `encode_prompt`
        makes tokens of it."""
        chosen = template or self.template
        if chosen is None:
            raise ConfigError(
                "this model has no chat template: give one (--chat-template FILE), or a text to "
                "continue (smart run --raw; LLM.generate in Python; /v1/completions)"
            )
        given = {
            "tools": None,  # as transformers has it where there are none
            "documents": None,
            **self.specials,
            **variables,
            "add_generation_prompt": add_generation_prompt,
        }
        return chat_template.render(chosen, messages, given)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Return token ids of a conversation's prompt."""
        return self.encode_prompt(self.apply_chat_template(messages, add_generation_prompt))

    def encode_prompt(self, text: str, template_given: bool = False) -> list[int]:
        """Return token ids of a template's text. A model's own template writes special tokens
        itself; one that was given may leave the beginning to the tokenizer."""
        bos = self.specials.get("bos_token")
        begun = bos is not None and text.startswith(bos)
        given = self.template_given or template_given
        return self.encode(text, add_special_tokens=given and not begun)


_begun: dict[tuple[object, ...] | None, Future[Tokenizer]] = {}  # what `begin` began


def begin(folder: Path) -> None:
    """Begin to load a folder's tokenizer, for the next `Tokenizer.load` of the same file: in a
    thread that lets others run, which may import torch meanwhile. Only from a tokenizer.json:
    others are read through transformers, which imports torch, too."""
    key = _identity(folder)
    if key is None:
        return
    pool = ThreadPoolExecutor(1)
    _begun[key] = pool.submit(Tokenizer._load, folder)
    pool.shutdown(wait=False)


def _identity(folder: Path) -> tuple[object, ...] | None:
    try:
        stat = (folder / "tokenizer.json").stat()
    except OSError:
        return None
    return folder, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _reported(error: BaseException, task: str) -> BaseException:
    """Return what to raise where the library fails; its panics are no Exceptions."""
    if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
        return error
    return ConfigError(f"the model's tokenizer cannot {task}: {reason_of(error)}")


def _backend_of(folder: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer, without the truncation and padding that some files have kept from
    training: a prompt is all of it, no more."""
    path = folder / "tokenizer.json"
    if path.exists():
        with reading(path):
            backend = tokenizers.Tokenizer.from_file(str(path))
    elif (folder / "tokenizer.model").exists():
        path = folder / "tokenizer.model"
        backend = _through_transformers(folder)
    else:
        raise ModelError(f"{folder} has neither tokenizer.json nor tokenizer.model")
    with reading(path):
        backend.no_truncation()
        backend.no_padding()
        backend.decode(backend.encode(_PROBE).ids)
    return backend


def _through_transformers(folder: Path) -> tokenizers.Tokenizer:
    """Llama-2 style folders hold a SentencePiece model only, which transformers converts."""
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.exists() else {}
    # what the files of Llama-1's time mean that do not say it: a blank before each piece of text
    old = "legacy" not in config and str(config.get("tokenizer_class")).startswith("LlamaTokenizer")
    options = {"legacy": True} if old else {}
    try:
        from transformers import AutoTokenizer

        # without trust_remote_code=False it would ask
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        backend: tokenizers.Tokenizer = found.backend_tokenizer
    except Exception as error:  # not installed, or one of its own optional parts is not
        needed = "in the clone, pip install -e '.[sentencepiece]'"
        raise ModelError(
            f"{folder} holds only tokenizer.model, which needs transformers: {needed}"
        ) from error
    return backend


def _gguf_backend(
    metadata: Mapping[str, Any], specials: Mapping[str, str], space: bool, usual_pre: str | None
) -> tokenizers.Tokenizer:
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre == "default" and usual_pre is not None:
        pre = usual_pre
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    vocab = {token: id_ for id_, token in enumerate(tokens) if types[id_] != _UNUSED}
    if kind == "llama":
        backend = _sentencepiece(metadata, vocab, specials.get("unk_token"), space)
    elif kind == "gpt2" and pre in _PRE_TOKENIZERS:
        backend = _byte_level(metadata, vocab, _PRE_TOKENIZERS[pre])
    else:
        known = ", ".join(_PRE_TOKENIZERS)
        raise ModelError(
            f"GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported "
            f"(llama, and gpt2 with {known} are)"
        )
    for type_, is_special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, its_type in zip(tokens, types, strict=True) if its_type == type_]
        backend.add_tokens(
            [AddedToken(token, special=is_special, normalized=False) for token in added]
        )
    begins = kind == "llama" or _PRE_TOKENIZERS[pre] in _OF_TIKTOKEN
    if metadata.get("tokenizer.ggml.add_bos_token", begins) and "bos_token" in specials:
        _begin_with(backend, specials["bos_token"])
    return backend


def _byte_level(
    metadata: Mapping[str, Any], vocab: dict[str, int], family: str
) -> tokenizers.Tokenizer:
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=family in _OF_TIKTOKEN)
    )
    backend.pre_tokenizer = _pre_tokenizer(family)
    backend.decoder = decoders.ByteLevel()
    if family in ("qwen2", "qwen35"):
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], unknown: str | None, space: bool
) -> tokenizers.Tokenizer:
    """Blanks are written as U+2581, with `space` one more before a text unless the file says
    otherwise; bytes of what has no piece have tokens of their own."""
    types, scores = (metadata[f"tokenizer.ggml.{name}"] for name in ("token_type", "scores"))
    pieces = {token: id_ for token, id_ in vocab.items() if types[id_] in (_NORMAL, _USER_DEFINED)}
    merges = _merges_of(pieces, scores)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    blank = "\u2581"
    normal: list[normalizers.Normalizer] = [normalizers.Replace(" ", blank)]
    plain = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", space):
        normal.insert(0, normalizers.Prepend(blank))
        plain.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(normal)
    backend.decoder = decoders.Sequence(plain)
    return backend


def _merges_of(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all pairs of pieces that make another one; those of the best piece first."""
    found = []
    for piece, id_ in pieces.items():
        if len(piece) > _LONGEST_PIECE:
            continue  # a damaged file's: its parts would fill the memory
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in pieces and right in pieces:
                found.append((-scores[id_], id_, pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _begin_with(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Has texts begin with this token, unless they do: of some models, DeepSeek's for one, only the
    class that transformers reads them by says so."""
    id_ = backend.token_to_id(bos)
    if id_ is None or backend.encode(_PROBE).ids[:1] == [id_]:
        return
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, id_)]
    )


def _pre_tokenizer(family: str) -> pre_tokenizers.PreTokenizer:
    if family == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = pre_tokenizers.Split(Regex(_SPLITS[family]), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def _text_of(token: Any) -> str:
    """A special token is written as a string or as an object with `content`."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no token")
    return text
