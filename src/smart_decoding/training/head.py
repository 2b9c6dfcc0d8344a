"""The draft head in trainable form: EAGLE-3 (arXiv 2503.01840), by default with normalised aux
hidden states, or EAGLE-1/2.

Pair t = (features of position t, embedding of token t + 1) predicts token t + 2. Unrolled step j
feeds the head's own output back j times, as drafting does: its keys are the true pairs up to t - j
and its own chain since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smart_decoding.errors import ModelError
from smart_decoding.models.config import ModelConfig
from smart_decoding.models.head_files import HeadFiles
from smart_decoding.models.head_shapes import FIRST


@dataclass(frozen=True, slots=True)
class Frozen:
    """What the head borrows from the target: embeddings [vocab, hidden], the draft vocabulary's
    rows of the output matrix [draft, hidden], and the final norm [hidden]."""

    embedding: Tensor
    head_rows: Tensor
    final_norm: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True, slots=True)
class Form:
    """What a head is made of. shape: of its one layer; aux_count: how many layers of the target it
    reads.

    fc_norm: each state is normed before fc. fused: EAGLE-1/2, whose fc reads [embedding ; features]
    at every step. norm_before_residual: the layer's residual is the normed features. own_output:
    rows of an output matrix of its own (0: the target's rows, which stay as they are)."""

    shape: ModelConfig
    aux_count: int
    fc_norm: bool = True
    fused: bool = False
    fc_bias: bool = False
    norm_before_residual: bool = False
    own_output: int = 0


def form_of(files: HeadFiles) -> Form:
    """The form of a head on disk. Raises ModelError for one that cannot be trained on."""
    if files.shape.layers > 1:
        raise ModelError(
            f"training cannot start from a head of {files.shape.layers} layers: it takes one"
        )
    weights = files.weights
    output = len(weights["lm_head.weight"]) if "lm_head.weight" in weights else 0
    return Form(
        files.shape,
        len(files.aux_layers),
        "fc_norm.0.weight" in weights,
        files.fused,
        "fc.bias" in weights,
        files.norm_before_residual,
        output,
    )


class TrainableHead(nn.Module):
    """fc, one decoder layer over [normed embedding ; normed features], and a norm before the output
    rows; or, fused, fc over [embedding ; features], and the layer over that."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, self.config = form, form.shape
        config, aux_count, d = form.shape, form.aux_count, form.shape.hidden
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.fc_norm = nn.ModuleList(
            RMSNorm(d, config.rms_eps) for _ in range(aux_count if form.fc_norm else 0)
        )
        self.fc = nn.Linear(2 * d if form.fused else aux_count * d, d, bias=form.fc_bias)
        if not form.fused:
            self.input_layernorm, self.hidden_norm = (
                RMSNorm(d, config.rms_eps),
                RMSNorm(d, config.rms_eps),
            )
            self.norm = RMSNorm(d, config.rms_eps)
        self.post_attention_layernorm = RMSNorm(d, config.rms_eps)
        self.qkv = nn.Linear(d if form.fused else 2 * d, q + 2 * kv, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q, d, bias=config.o_bias)
        self.lm_head = nn.Linear(d, form.own_output, bias=False) if form.own_output else None
        self.gate_up = nn.Linear(d, 2 * config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, d, bias=False)
        inverse, factor = config.inverse_frequencies()
        angles = torch.arange(4096).float()[:, None] * torch.from_numpy(inverse).float()
        self.register_buffer("cosine", angles.cos() * factor, persistent=False)
        self.register_buffer("sine", angles.sin() * factor, persistent=False)

    def start_from(self, weights: Mapping[str, Tensor], layers: int, aux_scale: float) -> None:
        """Starts as the last of the target's `layers` on the last aux state: a far better start
        than noise.

        aux_scale: root mean square of that state."""
        prefix = f"model.layers.{layers - 1}."

        def get(name: str) -> Tensor:
            return weights[prefix + name].float()

        d = self.config.hidden
        with torch.no_grad():
            self.fc.weight.normal_(0, 0.002)
            self.fc.weight[:, -d:] += torch.eye(d) * (aux_scale if self.form.fc_norm else 1.0)
            qkv = torch.cat([get(f"self_attn.{n}_proj.weight") for n in "qkv"])
            self.qkv.weight.copy_(torch.cat((torch.randn_like(qkv) * 0.01, qkv), dim=1))
            self.o_proj.weight.copy_(get("self_attn.o_proj.weight"))
            self.gate_up.weight.copy_(
                torch.cat((get("mlp.gate_proj.weight"), get("mlp.up_proj.weight")))
            )
            self.down_proj.weight.copy_(get("mlp.down_proj.weight"))
            self.hidden_norm.weight.copy_(get("input_layernorm.weight"))
            self.post_attention_layernorm.weight.copy_(get("post_attention_layernorm.weight"))
            self.norm.weight.copy_(weights["model.norm.weight"].float())

    @torch.no_grad()
    def start_at(self, weights: Mapping[str, Tensor]) -> None:
        """Goes on from a head on disk (`HeadFiles.weights`)."""
        for name, parameter in self._parameters_by_name().items():
            parameter.copy_(weights[name].float())

    def features(self, aux_hidden: Tensor) -> Tensor:
        """[..., aux_count * hidden] -> [..., hidden]. Fused heads read what the target's final norm
        gives, as it is."""
        if self.form.fused:
            return aux_hidden
        if not self.form.fc_norm:
            return cast(Tensor, self.fc(aux_hidden))
        parts = aux_hidden.chunk(len(self.fc_norm), dim=-1)
        normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        return cast(Tensor, self.fc(torch.cat(normed, dim=-1)))

    def forward(
        self,
        g: Tensor,
        embedded: Tensor,
        chain: list[tuple[Tensor, Tensor]],
        visual: Tensor | None = None,
    ) -> Tensor:
        """One unrolled step on g, embedded [batch, n, hidden]; `chain` holds the keys and values of
        earlier steps and gets this step's; visual [batch, n]: where `embedded` is a picture's
        (None: nowhere), all a fused head reads there (MSD). Returns the output [batch, n, hidden],
        to be fed back shifted by one position."""
        batch, n, _ = g.shape
        c = self.config
        if self.form.fused:
            fused = self.fc(torch.cat((embedded, g.to(embedded.dtype)), dim=-1))
            x = g = (
                fused
                if visual is None
                else torch.where(visual[..., None], embedded.to(fused.dtype), fused)
            )
        else:
            normed = self.hidden_norm(g)
            x = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
            g = normed if self.form.norm_before_residual else g
        q, k, v = self.qkv(x).split(
            (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim), dim=-1
        )
        q, k = (self._rotate(t.view(batch, n, -1, c.head_dim).transpose(1, 2)) for t in (q, k))
        v = v.view(batch, n, -1, c.head_dim).transpose(1, 2)
        repeat = c.heads // c.kv_heads
        chain.append((k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
        out = self._attend(q, chain)
        g = g + self.o_proj(out.transpose(1, 2).reshape(batch, n, -1))
        gate, up = self.gate_up(self.post_attention_layernorm(g)).chunk(2, dim=-1)
        return cast(Tensor, g + self.down_proj(F.silu(gate) * up))

    def _attend(self, q: Tensor, chain: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[batch, heads, n, head_dim]. Step j (len(chain) - 1) sees true pairs <= t - j and its own
        chain."""
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

    def _parameters_by_name(self) -> dict[str, Tensor]:
        """EAGLE-3's published names (and `fc_norm.{i}.weight`) -> the parameters, or views of
        them."""
        c, form = self.config, self.form
        sizes = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
        attention, mlp = f"{FIRST}self_attn.", f"{FIRST}mlp."
        gate, up = self.gate_up.weight.chunk(2)
        tensors: dict[str, Tensor] = {
            "fc.weight": self.fc.weight,
            f"{FIRST}post_attention_layernorm.weight": self.post_attention_layernorm.weight,
            **{
                f"{attention}{n}_proj.weight": part
                for n, part in zip("qkv", self.qkv.weight.split(sizes), strict=True)
            },
            f"{attention}o_proj.weight": self.o_proj.weight,
            f"{mlp}gate_proj.weight": gate,
            f"{mlp}up_proj.weight": up,
            f"{mlp}down_proj.weight": self.down_proj.weight,
            **{
                f"fc_norm.{i}.weight": cast(RMSNorm, norm).weight
                for i, norm in enumerate(self.fc_norm)
            },
        }
        if not form.fused:
            tensors |= {
                "norm.weight": self.norm.weight,
                f"{FIRST}input_layernorm.weight": self.input_layernorm.weight,
                f"{FIRST}hidden_norm.weight": self.hidden_norm.weight,
            }
        if c.qkv_bias:
            parts = zip("qkv", self.qkv.bias.split(sizes), strict=True)
            tensors |= {f"{attention}{n}_proj.bias": part for n, part in parts}
        optional = {f"{attention}o_proj.bias": self.o_proj.bias, "fc.bias": self.fc.bias}
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        return (
            tensors if self.lm_head is None else {**tensors, "lm_head.weight": self.lm_head.weight}
        )

    def exported(self) -> dict[str, Tensor]:
        """Weights in EAGLE-3's published names, bf16."""
        named = self._parameters_by_name()
        return {
            name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in named.items()
        }
