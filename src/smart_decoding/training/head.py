"""The draft head in trainable form: EAGLE-3's layout (arXiv 2503.01840) with normalised taps.

Pair t = (features of position t, embedding of token t + 1) predicts token t + 2. Unrolled step j feeds the head's own
output back j times, as drafting does: its keys are the true pairs up to t - j and its own chain since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smart_decoding.backends.torch.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the head borrows from the target: embeddings [vocab, hidden], the draft vocabulary's rows of the output
    matrix [draft, hidden], and the final norm [hidden]."""

    embedding: Tensor
    head_rows: Tensor
    final_norm: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class TrainableHead(nn.Module):
    """fc, one decoder layer over [normed embedding ; normed features], and a norm before the frozen output rows."""

    def __init__(self, config: ModelConfig, taps: int) -> None:
        super().__init__()
        d, self.config = config.hidden, config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.fc_norm = nn.ModuleList(RMSNorm(d, config.rms_eps) for _ in range(taps))
        self.fc = nn.Linear(taps * d, d, bias=False)
        self.input_layernorm, self.hidden_norm = RMSNorm(d, config.rms_eps), RMSNorm(d, config.rms_eps)
        self.post_attention_layernorm, self.norm = RMSNorm(d, config.rms_eps), RMSNorm(d, config.rms_eps)
        self.qkv = nn.Linear(2 * d, q + 2 * kv, bias=False)
        self.o_proj = nn.Linear(q, d, bias=False)
        self.gate_up = nn.Linear(d, 2 * config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, d, bias=False)
        inverse, factor = config.inverse_frequencies()
        angles = torch.arange(4096).float()[:, None] * torch.from_numpy(inverse).float()
        self.register_buffer("cosine", angles.cos() * factor, persistent=False)
        self.register_buffer("sine", angles.sin() * factor, persistent=False)

    def start_from(self, weights: Mapping[str, Tensor], tap_scale: float) -> None:
        """Starts as the target's last layer on the last tap: a far better start than noise."""
        prefix = f"model.layers.{self.config.layers - 1}."

        def get(name: str) -> Tensor:
            return weights[prefix + name].float()

        d = self.config.hidden
        with torch.no_grad():
            self.fc.weight.normal_(0, 0.002)
            self.fc.weight[:, -d:] += torch.eye(d) * tap_scale
            qkv = torch.cat([get(f"self_attn.{n}_proj.weight") for n in "qkv"])
            self.qkv.weight.copy_(torch.cat((torch.randn_like(qkv) * 0.01, qkv), dim=1))
            self.o_proj.weight.copy_(get("self_attn.o_proj.weight"))
            self.gate_up.weight.copy_(torch.cat((get("mlp.gate_proj.weight"), get("mlp.up_proj.weight"))))
            self.down_proj.weight.copy_(get("mlp.down_proj.weight"))
            self.hidden_norm.weight.copy_(get("input_layernorm.weight"))
            self.post_attention_layernorm.weight.copy_(get("post_attention_layernorm.weight"))
            self.norm.weight.copy_(weights["model.norm.weight"].float())

    def features(self, taps: Tensor) -> Tensor:
        """[..., taps * hidden] -> [..., hidden]."""
        parts = taps.chunk(len(self.fc_norm), dim=-1)
        normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        return cast(Tensor, self.fc(torch.cat(normed, dim=-1)))

    def forward(self, g: Tensor, embedded: Tensor, chain: list[tuple[Tensor, Tensor]]) -> Tensor:
        """One unrolled step on g, embedded [batch, n, hidden]; `chain` holds the keys and values of earlier steps and
        gets this step's. Returns the output [batch, n, hidden], to be fed back shifted by one position."""
        batch, n, _ = g.shape
        c = self.config
        x = torch.cat((self.input_layernorm(embedded), self.hidden_norm(g)), dim=-1)
        q, k, v = self.qkv(x).split((c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim), dim=-1)
        q, k = (self._rotate(t.view(batch, n, -1, c.head_dim).transpose(1, 2)) for t in (q, k))
        v = v.view(batch, n, -1, c.head_dim).transpose(1, 2)
        repeat = c.heads // c.kv_heads
        chain.append((k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
        out = self._attend(q, chain)
        g = g + self.o_proj(out.transpose(1, 2).reshape(batch, n, -1))
        gate, up = self.gate_up(self.post_attention_layernorm(g)).chunk(2, dim=-1)
        return cast(Tensor, g + self.down_proj(F.silu(gate) * up))

    def _attend(self, q: Tensor, chain: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[batch, heads, n, head_dim]. Step j (len(chain) - 1) sees true pairs <= t - j and its own chain."""
        step, n = len(chain) - 1, q.shape[2]
        keys, values = chain[0]
        scale = self.config.head_dim**-0.5
        at = torch.arange(n)
        seen = at[None, :] <= at[:, None] - step
        if step == 0:
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        scores = (q @ keys.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
        own = []
        for i in range(1, step + 1):
            shifted = F.pad(chain[i][0], (0, 0, step - i, 0))[:, :, :n]
            own.append((q * shifted).sum(-1, keepdim=True) * scale)
        weights = torch.cat((scores, *own), dim=-1).softmax(-1)
        out = weights[..., :n] @ values
        for i in range(1, step + 1):
            shifted = F.pad(chain[i][1], (0, 0, step - i, 0))[:, :, :n]
            out = out + weights[..., n + i - 1 : n + i] * shifted
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        cosine, sine = cast(Tensor, self.cosine)[:n], cast(Tensor, self.sine)[:n]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)

    def exported(self) -> dict[str, Tensor]:
        """Weights in EAGLE-3's published names (plus `fc_norm.{i}.weight`), bf16."""
        c = self.config
        q, k, v = self.qkv.weight.split((c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim))
        gate, up = self.gate_up.weight.chunk(2)
        tensors = {
            "fc.weight": self.fc.weight,
            "norm.weight": self.norm.weight,
            "midlayer.input_layernorm.weight": self.input_layernorm.weight,
            "midlayer.hidden_norm.weight": self.hidden_norm.weight,
            "midlayer.post_attention_layernorm.weight": self.post_attention_layernorm.weight,
            "midlayer.self_attn.q_proj.weight": q,
            "midlayer.self_attn.k_proj.weight": k,
            "midlayer.self_attn.v_proj.weight": v,
            "midlayer.self_attn.o_proj.weight": self.o_proj.weight,
            "midlayer.mlp.gate_proj.weight": gate,
            "midlayer.mlp.up_proj.weight": up,
            "midlayer.mlp.down_proj.weight": self.down_proj.weight,
            **{f"fc_norm.{i}.weight": cast(RMSNorm, norm).weight for i, norm in enumerate(self.fc_norm)},
        }
        return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
