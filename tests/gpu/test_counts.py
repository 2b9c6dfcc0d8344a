"""What a forward and a round ask of a GPU: operations, launches, uploads, and waits for it.

A model of Llama-3.1-8B's layout whose tensors have no contents (device "meta"): nothing can be read
back from those but by `download`, which is replaced."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import smart_decoding.models.torch
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.smart import Smart
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.families import decoder as decoder_module
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.sampling import ranking, sampler
from smart_decoding.models.target import TorchTarget
from smart_decoding.models.torch import device_draft, head_levels
from smart_decoding.models.torch.graphs import GraphedLayers
from smart_decoding.models.torch.head_levels import SteppedLevels
from smart_decoding.models.torch.torch_layers import TorchLayers
from smart_lab.replayed_run import RandomWeights, random_head

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from smart_decoding.engine.protocols import Drafter

LLAMA_8B = ModelConfig(
    family="llama",
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14336,
    vocab=128256,
    rope_theta=500_000.0,
    rms_eps=1e-5,
    max_positions=8192,
)
META = torch.device("meta")
# next to a forward of the target, levels and rows cost nothing
CHEAP_LEVELS = CostModel.from_table({8: {8: 1.0, 512: 1.1}}, {8: 1e-3, 512: 1e-3}, 0.0)


class Counts(TorchDispatchMode):
    """Operations by name, "upload" among them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        self.seen[name] += 1
        tensors = [part for part in args if isinstance(part, Tensor)]
        if isinstance(out, Tensor) and out.device == META:
            self.seen["upload"] += any(part.device != META and part.dim() for part in tensors)
        return out

    def take(self) -> tuple[int, Counter[str]]:
        """Operations in all, and by name, since the last time."""
        seen, self.seen = self.seen, Counter()
        return sum(seen.values()) - seen["upload"], seen


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """Counts with Triton's kernels in place of the reference, whose launches are counted only."""
    counting = Counts()

    class Launched:
        def __getattr__(self, name: str) -> Launched:
            return self

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *args, **options: counting.seen.update(["launch"])

    for name in ("triton_kernels", "triton_sampling"):
        monkeypatch.setitem(sys.modules, f"smart_decoding.models.torch.{name}", Launched())
        monkeypatch.setattr(smart_decoding.models.torch, name, Launched(), raising=False)
    monkeypatch.delitem(sys.modules, "smart_decoding.models.torch.triton_ops", raising=False)

    def download(tensor: Tensor) -> np.ndarray:
        """Tokens 0 of probability a half."""
        counting.seen["wait"] += 1
        floats = tensor.is_floating_point()
        return np.full(tensor.shape, np.log(0.5)) if floats else np.zeros(tensor.shape, np.int64)

    for module in (sampler, ranking, device_draft):
        monkeypatch.setattr(module, "download", download)
    with counting:
        yield counting
    sys.modules.pop("smart_decoding.models.torch.triton_ops", None)


def target_on_meta(monkeypatch: pytest.MonkeyPatch, graphs: bool) -> TorchTarget:
    from smart_decoding.models.torch.triton_ops import TritonOps

    def record(run: Callable[[], None]) -> Callable[[], None]:
        return lambda: counted.seen.update(["launch"])

    counted = next(mode for mode in [torch.utils._python_dispatch._get_current_dispatch_mode()])

    def layers_on(device: torch.device, layers: Any, wanted: bool) -> Any:
        eager = TorchLayers(layers, TritonOps())
        return GraphedLayers(eager, record) if graphs else eager

    for module in (decoder_module, head_levels):
        monkeypatch.setattr(module, "layers_on", layers_on)
    weights = {
        name: torch.empty(shape, dtype=torch.bfloat16, device=META)
        for name, shape in LLAMA_8B.expected_shapes().items()
    }
    checkpoint = Checkpoint(LLAMA_8B, weights, SimpleNamespace(), {"model": "8B"})  # type: ignore[arg-type]
    return TorchTarget(checkpoint, "bfloat16", META, 400, 2048)


def rounds(
    model: TorchTarget,
    counts: Counts,
    temperature: float,
    drafter: Drafter | None,
    logprobs: int | None = None,
) -> list[tuple[int, Counter[str]]]:
    """The counts of decoding rounds of eight requests."""
    policy = make_policy("static" if drafter else "off", {"cost": CostModel.default()})
    config = EngineConfig(400, 2048, 8, 256, False, 0, False)
    engine = Engine(model, policy, drafter, config, lambda skip: lambda ids: "")
    params = SamplingParams(
        temperature=temperature, max_tokens=60, top_p=0.9, ignore_eos=True, logprobs=logprobs
    )
    for i in range(8):
        engine.add_request(str(i), [5, 6, 7, 0, 0, 0, i], params)
    engine.step()
    found = []
    accepted = 0
    for _ in range(6):
        counts.take()
        engine.step()
        found.append(counts.take())
        assert engine.last_round is not None
        accepted += sum(engine.last_round.accepted)
    assert bool(accepted) == (drafter is not None)
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_round_asks_little(
    graphs: bool,
    drafts: bool,
    temperature: float,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = target_on_meta(monkeypatch, graphs)
    found = rounds(model, counts, temperature, NgramDrafter() if drafts else None)
    drawn = temperature > 0
    for operations, seen in found[1:]:
        assert operations <= (70 if graphs else 600), seen
        assert seen["launch"] == 1 + (1 if graphs else 4 * LLAMA_8B.layers), seen
        assert seen["wait"] == 1, seen
        assert seen["upload"] <= 2 + drawn, seen  # one of them where accepted keys move
    assert min(seen["upload"] for _, seen in found) == 1 + drawn


def test_log_probabilities_wait_once(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    model = target_on_meta(monkeypatch, True)
    for operations, seen in rounds(model, counts, 0.8, None, 3)[1:]:
        assert operations <= 70, seen
        assert seen["wait"] == 2, seen


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", ["chain", "eagle2", "smart"])
def test_drafted_levels_ask_little(
    policy: str, temperature: float, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds of EAGLE-3 in graphs: they wait once for all levels, and once for the
    verification."""
    monkeypatch.setattr(
        RandomWeights,
        "__getitem__",
        lambda self, name: torch.empty(self.shapes[name], dtype=torch.bfloat16, device=META),
    )
    model = target_on_meta(monkeypatch, True)
    head = EagleHead(random_head(LLAMA_8B, 32_000), model.decoder, 400, 40, 2048)
    assert isinstance(head.levels, SteppedLevels)
    head.levels.device_chooses = True
    options = {"chain": {"length": 4}, "eagle2": {"depth": 3}, "smart": {"max_levels": 4}}[policy]
    chosen = make_policy(policy, {"cost": CHEAP_LEVELS}, **options)
    if isinstance(chosen, Smart):  # candidates that are all alike, and a device that takes no time
        monkeypatch.setattr(chosen, "observe", lambda round: None)
    config = EngineConfig(400, 2048, 8, 256, False, 0, False)
    drafter = EagleDrafter(head, 400, 40)
    engine = Engine(model, chosen, drafter, config, lambda skip: lambda ids: "")
    params = SamplingParams(temperature=temperature, max_tokens=60, ignore_eos=True)
    for i in range(8):
        engine.add_request(str(i), [5, 6, 7, i], params)
    for _ in range(3):
        engine.step()
    counts.take()
    engine.step()
    operations, seen = counts.take()
    assert engine.last_round is not None
    levels = len(engine.last_round.round.level_widths)
    assert levels == 4 if policy != "smart" else levels > 2
    drawn = temperature > 0
    assert operations <= (350 if drawn else 300), seen
    assert seen["launch"] == levels * (1 + drawn) + 2, seen
    assert seen["wait"] == 2, seen
    assert seen["upload"] <= levels + 4 + drawn, seen
