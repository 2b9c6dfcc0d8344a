"""Triton kernels of device_sampling.py: noise.py and drawing.py for a row a program. The noise has
the CPU's bits; sums of masses round differently."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of finite float32
INF = tl.constexpr(float("inf"))
BLOCK = tl.constexpr(2048)  # of a row, read at once
UNIT = tl.constexpr(0.5**32)

STEP = tl.constexpr(0x9E3779B97F4A7C15)  # SplitMix64's
FIRST = tl.constexpr(0xBF58476D1CE4E5B9)
SECOND = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def _uniform_bits(key, token):
    """32 bits as int64, of an int64 key."""
    z = token.to(tl.uint64) * STEP + (key.to(tl.uint64, bitcast=True) + STEP)
    z = (z ^ (z >> 30)) * FIRST
    z = (z ^ (z >> 27)) * SECOND
    return ((z ^ (z >> 31)) >> 32).to(tl.int64)


@triton.jit
def _gumbel(bits):
    uniform = (bits.to(tl.float64) + 0.5) * UNIT
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _read(row, first, size):
    """Ids of a block, and its scores: below all floors behind the row's end, inf for NaN."""
    n = first + tl.arange(0, BLOCK)
    x = tl.load(row + n, mask=n < size, other=-INF).to(tl.float32)
    return n, tl.where(x == x, x, INF)


@triton.jit
def _maximum(row, size):
    """The largest score, and the lowest id that has it."""
    best = tl.full([BLOCK], -INF, tl.float32)
    ids = tl.zeros([BLOCK], tl.int32)
    for first in range(0, size, BLOCK):
        n, x = _read(row, first, size)
        ids = tl.where(x > best, n, ids)
        best = tl.maximum(best, x)
    top = tl.max(best)
    return top, tl.min(tl.where(best == top, ids, size))


@triton.jit
def _ordered(bits):
    """Of a float32's bits an int32 that ascends with it, and the other way round."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _above(row, size, score, floor, top, temperature, masses: tl.constexpr):
    """How many scores lie above one; their mass, where those below `floor` have none."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, BLOCK):
        _, x = _read(row, first, size)
        weight = tl.where(x > score, 1.0, 0.0)
        if masses:
            weight *= tl.where(x >= floor, tl.exp(tl.div_rn(x - top, temperature)), 0.0)
        total += weight.to(tl.float64)
    return tl.sum(total)


@triton.jit
def _cut(row, size, bound, floor, top, temperature, masses: tl.constexpr):
    """The lowest number from `floor` on above which there is less than `bound`: found by halving,
    so that nothing is sorted."""
    low = _ordered(floor.to(tl.int32, bitcast=True))
    high = _ordered(top.to(tl.int32, bitcast=True))
    while low < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        score = _ordered(middle).to(tl.float32, bitcast=True)
        if _above(row, size, score, floor, top, temperature, masses) < bound:
            high = middle
        else:
            low = middle + 1
    return _ordered(low).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel_max(row, size, key, floor, top, temperature):
    """The lowest id with the largest score / temperature + noise, of scores from `floor` on.

    noise = -log(-log(u)) < -log(1 - u): a cheap bound, so that doubles, which most cards are slow
    at, are computed only for blocks that may hold a better token."""
    slack = 1e-3 + 1e-6 * tl.abs(top / temperature)  # of the bound's rounding
    best = tl.full((), -INF, tl.float64)
    token = size
    for first in range(0, size, BLOCK):
        n, x = _read(row, first, size)
        bits = _uniform_bits(key, n)
        scaled = tl.where(x >= floor, tl.div_rn(x, temperature), -INF)
        bound = scaled - tl.log((((1 << 32) - bits).to(tl.float32) - 0.5) * UNIT)
        if (tl.max(bound) + slack).to(tl.float64) >= best:
            noisy = scaled.to(tl.float64) + _gumbel(bits).to(tl.float64)
            here = tl.max(noisy)
            if here > best:
                best = here
                token = tl.min(tl.where(noisy == here, n, size))
    return token


@triton.jit(do_not_specialize=["count"])
def draw(logits, settings, out, count, stride, size, drawn: tl.constexpr):
    """A row's token; -1 where it has no finite maximum. settings: [6, count] int64, see
    device_sampling.py; only rows where nothing is `drawn`, None for all of them."""
    i = tl.program_id(0)
    if settings is None:
        row = logits + i.to(tl.int64) * stride
    else:
        row = logits + tl.load(settings + i) * stride
    top, token = _maximum(row, size)
    if drawn:
        precise = tl.load(settings + count + i).to(tl.float64, bitcast=True)
        temperature = precise.to(tl.float32)
        if (temperature > 0) & (tl.abs(top) < INF):
            distance = tl.load(settings + 2 * count + i).to(tl.float64, bitcast=True)
            top_p = tl.load(settings + 3 * count + i).to(tl.float64, bitcast=True)
            key = tl.load(settings + 4 * count + i)
            rank = tl.load(settings + 5 * count + i).to(tl.float64)
            floor = tl.full((), LOWEST, tl.float32)
            if rank > 0:
                floor = _cut(row, size, rank, floor, top, temperature, False)
            floor = tl.maximum(floor, (top.to(tl.float64) + distance).to(tl.float32))
            if top_p < 1:
                mass = _above(row, size, -INF, floor, top, temperature, True)
                floor = _cut(row, size, top_p * mass, floor, top, temperature, True)
            token = _gumbel_max(row, size, key, floor, top, temperature)
    tl.store(out + i, tl.where(tl.abs(top) < INF, token, -1))


@triton.jit(do_not_specialize=["count"])
def perturb(logits, tokens, settings, out, count, size, block: tl.constexpr):
    """A part of a row of scores, logits [rows, size] times the row's factor, plus the noise of
    `tokens` under its key. settings: [2, count] int64, factors as float64, and keys (0: no
    noise)."""
    i = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * block + tl.arange(0, block)
    inside = n < size
    x = tl.load(logits + i * size + n, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(settings + i).to(tl.float64, bitcast=True)
    key = tl.load(settings + count + i)
    noise = _gumbel(_uniform_bits(key, tl.load(tokens + n, mask=inside, other=0)))
    scores = x * factor.to(tl.float32) + tl.where(key != 0, noise, 0.0)
    tl.store(out + i * size + n, scores, mask=inside)
