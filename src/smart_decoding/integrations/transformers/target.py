"""A transformers model as the engine's target: `Rows` become forwards with a mask."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from smart_decoding.engine.verification import TargetScores, verify_by_rows
from smart_decoding.integrations.transformers.aux_hidden import AuxHidden
from smart_decoding.integrations.transformers.cache import Layout, SlotCache, lay_out
from smart_decoding.models.sampling.sampler import Sampler

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.engine.kv import Ints
    from smart_decoding.engine.rows import Rows
    from smart_decoding.integrations.transformers.sequences import Host

UNEVEN = 4  # groups with so many times more rows than the smallest go into another forward


class HostTarget(Sampler):
    """A text model, whose keys lie in a `SlotCache`.

    tree: whether the model takes a mask [groups, 1, queries, keys]; else rows must be chains, under
    a padding mask. host: the processors of a `generate` call, or None for forwards only."""

    verify = verify_by_rows
    clock = staticmethod(time.perf_counter)
    states = snapshots = 0  # models with recurrent states are refused
    native = None  # no kernels verify in one call
    steps = ()  # of costs over rows: not known here
    experts = None  # of a mixture: not known here

    def __init__(
        self,
        model: PreTrainedModel,
        layers: int,
        tree: bool,
        eos_token_ids: tuple[int, ...] = (),
        host: Host | None = None,
    ) -> None:
        self.model = model
        self.tree = tree
        self.eos_token_ids = eos_token_ids
        self.host = host
        config = model.config.get_text_config(decoder=True)
        embedding: Any = model.get_input_embeddings()
        self.vocab = int(embedding.num_embeddings)
        self.max_positions = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
        self.device: torch.device = embedding.weight.device
        self.cache = SlotCache(layers)
        self._layers = layers
        self._aux_hidden: AuxHidden | None = None
        self._takes = frozenset(inspect.signature(model.forward).parameters)

    def forward(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        """Run one forward for each bundle of groups; features: [rows, aux_layers * hidden].

        Raises ModelError for aux_layers of a model whose layers cannot be found."""
        requested = np.arange(len(rows)) if rows.logit_rows is None else rows.logit_rows
        found: list[IntArray] = []
        logits: list[torch.Tensor] = []
        order: list[IntArray] = []
        features: list[torch.Tensor] = []
        for groups in _bundles(rows):
            layout = lay_out(rows, groups)
            mine = np.flatnonzero(np.isin(layout.row, requested))
            part = self._forward(rows, layout, mine, aux_layers)
            logits.append(part.logits)
            features.append(part.features)
            found.append(layout.row[mine])
            order.append(layout.row)
        all_features = _in_order(features, order, np.arange(len(rows))) if aux_layers else None
        return TargetScores(_in_order(logits, found, requested), all_features)

    def _forward(
        self, rows: Rows, layout: Layout, requested: IntArray, aux_layers: tuple[int, ...]
    ) -> TargetScores:
        """Return float32 logits [requested, vocab] of the layout's rows `requested`, indices into
        `layout.row`, and the aux hidden states of all its rows."""
        group, column = layout.at
        back = column[requested] - layout.queries  # from the end: the model may keep the last ones
        inputs = self._inputs(rows, layout)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = int(-back.min(initial=-1))
        self.cache.show(layout)
        logits, states = self._run(inputs, aux_layers)
        device = logits.device
        chosen = logits[
            torch.from_numpy(group[requested]).to(device), torch.from_numpy(back).to(device)
        ]
        if not aux_layers:
            return TargetScores(chosen.float(), None)
        at = (torch.from_numpy(group), torch.from_numpy(column))
        aux_hidden = [states[layer].to(self.device)[at] for layer in aux_layers]
        return TargetScores(chosen.float(), torch.cat(aux_hidden, dim=-1))

    def _inputs(self, rows: Rows, layout: Layout) -> dict[str, Any]:
        """Return the arguments of the model's forward."""
        group, column = layout.at
        token = np.zeros((layout.groups, layout.queries), np.int64)
        token[group, column] = rows.token[layout.row]
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(token).to(self.device),
            "attention_mask": self._mask(layout),
            "cache" if "cache" in self._takes else "past_key_values": self.cache,
            "use_cache": True,
            "return_dict": True,
        }
        if "position_ids" in self._takes:
            position = np.zeros_like(token)
            position[group, column] = rows.position[layout.row]
            inputs["position_ids"] = torch.from_numpy(position).to(self.device)
        return inputs

    def _run(
        self, inputs: Mapping[str, Any], aux_layers: tuple[int, ...]
    ) -> tuple[torch.Tensor, Mapping[int, torch.Tensor]]:
        """Return logits [groups, kept queries, vocab], and states after each of `aux_layers`."""
        if not aux_layers:
            return self.model(**inputs).logits, {}
        if self._aux_hidden is None:
            self._aux_hidden = AuxHidden(self.model, self._layers)
        with self._aux_hidden.taken(aux_layers) as states:
            logits: torch.Tensor = self.model(**inputs).logits
        return logits, states

    def _mask(self, layout: Layout) -> torch.Tensor:
        if not self.tree:
            return torch.from_numpy(layout.valid.astype(np.int64)).to(self.device)
        masked = torch.from_numpy(~layout.attended[:, None]).to(self.device)
        dtype = self.model.dtype
        mask = torch.zeros(masked.shape, dtype=dtype, device=self.device)
        return mask.masked_fill_(masked, torch.finfo(dtype).min)

    def sample(
        self, logits: torch.Tensor, which: IntArray, specs: Sequence[SampleSpec]
    ) -> IntArray:
        """Return the tokens that the call's processors and settings choose."""
        assert self.host is not None
        rows = torch.from_numpy(which).to(logits.device)
        return self.host.draw(logits[rows], specs, Sampler())

    def move(self, source: Ints, target: Ints) -> None:
        """Copy KV slots source[i] -> target[i]."""
        slots = (torch.from_numpy(part.astype(np.int64)) for part in (source, target))
        self.cache.move(*slots)

    def encode_image(self, pixels: Any) -> Any:
        """Raise: calls take only token ids (`checks.unsupported`)."""
        raise NotImplementedError

    def copy_state(self, source: int, target: int, beyond: int = 0) -> None:
        """Raise: models with recurrent states are refused."""
        raise NotImplementedError

    def forget_pictures(self) -> None:
        """Do nothing: calls have no pictures."""


def _in_order(
    parts: Sequence[torch.Tensor], rows: Sequence[IntArray], requested: IntArray
) -> torch.Tensor:
    """Return the parts' rows, whose numbers are `rows`, in the order of `requested`."""
    row = np.concatenate(rows)
    all_parts = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if np.array_equal(row, requested):
        return all_parts
    place = np.empty(int(row.max()) + 1, np.int64)
    place[row] = np.arange(len(row))
    return all_parts[torch.from_numpy(place[requested]).to(all_parts.device)]


def _bundles(rows: Rows) -> list[list[int]]:
    """Return groups that share a forward: of similar size, since all are padded to the largest."""
    counts = np.diff(rows.query_start_loc)
    if counts.max() <= 16 + UNEVEN * counts.min():
        return [list(range(len(counts)))]
    bundles: list[list[int]] = []
    for group in np.argsort(counts, kind="stable").tolist():
        if not bundles or counts[group] > 16 + UNEVEN * counts[bundles[-1][0]]:
            bundles.append([])
        bundles[-1].append(group)
    return bundles
