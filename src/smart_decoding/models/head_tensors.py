"""The tensors of a head's folder, and folders from the hub."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smart_decoding.errors import DownloadError, ModelError

TRUST = "convert it to safetensors, or allow it by --trust-pickle (trust_pickle=True)"


def read_tensors(folder: Path, trust_pickle: bool) -> dict[str, Tensor]:
    """All tensors of the folder; safetensors first. Raises ModelError."""
    files = sorted(folder.glob("model*.safetensors"))
    pickled = folder / "pytorch_model.bin"
    if not files and pickled.is_file():
        if not trust_pickle:
            raise ModelError(f"{pickled} is a pickle, and pickles are refused: {TRUST}")
        return _unpickle(pickled)
    tensors: dict[str, Tensor] = {}
    for path in files or [folder / "model.safetensors"]:
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} in {folder} is missing or corrupt ({error})") from error
    return tensors


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle, which may hold nothing else: no code is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} holds more than tensors, or is corrupt: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise ModelError(f"{path} is no table of tensors")
    return content


def snapshot(repository: str, patterns: list[str]) -> Path:
    """The folder of a head on the hub, with the files that match. Raises DownloadError."""
    from huggingface_hub import snapshot_download  # imported late: it takes a quarter of a second

    try:
        return Path(str(snapshot_download(repository, allow_patterns=patterns)))
    except Exception as error:  # the client lets errors of several libraries through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"cannot fetch the head {repository} from the hub: {reason}") from error
