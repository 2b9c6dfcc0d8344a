"""The draft head in trainable form: EAGLE-3 (arXiv 2503.01840), or EAGLE-1/2.

Pair t = (features of position t, embedding of token t + 1) predicts token t + 2. Unrolled step j
feeds the head's own output back j times, as drafting does: its keys are the true pairs up to t - j
and its own chain since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.kernels.weights import Matrix, as_tensor
from smart_decoding.models.families.layer import Experts
from smart_decoding.models.heads.files import AUX_NORM, FIRST

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.heads.files import HeadFiles


class RMSNorm(nn.Module):
    """Root mean square norm, in the dtype of what it norms."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


@dataclass(frozen=True, slots=True)
class Form:
    """The structure of a head.

    shape: of its one layer. aux_count: how many layers of the target it reads. fc_norm: each state
    is normed before fc. fused: EAGLE-1/2, whose fc reads [embedding ; features] at every step.
    norm_before_residual: the layer's residual is the normed features. own_output: rows of an output
    matrix of its own (0: the target's rows, which stay as they are)."""

    shape: ModelConfig
    aux_count: int
    fc_norm: bool = True
    fused: bool = False
    fc_bias: bool = False
    norm_before_residual: bool = False
    own_output: int = 0


def form_of(files: HeadFiles) -> Form:
    """Return the form of a head on disk. Raises ModelError for one that cannot be trained on."""
    if files.shape.layers > 1:
        raise ModelError(
            f"training cannot start from a head of {files.shape.layers} layers: it takes one"
        )
    weights = files.weights
    further = {
        "norm_before_fc": AUX_NORM in weights,
        "norm_output": files.form.feeds_back_normed,
        "norms of queries and keys": files.shape.qk_norm,
    }
    for which, has in further.items():
        if has:
            raise ModelError(f"training cannot start from a head with {which}: take one without")
    return Form(
        files.shape,
        len(files.aux_layers),
        fc_norm="fc_norm.0.weight" in weights,
        fused=files.fused,
        fc_bias="fc.bias" in weights,
        norm_before_residual=files.norm_before_residual,
        own_output=len(weights.get("lm_head.weight", ())),
    )


def narrowed(network: Sequence[Tensor], width: int) -> list[Tensor]:
    """Return a feed-forward network's gate, up and down with its `width` most important neurons, in
    their order: by the product of the norms of their three vectors. Raises ConfigError for a larger
    width than the network's."""
    gate, up, down = network
    if width > len(gate):
        raise ConfigError(f"intermediate_size={width}, but training starts from {len(gate)}")
    carried = gate.float().norm(dim=1) * up.float().norm(dim=1) * down.float().norm(dim=0)
    kept = carried.topk(width).indices.sort().values
    return [gate[kept], up[kept], down[:, kept]]


class TrainableHead(nn.Module):
    """fc, one decoder layer over [normed embedding ; normed features], and a norm.

    The output rows follow. Fused: fc over [embedding ; features], and the layer over that."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form
        self.config = config = form.shape
        d = config.hidden
        q = config.heads * config.head_dim
        kv = config.kv_heads * config.head_dim
        self._sizes = [q, kv, kv]  # of queries, keys, values
        self.fc_norm = nn.ModuleList(
            RMSNorm(d, config.rms_eps) for _ in range(form.aux_count if form.fc_norm else 0)
        )
        self.fc = nn.Linear(2 * d if form.fused else form.aux_count * d, d, bias=form.fc_bias)
        if not form.fused:
            self.input_layernorm = RMSNorm(d, config.rms_eps)
            self.hidden_norm = RMSNorm(d, config.rms_eps)
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

    def start_from(
        self, weights: Mapping[str, Matrix], target: ModelConfig, aux_scale: float
    ) -> None:
        """Start as the target's last layer with attention on the last aux state: far better than
        noise.

        A network of experts has no match here: the head's adds nothing at first. aux_scale: root
        mean square of that state."""
        last = target.layers - 1 if target.linear is None else target.attention_layers[-1]
        prefix = f"model.layers.{last}."

        def get(name: str) -> Tensor:
            return as_tensor(weights[prefix + name]).float()

        d = self.config.hidden
        with torch.no_grad():
            self.fc.weight.normal_(0, 0.002)
            self.fc.weight[:, -d:] += torch.eye(d) * (aux_scale if self.form.fc_norm else 1.0)
            q, k, v = (get(f"self_attn.{n}_proj.weight") for n in "qkv")
            if target.gated:  # a head's rows of q, then those of its gate
                q = q.view(target.heads, 2, -1, d)[:, 0].reshape(-1, d)
            qkv = torch.cat((q, k, v))
            self.qkv.weight.copy_(torch.cat((torch.randn_like(qkv) * 0.01, qkv), dim=1))
            self.o_proj.weight.copy_(get("self_attn.o_proj.weight"))
            if isinstance(target.layer(last).ffn, Experts):
                self.down_proj.weight.zero_()
            else:
                network = [get(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")]
                gate, up, down = narrowed(network, self.config.ffn)
                self.gate_up.weight.copy_(torch.cat((gate, up)))
                self.down_proj.weight.copy_(down)
            self.hidden_norm.weight.copy_(get("input_layernorm.weight"))
            self.post_attention_layernorm.weight.copy_(get(f"{target.norm_before_ffn}.weight"))
            self.norm.weight.copy_(as_tensor(weights["model.norm.weight"]).float())

    @torch.no_grad()
    def start_at(self, weights: Mapping[str, Matrix]) -> None:
        """Go on from a head on disk (`HeadFiles.weights`), which may be wider."""
        names = [f"{FIRST}mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        network = narrowed([as_tensor(weights[name]) for name in names], self.config.ffn)
        tensors = {**weights, **dict(zip(names, network, strict=True))}
        for name, parameter in self._parameters_by_name().items():
            parameter.copy_(as_tensor(tensors[name]).float())

    def features(self, aux_hidden: Tensor) -> Tensor:
        """[..., aux_count * hidden] -> [..., hidden].

        Fused heads read the output of the target's final norm unchanged."""
        if self.form.fused:
            return aux_hidden
        if not self.form.fc_norm:
            return cast("Tensor", self.fc(aux_hidden))
        parts = aux_hidden.chunk(len(self.fc_norm), dim=-1)
        normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
        return cast("Tensor", self.fc(torch.cat(normed, dim=-1)))

    def forward(
        self,
        g: Tensor,
        embedded: Tensor,
        chain: list[tuple[Tensor, Tensor]],
        visual: Tensor | None = None,
    ) -> Tensor:
        """Return one unrolled step: the output [batch, n, hidden], to be fed back shifted by one
        position.

        g, embedded: [batch, n, hidden]. chain: keys and values of earlier steps; it gets this
        step's. visual [batch, n]: where `embedded` is a picture's (None: nowhere)."""
        batch, n, _ = g.shape
        c = self.config
        x, g = self._layer_input(g, embedded, visual)
        q, k, v = (
            part.view(batch, n, -1, c.head_dim).transpose(1, 2)
            for part in torch.split(self.qkv(x), self._sizes, dim=-1)
        )
        repeat = c.heads // c.kv_heads
        keys = self._rotate(k).repeat_interleave(repeat, 1)
        chain.append((keys, v.repeat_interleave(repeat, 1)))
        out = self._attend(self._rotate(q), chain)
        g = g + self.o_proj(out.transpose(1, 2).reshape(batch, n, -1))
        gate, up = self.gate_up(self.post_attention_layernorm(g)).chunk(2, dim=-1)
        return cast("Tensor", g + self.down_proj(F.silu(gate) * up))

    def _layer_input(
        self, g: Tensor, embedded: Tensor, visual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's input [batch, n, width], and the start of its residual.

        At a picture's positions a fused head reads only the embedding (MSD)."""
        if self.form.fused:
            fused = self.fc(torch.cat((embedded, g.to(embedded.dtype)), dim=-1))
            if visual is not None:
                fused = torch.where(visual[..., None], embedded.to(fused.dtype), fused)
            return fused, fused
        normed = self.hidden_norm(g)
        x = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        return x, normed if self.form.norm_before_residual else g

    def _attend(self, q: Tensor, chain: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[batch, heads, n, head_dim].

        Step j = len(chain) - 1 attends to true pairs <= t - j and to its own chain."""
        step = len(chain) - 1
        n = q.shape[2]
        keys, values = chain[0]
        if step == 0:
            return F.scaled_dot_product_attention(q, keys, values, is_causal=True)
        scale = self.config.head_dim**-0.5
        at = torch.arange(n)
        later = at[None, :] > at[:, None] - step
        scores = (q @ keys.transpose(-1, -2) * scale).masked_fill(later, float("-inf"))
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
        cosine = cast("Tensor", self.cosine)[:n]
        sine = cast("Tensor", self.sine)[:n]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cosine - b * sine, b * cosine + a * sine), dim=-1)

    def _parameters_by_name(self) -> dict[str, Tensor]:
        """EAGLE-3's published names (and `fc_norm.{i}.weight`) -> the parameters, or views."""
        attention = f"{FIRST}self_attn."
        gate, up = self.gate_up.weight.chunk(2)
        tensors: dict[str, Tensor | None] = {
            "fc.weight": self.fc.weight,
            "fc.bias": self.fc.bias,
            f"{FIRST}post_attention_layernorm.weight": self.post_attention_layernorm.weight,
            f"{attention}o_proj.weight": self.o_proj.weight,
            f"{attention}o_proj.bias": self.o_proj.bias,
            f"{FIRST}mlp.gate_proj.weight": gate,
            f"{FIRST}mlp.up_proj.weight": up,
            f"{FIRST}mlp.down_proj.weight": self.down_proj.weight,
            "lm_head.weight": None if self.lm_head is None else self.lm_head.weight,
        }
        for i, norm in enumerate(self.fc_norm):
            tensors[f"fc_norm.{i}.weight"] = cast("RMSNorm", norm).weight
        if not self.form.fused:
            tensors["norm.weight"] = self.norm.weight
            tensors[f"{FIRST}input_layernorm.weight"] = self.input_layernorm.weight
            tensors[f"{FIRST}hidden_norm.weight"] = self.hidden_norm.weight
        for kind, parameter in (("weight", self.qkv.weight), ("bias", self.qkv.bias)):
            if parameter is not None:
                parts = torch.split(parameter, self._sizes)
                for name, part in zip("qkv", parts, strict=True):
                    tensors[f"{attention}{name}_proj.{kind}"] = part
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def exported(self) -> dict[str, Tensor]:
        """Return weights in EAGLE-3's published names, bf16."""
        return {
            name: tensor.detach().to(torch.bfloat16).contiguous()
            for name, tensor in self._parameters_by_name().items()
        }
