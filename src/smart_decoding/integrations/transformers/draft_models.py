"""A smaller transformers model of the same vocabulary, as the drafter of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

from smart_decoding.drafters import check_draft
from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.errors import ModelError
from smart_decoding.integrations.transformers.checks import unsupported_cache
from smart_decoding.integrations.transformers.target import HostTarget
from smart_decoding.kernels import library
from smart_decoding.models.sampling.ranking import ranked
from smart_decoding.speculation import (
    DRAFT_SCRATCH_PAGES,
    require_same_vocabulary,
    vocabulary_difference,
)

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft, TreeRule
    from smart_decoding.core.tree import DraftTrees
    from smart_decoding.engine.protocols import Drafter
    from smart_decoding.engine.rows import DraftInputs, LevelRequest, Ranked, Rows


class HostDraftModel:
    """folder: of a prior; draft models have none.

    Models pad their vocabularies differently: tokens that only one of the two has are never
    proposed. Keys of tree nodes come first in the cache, so that it grows with the text, not with
    the pages that a call may use."""

    drafts_rounds = False
    folder: Path | None = None

    def __init__(self, model: PreTrainedModel, layers: int, tree: bool, target_vocab: int) -> None:
        text = model.config.get_text_config(decoder=True)
        self.model = model
        self._layers = layers
        self._tree = tree
        self._target = HostTarget(model, layers, tree)
        self._vocab = min(target_vocab, int(text.vocab_size))
        self._tokens = torch.arange(self._vocab, device=self._target.device)
        self._native = self._target.device.type == "cpu" and library.unavailable() is None
        self._pages = 0
        self.shape = (type(model).__name__, layers, text.hidden_size, self._vocab)

    def drafter(self, pages: int, positions: int, tree: bool) -> Drafter:
        """Return a drafter for one call, with room for keys in so many pages."""
        self._target = HostTarget(self.model, self._layers, self._tree)
        self._pages = pages
        drafter = DraftModelDrafter(self, pages, DRAFT_SCRATCH_PAGES)
        if not (tree and self._tree):
            drafter.widest = 1
        return drafter

    def draft(self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs) -> Draft:
        """Raise: this model drafts level by level."""
        raise NotImplementedError

    def check_length(self, max_length: int) -> None:
        """Raise ModelError if the model cannot follow a text to this length."""
        check_length(self.model.config, max_length)

    @torch.inference_mode()
    def rank(self, rows: Rows, request: LevelRequest) -> Ranked:
        """Run one forward; return the most likely next tokens of the requested rows, and their
        probabilities: [rows, k]; see `ranked`."""
        rows.token = np.minimum(rows.token, self._vocab - 1)
        rows.slot_mapping = self._moved(rows.slot_mapping, PAGE)
        rows.ancestors = self._moved(rows.ancestors, PAGE)
        rows.pages = self._moved(rows.pages, 1)
        logits: torch.Tensor = self._target.forward(rows, ()).logits
        return ranked(logits[:, : self._vocab], self._tokens, request, self._native)

    def _moved(self, places: Ints, unit: int) -> Ints:
        """Return pages or slots: those of tree nodes before the others."""
        shift = np.where(places < self._pages * unit, DRAFT_SCRATCH_PAGES, -self._pages) * unit
        moved: Ints = (places + shift).astype(np.int32)
        return moved


def load_draft_model(target: PreTrainedModel, draft: Any, max_length: int) -> PreTrainedModel:
    """Return the model, loaded in the target's dtype to its device if it is a folder or hub id.

    Raises ConfigError or ModelError, before it is loaded, if it does not fit the target or the
    call's longest text."""
    check_draft("draft_model", draft, "model=NAME")
    config = draft.config if isinstance(draft, PreTrainedModel) else _config(draft)
    name = config.name_or_path or type(draft).__name__
    if config.is_encoder_decoder:
        raise ModelError(f"the draft model {name} is an encoder-decoder model: take a decoder")
    _check_vocabulary(target, config, name)
    check_length(config, max_length)
    if isinstance(draft, PreTrainedModel):
        return draft
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(draft, dtype=target.dtype)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the draft model {name} cannot be loaded: {_first_line(error)}"
        ) from error
    placed: PreTrainedModel = model.to(target.device).eval()
    return placed


def check_length(config: Any, max_length: int) -> None:
    """Raise ModelError if the draft model cannot follow a text to this length."""
    name = config.name_or_path or type(config).__name__
    text = config.get_text_config(decoder=True)
    positions = getattr(text, "max_position_embeddings", None)
    if positions and positions < max_length:
        raise ModelError(
            f"the draft model {name} has {positions} positions, but prompt and answer may reach "
            f"{max_length}: lower max_new_tokens"
        )
    caches = {"past_key_values": DynamicCache(config=text)}
    call = GenerationConfig(max_length=max_length)  # type: ignore[no-untyped-call]
    reason = unsupported_cache(f"the draft model {name}", call, caches)
    if reason:
        raise ModelError(reason)


def _config(name: Any) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"there is no draft model {str(name)!r}: {_first_line(error)}") from error


def _check_vocabulary(target: PreTrainedModel, config: Any, name: str) -> None:
    """Compare the two tokenizers where both are at hand, else the numbers of tokens. Raises
    ModelError."""
    ours = _vocabulary(target.config.name_or_path, local_only=True)
    theirs = _vocabulary(name, local_only=False) if ours else None
    mine, its = (c.get_text_config(decoder=True).vocab_size for c in (target.config, config))
    if ours and theirs:
        why = vocabulary_difference(ours, theirs, min(mine, its))
    else:
        why = None if mine == its else f"{its} tokens instead of {mine}"
    require_same_vocabulary(name, why)


def _vocabulary(name: str | None, local_only: bool) -> dict[str, int] | None:
    """Return token to id, or None without a tokenizer."""
    if not name or (local_only and Path(name).is_dir() and not any(Path(name).glob("tokenizer*"))):
        return None
    try:
        return dict(AutoTokenizer.from_pretrained(name, local_files_only=local_only).get_vocab())
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
