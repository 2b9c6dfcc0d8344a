"""The levels of a head as a few calls of torch each.

EAGLE-3 (arXiv 2503.01840): q, k and v read [norm(embedding) ; norm(features)], the residual is the
un-normalised features, and what is fed back is the output before the last norm. EAGLE-1/2: fc
merges [embedding ; features] into the layer's input, and the target's own output matrix ranks what
comes out. `HeadForm` says which, and docs/eagle-heads.md has the conventions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.core.rule import Draft
from smart_decoding.core.selection import Fixed
from smart_decoding.core.tree import added
from smart_decoding.kernels.selection import fastest_selection
from smart_decoding.models.families.decoder import put
from smart_decoding.models.heads.features import FeaturePart, stacked, take_rows
from smart_decoding.models.sampling.ranking import ranked
from smart_decoding.models.torch.device_draft import DeviceDraft
from smart_decoding.models.torch.graphs import layers_on
from smart_decoding.models.torch.layers import Context, KVCache
from smart_decoding.models.torch.torch_layers import Linear, rms_norm

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.rows import DraftInputs, LevelRequest, Ranked, Rows
    from smart_decoding.models.heads.weights import HeadWeights


# On a GPU: two waits a round, or one for each level and a host that can stop. Which is faster was
# not measured yet: tools/gpu_check.sh says which of both to write here.
DEVICE_CHOOSES = True


class SteppedLevels:
    """Pairs go through the layers, and the output is ranked.

    kv, rotary: a head's keys and values, and its tables [positions, head_dim / 2], which it sets.
    device_chooses: what levels expand; then its kernels must read `DeviceRows`."""

    kv: KVCache
    rotary: tuple[Tensor, Tensor]

    def __init__(self, weights: HeadWeights) -> None:
        self._config = weights.files.shape
        self._form = form = weights.files.form
        self._norm_before_residual = weights.files.norm_before_residual
        self._target = target = weights.target
        self._layers = layers_on(target.device, weights.layers(), target.graphs)
        self._fc = Linear(weights["fc.weight"], weights.get("fc.bias"))
        self._aux_norm = weights.aux_norm
        self._norms = 1 if weights.aux_together else len(weights.files.aux_layers)
        self._embedding_norm = weights.norm(form.embedding_norm)
        self._features_norm = weights.norm(form.features_norm)
        self._last_norm = weights.norm(form.last_norm)
        self._output = _output(weights)
        self._embedding = weights.embedding
        self._draft_ids = weights.draft_ids
        self._rows_of = weights.rows_of
        self._round: list[Tensor] = []
        self.device_chooses = DEVICE_CHOOSES and target.device.type == "cuda"

    @torch.inference_mode()
    def first(
        self, rows: Rows, parts: Sequence[FeaturePart], last: IntArray, request: LevelRequest
    ) -> Ranked:
        """Begin a round: runs pairs of tokens and aux states; children of the `last` rows."""
        self._round = [take_rows(self._catch_up(rows, parts), last)]
        return self._rank(request)

    @torch.inference_mode()
    def deeper(self, rows: Rows, above: IntArray, request: LevelRequest) -> Ranked:
        """Runs nodes below the outputs `above` of this round; the best children of all."""
        context = Context(rows, *self.rotary)
        self._round.append(self._run(context, take_rows(self.outputs, above)))
        return self._rank(request)

    @torch.inference_mode()
    def replace(self, places: IntArray, tokens: IntArray) -> None:
        """Propose these tokens in place of others, with rows of the output matrix."""
        at, ids = (torch.from_numpy(each).to(self._target.device) for each in (places, tokens))
        self._draft_ids[at] = ids
        self._output.replace_rows(at, self._rows_of(ids))

    def follows(self, rule: TreeRule) -> bool:
        """Return whether a device can choose what levels expand: their widths are known before."""
        return self.device_chooses and Fixed.before(rule) is not None

    @torch.inference_mode()
    def draft(
        self,
        rule: TreeRule,
        proposed: DraftTrees,
        inputs: DraftInputs,
        parts: Sequence[FeaturePart],
    ) -> Draft:
        """Draft all levels of a rule of which `Fixed.before` knows the widths, and merge them with
        `proposed`; the host waits for a device once."""
        fixed = Fixed.before(rule)
        assert fixed is not None
        round = DeviceDraft(rule, fixed, inputs, self._draft_ids)
        self._round = [self._catch_up(inputs.rows, parts)[round.last]]
        round.rank(self._logits())
        while (level := round.expand(self.rotary)) is not None:
            context, above = level
            self._round.append(self._run(context, self._round[-1][above]))
            round.rank(self._logits())
        drafted, expanded, seconds = round.fetch()
        trees = added(proposed, drafted)
        began = time.perf_counter()
        kept = fastest_selection().select(rule, trees)
        choosing = time.perf_counter() - began
        return Draft(trees, rule, kept, [len(inputs.rows), *expanded], seconds, choosing)

    @property
    def outputs(self) -> Tensor:
        """[rows, hidden] of this round so far, which deeper levels read."""
        return torch.cat(self._round)

    def _features(self, states: Tensor) -> Tensor:
        """Return features [rows, hidden] of aux hidden states [rows, aux_layers * hidden]."""
        if self._form.fused:
            return rms_norm(states, self._target.final_norm, self._target.config.rms_eps)
        if self._aux_norm is not None:
            each = states.view(len(states), self._norms, -1)
            normed = F.rms_norm(each, each.shape[2:], eps=self._config.rms_eps)
            states = normed.view(states.shape) * self._aux_norm
        return self._fc(states)

    def _inputs(
        self, rows: Rows, embedded: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream [rows, hidden], to be changed in place, and what q, k and v of
        the first layer read, if not the normed stream."""
        eps = self._config.rms_eps
        normed = rms_norm(features, self._features_norm, eps)
        pair = torch.cat((rms_norm(embedded, self._embedding_norm, eps), normed), dim=-1)
        if self._form.fused:
            x = self._fc(pair)
            put(x, rows.mm_embeds)  # MSD: of a visual position the layer reads the embedding alone
            return x, None if self._form.input_norm else x.clone()
        return normed if self._norm_before_residual else features.clone(), pair

    def _catch_up(self, rows: Rows, parts: Sequence[FeaturePart]) -> Tensor:
        """Return the outputs [rows, hidden] of all pairs that wait."""
        states = torch.cat([stacked(part) for part in parts])
        features = self._features(states.to(self._target.device, self._target.work_dtype))
        return self._run(Context(rows, *self.rotary), features)

    def _run(self, context: Context, features: Tensor) -> Tensor:
        """Return one pass over pairs of features and tokens: the outputs [rows, hidden], fed back
        as features."""
        rows = context.rows
        embedded = self._embed(context.on_device.token)
        put(embedded, rows.mm_embeds)
        x, context.inputs = self._inputs(rows, embedded, features)
        self._layers(x, context, self.kv)
        return self._normed(x) if self._form.feeds_back_normed else x

    def _normed(self, x: Tensor) -> Tensor:
        """Return what the output matrix reads."""
        return rms_norm(x, self._last_norm, self._config.rms_eps)

    def _logits(self) -> Tensor:
        """After the rows that were run last."""
        x = self._round[-1]
        return self._output(x if self._form.feeds_back_normed else self._normed(x))

    def _rank(self, request: LevelRequest) -> Ranked:
        return ranked(self._logits(), self._draft_ids, request, native=False)

    def _embed(self, token: Tensor) -> Tensor:
        return self._target.embed(token) if self._embedding is None else self._embedding[token]


def _output(weights: HeadWeights) -> Linear:
    """Return the output matrix: the target's, or one of the head's own tokens."""
    if not weights.shares_output:
        return Linear(weights.output.to(weights.target.dtype))
    assert isinstance(weights.target.head, Linear)
    return weights.target.head
