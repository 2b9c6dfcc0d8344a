"""An EAGLE head at inference: aux hidden states and tokens in, ranked children out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smart_decoding.engine.kv import PAGE
from smart_decoding.kernels.weights import QuantizedTensor
from smart_decoding.models.cpu.native_level import NativeLevel
from smart_decoding.models.families.decoder import rotary_table
from smart_decoding.models.heads.features import apart
from smart_decoding.models.heads.files import scheme_of
from smart_decoding.models.heads.forms import MTP_LAYER
from smart_decoding.models.heads.vocabulary import DraftVocabulary
from smart_decoding.models.heads.weights import HeadWeights, TargetWeights
from smart_decoding.models.heads.widening import require_served_head, widened
from smart_decoding.models.torch.head_levels import SteppedLevels
from smart_decoding.models.torch.layers import KVCache

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.models.heads.features import FeaturePart, Features
    from smart_decoding.models.heads.files import HeadFiles


def _formats(files: HeadFiles) -> list[str]:
    """Return how the matrices are stored if they are quants, on which costs depend."""
    scheme = scheme_of(files.config)
    kinds = {w.format for w in files.weights.values() if isinstance(w, QuantizedTensor)}
    return [scheme] if scheme else sorted(kinds)


class EagleHead:
    """The head on the target's device; its keys live in pages with the target's numbers, plus
    scratch for the tree.

    shape: what the cost of a level depends on. levels: how they run."""

    def __init__(
        self,
        files: HeadFiles,
        target: TargetWeights,
        pages: int,
        scratch_pages: int,
        positions: int,
    ) -> None:
        if target.native:
            require_served_head(files.shape)
            files = widened(files)
        weights = HeadWeights(files, target)
        self._config = files.shape
        self._target = target
        self.work_dtype = target.work_dtype  # of aux hidden states and activations
        self.aux_layers = files.aux_layers
        self.resting_layers = files.aux_layers
        if target.native:  # which leaves the last layer out of rows that nobody reads
            self.resting_layers = _resting(files.aux_layers, target.config.layers)
        self.supports_images = files.supports_images
        self.draft_ids = weights.draft_ids
        self.shape = (
            files.shape.layers,
            files.shape.hidden,
            files.shape.ffn,
            len(weights.draft_ids),
            len(files.aux_layers),
            *_formats(files),
            *(["mtp"] if files.form == MTP_LAYER else []),
        )
        self.levels = NativeLevel(weights) if target.native else SteppedLevels(weights)
        self._vocabulary: DraftVocabulary | None = None
        if weights.changes:
            ids = weights.draft_ids.cpu().numpy()
            self._vocabulary = DraftVocabulary(ids, target.config.vocab)
        self.allocate(pages + scratch_pages, positions)

    def allocate(self, pages: int, positions: int) -> None:
        """Make room for keys, anew, and for positions below `positions`."""
        c = self._config
        target = self._target
        self.levels.kv = KVCache.empty(
            c.layers, c.kv_heads, pages, c.head_dim, target.dtype, target.device, target.native
        )
        self.levels.rotary = rotary_table(c, positions, target.device)

    def use(self, tokens: IntArray) -> None:
        """Note tokens of texts, which are proposed from now on, where it can change them."""
        if self._vocabulary is not None:
            places, new = self._vocabulary.use(tokens)
            if len(new):
                self.levels.replace(places, new)

    def apart(self, part: FeaturePart) -> FeaturePart:
        """Return the part, copied where it is a small piece of an array that it would keep alive
        whole."""
        return apart(part)

    def take(self, features: Features, row: int) -> Features:
        """Return a row of aux hidden states: [1, width], a copy."""
        taken = features[row : row + 1]
        return taken.clone() if isinstance(taken, Tensor) else taken.copy()

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys of page `source` to a later page `target`."""
        slots = torch.arange(PAGE, dtype=torch.int32)
        self.levels.kv.move(source * PAGE + slots, target * PAGE + slots)

    def blank(self, rows: int) -> Tensor:
        """Aux hidden states of `rows` rows, of arbitrary content."""
        width = len(self.aux_layers) * self._target.config.hidden
        return torch.ones(rows, width, dtype=self.work_dtype, device=self._target.device)


def _resting(aux_layers: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Return the layers with the state that enters the last layer in place of the one behind it:
    only a prompt's last row then runs there. A head that reads several layers loses 1 to 4 % of its
    tokens by that, and the reading of prompts gains the time of a layer."""
    *others, last = aux_layers
    changed = others and last == layers and others[-1] < layers - 1
    return (*others, layers - 1) if changed else aux_layers
