"""A transformers model in shards, as a `device_map` leaves it: embeddings and a first layer on one
device, the rest on another.

The other device is simulated: its tensors call themselves "meta" and have their contents on the
CPU. As between GPUs, an operation takes tensors of one device only, but for copies, numbers, and
indices from the CPU. A real device's arithmetic and asynchrony are not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from smart_decoding.integrations.transformers import generate, heads, last_report
from smart_decoding.integrations.transformers.heads import HostHead, HostWeights, host_config
from smart_lab.replayed_run import random_head

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")
VOCAB = 13
PROMPTS = torch.tensor([[1, 9, 8, 9, 8, 9, 8, 9], [0, 0, 1, 5, 6, 7, 5, 6]])


class There(Tensor):
    """A tensor of the other device; `here` has its contents."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        with torch.inference_mode(False):  # it may be a view of one from outside of it
            made: Any = Tensor._make_wrapper_subclass(
                cls,
                here.shape,
                here.stride(),
                here.storage_offset(),
                dtype=here.dtype,
                device=ELSEWHERE,
            )
        made.here = here
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("a tensor was used beyond the simulation")


class Devices(TorchDispatchMode):
    """Runs the operations of both devices on the CPU. moved: copies from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        given: Mapping[str, Any] = kwargs or {}
        name = str(func).rsplit(".", 1)[0]
        if name == "aten.to":  # not taken apart in inference mode
            with self:
                return func.decompose(*args, **given)
        tensors = [x for x in pytree.tree_leaves((args, given)) if isinstance(x, Tensor)]
        there = any(isinstance(x, There) for x in tensors)
        to = given.get("device") or (ELSEWHERE if there else CPU)
        if name == "aten._to_copy":
            self.moved += (to == ELSEWHERE) != there
        elif "index" not in name:  # indices may lie on the CPU
            alike = all(isinstance(x, There) for x in tensors if x.dim())
            assert alike or not there, f"{func} takes tensors of two devices"
        if "device" in given:
            given = {**given, "device": CPU}
        contents = pytree.tree_map_only(There, lambda x: x.here, (args, given))
        out = func(*contents[0], **contents[1])
        if to != ELSEWHERE:
            return out
        known = {id(x.here): x for x in tensors if isinstance(x, There)}  # changed in place
        return pytree.tree_map_only(
            Tensor, lambda x: known[id(x)] if id(x) in known else There(x), out
        )


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.3,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def brought(values: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), values)


def sharded() -> PreTrainedModel:
    """With hooks as accelerate's: inputs go to a shard's device, the outputs come back."""
    model = tiny()
    for module in (*model.model.layers[1:], model.model.norm, model.lm_head):
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                part._parameters[name] = nn.Parameter(There(weight.detach()), requires_grad=False)
        module.register_forward_pre_hook(
            lambda module, args, given: brought((args, given), ELSEWHERE), with_kwargs=True
        )
    model.register_forward_hook(lambda module, args, output: brought(output, CPU))
    return model


@pytest.mark.parametrize("method", ["ngram", "eagle"])
def test_a_sharded_model_says_the_same(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def head(model: PreTrainedModel, name: Any, trust_pickle: bool = False) -> HostHead:
        return HostHead(random_head(host_config(model)[0], VOCAB), Path(), model)

    monkeypatch.setattr(heads, "load_host_head", head)
    given = {
        "input_ids": PROMPTS,
        "attention_mask": (PROMPTS.cumsum(1) > 0).long(),
        "max_new_tokens": 40,
        "do_sample": False,
    }
    config = {"method": method, "policy": "static", "profile_seconds": 0}
    config |= {"min_n": 1} if method == "ngram" else {"model": "random"}
    expected = tiny().generate(**given)
    with Devices() as devices:
        model = sharded()
        found = model.generate(custom_generate=generate, speculative_config=config, **given)
        report = last_report(model)
    assert torch.equal(found, expected)
    assert devices.moved > 40
    assert report is not None
    assert report.accepted > 0


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


def test_a_head_reads_embeddings_as_the_model_computes_them() -> None:
    model = tiny()
    plain: Any = model.get_input_embeddings()
    scaled = Scaled(*plain.weight.shape, _weight=plain.weight)
    files = random_head(host_config(model)[0], VOCAB)
    for module, factor in ((plain, 1), (scaled, 3)):
        model.set_input_embeddings(module)
        assert torch.equal(HostWeights(files, model).embedding, factor * plain.weight)
