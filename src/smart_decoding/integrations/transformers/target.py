"""A transformers model as the engine's target: `Rows` become one forward with positions and a
mask."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from smart_decoding.core.tree import IntArray
from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.kv import Ints
from smart_decoding.engine.protocols import TargetScores
from smart_decoding.engine.rows import Rows
from smart_decoding.integrations.transformers.aux_hidden import AuxHidden
from smart_decoding.integrations.transformers.cache import Layout, SlotCache, lay_out
from smart_decoding.integrations.transformers.sequences import Host
from smart_decoding.models.sampler import Sampled, Sampler

UNEVEN = 4  # groups with so many times more rows than the smallest go into another forward


class HostTarget(Sampled):
    """tree: whether the model takes a mask [groups, 1, queries, keys]; else rows must be chains,
    under a padding mask.

    host: the processors of a `generate` call, or None where only forwards are wanted."""

    verify_greedy = None
    steps = ()  # of costs over rows: not known here

    def __init__(
        self,
        model: PreTrainedModel,
        layers: int,
        tree: bool,
        eos_token_ids: tuple[int, ...] = (),
        host: Host | None = None,
    ) -> None:
        self.model, self.tree, self.eos_token_ids, self.host = model, tree, eos_token_ids, host
        config = model.config.get_text_config(decoder=True)
        embedding: Any = model.get_input_embeddings()
        self.vocab = int(embedding.num_embeddings)
        self.max_positions = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.device: torch.device = embedding.weight.device
        self.cache = SlotCache(layers)
        self._layers = layers
        self._aux_layers: AuxHidden | None = None
        self.sampler = Sampler(self.vocab)
        self._takes = frozenset(inspect.signature(model.forward).parameters)

    def verify(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        """Features: [rows, aux_layers * hidden]. Raises ModelError for aux_layers of a model whose
        layers cannot be found."""
        wanted = np.arange(len(rows)) if rows.logit_rows is None else rows.logit_rows
        found, logits, order, features = [], [], [], []
        for groups in _bundles(rows):
            layout = lay_out(rows, groups)
            mine = np.flatnonzero(np.isin(layout.row, wanted))
            part = self._forward(rows, layout, mine, aux_layers)
            logits.append(part.logits)
            features.append(part.features)
            found.append(layout.row[mine])
            order.append(layout.row)
        all_features = _in_order(features, order, np.arange(len(rows))) if aux_layers else None
        return TargetScores(_in_order(logits, found, wanted), all_features)

    def _forward(
        self, rows: Rows, layout: Layout, wanted: IntArray, aux_layers: tuple[int, ...]
    ) -> TargetScores:
        """[wanted, vocab] float32 logits of the layout's rows `wanted` (indices into `layout.row`),
        and the aux_hidden states of all its rows."""
        group, column = layout.at
        token = np.zeros((layout.groups, layout.queries), np.int64)
        position = np.zeros_like(token)
        token[group, column], position[group, column] = (
            rows.token[layout.row],
            rows.position[layout.row],
        )
        back = (
            column[wanted] - layout.queries
        )  # from the end: the model may keep the last ones only
        self.cache.show(layout)
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(token).to(self.device),
            "attention_mask": self._mask(layout),
            "cache" if "cache" in self._takes else "past_key_values": self.cache,
            "use_cache": True,
            "return_dict": True,
        }
        if "position_ids" in self._takes:
            inputs["position_ids"] = torch.from_numpy(position).to(self.device)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = int(-back.min(initial=-1))
        if aux_layers and self._aux_layers is None:
            self._aux_layers = AuxHidden(self.model, self._layers)
        with self._aux_layers.taken(aux_layers) if self._aux_layers else nullcontext({}) as states:
            logits = self.model(**inputs).logits
        chosen = logits[
            torch.from_numpy(group[wanted]).to(logits.device),
            torch.from_numpy(back).to(logits.device),
        ]
        aux_hidden = [
            states[tap].to(self.device)[torch.from_numpy(group), torch.from_numpy(column)]
            for tap in aux_layers
        ]
        return TargetScores(chosen.float(), torch.cat(aux_hidden, dim=-1) if aux_layers else None)

    def _mask(self, layout: Layout) -> torch.Tensor:
        if not self.tree:
            return torch.from_numpy(layout.valid.astype(np.int64)).to(self.device)
        hidden = torch.from_numpy(~layout.seen[:, None]).to(self.device)
        dtype = self.model.dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(
            hidden, torch.finfo(dtype).min
        )

    def sample(
        self, logits: torch.Tensor, which: IntArray, specs: Sequence[SampleSpec]
    ) -> IntArray:
        assert self.host is not None
        return self.host.draw(
            logits[torch.from_numpy(which).to(logits.device)], specs, self.sampler
        )

    def move(self, source: Ints, target: Ints) -> None:
        self.cache.move(
            torch.from_numpy(source.astype(np.int64)), torch.from_numpy(target.astype(np.int64))
        )


def _in_order(
    parts: Sequence[torch.Tensor], rows: Sequence[IntArray], wanted: IntArray
) -> torch.Tensor:
    """The parts' rows, whose numbers are `rows`, in the order of `wanted`."""
    row, all_parts = np.concatenate(rows), torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if np.array_equal(row, wanted):
        return all_parts
    place = np.empty(int(row.max()) + 1, np.int64)
    place[row] = np.arange(len(row))
    return all_parts[torch.from_numpy(place[wanted]).to(all_parts.device)]


def _bundles(rows: Rows) -> list[list[int]]:
    """Groups that share a forward: of similar size, since all are padded to the largest."""
    counts = np.diff(rows.query_start_loc)
    if counts.max() <= 16 + UNEVEN * counts.min():
        return [list(range(len(counts)))]
    bundles: list[list[int]] = []
    for group in np.argsort(counts, kind="stable").tolist():
        if not bundles or counts[group] > 16 + UNEVEN * counts[bundles[-1][0]]:
            bundles.append([])
        bundles[-1].append(group)
    return bundles
