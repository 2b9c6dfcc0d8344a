"""Draft heads in plain torch, written from docs/eagle-heads.md, and tiny random ones in published
layouts. Nothing here is shared with the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.core.rule import NO_NODES, TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.kv import BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker

if TYPE_CHECKING:
    import transformers

    from smart_decoding.models.families.decoder import Decoder
    from smart_decoding.models.heads.eagle_head import EagleHead

PAGES = 16
SCRATCH = 8


def random(*shape: int, scale: float = 0.2) -> Tensor:
    return torch.randn(*shape) * scale


def layer_tensors(
    prefix: str, layer: dict[str, Any], width: int, bias: bool = False
) -> dict[str, Tensor]:
    """One Llama layer of a config's sizes, its q, k and v reading `width`, without norms at its
    input."""
    d, ffn = layer["hidden_size"], layer["intermediate_size"]
    q = layer["num_attention_heads"] * layer["head_dim"]
    kv = layer["num_key_value_heads"] * layer["head_dim"]
    tensors = {
        "self_attn.q_proj.weight": random(q, width),
        "self_attn.k_proj.weight": random(kv, width),
        "self_attn.v_proj.weight": random(kv, width),
        "self_attn.o_proj.weight": random(d, q),
        "mlp.gate_proj.weight": random(ffn, d),
        "mlp.up_proj.weight": random(ffn, d),
        "mlp.down_proj.weight": random(d, ffn),
        "post_attention_layernorm.weight": 1 + random(d),
    }
    if bias:
        tensors |= {
            f"self_attn.{n}_proj.bias": random(size) for n, size in (("q", q), ("k", kv), ("v", kv))
        }
    return {prefix + name: tensor for name, tensor in tensors.items()}


def eagle3_tensors(
    prefix: str,
    layer: dict[str, Any],
    draft: int,
    embedding: bool = False,
    bias: bool = False,
    aux: int = 3,
) -> dict[str, Tensor]:
    """All of an EAGLE-3 head with `draft` tokens of its own, which reads `aux` layers."""
    torch.manual_seed(1)
    d, vocab = layer["hidden_size"], layer["vocab_size"]
    ids = torch.randperm(vocab)[:draft].sort().values
    return {
        **layer_tensors(prefix, layer, 2 * d, bias),
        prefix + "input_layernorm.weight": 1 + random(d),
        prefix + "hidden_norm.weight": 1 + random(d),
        "fc.weight": random(d, aux * d),
        "norm.weight": 1 + random(d),
        "lm_head.weight": random(draft, d),
        "d2t": ids - torch.arange(draft),
        "t2d": torch.isin(torch.arange(vocab), ids),
        **({"embed_tokens.weight": random(vocab, d, scale=0.5)} if embedding else {}),
    }


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], pickled: bool = False
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
        )
    return folder


def inputs_of_layers(
    model: transformers.PreTrainedModel, tokens: list[int]
) -> tuple[list[Tensor], Tensor]:
    """What enters each layer of the target and its final norm, [n, hidden] each; and what leaves
    that norm."""
    found: list[Tensor] = []
    modules = [*model.model.layers, model.model.norm]
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: found.append((args or kwargs["hidden_states"])[0][0]),
            with_kwargs=True,
        )
        for module in modules
    ]
    with torch.no_grad():
        last = model.model(torch.tensor([tokens])).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    assert len(found) == len(modules)
    return found, last


class ReferenceHead:
    """What a head proposes after a prompt and further tokens, from the conventions alone.

    entries: layers of the target whose inputs are read; their number: the input of the final norm;
    () for EAGLE-1/2, which reads its output."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        entries: tuple[int, ...],
        prompt: list[int],
        norm_before_residual: bool = False,
    ) -> None:
        layer = config.get("transformer_layer_config", config)
        self.w = {
            name.replace("layers.0.", "midlayer."): tensor.float()
            for name, tensor in tensors.items()
            if name not in ("d2t", "t2d")
        }
        self.d2t = tensors.get("d2t")
        self.prompt, self.one = prompt, not entries
        self.head_dim = layer["head_dim"]
        self.repeat = layer["num_attention_heads"] // layer["num_key_value_heads"]
        self.theta = layer.get("rope_theta", 10_000.0)
        self.eps = layer.get("rms_norm_eps", 1e-6)
        self.normed_residual = norm_before_residual
        self.feeds_back_normed = config.get("norm_output", False)
        self.model = model
        states, last = inputs_of_layers(model, prompt[:-1])
        self.true = last if self.one else self.features([states[i] for i in entries])
        own = self.w.get("embed_tokens.weight")
        self.embedding = model.get_input_embeddings().weight.detach() if own is None else own

    def features(self, states: list[Tensor]) -> Tensor:
        """fc over the states, each normed by fc_norm, or all together by input_norm."""
        if "fc_norm.0.weight" in self.w:
            states = [self.norm(x, f"fc_norm.{i}.weight") for i, x in enumerate(states)]
        together = torch.cat(states, dim=-1)
        if "input_norm.weight" in self.w:
            together = self.norm(together, "input_norm.weight")
        return together @ self.w["fc.weight"].T

    def probs(self, drafted: list[int]) -> Tensor:
        """[vocab] over target ids, after the drafted tokens."""
        features = self.true
        tokens = self.prompt[1:]
        out = self.layer(features, tokens)
        for token in drafted:
            last = self.norm(out[-1:], "norm.weight") if self.feeds_back_normed else out[-1:]
            features, tokens = torch.cat((features, last)), [*tokens, token]
            out = self.layer(features, tokens)
        if self.one:
            return (self.model.get_output_embeddings().weight.detach() @ out[-1]).softmax(-1)
        logits = self.w["lm_head.weight"] @ self.norm(out[-1], "norm.weight")
        if self.d2t is None:
            return logits.softmax(-1)
        result = torch.zeros(len(self.embedding))
        result[torch.arange(len(self.d2t)) + self.d2t] = logits.softmax(-1)
        return result

    def layer(self, features: Tensor, tokens: list[int]) -> Tensor:
        """[n, hidden] outputs of the pairs (features[t], tokens[t]) at positions 0 .. n - 1."""
        embedded = self.embedding[tokens]
        if self.one:
            x = torch.cat((embedded, features), -1) @ self.w["fc.weight"].T + self.w.get(
                "fc.bias", 0.0
            )
            read = x
        else:
            normed = self.norm(features, "midlayer.hidden_norm.weight")
            read = torch.cat((self.norm(embedded, "midlayer.input_layernorm.weight"), normed), -1)
            x = normed if self.normed_residual else features
        x = self.block("midlayer.", read, x)
        if "layers.1.input_layernorm.weight" in self.w:
            x = self.block("layers.1.", self.norm(x, "layers.1.input_layernorm.weight"), x)
        return x

    def block(self, prefix: str, read: Tensor, x: Tensor) -> Tensor:
        """Attention over `read` and the MLP, each added to the residual x."""
        n = len(x)
        q, k, v = (
            (
                read @ self.w[f"{prefix}self_attn.{name}_proj.weight"].T
                + self.w.get(f"{prefix}self_attn.{name}_proj.bias", 0.0)
            )
            .view(n, -1, self.head_dim)
            .transpose(0, 1)
            for name in "qkv"
        )
        if f"{prefix}self_attn.q_norm.weight" in self.w:
            q = self.norm(q, f"{prefix}self_attn.q_norm.weight")
            k = self.norm(k, f"{prefix}self_attn.k_norm.weight")
        q, k = self.turn(q), self.turn(k)
        k, v = k.repeat_interleave(self.repeat, 0), v.repeat_interleave(self.repeat, 0)
        scores = (q @ k.transpose(1, 2)) / self.head_dim**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        attended = (scores @ v).transpose(0, 1).reshape(n, -1)
        x = x + attended @ self.w[f"{prefix}self_attn.o_proj.weight"].T
        inner = self.norm(x, f"{prefix}post_attention_layernorm.weight")
        gate = F.silu(inner @ self.w[f"{prefix}mlp.gate_proj.weight"].T)
        up = inner @ self.w[f"{prefix}mlp.up_proj.weight"].T
        return x + (gate * up) @ self.w[f"{prefix}mlp.down_proj.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.w[name]

    def turn(self, x: Tensor) -> Tensor:
        """Rotary positions, half-split."""
        angle = torch.arange(x.shape[1])[:, None] * self.theta ** (
            -torch.arange(0, self.head_dim, 2) / self.head_dim
        )
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    def check(self, trees: DraftTrees, rtol: float = 2e-3) -> None:
        """Compare trees with what the head proposes."""
        check(trees, self.probs, rtol)


def check(trees: DraftTrees, probs_of: Callable[[list[int]], Tensor], rtol: float = 2e-3) -> None:
    """Compare the three best of each expanded node, their probabilities, and the products of these
    along all paths. probs_of: drafted tokens -> probabilities behind them."""
    parents = [ROOT, 0, 1, 2, 4, 9]
    assert sorted(set(trees.parent.tolist())) == sorted(parents)
    for parent in parents:
        path = trees.token[trees.path(parent)].tolist() if parent != ROOT else []
        probs = probs_of(path)
        children = np.flatnonzero(trees.parent == parent)
        best = probs.topk(3)
        assert trees.token[children].tolist() == best.indices.tolist()
        np.testing.assert_allclose(
            trees.draft_prob[children], best.values.numpy(), rtol=rtol, atol=1e-5
        )
    products = [trees.draft_prob[trees.path(node)].prod() for node in range(len(trees))]
    np.testing.assert_allclose(trees.path_prob, products, rtol=1e-12)


class Drafting:
    """A target, a head and one request, driven as the engine drives them."""

    def __init__(self, decoder: Decoder, head: EagleHead, prompt: list[int]) -> None:
        self.decoder = decoder
        self.drafter = EagleDrafter(head, PAGES, SCRATCH)
        decoder.hold_states(1)  # if it has some
        params = SamplingParams(temperature=0.0)
        table = BlockTable(PagePool(PAGES))
        self.request = Request("r", prompt, params, 0, table, StopChecker(params, lambda ids: ""))

    def round(self) -> DraftTrees:
        """The target reads what it has not read yet, but for the root; then three levels are
        drafted: all of the first one expanded, then one node of the second."""
        request = self.request
        table = self.request.table
        first = table.length
        new = request.tokens[table.length : -1]
        slots = table.reserve(len(new))
        span = Span(new, first, slots, np.array(table.pages, np.int32), state=0)
        rows, _, _ = build_rows([span], DraftTrees.empty(1), [True])
        aux_hidden = self.decoder.forward(rows, self.drafter.aux_layers).features
        table.commit(request.tokens, first + len(new))
        self.drafter.extend(request, aux_hidden, first, new)
        rule = TreeRule(3, 3, np.array([9]), NO_NODES, Beam(3), KeepBest(9))
        trees = self.drafter.propose_roots([request], rule)
        self.drafter.next_level([request], trees, np.arange(3), rule)
        self.drafter.next_level([request], trees, np.array([4, 9]), rule)
        return trees
