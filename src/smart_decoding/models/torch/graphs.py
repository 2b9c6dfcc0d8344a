"""CUDA graphs: all decoder layers, recorded once for each bucket of rows, replayed in one launch.

Kernels find contexts and trees in the device's memory (`DeviceRows`), so that a recording depends
on the number of rows alone, which is padded to the next bucket.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smart_decoding.models.torch.rows import BUCKETS
from smart_decoding.models.torch.torch_layers import TorchLayers, ops_for

if TYPE_CHECKING:
    from smart_decoding.models.torch.layers import Context, KVCache, Layers, LayerWeights

log = logging.getLogger("smart.graphs")

META = 1 << 18  # int32 of block tables and the like; rounds with more are run eagerly
# from what is done to what does it again
Record = Callable[[Callable[[], None]], Callable[[], None]]


def layers_on(device: torch.device, layers: Iterable[LayerWeights], graphs: bool) -> Layers:
    """Return the layers on torch's products. graphs: whether they are recorded, on a CUDA device;
    mixtures of experts and linear attention are not.

    Raises ConfigError where Triton is missing there."""
    eager = TorchLayers(layers, ops_for(device))
    if device.type != "cuda" or not graphs or not eager.recordable:
        return eager
    return GraphedLayers(eager, recorder(device))


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
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay


recorder = functools.cache(CudaRecorder)  # one for a target and what drafts for it


class _Buffers:
    """Recordings that keep the same aux layers, and what they read and write, with room for the
    largest bucket."""

    def __init__(self, x: Tensor, context: Context) -> None:
        self.replays: dict[int, Callable[[], None]] = {}  # by rows
        self._meta = context.on_device.meta.new_zeros(META)
        self._read = [_room(part) for part in _given(x, context)]
        aux = context.aux_hidden
        self._aux_hidden = None if aux is None else _room(aux)

    def arguments(self, given: Context) -> tuple[Tensor, Context]:
        """Return what a recording is given, for forwards as large as the `given` one."""
        size = given.on_device.size
        x, cosine, sine, *inputs = (part[:size] for part in self._read)
        aux = self._aux_hidden
        fixed = replace(given, inputs=inputs[0] if inputs else None)
        fixed.aux_hidden = None if aux is None else aux[:size]
        fixed.rotation = cosine, sine
        fixed.on_device = replace(given.on_device, meta=self._meta)
        return x, fixed

    def fill(self, x: Tensor, context: Context) -> None:
        """Bring a forward's inputs. What padding reads must not grow from forward to forward."""
        meta = context.on_device.meta
        self._meta[: len(meta)] = meta
        for buffer, part in zip(self._read, _given(x, context), strict=True):
            buffer[: len(x)] = part
        if len(x) < context.on_device.size:
            self._read[0][len(x) : context.on_device.size] = 0

    def fetch(self, x: Tensor, context: Context) -> None:
        """Take a forward's outputs to where its caller has them."""
        x.copy_(self._read[0][: len(x)])
        if context.aux_hidden is not None and self._aux_hidden is not None:
            context.aux_hidden.copy_(self._aux_hidden[: len(x)])


def _given(x: Tensor, context: Context) -> list[Tensor]:
    """Return what a forward reads, row by row."""
    inputs = [] if context.inputs is None else [context.inputs]
    return [x, *context.rotation, *inputs]


def _room(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(BUCKETS[-1], *tensor.shape[1:])


class GraphedLayers:
    """TorchLayers in recordings, which are made when they are first needed. Where that fails,
    kernels are launched one by one."""

    def __init__(self, layers: TorchLayers, record: Record) -> None:
        self.eager = layers
        self._record: Record | None = record
        self._cache: KVCache | None = None
        self._buffers: dict[tuple[int, ...], _Buffers] = {}  # by aux layers

    def __call__(self, x: Tensor, context: Context, cache: KVCache) -> None:
        """See `Layers`."""
        rows = context.on_device
        if len(x) > BUCKETS[-1] or len(rows.meta) > META or self._record is None:
            self.eager(x, context, cache)
            return
        if cache is not self._cache:
            self._cache = cache
            self._buffers = {}
        if context.aux_layers not in self._buffers:
            self._buffers[context.aux_layers] = _Buffers(x, context)
        buffers = self._buffers[context.aux_layers]
        if rows.size not in buffers.replays:
            buffers.fill(x, context)
            run = functools.partial(self.eager, *buffers.arguments(context), cache)
            try:
                buffers.replays[rows.size] = _without_collection(self._record, run)
            except RuntimeError as error:
                log.warning("no CUDA graphs, so every kernel is launched by itself: %s", error)
                self._record = None
                self.eager(x, context, cache)
                return
        buffers.fill(x, context)
        buffers.replays[rows.size]()
        buffers.fetch(x, context)


def _without_collection(record: Record, run: Callable[[], None]) -> Callable[[], None]:
    collecting = gc.isenabled()
    gc.disable()  # freeing a tensor in the middle of a recording would spoil it
    try:
        return record(run)
    finally:
        if collecting:
            gc.enable()
