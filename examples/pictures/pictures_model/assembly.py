"""A vision-language model put together from a text model's weights and a folder of parts.

The parts are the tower, the projector, and low-rank changes of the text model's linear layers. The
result is a LLaVA folder in the cache, which transformers can read, too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smart_decoding.models.checkpoints.gguf import is_whole, move_into_place, write_record
from smart_decoding.models.checkpoints.hub import cache_dir, scratch
from smart_decoding.models.checkpoints.loading import load_checkpoint

PARTS_FOLDER = Path(__file__).parents[1] / "smart-pictures-135m"
HEAD = PARTS_FOLDER / "head"  # which drafts for it
PARTS = "parts.json"  # the base, and how the parts go onto it
PARTS_WEIGHTS = "parts.safetensors"
IMAGE_TOKEN = "<image>"


def model_folder(parts: Path = PARTS_FOLDER) -> Path:
    """The cached folder with the whole model. Its base is fetched first if need be."""
    base = load_checkpoint(_read(parts / PARTS)["base"])
    return assembled_folder(parts, base.tokenizer_source)


def assembled_folder(parts: Path, base: Path) -> Path:
    """The cached folder with the whole model, written first if it is not there or damaged.

    base: the text model's folder."""
    digest = hashlib.sha256((parts / PARTS_WEIGHTS).read_bytes())
    digest.update(str(base).encode())
    target: Path = cache_dir() / "converted" / f"{parts.name}-{digest.hexdigest()[:16]}"
    if not is_whole(target):
        shutil.rmtree(target, ignore_errors=True)
        _assemble(parts, base, target)
    return target


def _assemble(parts: Path, base: Path, target: Path) -> None:
    told = _read(parts / PARTS)
    sources = (*base.glob("*.safetensors"), parts / PARTS_WEIGHTS)
    with scratch(2 * sum(path.stat().st_size for path in sources)) as part:
        added = load_file(parts / PARTS_WEIGHTS)
        weights = {f"model.language_model.{name}": weight for name, weight in _text_weights(base)}
        for name in [name for name in added if name.endswith(".lora_a")]:
            layer = name.removesuffix(".lora_a")
            change = added.pop(f"{layer}.lora_b").float() @ added.pop(name).float()
            weight = weights[f"{layer}.weight"]
            changed = weight.float() + told["lora_scale"] * change
            weights[f"{layer}.weight"] = changed.to(weight.dtype)
        save_file(weights | added, part / "model.safetensors", metadata={"format": "pt"})
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copyfile(parts / name, part / name)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            _rename_token(base / name, part / name, told["image_token"])
        write_record(part, {"base": told["base"]})
        move_into_place(part, target)


def _text_weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                yield name.removeprefix("model."), file.get_tensor(name)


def _rename_token(source: Path, target: Path, token: dict[str, Any]) -> None:
    """One of the base's unused special tokens becomes the picture's placeholder."""
    content = _read(source)
    for entry in content.get("added_tokens", []):
        if entry["id"] == token["id"]:
            vocab = content["model"]["vocab"]
            vocab[token["text"]] = vocab.pop(entry["content"])
            entry["content"] = token["text"]
    decoded = content.get("added_tokens_decoder", {}).get(str(token["id"]))
    if decoded:
        decoded["content"] = token["text"]
    target.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
