"""The tensors of a head's folder."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from smart_decoding.errors import ModelError
from smart_decoding.files import reading
from smart_decoding.models.registry import TRUST
from smart_decoding.models.weight_files import unpickle


def read_tensors(folder: Path, trust_pickle: bool) -> dict[str, Tensor]:
    """All tensors of the folder; safetensors first. Raises ModelError."""
    files = sorted(folder.glob("model*.safetensors"))
    pickled = folder / "pytorch_model.bin"
    if not files and pickled.is_file():
        if not trust_pickle:
            raise ModelError(f"{pickled} is a pickle, and pickles are refused: {TRUST}")
        return unpickle(pickled)
    tensors: dict[str, Tensor] = {}
    for path in files or [folder / "model.safetensors"]:
        with reading(path):
            tensors |= load_file(path)
    return tensors
