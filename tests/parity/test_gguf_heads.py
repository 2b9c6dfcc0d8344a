"""EAGLE-3 heads as llama.cpp's converter writes them (conversion/llama.py and src/models/eagle3.cpp
in llama-cpp-python 0.3.36), against the safetensors that they were converted from."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch

from smart_decoding import speculation
from smart_decoding.cli import main as cli
from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints.gguf_header import is_head_file, own_words
from smart_decoding.models.checkpoints.hub_repository import Listing
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.heads import files as head_files
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import head_path, is_head, load_head

from .reference_head import PAGES, SCRATCH, write
from .test_known_heads import (
    CPU,
    HEADS,
    VOCAB,
    Known,
    answers,
    drafts,
    targets,  # noqa: F401  # a fixture here, too
)

if TYPE_CHECKING:
    from torch import Tensor

Kind = gguf.GGMLQuantizationType
NAMES = {
    "fc": "fc",
    "input_norm": "enc.output_norm",
    "norm": "output_norm",
    "lm_head": "output",
    "embed_tokens": "token_embd",
    "input_layernorm": "blk.0.attn_norm",
    "hidden_norm": "blk.0.attn_norm_2",
    "self_attn.q_proj": "blk.0.attn_q",
    "self_attn.k_proj": "blk.0.attn_k",
    "self_attn.v_proj": "blk.0.attn_v",
    "self_attn.o_proj": "blk.0.attn_output",
    "post_attention_layernorm": "blk.0.ffn_norm",
    "mlp.gate_proj": "blk.0.ffn_gate",
    "mlp.up_proj": "blk.0.ffn_up",
    "mlp.down_proj": "blk.0.ffn_down",
}
# what llama.cpp's converter takes: no norms of each state, none of queries and keys
CONVERTED = [name for name in HEADS if "0.9" not in name and "3.1" not in name]
USUAL = "AngelSlim Qwen3-1.7B"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama.cpp's order: in each head its two halves alternate."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def convert(
    path: Path,
    known: Known,
    kind: Kind = Kind.F32,
    change: Callable[[dict[str, Any]], object] = lambda entries: None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Writes the head as a GGUF file. change: of the entries under `eagle3.`."""
    layer = known.config.get("transformer_layer_config", known.config)
    heads, kv_heads = layer["num_attention_heads"], layer["num_key_value_heads"]
    head_dim = layer.get("head_dim", layer["hidden_size"] // heads)
    entries: dict[str, Any] = {
        "block_count": 1,
        "context_length": layer["max_position_embeddings"],
        "embedding_length": layer["hidden_size"],
        "feed_forward_length": layer["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": layer["rms_norm_eps"],
        "vocab_size": VOCAB,
        "rope.dimension_count": head_dim,
        "target_layers": list(known.layers),
        "target_hidden_size": layer["hidden_size"],
        "norm_before_residual": known.normed,
        "norm_before_fc": bool(known.config.get("norm_before_fc")),
    }
    if "head_dim" in layer:
        entries |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if "rope_theta" in layer:
        entries["rope.freq_base"] = float(layer["rope_theta"])
    change(entries)
    writer = gguf.GGUFWriter(path, "eagle3")
    writer.add_name("A head")
    for key, value in entries.items():
        add = {
            bool: writer.add_bool,
            float: writer.add_float32,
            list: writer.add_array,
            str: writer.add_string,
        }
        add.get(type(value), writer.add_uint32)(f"eagle3.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"w{i}" for i in range(VOCAB)])
    for name, tensor in known.tensors.items():
        if name == "d2t":  # token ids, not offsets
            ids = (tensor + torch.arange(len(tensor))).numpy()
            writer.add_tensor("d2t", ids, raw_dtype=Kind.I64)
        elif name != "t2d":
            add_matrix(writer, name, tensor, kind, heads, kv_heads)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_matrix(
    writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: Kind, heads: int, kv_heads: int
) -> None:
    stem, end = name.removeprefix("midlayer.").removeprefix("layers.0.").rsplit(".", 1)
    array = tensor.float().numpy()
    if "q_proj" in stem or "k_proj" in stem:
        array = permuted(array, heads if "q_proj" in stem else kv_heads)
    array = np.ascontiguousarray(array)
    if array.ndim == 1 or kind == Kind.F32:
        writer.add_tensor(f"{NAMES[stem]}.{end}", array)
    else:
        writer.add_tensor(f"{NAMES[stem]}.{end}", gguf.quantize(array, kind), raw_dtype=kind)


@pytest.mark.parametrize("name", CONVERTED)
@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16])
def test_a_file_is_read_as_what_it_was_converted_from(
    name: str,
    kind: Kind,
    targets: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    known = HEADS[name]
    config = load_checkpoint(targets(known.target)).config
    source = load_head(
        write(tmp_path / "head", known.config, known.tensors, known.pickled), config, known.pickled
    )
    found = load_head(convert(tmp_path / "head.gguf", known, kind), config)
    assert (found.aux_layers, found.norm_before_residual, found.fused, found.shape) == (
        source.aux_layers,
        source.norm_before_residual,
        source.fused,
        source.shape,
    )
    assert found.weights.keys() == source.weights.keys()
    for key, weight in source.weights.items():
        if kind == Kind.BF16 and weight.ndim > 1:  # of a head in float16
            weight = weight.bfloat16().to(weight.dtype)
        assert torch.equal(as_tensor(found.weights[key]).to(weight.dtype), weight), key


def test_scaled_positions_are_read(targets: Any, tmp_path: Path) -> None:  # noqa: F811
    """Llama 3's as divisors of the frequencies, in a tensor of their own; YaRN's as keys."""
    config = load_checkpoint(targets("qwen3")).config
    divisors = np.linspace(1, 8, 16, dtype=np.float32)
    path = convert(tmp_path / "a.gguf", HEADS[USUAL], extra={"rope_freqs.weight": divisors})
    plain = load_head(convert(tmp_path / "b.gguf", HEADS[USUAL]), config)
    scaled = load_head(path, config).shape.inverse_frequencies()[0]
    np.testing.assert_allclose(scaled * divisors, plain.shape.inverse_frequencies()[0])
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
    change = put(**{f"rope.scaling.{key}": value for key, value in yarn.items()})
    path = convert(tmp_path / "c.gguf", HEADS[USUAL], change=change)
    scaling = load_head(path, config).shape.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.numbers["factor"]) == ("yarn", 4.0)


def test_quants_stay_what_they_are(targets: Any, tmp_path: Path) -> None:  # noqa: F811
    """But tables: rows of the output matrix and embeddings are looked up or packed otherwise."""
    known = HEADS["AngelSlim Qwen3-8B"]
    checkpoint = load_checkpoint(targets(known.target))
    found = load_head(convert(tmp_path / "head.gguf", known, Kind.Q8_0), checkpoint.config)
    exact = load_head(convert(tmp_path / "exact.gguf", known), checkpoint.config)
    quants = [name for name, w in found.weights.items() if isinstance(w, QuantizedTensor)]
    assert len(quants) == 10
    decoder = Decoder(checkpoint.config, checkpoint.weights, torch.bfloat16, CPU, PAGES, 128, True)
    costs = [EagleHead(each, decoder, PAGES, SCRATCH, 128).shape for each in (found, exact)]
    assert costs[0] == (*costs[1], "Q8_0")  # what a level takes depends on it
    for name in quants:
        weight = as_tensor(exact.weights[name]).float()
        torch.testing.assert_close(
            as_tensor(found.weights[name]).float(), weight, rtol=0, atol=0.02 * float(weight.std())
        )


@pytest.mark.parametrize(
    ("kind", "quantization"), [(Kind.BF16, "off"), (Kind.Q8_0, "off"), (Kind.Q4_0, "int8")]
)
def test_answers_are_those_of_plain_decoding(
    kind: Kind,
    quantization: str,
    targets: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    known = HEADS[USUAL]
    plain = LLM(
        targets(known.target),
        speculative_config=False,
        quantization=quantization,
        max_model_len=64,
        max_num_seqs=3,
        enable_prefix_caching=False,
    )
    expected = [answers(plain, temperature) for temperature in (0.0, 0.8)]
    head = convert(tmp_path / "head.gguf", known, kind)
    for policy in ("chain", "eagle2", "smart"):
        llm = plain.sharing_weights({"method": "eagle", "model": str(head), "policy": policy})
        before = drafts(llm)
        assert [answers(llm, temperature) for temperature in (0.0, 0.8)] == expected
        assert llm.speculation.description == "eagle head head.gguf"
        assert policy == "smart" or drafts(llm) > before
    beside = plain.sharing_weights({"model": str(head)})  # a head, though a GGUF file
    assert beside.speculation.description == "eagle head head.gguf"
    assert answers(beside, 0.0) == expected[0]


def test_the_commands_take_a_file(
    targets: Any,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known = HEADS[USUAL]
    head = str(convert(tmp_path / "head.gguf", known))
    target = str(targets(known.target))
    run = ["run", "--model", target, "-n", "8", "--temp", "0", "--raw", "w3"]
    assert cli.main([*run, "--method", "none"]) == 0
    expected = capsys.readouterr().out
    assert cli.main([*run, "--method", "eagle", "--draft", head]) == 0
    assert capsys.readouterr().out == expected
    out = str(tmp_path / "out")
    assert cli.main(["export", head, "--model", target, "--layout", "eagle3", "--output", out]) == 0
    config = load_checkpoint(targets(known.target)).config
    again = load_head(tmp_path / "out", config)
    for name, weight in load_head(Path(head), config).weights.items():
        assert torch.equal(as_tensor(again.weights[name]), as_tensor(weight))


def remove(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries.pop(key)


def put(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries.update(changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove("target_layers"), "lacks eagle3.target_layers: convert the head again"),
        (put(target_layers=[2, 4, 9]), r"reads layers \(2, 4, 9\) of a model of 8"),
        (put(target_hidden_size=96), "target_hidden_size 96, but the model has 64"),
        (put(vocab_size=98), "vocab_size 98, but the model has 97"),
        (put(norm_before_fc=True), "lacks the tensor input_norm.weight"),
        (put(block_count=2), "lacks the tensor layers.1"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[dict[str, Any]], object],
    reason: str,
    targets: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = load_checkpoint(targets("qwen3")).config
    with pytest.raises(ModelError, match=reason):
        load_head(convert(tmp_path / "head.gguf", HEADS[USUAL], change=change), config)


def test_tensors_that_do_not_fit_are_named(targets: Any, tmp_path: Path) -> None:  # noqa: F811
    known = HEADS[USUAL]
    config = load_checkpoint(targets("qwen3")).config
    for shift, reason in ((VOCAB, "within the model's vocabulary"), (None, "some tokens under")):
        offsets = known.tensors["d2t"]
        changed = offsets + shift if shift else -torch.arange(len(offsets))
        tensors = {**known.tensors, "d2t": changed}
        path = convert(tmp_path / "head.gguf", Known("qwen3", known.config, tensors))
        with pytest.raises(ModelError, match=reason):
            load_head(path, config)
    other = {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4, 4), np.float32)}
    path = convert(tmp_path / "head.gguf", known, extra=other)
    with pytest.raises(ModelError, match=r"holds the tensor blk\.0\.ffn_gate_exps\.weight"):
        load_head(path, config)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="was cut"):
        load_head(path, config)


def test_a_head_is_no_model_and_a_model_no_head(targets: Any, tmp_path: Path) -> None:  # noqa: F811
    """Before a weight of the model beside it is read."""
    head = convert(tmp_path / "head.gguf", HEADS[USUAL])
    assert is_head(head)
    assert own_words(head) == {"architecture": "eagle3", "name": "A head"}
    with pytest.raises(ModelError, match="draft head is no model: name its model"):
        LLM(head)
    with pytest.raises(ModelError, match="draft head is no model"):
        LLM(targets("qwen3"), speculative_config={"method": "draft_model", "model": str(head)})
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = {"method": "eagle", "model": str(tmp_path / "model.gguf")}
    with pytest.raises(ModelError, match=r"no draft head but a model \('llama'\): .* draft_model"):
        LLM(targets("qwen3"), speculative_config=config)


def test_a_head_that_does_not_fit_is_refused_before_its_model_is_read(
    targets: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = convert(tmp_path / "head.gguf", HEADS["AngelSlim Qwen3-4B, head_dim 80"])
    monkeypatch.setattr("smart_decoding.llm.TorchTarget", None)
    with pytest.raises(ModelError, match="hidden_size 160, but the model has 64"):
        LLM(targets("qwen3"), speculative_config={"model": str(head)}, max_model_len=64)
    known = HEADS["speculators 0.9"]
    layer = {**known.config["transformer_layer_config"], "head_dim": 24}
    tensors = {
        name: {"q": w[:96], "k": w[:48], "v": w[:48], "o": w[:, :96]}[name.split(".")[3][0]]
        if "_proj" in name and "self_attn" in name
        else w[:24]
        if "q_norm" in name or "k_norm" in name
        else w
        for name, w in known.tensors.items()
    }
    folder = write(tmp_path / "head", {**known.config, "transformer_layer_config": layer}, tensors)
    with pytest.raises(ModelError, match="do not serve this head: head dimension 24"):
        LLM(targets("llama"), speculative_config={"model": str(folder)}, max_model_len=64)


@pytest.mark.parametrize("answered", [True, False])
def test_a_head_on_the_hub(answered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is known by what the hub says of its files, or by the files in the cache."""
    name = "Qwen3-1.7B_eagle3-BF16.gguf"
    convert(tmp_path / name, HEADS[USUAL])
    listed = Listing("a/b", [name], "eagle3" if answered else "", answered)
    for module in (head_files, speculation):
        monkeypatch.setattr(module, "listing", lambda repository, timeout: listed)
    monkeypatch.setattr(head_files, "download", lambda *_: tmp_path)
    monkeypatch.setattr(
        "smart_decoding.models.checkpoints.hub_repository._stored", lambda repository: tmp_path
    )
    monkeypatch.setattr(
        head_files, "gguf_file", lambda repository, file, timeout, local_only: tmp_path / file
    )
    for text in ("a/b", f"a/b:{name}", "a/b:BF16"):
        assert not speculation._is_model(text, ask=True)
        assert head_path(text) == tmp_path / name
    with pytest.raises(DownloadError, match="no GGUF file of Q4_K_M"):
        head_path("a/b:Q4_K_M")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"GGUF", b"GGUF" + bytes(20), b"PK" + bytes(60)),
        b"GGUF\x03\0\0\0" + b"\xff" * 40,
        # a list of 2**63 numbers
        b"GGUF" + struct.pack("<IQQQsIIQ", 3, 0, 2, 1, b"a", 9, 4, 1 << 63) + bytes(60),
    ],
)
def test_a_damaged_file_says_nothing_of_itself(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    assert own_words(path) == {}
    assert not is_head_file(path)
    assert not is_head_file(tmp_path)
