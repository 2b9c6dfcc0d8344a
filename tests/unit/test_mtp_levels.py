"""A layer for multi-token prediction proposes what its definition says: a tiny random Qwen3.5 with
such a layer, in safetensors and GGUF, against plain torch.

The expected values share no code with the package: the model's states after its final norm are
transformers' own, the layer is written out below, one full causal forward for each drafted token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.mtp import mtp_files

from ..parity.reference_head import PAGES, SCRATCH, Drafting, check
from .drafters.tiny import ways_to_run
from .test_loading import own_cache, tiny_model, write_gguf
from .test_mtp_files import EMBEDDING, KINDS, OUTPUT, OWN, folder_of, tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from smart_decoding.models.checkpoints.loading import Checkpoint

__all__ = ["own_cache"]
PROMPT = np.random.default_rng(3).integers(0, 97, 24).tolist()
HEADS, KV, HEAD_DIM, ROTARY, THETA, EPS, VOCAB = 4, 2, 16, 4, 10_000.0, 1e-6, 300


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight)


def turned(x: Tensor) -> Tensor:
    """x [heads, n, HEAD_DIM], its first ROTARY dimensions by the position."""
    angle = torch.arange(x.shape[1])[:, None] * THETA ** (-torch.arange(0, ROTARY, 2) / ROTARY)
    a, b, others = x[..., : ROTARY // 2], x[..., ROTARY // 2 : ROTARY], x[..., ROTARY:]
    first = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
    return torch.cat((*first, others), -1)


class Expected:
    """The proposals after a prompt and drafted tokens. weights: the layer's, as published."""

    def __init__(
        self,
        kind: str,
        prompt: list[int],
        tokens: Sequence[int] = range(VOCAB),
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        weights = tensors(kind=kind) if weights is None else weights
        self._w = {name.removeprefix("mtp."): weight for name, weight in weights.items()}
        self._prompt = prompt
        self._tokens = list(tokens)
        model = tiny_model(kind).eval()
        with torch.no_grad():
            self._states = model.model(torch.tensor([prompt[:-1]])).last_hidden_state[0]
        embedding = model.get_input_embeddings().weight.detach()
        output = model.get_output_embeddings().weight.detach()
        self._embedding = weights.get(EMBEDDING, embedding)
        self._output = weights.get(OUTPUT, output)
        self._norm = self._w.get("norm.weight", model.model.norm.weight.detach())

    def probs(self, drafted: list[int]) -> Tensor:
        """[vocab] after the drafted tokens."""
        states, tokens = self._states, self._prompt[1:]
        out = self._step(states, tokens)
        for token in drafted:
            states, tokens = torch.cat((states, out[-1:])), [*tokens, token]
            out = self._step(states, tokens)
        probs = torch.zeros(VOCAB)
        probs[self._tokens] = (self._output[self._tokens] @ out[-1]).softmax(-1)
        return probs

    def _step(self, states: Tensor, tokens: list[int]) -> Tensor:
        """[n, hidden] of the pairs (states[t], tokens[t]) at positions 0 .. n - 1: what the output
        matrix reads, and the next step as its state."""
        embedded = norm(self._embedding[tokens], self._w["pre_fc_norm_embedding.weight"])
        states = norm(states, self._w["pre_fc_norm_hidden.weight"])
        x = torch.cat((embedded, states), -1) @ self._w["fc.weight"].T
        x = x + self._attention(norm(x, self._w["layers.0.input_layernorm.weight"]))
        read = norm(x, self._w["layers.0.post_attention_layernorm.weight"])
        is_mixture = "layers.0.mlp.gate.weight" in self._w
        x = x + (self._mixture(read) if is_mixture else self._network("mlp", read))
        return norm(x, self._norm)

    def _network(self, name: str, read: Tensor) -> Tensor:
        gate, up, down = (
            self._w[f"layers.0.{name}.{part}_proj.weight"] for part in ("gate", "up", "down")
        )
        return (F.silu(read @ gate.T) * (read @ up.T)) @ down.T

    def _mixture(self, read: Tensor) -> Tensor:
        """The two most probable of four experts, and the shared one."""
        probs = (read @ self._w["layers.0.mlp.gate.weight"].T).softmax(-1)
        probs = probs.where(probs >= probs.topk(2).values[:, 1:], torch.zeros(()))
        probs = probs / probs.sum(-1, keepdim=True)
        each = torch.stack([self._network(f"mlp.experts.{n}", read) for n in range(4)], 1)
        shared = (read @ self._w["layers.0.mlp.shared_expert_gate.weight"].T).sigmoid()
        of_all = shared * self._network("mlp.shared_expert", read)
        return (probs[:, :, None] * each).sum(1) + of_all

    def _attention(self, read: Tensor) -> Tensor:
        n = len(read)
        q, k, v = (
            (read @ self._w[f"layers.0.self_attn.{name}_proj.weight"].T).view(n, heads, -1)
            for name, heads in (("q", HEADS), ("k", KV), ("v", KV))
        )
        q, gate = q.split(HEAD_DIM, -1)  # of each head its queries, then its gates
        q = turned(norm(q, self._w["layers.0.self_attn.q_norm.weight"]).transpose(0, 1))
        k = turned(norm(k, self._w["layers.0.self_attn.k_norm.weight"]).transpose(0, 1))
        k, v = (each.repeat_interleave(HEADS // KV, 0) for each in (k, v.transpose(0, 1)))
        scores = (q @ k.transpose(1, 2)) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        attended = (scores @ v).transpose(0, 1) * gate.sigmoid()
        return attended.reshape(n, -1) @ self._w["layers.0.self_attn.o_proj.weight"].T


def decoder_of(checkpoint: Checkpoint, native: bool) -> Decoder:
    cpu = torch.device("cpu")
    return Decoder(checkpoint.config, checkpoint.weights, torch.float32, cpu, PAGES, 128, native)


def drafting_of(
    path: Path, tokens: int = VOCAB, quantization: str | None = None, native: bool = False
) -> Drafting:
    checkpoint = load_checkpoint(path, quantization=quantization)
    decoder = decoder_of(checkpoint, native)
    assert checkpoint.mtp is not None
    files = mtp_files(checkpoint.config, checkpoint.mtp, tokens)
    return Drafting(decoder, EagleHead(files, decoder, PAGES, SCRATCH, 128), PROMPT)


def file_of(
    folder: Path, kind: str, name: str, weights: Mapping[str, Tensor] | None = None
) -> Path:
    weights = tensors(kind=kind) if weights is None else weights
    if name == "folder":
        return folder_of(folder / name, dict(weights), kind)
    write_gguf(folder / name, kind, mtp=weights)
    return folder / name


def check_proposals(path: Path, kind: str, weights: Mapping[str, Tensor], tokens: int) -> None:
    """After the prompt, and again two tokens later: one that was drafted, one that was not."""
    for native in ways_to_run(load_checkpoint(path).config):
        drafting = drafting_of(path, tokens, native=native)
        trees = drafting.round()
        assert trees.token.max() < tokens
        check(trees, Expected(kind, PROMPT, range(tokens), weights).probs)
        drafting.request.tokens.extend([int(trees.token[1]), 7])
        expected = Expected(kind, drafting.request.tokens, range(tokens), weights)
        check(drafting.round(), expected.probs)


@pytest.mark.parametrize("tokens", [VOCAB, 120])
@pytest.mark.parametrize("name", ["folder", "tiny.gguf"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", OWN)
def test_proposals_are_those_of_the_definition(
    own: Sequence[str], kind: str, name: str, tokens: int, tmp_path: Path
) -> None:
    """By embeddings and an output matrix of its own, too."""
    weights = tensors(kind=kind, own=own)
    check_proposals(file_of(tmp_path, kind, name, weights), kind, weights, tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_without_its_norm_means_the_model_s(kind: str, tmp_path: Path) -> None:
    weights = tensors(kind=kind)
    del weights["mtp.norm.weight"]
    check_proposals(file_of(tmp_path, kind, "tiny.gguf", weights), kind, weights, VOCAB)


@pytest.mark.parametrize("quantization", [None, "off"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [OWN[0], OWN[-1]])
def test_both_formats_draft_identically(
    own: Sequence[str], kind: str, quantization: str | None, tmp_path: Path
) -> None:
    """Expanded, or read where they lie. GGUF files hold the exponential of the model's A_log."""
    weights = tensors(kind=kind, own=own)
    a, b = (
        drafting_of(file_of(tmp_path, kind, name, weights), quantization=quantization).round()
        for name in ("tiny.gguf", "folder")
    )
    assert a.token.tolist() == b.token.tolist()
    np.testing.assert_allclose(a.draft_prob, b.draft_prob, rtol=1e-4)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("tokens", [VOCAB, 120])
def test_quants_draft_as_their_expanded_file(
    tokens: int, own: Sequence[str], tmp_path: Path
) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "tiny.gguf", "qwen35", kind, mtp=tensors(own=own))
    drafts = [
        drafting_of(tmp_path / "tiny.gguf", tokens, quantization=each).round()
        for each in (None, "off")
    ]
    a, b = drafts
    assert a.token.tolist() == b.token.tolist()
    # value heads of quants stay in the file's order, and sums over them with them
    np.testing.assert_allclose(a.draft_prob, b.draft_prob, rtol=1e-4)
