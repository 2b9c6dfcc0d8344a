"""A smaller model beside the target, with a KV cache of its own."""

from __future__ import annotations

from collections import ChainMap
from ctypes import addressof
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from smart_decoding.kernels.selection import native_selection
from smart_decoding.kernels.weights import IF_FASTER
from smart_decoding.models.cpu.kernel_check import use_native
from smart_decoding.models.cpu.native_level import LevelCall, fill_first_level
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.sampling.ranking import ranked
from smart_decoding.models.target import TorchTarget, fitting_memory

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft, TreeRule
    from smart_decoding.core.tree import DraftTrees
    from smart_decoding.engine.rows import DraftInputs, LevelRequest, Ranked, Rows
    from smart_decoding.kernels.weights import Matrix
    from smart_decoding.models.checkpoints.loading import Checkpoint

_BY_TOKEN = ("model.embed_tokens.weight", "lm_head.weight")


class _Decoder(Decoder):
    """No answer depends on drafts. It may be loaded while an answer is shown."""

    in_bytes = IF_FASTER
    quiet = True


class DraftModel:
    """A model of any family in the target's dtype on its device, with pages of its numbers and
    `scratch_pages` more.

    Models pad their vocabularies differently: tokens that only one of the two has are never
    proposed. The weights are read by `load`, or when something is drafted."""

    def __init__(
        self, checkpoint: Checkpoint, target: TorchTarget, pages: int, scratch_pages: int
    ) -> None:
        checkpoint.config.check_draft()
        vocab = min(checkpoint.config.vocab, target.vocab)
        self.config = c = replace(checkpoint.config, vocab=vocab)
        self._checkpoint = checkpoint
        self._target = target
        self._pages = (pages, scratch_pages)
        self._native = use_native(c, target.device, target.allow_slow)
        self.drafts_rounds = self._native
        self._tokens = torch.arange(vocab, device=target.device)
        self.shape = (
            "draft_model",
            checkpoint.provenance.get("dtype"),  # quants cost less
            c.layers,
            c.hidden,
            c.heads,
            c.kv_heads,
            c.head_dim,
            c.ffn,
            vocab,
            *(() if c.experts is None else (c.experts.count, c.experts.per_token)),
        )

    def load(self) -> None:
        """Read the weights, if they are not here yet. Raises CapacityError."""
        _ = self._decoder

    @cached_property
    def _decoder(self) -> _Decoder:
        vocab = self.config.vocab
        given = self._checkpoint.weights
        cut = {name: given[name][:vocab] for name in _BY_TOKEN if name in given}
        weights: ChainMap[str, Matrix] = ChainMap(cut, given)  # type: ignore[arg-type]  # only read
        target = self._target
        with fitting_memory("draft model", self._pages[0]):
            return _Decoder(
                self.config,
                weights,
                target.dtype,
                target.device,
                sum(self._pages),
                target.max_positions + 64,
                self._native,
                target.graphs,
            )

    def rank(self, rows: Rows, request: LevelRequest) -> Ranked:
        """Return one forward: the most likely next tokens of the rows with logits, and their
        probabilities: [rows, k]; see `ranked`."""
        rows.token = np.minimum(rows.token, self.config.vocab - 1)
        return ranked(self._decoder.forward(rows).logits, self._tokens, request, self._native)

    def draft(self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs) -> Draft:
        """Draft a round as the rule says, in one call, and merge it with `proposed`."""
        assert self._decoder.model is not None
        k = min(inputs.request.k, self.config.vocab)
        call = LevelCall(True, inputs.rows, None, proposed.batch, k)
        drafts = {"model": addressof(self._decoder.model.struct), "tokens": self._tokens.data_ptr()}
        first = fill_first_level(inputs, call, self._decoder.rotary, rule.levels, **drafts)
        return native_selection().draft(rule, proposed, first)
