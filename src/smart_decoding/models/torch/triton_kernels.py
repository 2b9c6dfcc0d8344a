"""Triton kernels of triton_ops.py. They read `DeviceRows`, as `meta`, and a cache of keys and
values [kv_heads, pages, PAGE, width] whose heads lie `plane` elements apart."""

import triton
import triton.language as tl

from smart_decoding.engine.kv import PAGE as _PAGE
from smart_decoding.models.torch.rows import TILE as _TILE

PAGE = tl.constexpr(_PAGE)
TILE = tl.constexpr(_TILE)
KEYS = tl.constexpr(64)  # of the context, read at once
NONE = tl.constexpr(float("-inf"))


@triton.jit
def _target(queries, keys, values, row, slot, plane, heads, kv_heads, width):
    """Where a head of a row goes."""
    head = tl.program_id(1).to(tl.int64)
    target = queries + (row * heads + head) * width
    if head >= heads + kv_heads:
        target = values + (head - heads - kv_heads) * plane + slot * width
    elif head >= heads:
        target = keys + (head - heads) * plane + slot * width
    return target


@triton.jit(do_not_specialize=["angles", "angle"], do_not_specialize_on_alignment=["meta"])
def write(
    qkv,
    queries,
    keys,
    values,
    meta,
    cosine,
    sine,
    q_norm,
    k_norm,
    eps,
    plane,
    angles,
    angle,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
):
    """One head of one row: queries and keys are normed and rotated; keys and values are cached."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, triton.next_power_of_2(half))
    inside = i < half
    at = qkv + (row * (heads + 2 * kv_heads) + head) * 2 * half + i
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    if head < heads + kv_heads:
        if q_norm is not None:
            inverse = tl.rsqrt(tl.sum(a * a + b * b) / (2 * half) + eps)
            weight = (q_norm if head < heads else k_norm) + i
            a *= inverse * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
            b *= inverse * tl.load(weight + half, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cosine + row * angles + angle + i, mask=inside)
        s = tl.load(sine + row * angles + angle + i, mask=inside)
        a, b = a * c - b * s, b * c + a * s
    slot = tl.load(meta + row).to(tl.int64)
    to = _target(queries, keys, values, row, slot, plane, heads, kv_heads, 2 * half) + i
    inside = inside & ((slot >= 0) | (head < heads))
    tl.store(to, a, mask=inside)
    tl.store(to + half, b, mask=inside)


@triton.jit
def _rescaled(best, total, acc, scores):
    """The online softmax before rows of scores with these maxima come in."""
    new = tl.maximum(best, scores)
    safe = tl.where(new == NONE, 0.0, new)
    shrink = tl.exp2(best - safe)
    return new, safe, total * shrink, acc * shrink[:, None]


@triton.jit
def _over_context(
    q, keys, values, table, window_start, context, start, end, scale, width: tl.constexpr
):
    """Maxima, sums and outputs of rows over the positions start .. end - 1, of which each row reads
    those from its own `window_start` to below its `context`."""
    best = tl.full([q.shape[0]], NONE, tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    acc = tl.zeros(q.shape, tl.float32)
    d = tl.arange(0, q.shape[1])
    for first in range(start, end, KEYS):
        n = first + tl.arange(0, KEYS)
        page = tl.load(table + n // PAGE, mask=n < end, other=0)
        at = ((page * PAGE + n % PAGE) * width)[:, None] + d
        readable = (n < end)[:, None] & (d < width)  # other memory may hold NaN
        k = tl.load(keys + at, mask=readable, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        reads = (n >= window_start[:, None]) & (n < context[:, None])
        scores = tl.where(reads & (n < end), scores, NONE)
        best, safe, total, acc = _rescaled(best, total, acc, tl.max(scores, 1))
        p = tl.exp2(scores - safe[:, None])
        v = tl.load(values + at, mask=readable, other=0.0)
        total += tl.sum(p, 1)
        acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return best, total, acc


@triton.jit
def _attend(q, keys, values, meta, row, live, size, table, scale, window, width: tl.constexpr):
    """The same over one part of the context, and with the last part over each row's ancestors.
    window: how many of all those a row attends to, 0: all."""
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    context = tl.load(meta + size + row, mask=live, other=0)
    begin = tl.load(meta + 2 * size + row, mask=live, other=0)
    count = tl.load(meta + 3 * size + row, mask=live, other=0) - begin
    window_start = tl.where(live & (window > 0), context + count - window, 0)
    longest = tl.max(context)
    first = tl.maximum(tl.min(tl.where(live, window_start, longest)), 0) // KEYS * KEYS
    part = tl.cdiv(tl.cdiv(longest - first, KEYS), splits) * KEYS
    start = first + split * part
    end = tl.minimum(start + part, longest)
    best, total, acc = _over_context(
        q, keys, values, table, window_start, context, start, end, scale, width
    )
    if split == splits - 1:
        d = tl.arange(0, q.shape[1])
        for j in range(0, tl.max(count)):
            has = (j < count) & ((window == 0) | (j >= count - window))
            at = (tl.load(meta + begin + j, mask=has, other=0) * width)[:, None] + d
            readable = has[:, None] & (d < width)
            k = tl.load(keys + at, mask=readable, other=0.0)
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
            scores = tl.where(has, scores, NONE)
            best, safe, total, acc = _rescaled(best, total, acc, scores)
            p = tl.exp2(scores - safe)
            v = tl.load(values + at, mask=readable, other=0.0)
            total += p
            acc += p[:, None] * v.to(tl.float32)
    return best, total, acc


@triton.jit(do_not_specialize=["size", "window"], do_not_specialize_on_alignment=["meta"])
def attend(
    queries,
    keys,
    values,
    meta,
    partial,
    weight,
    size,
    plane,
    scale,
    window,
    group: tl.constexpr,
    width: tl.constexpr,
):
    """A tile's queries of one head of keys, over one part. partial [rows, heads, splits, width]:
    outputs; weight [rows, heads, splits, 2]: maxima and sums, or None if there is one part."""
    tiles = tl.num_programs(0)
    of_tile = meta + 4 * size + tl.program_id(0)
    count = tl.load(of_tile + tiles)
    if count == 0:
        return
    m = tl.arange(0, max(16, TILE * triton.next_power_of_2(group)))
    live = m // group < count
    row = tl.load(of_tile).to(tl.int64) + m // group
    kv_head = tl.program_id(1).to(tl.int64)
    at = (row * (tl.num_programs(1) * group) + kv_head * group + m % group)[:, None]
    d = tl.arange(0, max(16, triton.next_power_of_2(width)))
    q = tl.load(queries + at * width + d, mask=live[:, None] & (d < width), other=0.0)
    keys, values = keys + kv_head * plane, values + kv_head * plane
    table = meta + tl.load(of_tile + 2 * tiles)
    best, total, acc = _attend(q, keys, values, meta, row, live, size, table, scale, window, width)
    to = at * tl.num_programs(2) + tl.program_id(2)
    if weight is None:
        acc /= tl.where(total > 0, total, 1.0)[:, None]
    else:
        tl.store(weight + 2 * to, best[:, None], mask=live[:, None])
        tl.store(weight + 2 * to + 1, total[:, None], mask=live[:, None])
    inside = (live & (best > NONE))[:, None] & (d < width)
    tl.store(partial + to * width + d, acc, mask=inside)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["meta"])
def reduce(partial, weight, meta, out, splits, width: tl.constexpr, block_s: tl.constexpr):
    """What a row's head attends to, of all parts; zeros for padding."""
    row = tl.program_id(0).to(tl.int64)
    at = row * tl.num_programs(1) + tl.program_id(1)
    s = tl.arange(0, block_s)
    d = tl.arange(0, max(16, triton.next_power_of_2(width)))
    there = (s < splits) & (tl.load(meta + row) >= 0)
    best = tl.load(weight + 2 * (at * splits + s), mask=there, other=NONE)
    there = best > NONE
    share = tl.exp2(tl.where(there, best - tl.max(best), NONE))
    total = tl.sum(share * tl.load(weight + 2 * (at * splits + s) + 1, mask=there, other=0.0))
    parts = partial + ((at * splits + s) * width)[:, None] + d
    acc = tl.load(parts, mask=there[:, None] & (d < width), other=0.0)
    mean = tl.sum(acc * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + at * width + d, mean, mask=d < width)


@triton.jit
def gate(gate_up, out, ffn, gelu: tl.constexpr, block: tl.constexpr):
    """silu(gate) * up of a part of one row, or with GELU: by tanh, as 1 + tanh(u) is twice the
    sigmoid of 2 u."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * block + tl.arange(0, block)
    of_gate = tl.load(gate_up + row * 2 * ffn + i, mask=i < ffn, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * ffn + i, mask=i < ffn, other=0.0).to(tl.float32)
    slope = of_gate
    if gelu:
        slope *= 1.5957691216 + 0.0713548163 * of_gate * of_gate
    tl.store(out + row * ffn + i, of_gate * tl.sigmoid(slope) * up, mask=i < ffn)
