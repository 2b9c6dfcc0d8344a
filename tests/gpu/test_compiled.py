"""Triton's kernels compiled for real GPUs, ahead of time and without one: what they take of a
multiprocessor. Launched as in decoding, with the shapes of real models; only the last step is left
out."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton is to compile: make test-gpu-path", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed: make test-gpu-path")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.models.torch import device_sampling
from smart_decoding.models.torch.layers import Context, KVCache
from smart_decoding.models.torch.triton_ops import TritonOps
from smart_lab import gpu_noise

# query heads, heads of keys, width, norms of queries and keys
SHAPES = {
    "Llama-3.1-8B": (32, 8, 128, False),
    "Llama-3.1-70B": (64, 8, 128, False),
    "Qwen2.5-7B": (28, 4, 128, False),
    "Qwen3-8B": (32, 8, 128, True),
    "Vicuna-7B": (32, 32, 128, False),
    "SmolLM2-135M": (9, 3, 64, False),
    "Gemma-3-4B": (8, 4, 256, True),
}
Compiled: TypeAlias = dict[str, list[Any]]
MOST_REGISTERS = {  # of a thread
    "attend": 255,
    "reduce": 128,
    "write": 64,
    "gate": 64,
    "draw": 128,
    "perturb": 64,
}
# compiled for different arguments, a second each
MOST_FORMS = {"attend": 2, "gate": 2, "draw": 2}
MOST_SHARED = 99 << 10  # bytes: what a block may have on every card since the RTX 3090


class Compiling:
    """A driver for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Any]]:
    """What is compiled for the capability asked for, by name."""
    found: Compiled = {}
    run = JITFunction.run

    def compiling(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(self.__name__, []).append(made)

    monkeypatch.setattr(JITFunction, "run", compiling)
    triton.runtime.driver.set_active(Compiling(request.param))
    return found


def resources(kernel: Any, capability: int) -> tuple[int, int]:
    """Registers of a thread, and bytes of spilled ones, by ptxas."""
    tool = "ptxas-blackwell" if capability >= 100 else "ptxas"
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    arch = re.search(r"\.target (sm_\w+)", kernel.asm["ptx"])
    assert arch is not None
    assert arch[1].startswith(f"sm_{capability}")
    command = [ptxas, "-v", f"-arch={arch[1]}", "-o", os.devnull, "/dev/stdin"]
    said = subprocess.run(command, input=kernel.asm["ptx"], text=True, capture_output=True)
    assert said.returncode == 0, said.stderr
    spills = map(int, re.findall(r"(\d+) bytes spill", said.stderr))
    registers = re.search(r"Used (\d+) registers", said.stderr)
    assert registers is not None
    return int(registers[1]), sum(spills)


def launch_all(heads: int, kv_heads: int, width: int, normed: bool, count: int) -> None:
    """Launches everything for `count` rows of a prompt."""
    ops = TritonOps()
    pages = np.arange(-(-count // 16), dtype=np.int32)
    slots = np.arange(count, dtype=np.int32)
    rows = build_rows([Span([0] * count, 0, slots, pages)], DraftTrees.empty(0), [True]).rows
    cache = KVCache.empty(
        1, kv_heads, len(pages), width, torch.bfloat16, torch.device("cpu"), False
    )
    norm = torch.ones(width, dtype=torch.bfloat16) if normed else None
    w: Any = SimpleNamespace(
        heads=heads, kv_heads=kv_heads, head_dim=width, eps=1e-5, q_norm=norm, k_norm=norm, angle=0
    )
    context = Context(rows, torch.ones(count, width // 2), torch.ones(count, width // 2))
    qkv = torch.zeros(count, (heads + 2 * kv_heads) * width, dtype=torch.bfloat16)
    q = ops.write(qkv, w, context, cache.keys[0], cache.values[0])
    ops.attend(q, context, cache.keys[0], cache.values[0])
    for gelu in (False, True):
        ops.gate(torch.zeros(count, 2 * 14336, dtype=torch.bfloat16), gelu)
    logits = torch.zeros(count, 128256)
    device_sampling.maxima(logits)
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9)
    device_sampling.draw(logits, np.arange(count), [SampleSpec(params)] * count)
    tokens = torch.arange(32000)
    scores = torch.zeros(count, 32000, dtype=torch.bfloat16)
    device_sampling.perturbed(scores, tokens, torch.ones(2, count, dtype=torch.int64))


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("compiled", [80, 90, 100], indirect=True, ids="sm_{}".format)
def test_nothing_spills(
    compiled: Compiled,
    model: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capability = request.node.callspec.params["compiled"]
    for count in (1, 8, 100, 512):  # in parts, and not
        launch_all(*SHAPES[model], count)
    assert compiled.keys() == MOST_REGISTERS.keys()
    for name, kernels in compiled.items():
        different = {kernel.hash: kernel for kernel in kernels}.values()
        assert len(different) <= MOST_FORMS.get(name, 1)
        for kernel in different:
            registers, spilled = resources(kernel, capability)
            shared = kernel.metadata.shared
            with capsys.disabled():
                print(
                    f"sm_{capability} {model} {name}: {registers} registers, "
                    f"{spilled} bytes spilled, {shared} of shared memory"
                )
            assert spilled == 0
            assert registers <= MOST_REGISTERS[name]
            assert shared <= MOST_SHARED


@pytest.mark.parametrize("compiled", [90], indirect=True, ids="sm_{}".format)
def test_the_noise_of_the_parity_check_compiles(compiled: Compiled) -> None:
    gpu_noise.noise(torch.zeros(3, dtype=torch.int64), torch.arange(128_256))
    assert [*compiled] == ["noise_kernel"]
    assert resources(compiled["noise_kernel"][0], 90)[1] == 0
