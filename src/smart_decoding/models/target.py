"""The target model as the engine uses it: loading, memory limits, forwards, sampling."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.engine.verification import lay_out, settle, verify_by_rows
from smart_decoding.errors import CapacityError, ConfigError, require_finite
from smart_decoding.models.cpu.kernel_check import use_native, why_slow
from smart_decoding.models.cpu.native_states import snapshots_of
from smart_decoding.models.cpu.native_verification import NativeBatch, draws_unchanged
from smart_decoding.models.families.decoder import Decoder, RoundingDecoder
from smart_decoding.models.families.vision import VisionTower
from smart_decoding.models.sampling.sampler import Sampler

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft
    from smart_decoding.engine.media import Pixels
    from smart_decoding.engine.protocols import Verified
    from smart_decoding.engine.rows import Rows
    from smart_decoding.engine.scheduler import Batch
    from smart_decoding.engine.verification import TargetScores
    from smart_decoding.models.checkpoints.loading import Checkpoint

# what torch says where memory is short; not of an illegal access to it
_LACKING = re.compile("out of memory|not enough memory|allocate memory", re.IGNORECASE)
DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    # vLLM's; of 16 bits bfloat16 is the one that the kernels know
    "auto": torch.bfloat16,
    "half": torch.bfloat16,
    "float16": torch.bfloat16,
}


def dtype_of(name: str) -> torch.dtype:
    """bfloat16 or float32 by name. Raises ConfigError for any other."""
    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not supported: use bfloat16 (bf16) or float32 (fp32)")
    return DTYPES[name]


def device_of(name: str) -> torch.device:
    """Return the device that auto, cpu or cuda names here. Raises ConfigError for one that is not
    there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}, but this torch finds no CUDA device: use cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise ConfigError(f"device={name!r} is not supported: use auto, cpu or cuda")
    return torch.device(name)


@contextmanager
def fitting_memory(what: str, pages: int) -> Iterator[None]:
    """Raise CapacityError where the block, which allocates a model and its KV pages, runs out of
    memory."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not (isinstance(error, MemoryError) or _LACKING.search(str(error))):
            raise
        raise CapacityError(
            f"no memory for the {what} and {pages} KV pages: lower kv_cache_tokens"
        ) from error


class TorchTarget(Sampler):
    """A model of any family on one device, with room for `pages` KV pages of 16 tokens, and its
    vision tower if it has one.

    enforce_eager: no CUDA graphs. allow_slow: plain torch on a CPU where the kernels cannot run;
    else an error. max_num_seqs: requests whose recurrent states are kept, where the model has
    some."""

    clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        device: str | torch.device,
        pages: int,
        max_model_len: int,
        enforce_eager: bool = False,
        allow_slow: bool = False,
        max_num_seqs: int = 32,
    ) -> None:
        config = checkpoint.config
        config.check_context(max_model_len)
        self.dtype = dtype_of(dtype)
        self.device = torch.device(device)
        self.graphs = not enforce_eager
        self.allow_slow = allow_slow
        self.plain_torch = why_slow(config, self.device)
        self._tower: VisionTower | None = None
        self.states = 0 if config.linear is None else max_num_seqs
        native = use_native(config, self.device, allow_slow)
        with fitting_memory("model", pages):
            if checkpoint.vision:
                self._tower = VisionTower(checkpoint.vision, self.dtype, self.device)
            self.decoder = (RoundingDecoder if checkpoint.in_bytes else Decoder)(
                config,
                checkpoint.weights,
                self.dtype,
                self.device,
                pages,
                max_model_len + 64,
                native,
                self.graphs,
            )
            self.snapshots = snapshots_of(self.states) if native else 0
            self.decoder.hold_states(self.states + self.snapshots)
        self.vocab = config.vocab
        mixture = config.experts
        # of a mixture's layer, and of one row
        self.experts = None if mixture is None else (mixture.count, mixture.per_token)
        self.steps = self.decoder.steps
        self.max_positions = max_model_len
        self.eos_token_ids = config.eos_token_ids
        # the whole model on the kernels, which verify rounds in one call
        self.native = self.decoder.model

    def verify(self, batch: Batch, draft: Draft, aux_layers: tuple[int, ...]) -> Verified:
        """See `Target`."""
        if self.native is None or not draws_unchanged(batch):
            return verify_by_rows(self, batch, draft, aux_layers)
        done = self.native.verify(NativeBatch.of(batch.decode, draft, aux_layers))
        if done.acceptance is None:  # rounding would decide a token, which the reference draws
            rows = lay_out(batch, draft)
            done.scores.advance = self.native.advance_after(rows.layout.rows)
            return settle(self, rows, done.scores, done.forward_seconds)
        require_finite(min(map(min, done.acceptance.emitted)) >= 0)
        return done.verified(batch.decode)

    def forward(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        """See `RowModel`."""
        return self.decoder.forward(rows, aux_layers)

    def copy_state(self, source: int, target: int, beyond: int = 0) -> None:
        """See `Target`."""
        assert self.native is not None
        assert self.native.states is not None
        self.native.states.copy(source, target, beyond)

    def encode_image(self, pixels: Pixels) -> torch.Tensor:
        """[length, hidden] the embeddings of a picture, for rows to be inserted."""
        if self._tower is None:
            raise ConfigError("this model reads text only")
        embeddings = self._tower.encode_image(pixels)
        if self.device.type == "cuda":  # what is timed is not its launch
            torch.cuda.current_stream(self.device).synchronize()
        return embeddings

    def forget_pictures(self) -> None:
        """See `Target`."""
        if self._tower is not None:
            self._tower.forget()

    def move(self, source: Ints, target: Ints) -> None:
        """See `Target`."""
        self.decoder.kv.move(torch.from_numpy(source), torch.from_numpy(target))


def pages_for(tokens: int, max_num_seqs: int) -> int:
    """Return pages for `tokens` committed tokens in `max_num_seqs` requests, each with a last page
    half full and a tree."""
    return int(np.ceil(tokens / PAGE)) + 5 * max_num_seqs
