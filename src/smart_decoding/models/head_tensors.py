"""The tensors of a head's folder, and folders from the hub."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.files import reading, reason_of
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


def snapshot(repository: str, patterns: list[str]) -> Path:
    """The folder of a head on the hub, with the files that match. Raises DownloadError."""
    from huggingface_hub import snapshot_download  # imported late: it takes a quarter of a second

    try:
        return Path(str(snapshot_download(repository, allow_patterns=patterns)))
    except Exception as error:  # the client lets errors of several libraries through
        raise DownloadError(
            f"cannot fetch the head {repository} from the hub: {reason_of(error)}"
        ) from error
