"""A sharded fp16 checkpoint and a file of quants are loaded layer by layer: without a second copy
of the weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.reading import config_to_hf

LAYERS = 11
CONFIG = ModelConfig("llama", LAYERS, 1024, 16, 16, 64, 4096, 8192, 1e4, 1e-5, 2048)
WEIGHTS = 400  # MB of all of it, about
FIXED = 100  # MB of KV memory, workspaces and whatever else is loaded on the way
CODE = """
import resource, sys, threading, time
import torch
from pathlib import Path
from smart_decoding.files import read_json
from smart_decoding.models.checkpoints.gguf import StoredWeights
from smart_decoding.models.checkpoints.loading import Checkpoint, load_checkpoint, read_config
from smart_decoding.models.target import TorchTarget

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3

def load(folder):
    index = Path(folder, "tensors.json")
    if index.exists():
        weights = StoredWeights(index.with_name("quants"), read_json(index))
        checkpoint = Checkpoint(read_config(Path(folder)), weights, Path(folder), {})
    else:
        checkpoint = load_checkpoint(folder, trust_pickle=True)
    return TorchTarget(checkpoint, "bfloat16", "cpu", 16, 128)

load(sys.argv[2])  # what the libraries take for themselves
sizes = [anonymous()]
done = threading.Event()
def watch():
    while not done.wait(0.002):
        sizes.append(anonymous())
thread = threading.Thread(target=watch)
thread.start()
target = load(sys.argv[1])
done.set()
thread.join()
print(sizes[0], max(sizes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
"""


def save(folder: Path, config: ModelConfig, pickled: bool) -> int:
    """Writes fp16 weights, random along a row, in four shards; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**config_to_hf(config), "torch_dtype": "float16"})
    )
    shapes = list(config.expected_shapes().items())
    end = ".bin" if pickled else ".safetensors"
    stem = "pytorch_model" if pickled else "model"
    weight_map = {}
    total = 0
    for i in range(4):
        size = -(-len(shapes) // 4)
        part = {
            name: (torch.rand(shape[-1]).half() * 0.02).expand(shape).contiguous()
            for name, shape in shapes[size * i : size * i + size]
        }
        file = f"{stem}-{i + 1:05d}-of-00004{end}"
        torch.save(part, folder / file) if pickled else save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
        total += sum(weight.nbytes for weight in part.values())
    (folder / f"{stem}{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def save_quants(folder: Path, config: ModelConfig) -> int:
    """Writes zeros in Q8_0, norms in fp32, as a GGUF file holds them; returns their bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    index = {}
    total = 0
    for name, shape in config.expected_shapes().items():
        size = math.prod(shape) * 34 // 32 if len(shape) == 2 else 4 * shape[0]
        kind = "Q8_0" if len(shape) == 2 else "F32"
        entry = {"tensor": name, "part": 0, "type": kind, "shape": list(shape), "order": None}
        index[name] = {**entry, "offset": total, "bytes": size}
        total += size
    (folder / "tensors.json").write_text(json.dumps(index))
    with (folder / "quants").open("wb") as file:
        file.truncate(total)
    return total


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["safetensors", "pickled", "quants"])
def test_weights_are_not_held_twice(form: str, tmp_path: Path) -> None:
    def write(name: str, config: ModelConfig) -> int:
        folder = tmp_path / name
        return (
            save_quants(folder, config)
            if form == "quants"
            else save(folder, config, form == "pickled")
        )

    total = write("large", CONFIG) / 1e6
    expected = WEIGHTS * 17 / 32 if form == "quants" else WEIGHTS
    assert abs(total - expected) < 0.05 * expected
    write("tiny", ModelConfig("llama", 1, 64, 4, 4, 16, 64, 64, 1e4, 1e-5, 2048))
    out = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "large"), str(tmp_path / "tiny")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    before, peak, highest = map(float, out.split())
    print(f"weights {total:.0f} MB: anonymous {before:.0f} -> {peak:.0f}, all {highest:.0f} MB")
    most = 1.15 if form == "quants" else 1.25
    assert 0.9 * total < peak - before <= most * total + FIXED
