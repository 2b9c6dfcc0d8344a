"""CUDA graphs: all of a decoder layer but attention, recorded once for each bucket of rows,
replayed in one launch.

Attention depends on contexts and trees, all else on the number of rows alone. So rows are padded to
the next bucket there, and only there, and a recording reaches from one attention to the next: the
half of a layer behind it and the half of the next layer before it.
"""

from __future__ import annotations

import bisect
import gc
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smart_decoding.models.torch_layers import TorchLayer, TorchLayers, attend

if TYPE_CHECKING:
    from smart_decoding.models.layers import Context, KVCache, Layers, LayerWeights

log = logging.getLogger("smart.graphs")

# Rows: as many as tensor cores multiply at once anyway. More are run eagerly: prompts, which
# launches do not slow.
BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 321, 16))
# from what is done to what does it again
Record = Callable[[Callable[[], None]], Callable[[], None]]


class CudaRecorder:
    """Records what a function launches on a device. Recordings share a stream, and with it the
    libraries' working memory, and their own memory: they run one after another."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Runs a function, and returns what replays its launches."""
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()  # libraries set themselves up at their first call, which cannot be recorded
            graph.capture_begin(pool=self._pool)
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay


class GraphedLayers:
    """TorchLayers whose halves are recorded."""

    def __init__(
        self, layers: TorchLayers, record: Record, buckets: Sequence[int] = BUCKETS
    ) -> None:
        self._eager = layers
        self._buckets = buckets
        w = layers.each[0].weights
        most = buckets[-1]

        def rows(*shape: int) -> Tensor:
            return w.post_norm.new_zeros(most, *shape)

        self._x = rows(w.hidden)
        self._attended = rows(w.heads * w.head_dim)
        self._rotation = tuple(rows(w.head_dim // 2).float() for _ in range(2))
        self._qkv = (
            rows(w.heads, w.head_dim),
            rows(w.kv_heads, w.head_dim),
            rows(w.kv_heads, w.head_dim),
        )
        halves = [None, *layers.each, None]
        self._parts = {  # the largest first: smaller ones then fit into its memory
            size: [record(partial(self._part, *pair, size)) for pair in itertools.pairwise(halves)]
            for size in reversed(buckets)
        }

    @torch.inference_mode()
    def _part(self, behind: TorchLayer | None, ahead: TorchLayer | None, size: int) -> None:
        """From one attention to the next, for `size` rows; before the first one and after the last
        one half of it."""
        x = self._x[:size]
        if behind is not None:
            behind.after(x, self._attended[:size])
        if ahead is not None:
            made = ahead.before(x, *(table[:size] for table in self._rotation))
            for buffer, part in zip(self._qkv, made, strict=True):
                buffer[:size] = part

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """See `Layers`."""
        rows = len(x)
        if rows > self._buckets[-1]:
            self._eager(x, context, cache)
            return
        size = self._buckets[bisect.bisect_left(self._buckets, rows)]
        first, *others = self._parts[size]
        own = self._x[:rows]
        own.copy_(x)
        self._x[rows:size] = 0  # what nobody reads must not grow from forward to forward
        for table, angles in zip(self._rotation, context.rotation, strict=True):
            table[:rows] = angles
        q, k, v = (buffer[:rows] for buffer in self._qkv)
        first()
        for i, part in enumerate(others):
            self._attended[:rows] = attend(q, k, v, context, cache.keys[i], cache.values[i])
            part()
            context.keep_aux(i + 1, own)
        x.copy_(own)


def graphed(layers: Sequence[LayerWeights]) -> Layers:
    """The layers in CUDA graphs; without, and saying so, where recording fails."""
    eager = TorchLayers(layers)
    collecting = gc.isenabled()
    gc.disable()  # freeing a tensor in the middle of a recording would spoil it
    try:
        return GraphedLayers(eager, CudaRecorder(layers[0].post_norm.device))
    except RuntimeError as error:
        log.warning("no CUDA graphs, so every kernel is launched by itself: %s", error)
        return eager
    finally:
        if collecting:
            gc.enable()
