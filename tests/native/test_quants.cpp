// Quants: packed, unpacked and multiplied.

#include <algorithm>
#include <cstring>

#include "abi.h"
#include "check.h"
#include "reference.h"

using check::Random;

namespace {

struct Kind {
    int64_t format;
    const char* name;
    int64_t k, bytes;         // of a block in a file
    std::vector<int> halves;  // where it has floats of 16 bits
    int power = -1;           // where it has a byte that is an exponent
};

const std::vector<Kind> KINDS = {
    {BF16_ROWS, "BF16", 32, 64, {}},  {Q4_0, "Q4_0", 32, 18, {0}},
    {Q4_1, "Q4_1", 32, 20, {0, 2}},   {Q5_0, "Q5_0", 32, 22, {0}},
    {Q5_1, "Q5_1", 32, 24, {0, 2}},   {Q8_0, "Q8_0", 32, 34, {0}},
    {Q4_K, "Q4_K", 256, 144, {0, 2}}, {Q5_K, "Q5_K", 256, 176, {0, 2}},
    {Q6_K, "Q6_K", 256, 210, {208}},  {IQ4_NL, "IQ4_NL", 32, 18, {0}},
    {MXFP4, "MXFP4", 32, 17, {}, 0},
};

float half(const uint8_t* p) {
    const int bits = p[0] | p[1] << 8, exponent = bits >> 10 & 31;
    const double mantissa = bits & 1023;
    const double size =
        exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return float(bits >> 15 ? -size : size);
}

int bit(const uint8_t* bytes, int i) { return bytes[i / 8] >> i % 8 & 1; }

// Scale `which` (of 8) of Q4_K and Q5_K, and the least value's.
int six_bits(const uint8_t* s, int which, bool least) {
    if (which < 4) return s[which + 4 * least] & 63;
    const int low = least ? s[which + 4] >> 4 : s[which + 4] & 15;
    return low | (s[which - 4 + 4 * least] >> 6) << 4;
}

// A float of four bits, a sign, two of an exponent and one of a mantissa, times two.
int twice_e2m1(int q) {
    const int exponent = q >> 1 & 3, mantissa = q & 1;
    const int size = exponent ? (2 + mantissa) << (exponent - 1) : mantissa;
    return q & 8 ? -size : size;
}

const float NON_LINEAR[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                              1,    13,   25,  38,  53,  69,  89,  113};

// Weight i of a block is scale * quant + least, as llama.cpp's format says it; all are exact.
struct Term {
    float scale;
    int quant;
    float least = 0;

    double value() const { return double(scale) * quant + least; }
};

Term term(int64_t format, const uint8_t* b, int i) {
    const int nibble_at = i % 16, shift = i / 16 * 4;  // of formats of 32
    auto nibble = [&](int from) { return b[from + nibble_at] >> shift & 15; };
    const float d = half(b);
    switch (format) {
        case BF16_ROWS:
            return {reference::from_bf16(uint16_t(b[2 * i] | b[2 * i + 1] << 8)), 1};
        case Q4_0:
            return {d, nibble(2) - 8};
        case Q4_1:
            return {d, nibble(4), half(b + 2)};
        case Q5_0:
            return {d, (nibble(6) | bit(b + 2, i) << 4) - 16};
        case Q5_1:
            return {d, nibble(8) | bit(b + 4, i) << 4, half(b + 2)};
        case Q8_0:
            return {d, int8_t(b[2 + i])};
        case IQ4_NL:
            return {d, int(NON_LINEAR[nibble(2)])};
        case MXFP4:
            return {b[0] == 255 ? NAN : float(std::ldexp(1, b[0] - 128)), twice_e2m1(nibble(1))};
        case Q6_K: {
            const int h = i / 128, j = i % 128;
            const int low = b[64 * h + j % 64] >> j / 64 * 4 & 15;
            const int high = b[128 + 32 * h + j % 32] >> j / 32 * 2 & 3;
            return {half(b + 208) * int8_t(b[192 + i / 16]), (low | high << 4) - 32};
        }
        default: {  // Q4_K, Q5_K
            const uint8_t* quants = b + (format == Q5_K ? 48 : 16);
            int q = quants[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
            if (format == Q5_K) q |= (b[16 + i % 32] >> i / 32 & 1) << 4;
            const float scale = d * float(six_bits(b + 4, i / 32, false));
            return {scale, q, -(half(b + 2) * float(six_bits(b + 4, i / 32, true)))};
        }
    }
}

// Random rows [n, k] of a format, and their weights, as they are and rounded to bf16.
struct Rows8 {
    std::vector<uint8_t> file;
    std::vector<Term> terms;
    std::vector<double> exact;
    std::vector<uint16_t> weights;
    int64_t row_bytes;

    Rows8(Random& random, const Kind& kind, int64_t n, int64_t k)
        : file(n * k / kind.k * kind.bytes), row_bytes(k / kind.k * kind.bytes) {
        for (uint8_t& byte : file) byte = uint8_t(random.next());
        for (int64_t block = 0; block < n * k / kind.k; block++) {
            uint8_t* at = &file[block * kind.bytes];
            if (random.chance(0.2))  // the largest sums that integers must hold
                std::fill_n(at, kind.bytes, uint8_t(random.of({0xff, 0x7f, 0x80})));
            for (int where : kind.halves)  // of moderate size, subnormal now and then
                at[where + 1] =
                    uint8_t(random.chance(0.1) ? random.of({0, 0x80})
                                               : random.between(0x18, 0x2c) | random.of({0, 0x80}));
            if (kind.power >= 0)
                at[kind.power] =
                    uint8_t(random.chance(0.1) ? random.below(3) : random.between(110, 126));
            for (int i = 0; kind.format == BF16_ROWS && i < kind.k; i++)
                at[2 * i + 1] = uint8_t(random.between(0x3a, 0x3e) | random.of({0, 0x80}));
            for (int i = 0; i < kind.k; i++) {
                terms.push_back(term(kind.format, at, i));
                exact.push_back(terms.back().value());
                weights.push_back(reference::to_bf16(float(exact.back())));
            }
        }
    }
};

// A weight whose strips have formats of their own, and the same in bf16 panels.
void one_weight(uint64_t seed, const std::vector<Kind>& kinds, int64_t k) {
    Random random(seed);
    const int64_t lanes = smart_vector_width();
    std::vector<Rows8> parts;
    std::vector<Strip> strips;
    std::vector<const void*> rows;
    std::vector<uint16_t> plain;
    std::vector<std::vector<uint8_t>> memory;
    std::string names;
    int64_t n = 0;
    for (const Kind& kind : kinds) {  // all but the last one fill their strips
        const bool last = &kind == &kinds.back();
        const int64_t count = last ? random.between(1, 3 * lanes) : lanes * random.between(1, 3);
        parts.emplace_back(random, kind, count, k);
        n += count;
        names += std::string(names.empty() ? "" : ", ") + kind.name;
    }
    for (size_t p = 0; p < parts.size(); p++) {
        const int64_t count = parts[p].weights.size() / k;
        for (int64_t r = 0; r < count; r++) rows.push_back(&parts[p].file[r * parts[p].row_bytes]);
        plain.insert(plain.end(), parts[p].weights.begin(), parts[p].weights.end());
        while (int64_t(strips.size()) * lanes < int64_t(rows.size())) {
            const int64_t format = kinds[p].format;
            memory.emplace_back(smart_strip_bytes(format, k));
            strips.push_back({memory.back().data(), format});
        }
    }
    while (int64_t(strips.size()) * lanes < smart_packed_rows(n)) {  // of zeros
        memory.emplace_back(smart_strip_bytes(Q8_0, k));
        strips.push_back({memory.back().data(), Q8_0});
    }
    rows.resize(smart_packed_rows(n), nullptr);
    check::begin("quants", seed, names + ", n " + std::to_string(n) + ", k " + std::to_string(k));
    smart_pack_quants(strips.data(), strips.size(), rows.data(), k, 0);
    const Weight quants{nullptr, strips.data(), 0};

    std::vector<int64_t> index(n);
    for (int64_t i = 0; i < n; i++) index[i] = i;
    std::vector<float> unpacked(n * k);
    smart_unpack(&quants, k, 1, index.data(), int32_t(n), unpacked.data());
    for (int64_t i = 0; i < n * k; i++)
        if (!check::near("weight", reference::from_bf16(plain[i]), unpacked[i], 0)) return;

    std::vector<uint16_t> packed(smart_packed_rows(n) * k);
    smart_pack(plain.data(), n, k, packed.data(), 1);
    const Weight panels{packed.data(), nullptr, 0};
    for (int rows_of_x : {1, 2, int(random.between(3, 8)), 9, 11, int(random.between(10, 16)), 13,
                          17, int(random.between(18, 31)), 32, 33, 48, 49, 65}) {
        const std::vector<float> x = random.normals(rows_of_x * k);
        std::vector<float> scratch(x.size()), wanted(rows_of_x * n), found(rows_of_x * n);
        const int threads = random.chance(0.1) ? 16 : int(random.between(1, 3));
        smart_linear(x.data(), rows_of_x, &panels, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                     wanted.data(), n, 0, 3, nullptr, threads);
        smart_linear(x.data(), rows_of_x, &quants, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                     found.data(), n, 0, 3, nullptr, threads);
        if (!check::bits("product", wanted.data(), found.data(), wanted.size())) return;
    }
}

// Inputs [k] as integers times the scale of each 32, and that scale.
struct EightBits {
    std::vector<int> integer;
    std::vector<float> step;

    double rounded(int64_t i) const { return double(step[i]) * integer[i]; }
};

// 32 inputs as the kernels read them: the largest is 127 or 125 steps, whichever errs less.
struct EightBitBlock {
    float largest = 1e-30f, steps = 127;
    int unclear = -1;  // an input that decides, as compilers fuse or not, about itself or all

    explicit EightBitBlock(const float* x) {
        for (int j = 0; j < 32; j++) largest = std::max(largest, std::fabs(x[j]));
        const double first = error(x, 127), second = error(x, 125);
        if (second < first) steps = 125;
        for (int j = 0; j < 32; j++) {
            const double at = double(x[j]) * factor();
            if (std::fabs(at - std::floor(at) - 0.5) < 1e-3) unclear = j;
        }
        if (first + second > 0 && std::fabs(first - second) < 1e-3 * (first + second))
            unclear = int(std::max_element(x, x + 32) - x);
    }

    float factor() const { return steps / largest; }
    int integer(float x) const { return int(std::nearbyint(x * factor())); }

    double error(const float* x, double of) const {
        double squares = 0;
        for (int j = 0; j < 32; j++) {
            const double at = x[j] * of / largest, off = at - std::nearbyint(at);
            squares += off * off / of / of;
        }
        return squares;
    }
};

// Makes what is unclear 0, before it is read.
EightBits in_eight_bits(float* x, int64_t k) {
    EightBits out;
    for (float* end = x + k; x < end; x += 32) {
        EightBitBlock block(x);
        for (; block.unclear >= 0; block = EightBitBlock(x)) x[block.unclear] = 0;
        for (int j = 0; j < 32; j++) {
            out.integer.push_back(block.integer(x[j]));
            out.step.push_back(block.largest / block.steps);
        }
    }
    return out;
}

// A row's products, which are sums of integers times scales, are those in double.
void near_integers(const std::vector<Rows8>& parts, const EightBits& input, const float* y,
                   int64_t k) {
    for (const Rows8& part : parts)
        for (size_t from = 0; from < part.exact.size(); from += k, y++) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < k; i++) {
                const double product = input.rounded(i) * part.exact[from + i];
                sum += product;
                size += std::fabs(product);
            }
            check::near("product of integers", sum, *y, 1e-6 * size + 1e-30);
        }
}

// Weights that are packed twice: as they are widened, and for inputs in 8 bits; each kind fills a
// strip.
struct BothWays {
    std::vector<Rows8> parts;
    std::vector<const void*> rows;
    std::vector<uint8_t> exact_memory, byte_memory;
    std::vector<Strip> exact_strips, byte_strips;
    std::string names;

    BothWays(Random& random, const std::vector<Kind>& kinds, int64_t k) {
        const int64_t lanes = smart_vector_width();
        std::vector<int64_t> starts;
        int64_t size = 0;
        parts.reserve(kinds.size());
        for (const Kind& kind : kinds) {
            names += (names.empty() ? "" : ", ") + std::string(kind.name);
            parts.emplace_back(random, kind, lanes, k);
            for (int64_t r = 0; r < lanes; r++)
                rows.push_back(&parts.back().file[r * parts.back().row_bytes]);
            starts.push_back(size);
            size += smart_strip_bytes(kind.format, k);
        }
        exact_memory.resize(size);
        byte_memory.resize(size);
        for (size_t i = 0; i < kinds.size(); i++) {
            exact_strips.push_back({&exact_memory[starts[i]], kinds[i].format});
            byte_strips.push_back({&byte_memory[starts[i]], kinds[i].format});
        }
        smart_pack_quants(exact_strips.data(), exact_strips.size(), rows.data(), k, 0);
        smart_pack_quants(byte_strips.data(), byte_strips.size(), rows.data(), k, 1);
    }
};

// A row's sum as the kernels add it: a block's integers, scaled, then times the input's scale.
// halves: each half of a block has a scale of its own.
float plain_sum(const Term* terms, const EightBits& input, int64_t k, bool halves) {
    float sum = 0;
    for (int64_t first = 0; first < k; first += 32) {
        int integers[2] = {}, inputs = 0;
        for (int j = 0; j < 32; j++) {
            integers[halves && j >= 16] += input.integer[first + j] * terms[first + j].quant;
            inputs += input.integer[first + j];
        }
        const float step = input.step[first];
        float scaled = float(integers[0]) * terms[first].scale;
        if (halves) scaled = std::fma(float(integers[1]), terms[first + 16].scale, scaled);
        sum = std::fma(scaled, step, sum);
        sum = std::fma(terms[first].least, step * float(inputs), sum);
    }
    return sum;
}

// With inputs in 8 bits a row has the bits of plain loops, alone and in any company.
void any_company(uint64_t seed, const std::vector<Kind>& kinds, int64_t k) {
    Random random(seed);
    const BothWays made(random, kinds, k);
    const int64_t n = int64_t(made.rows.size()), lanes = smart_vector_width();
    check::begin("company in 8 bits", seed, made.names + ", k " + std::to_string(k));
    constexpr int MOST = 70;
    std::vector<float> x = random.normals(MOST * k), plain(MOST * n), scratch(MOST * k);
    for (int r = 0; r < MOST; r++) {
        const EightBits input = in_eight_bits(&x[r * k], k);
        for (int64_t i = 0; i < n; i++)
            plain[r * n + i] = plain_sum(&made.parts[i / lanes].terms[i % lanes * k], input, k,
                                         kinds[i / lanes].format == Q6_K);
    }
    const Weight weight{nullptr, made.byte_strips.data(), ALWAYS};
    for (int count = 1; count <= MOST; count += count < 34 ? 1 : 18) {
        const int64_t first = random.below(MOST - count + 1);
        std::vector<float> found(count * n);
        smart_linear(&x[first * k], count, &weight, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                     found.data(), n, 0, 3, nullptr, int(random.between(1, 3)));
        if (!check::bits("sum", &plain[first * n], found.data(), found.size())) return;
    }
}

// With inputs in 8 bits: near the exact product, and a row is the same in any company.
void in_bytes(uint64_t seed, const std::vector<Kind>& kinds, int64_t k) {
    Random random(seed);
    const BothWays made(random, kinds, k);
    const std::vector<Rows8>& parts = made.parts;
    const int64_t n = int64_t(made.rows.size());
    check::begin("quants in 8 bits", seed, made.names + ", k " + std::to_string(k));
    const Weight exact{nullptr, made.exact_strips.data(), NEVER},
        rounded{nullptr, made.byte_strips.data(), ALWAYS};

    std::vector<int64_t> index(n);
    for (int64_t i = 0; i < n; i++) index[i] = i;
    std::vector<float> wanted_rows(n * k), found_rows(n * k);
    smart_unpack(&exact, k, 1, index.data(), int32_t(n), wanted_rows.data());
    smart_unpack(&rounded, k, 1, index.data(), int32_t(n), found_rows.data());
    for (int64_t i = 0; i < n * k; i++)  // zeros may have either sign
        if (!check::near("weight", wanted_rows[i], found_rows[i], 0)) return;

    const int count = int(random.between(1, 40));
    std::vector<float> x = random.normals(count * k);
    if (random.chance(0.3)) std::fill_n(x.begin() + random.below(count) * k, k, 0.0f);
    if (random.chance(0.3)) std::fill_n(x.begin(), k, random.of({1.0f, -1.0f}));
    std::vector<EightBits> inputs;
    for (int r = 0; r < count; r++) inputs.push_back(in_eight_bits(&x[r * k], k));
    std::vector<float> scratch(x.size()), wanted(count * n), found(count * n), alone(n);
    smart_linear(x.data(), count, &exact, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                 wanted.data(), n, 0, 3, nullptr, 2);
    smart_linear(x.data(), count, &rounded, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                 found.data(), n, 0, 3, nullptr, 2);
    double squares = 1e-30, errors = 0;
    for (int64_t i = 0; i < count * n; i++) {
        squares += double(wanted[i]) * wanted[i];
        errors += (double(found[i]) - wanted[i]) * (double(found[i]) - wanted[i]);
    }
    check::near("relative error", 0, std::sqrt(errors / squares), 0.02);
    for (int r = 0; r < count; r++) near_integers(parts, inputs[r], &found[r * n], k);
    const Weight drafting{nullptr, made.byte_strips.data(), IF_FASTER};
    const bool by_tiles = smart_pass_rows(&exact, 1) == 32 && count > 16;
    std::vector<float> drafted(count * n);
    smart_linear(x.data(), count, &drafting, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                 drafted.data(), n, 0, 3, nullptr, 2);
    check::bits("many rows by tiles", by_tiles ? wanted.data() : found.data(), drafted.data(),
                drafted.size());
    const int row = int(random.below(count));
    smart_linear(&x[row * k], 1, &rounded, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                 alone.data(), n, 0, 3, nullptr, 1);
    check::bits("a row alone", alone.data(), &found[row * n], n);

    x[row * k + random.below(k)] = random.of({NAN, INFINITY});
    smart_linear(x.data(), count, &rounded, n, k, 1, nullptr, 0, nullptr, scratch.data(),
                 found.data(), n, 0, 3, nullptr, 1);
    for (int64_t i = 0; i < n; i++) check::same("not a number", 1, std::isnan(found[row * n + i]));
}

// Weights whose scale is infinite, or no number, are no numbers.
void odd_scales(uint64_t seed, const Kind& kind) {
    Random random(seed);
    const int64_t lanes = smart_vector_width(), k = 2 * kind.k;
    check::begin("scales that are no numbers", seed, kind.name);
    Rows8 part(random, kind, lanes, k);
    std::vector<const void*> rows;
    for (int64_t r = 0; r < lanes; r++) {
        uint8_t* row = &part.file[r * part.row_bytes];
        rows.push_back(row);
        const uint16_t odd = uint16_t(random.of({0x7c00, 0xfc00, 0x7e00}));
        for (int where : kind.halves) memcpy(row + where, &odd, sizeof odd);
        if (kind.power >= 0) row[kind.power] = 255;
    }
    std::vector<uint8_t> memory(smart_strip_bytes(kind.format, k));
    Strip strip{memory.data(), kind.format};
    smart_pack_quants(&strip, 1, rows.data(), k, 0);
    const Weight weight{nullptr, &strip, NEVER};
    std::vector<int64_t> index(lanes);
    for (int64_t i = 0; i < lanes; i++) index[i] = i;
    std::vector<float> found(lanes * k);
    smart_unpack(&weight, k, 1, index.data(), int32_t(lanes), found.data());
    for (int64_t i = 0; i < lanes * k; i++)
        check::same("is a number", i % k >= kind.k, std::isfinite(found[i]));
}

}  // namespace

void test_quants() {
    for (const Kind& kind : KINDS)
        for (uint64_t seed = 1; seed <= check::seeds(4) && kind.format != BF16_ROWS; seed++)
            odd_scales(seed, kind);
    std::vector<Kind> byte_kinds;
    for (const Kind& kind : KINDS)
        if (kind.format != BF16_ROWS) byte_kinds.push_back(kind);
    for (const Kind& kind : byte_kinds)
        for (uint64_t seed = 1; seed <= check::seeds(8); seed++) {
            Random random(seed);
            const int64_t k = kind.k * (kind.k > 32 ? random.between(1, 4) : random.between(1, 20));
            in_bytes(seed + 1000 * kind.format, {kind, kind}, k);
            any_company(seed + 1000 * kind.format, {kind, kind}, k);
        }
    for (uint64_t seed = 1; seed <= check::seeds(8); seed++) {
        Random random(seed + 300);
        const auto any = [&] { return byte_kinds[random.below(byte_kinds.size())]; };
        const std::vector<Kind> four = {any(), any(), any(), any()};
        in_bytes(seed + 30000, four, 256 * random.between(1, 3));
        any_company(seed + 30000, four, 256 * random.between(1, 3));
    }
    for (const Kind& kind : KINDS)
        for (uint64_t seed = 1; seed <= check::seeds(8); seed++) {
            Random random(seed + 100);
            const int64_t k = kind.k * (kind.k > 32 ? random.between(1, 3) : random.between(1, 20));
            one_weight(seed + 1000 * kind.format, {kind}, k);
        }
    for (uint64_t seed = 1; seed <= check::seeds(24); seed++) {
        Random random(seed + 200);
        std::vector<Kind> kinds;
        for (int64_t i = random.between(2, 4); i; i--)
            kinds.push_back(KINDS[random.below(KINDS.size())]);
        one_weight(seed + 20000, kinds, 256 * random.between(1, 3));
    }
    std::vector<Kind> small_kinds;
    for (const Kind& kind : KINDS)
        if (kind.k == 32) small_kinds.push_back(kind);
    for (uint64_t seed = 1; seed <= check::seeds(24); seed++) {  // chunks that are not whole
        Random random(seed + 400);
        std::vector<Kind> kinds;
        for (int64_t i = random.between(2, 4); i; i--)
            kinds.push_back(small_kinds[random.below(small_kinds.size())]);
        one_weight(seed + 40000, kinds, 32 * random.between(1, 20));
    }
    check::begin("quants", 0, "row lengths that are not whole blocks");
    check::same("Q4_K", 0, smart_strip_bytes(Q4_K, 128));
    check::same("Q4_0", 0, smart_strip_bytes(Q4_0, 48));
}
