"""GPTQ and AWQ checkpoints, written here as AutoGPTQ and AutoAWQ pack them: they load as the
weights that were packed, as quants where their groups fill blocks, and bad ones are refused."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ModelError
from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.llm import LLM
from smart_decoding.models.loading import load_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

VOCAB = 96
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DOWN = "model.layers.1.mlp.down_proj"
IN_ORDER = range(8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the columns in an integer's nibbles, the lowest first


@dataclass(frozen=True)
class Kind:
    """A way to quantise. zeros: their range; scattered: columns are in groups at random."""

    method: str = "gptq"
    group: int = 32
    zeros: tuple[int, int] = (1, 16)
    options: tuple[tuple[str, Any], ...] = ()
    scattered: bool = False
    scale: torch.dtype = torch.float16

    @property
    def config(self) -> dict[str, Any]:
        return {
            "quant_method": self.method,
            "bits": 4,
            "group_size": self.group,
            **({"version": "gemm", "zero_point": True} if self.method == "awq" else {}),
            **dict(self.options),
        }

    @property
    def offset(self) -> int:
        """What the zeros in the file lack."""
        is_first = dict(self.options).get("checkpoint_format", "gptq") == "gptq"
        return int(self.method == "gptq" and is_first)


SYMMETRIC = Kind(zeros=(8, 8), options=(("sym", True), ("desc_act", False)))
KINDS = {
    "symmetric": (SYMMETRIC, "Q4_0"),
    "zeros": (Kind(options=(("checkpoint_format", "gptq"), ("sym", False))), "Q4_Z"),
    "zeros of the second version": (
        Kind(zeros=(0, 15), options=(("checkpoint_format", "gptq_v2"),)),
        "Q4_Z",
    ),
    "one group": (Kind(group=-1), "Q4_Z"),
    "a group that is cut short": (Kind(group=64), "Q4_Z"),
    "an order of its own, in one group": (Kind(group=-1, options=(("desc_act", True),)), "Q4_Z"),
    "an order of its own that changes nothing": (Kind(options=(("desc_act", True),)), "Q4_Z"),
    "an order of its own": (Kind(options=(("desc_act", True),), scattered=True), None),
    "scales that are no halves": (Kind(scale=torch.float32), None),
    "AWQ": (Kind("awq", zeros=(0, 15)), "Q4_Z"),
    "AWQ, symmetric": (Kind("awq", zeros=(8, 8), options=(("version", "GEMM"),)), "Q4_0"),
}


def packed(values: NDArray[np.int64], order: Sequence[int]) -> torch.Tensor:
    """Integers of 32 bits [a, b / 8] of values [a, b]."""
    out = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for nibble, column in enumerate(order):
        out |= values[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return torch.from_numpy(out.view(np.int32))


def quantise(
    shape: tuple[int, int], kind: Kind, rng: np.random.Generator
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a random matrix, and the weights, rounded once."""
    n, k = shape
    size = k if kind.group == -1 else kind.group
    groups = np.arange(k) // size
    count = int(groups[-1]) + 1
    if kind.scattered:
        groups = rng.permutation(groups)
    q = rng.integers(0, 16, (n, k))
    zeros = rng.integers(kind.zeros[0], kind.zeros[1] + 1, (n, count))
    scales = torch.from_numpy(rng.uniform(0.005, 0.05, (n, count))).to(kind.scale)
    weights = scales.double().numpy()[:, groups] * (q - zeros[:, groups])
    is_awq = kind.method == "awq"
    order = AWQ_ORDER if is_awq else IN_ORDER
    tensors = {
        "qweight": packed(q.T, order) if is_awq else packed(q, order).T.contiguous(),
        "qzeros": packed(zeros.T - kind.offset, order),
        "scales": scales.T.contiguous(),
    }
    if not is_awq:
        tensors["g_idx"] = torch.from_numpy(groups.astype(np.int32))
    return tensors, torch.from_numpy(weights).float().bfloat16()


def write(folder: Path, kind: Kind, config_class: Any = transformers.LlamaConfig) -> Path:
    """A quantised checkpoint, and beside it in `folder`-bf16 the same one expanded."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**SIZES)).half()
    quantised: dict[str, torch.Tensor] = {}
    expanded: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith("_proj.weight"):
            tensors, expanded[name] = quantise(tuple(weight.shape), kind, rng)
            module = name.removesuffix(".weight")
            quantised |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
        else:
            quantised[name] = expanded[name] = torch.randn_like(weight) * 0.5
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    for path, weights, options in (
        (folder, quantised, {"quantization_config": kind.config}),
        (expanded_beside(folder), expanded, {}),
    ):
        path.mkdir()
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({**config, **options}))
        words = {f"w{i}": i for i in range(VOCAB)}
        tokenizer = tokenizers.models.WordLevel(words, unk_token="w0")
        tokenizers.Tokenizer(tokenizer).save(str(path / "tokenizer.json"))
    return folder


def expanded_beside(folder: Path) -> Path:
    return folder.with_name(folder.name + "-bf16")


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Sets tensors of DOWN, or takes them away."""
    weights = load_file(folder / "model.safetensors")
    for part, tensor in changes.items():
        weights.pop(f"{DOWN}.{part}", None)
        if tensor is not None:
            weights[f"{DOWN}.{part}"] = tensor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", KINDS)
def test_weights_are_those_that_were_packed(name: str, tmp_path: Path) -> None:
    kind, format_ = KINDS[name]
    folder = write(tmp_path / "model", kind)
    expected = load_file(expanded_beside(folder) / "model.safetensors")
    for quantization in (None, "off"):
        checkpoint = load_checkpoint(folder, quantization=quantization)
        assert set(checkpoint.weights) == set(expected)
        for key, tensor in expected.items():
            weight = checkpoint.weights[key]
            if "_proj" in key and quantization is None and format_ is not None:
                assert isinstance(weight, QuantizedTensor)
                assert weight.format == format_
            else:
                assert isinstance(weight, torch.Tensor)
            assert torch.equal(as_tensor(weight), tensor), key
        told = "as stored" if quantization is None else "dequantised to bf16"
        assert told in checkpoint.provenance["weights"]


@pytest.mark.parametrize("name", ["symmetric", "zeros", "an order of its own", "AWQ"])
def test_answers_are_those_of_the_expanded_model(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", KINDS[name][0])
    prompts = [[1, 5, 9], [7, 7, 30, 41], list(range(40, 60))]
    found = []
    for model, quantization in (
        (folder, None),
        (folder, "off"),
        (expanded_beside(folder), None),
    ):
        llm = LLM(
            model,
            speculative_config=False,
            device="cpu",
            quantization=quantization,
            max_model_len=96,
            max_num_seqs=4,
            enable_prefix_caching=False,
            allow_slow=True,
        )
        for config in (False, {"method": "ngram"}):
            for temperature in (0.0, 0.9):
                params = SamplingParams(
                    temperature=temperature, max_tokens=24, seed=3, ignore_eos=True
                )
                answers = llm.sharing_weights(config).generate(prompts, params)
                found.append([answer.outputs[0].token_ids for answer in answers])
    assert found[0] != found[1]
    assert found[0] == found[2] == found[4] == found[6] == found[8] == found[10]
    assert found[1] == found[3] == found[5] == found[7] == found[9] == found[11]


def test_in_fp32_they_are_expanded(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", KINDS["AWQ"][0])
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    one, two = (
        LLM(
            model,
            speculative_config=False,
            dtype="float32",
            device="cpu",
            max_model_len=96,
            max_num_seqs=1,
            allow_slow=True,
        ).generate([[1, 5, 9]], params)
        for model in (folder, expanded_beside(folder))
    )
    assert one[0].outputs[0].token_ids == two[0].outputs[0].token_ids


def test_biases_pass_but_for_those_that_only_old_files_have(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write(tmp_path / "qwen", SYMMETRIC, transformers.Qwen2Config))
    assert checkpoint.config.qkv_bias
    bias = as_tensor(checkpoint.weights["model.layers.0.self_attn.q_proj.bias"])
    assert bias.any()
    folder = write(tmp_path / "llama", SYMMETRIC)
    change_weights(folder, bias=torch.zeros(64, dtype=torch.float16))
    assert f"{DOWN}.bias" not in load_checkpoint(folder).weights
    change_weights(folder, bias=torch.ones(64, dtype=torch.float16))
    with pytest.raises(ModelError, match=rf"{DOWN}\.bias"):
        load_checkpoint(folder)


def test_symmetric_files_whose_zeros_are_of_the_second_version(tmp_path: Path) -> None:
    """As some are written; a zero of 9 would not be symmetric."""
    second = replace(SYMMETRIC, options=(("sym", True), ("checkpoint_format", "gptq_v2")))
    folder = write(tmp_path / "model", second)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("gptq_v2", "gptq"))
    expected = load_file(expanded_beside(folder) / "model.safetensors")
    weight = load_checkpoint(folder, quantization=None).weights[f"{DOWN}.weight"]
    assert torch.equal(as_tensor(weight), expected[f"{DOWN}.weight"])


def test_an_order_of_its_own_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_checkpoint(write(tmp_path / "plain", SYMMETRIC), quantization=None)
    assert not caplog.records
    load_checkpoint(write(tmp_path / "own", KINDS["an order of its own"][0]), quantization=None)
    assert "desc_act" in caplog.text


def test_bytes_are_counted_before_weights_are_read(tmp_path: Path) -> None:
    weights = load_checkpoint(write(tmp_path / "own", KINDS["AWQ"][0]), quantization=None).weights
    held = [weights[name] for name in weights]
    matrices = sum(weight.rows.nbytes for weight in held if isinstance(weight, QuantizedTensor))
    others = sum(2 * weight.numel() for weight in held if isinstance(weight, torch.Tensor))
    assert weights.nbytes == matrices + others
    expanded = load_checkpoint(tmp_path / "own").weights
    assert expanded.nbytes == sum(2 * as_tensor(expanded[name]).numel() for name in expanded)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bits": 8}, "bits 8"),
        ({"group_size": 16}, "group_size 16"),
        ({"checkpoint_format": "marlin"}, "gptq, marlin"),
        ({"is_marlin_format": True}, "quantization_config"),
        ({"quant_method": "awq", "version": "gemv"}, "awq, gemv"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
    ],
)
def test_refuses_other_schemes(options: dict[str, Any], word: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", replace(SYMMETRIC, options=tuple(options.items())))
    with pytest.raises(ModelError, match=word) as caught:
        load_checkpoint(folder, quantization=None)
    assert "take GPTQ or AWQ (gemm) of 4 bits" in str(caught.value)


def test_refuses_to_round_what_is_quantised(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", SYMMETRIC)
    with pytest.raises(ModelError, match="quantised already"):
        load_checkpoint(folder, quantization="int8")


def test_refuses_tensors_that_do_not_fit(tmp_path: Path) -> None:
    kind = KINDS["an order of its own"][0]
    folder = write(tmp_path / "model", kind)
    good = load_file(folder / "model.safetensors")
    bad: dict[str, torch.Tensor | None] = {
        "qweight": torch.zeros(6, 64, dtype=torch.int32),
        "qzeros": torch.zeros(2, 8, dtype=torch.int32),
        "scales": None,
        "g_idx": torch.zeros(96),
    }
    for part, tensor in bad.items():
        change_weights(folder, **{part: tensor})
        with pytest.raises(ModelError, match=DOWN) as caught:
            load_checkpoint(folder)
        assert "\n" not in str(caught.value)
        change_weights(folder, **{part: good[f"{DOWN}.{part}"]})
    change_weights(folder, g_idx=torch.full((96,), 3, dtype=torch.int32))
    weights = load_checkpoint(folder).weights
    with pytest.raises(ModelError, match=rf"{DOWN}\.g_idx"):
        weights[f"{DOWN}.weight"]
