// Attention over pages of keys and values: positions in order, then a row's ancestors in its tree.

#pragma once
#include "abi.h"
#include "linear.h"
#include "pages.h"
#include "pair_attention.h"

template <class T, int HD> static std::vector<Block> blocks_of(const Rows& in, int heads_per_key) {
    int size = std::max(1, PAIRED<T, HD> ? TILE / heads_per_key : std::min(4, 32 / heads_per_key));
    std::vector<Block> blocks;
    for (int g = 0; g < in.requests; g++)
        for (int row = in.query_start_loc[g]; row < in.query_start_loc[g + 1]; row += size) {
            Block block = {g, row, std::min(size, in.query_start_loc[g + 1] - row)};
            for (int r = row; r < row + block.count; r++) {
                block.context_len = std::max(block.context_len, in.context_len[r]);
                block.longest = std::max(block.longest, in.context_len[r] + in.ancestors_start[r + 1] - in.ancestors_start[r]);
            }
            blocks.push_back(block);
        }
    return blocks;
}

template <int HD> struct Query {  // running softmax of one query head
    float q[HD], best, sum;
    vf acc[HD / VW];
};

template <class F> static inline F load_f32(const float* p) { return loadu<F>(p); }
template <class F> static inline F load_f32(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 splits the generic conversion in two
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    if constexpr (sizeof(F) == sizeof(pf)) return (F)(__builtin_convertvector(loadu<ph>(p), pu) << 16);
    else return (F)(__builtin_convertvector(loadu<vh>(p), vu) << 16);
#endif
}

// Scores of P pages of 16 keys for N queries. Each score is summed over the dimensions in order.
template <class T, int HD, int N, int P>
static inline void page_scores(const T* const* k, const Query<HD>* queries, pf (*scores)[CHUNK / PAGE], int page) {
    pf s[P][N] = {};
    for (int d = 0; d < HD; d++)
        for (int p = 0; p < P; p++) {
            pf key = load_f32<pf>(k[page + p] + d * PAGE);
            for (int i = 0; i < N; i++) s[p][i] += key * queries[i].q[d];
        }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < N; i++) scores[i][page + p] = s[p][i];
}

// Folds one chunk of `valid` positions into the running softmax of N queries. Sums depend on positions only.
template <class T, int HD, int N>
static inline void fold(Query<HD>* queries, const pf (*scores)[CHUNK / PAGE], const T* const* v, int valid) {
    float weights[N][CHUNK];
    vf acc[N][HD / VW];
    for (int i = 0; i < N; i++) {
        Query<HD>& query = queries[i];
        float* s = weights[i];
        memcpy(s, scores[i], sizeof weights[i]);
        for (int j = valid; j < CHUNK; j++) s[j] = -INFINITY;
        pf top = loadu<pf>(s);
        for (int p = 1; p < CHUNK / PAGE; p++) { pf x = loadu<pf>(s + p * PAGE); top = x > top ? x : top; }
        float best = query.best, total = 0;
        for (int j = 0; j < PAGE; j++) best = std::max(best, top[j]);
        pf sums = {};
        for (int p = 0; p < CHUNK / PAGE; p++) {
            pf w = vexp<pf, pi>(loadu<pf>(s + p * PAGE) - best);
            storeu(s + p * PAGE, w);
            sums += w;
        }
        for (int j = 0; j < PAGE; j++) total += sums[j];
        float rescale = query.best == -INFINITY ? 0.0f : std::exp(query.best - best);
        query.sum = query.sum * rescale + total;
        query.best = best;
        for (int c = 0; c < HD / VW; c++) acc[i][c] = query.acc[c] * rescale;
    }
    for (int j = 0; j < valid; j++) {
        const T* value = v[j / PAGE] + (j % PAGE) * HD;
        for (int c = 0; c < HD / VW; c++) {
            vf x = load_f32<vf>(value + c * VW);
            for (int i = 0; i < N; i++) acc[i][c] += x * weights[i][j];
        }
    }
    for (int i = 0; i < N; i++)
        for (int c = 0; c < HD / VW; c++) queries[i].acc[c] = acc[i][c];
}

// The above for `heads` queries of one row, in register-sized groups.
template <class T, int HD>
static inline void row_scores(const T* const* k, const Query<HD>* queries, int heads, pf (*scores)[CHUNK / PAGE], int first,
                              int last) {
    for (int i = 0; i < heads;) {
        int n = heads - i >= 4 ? (heads - i == 6 ? 3 : 4) : heads - i, page = first;
#define GO(N) case N: for (; page + 4 <= last; page += 4) page_scores<T, HD, N, 4>(k, queries + i, scores + i, page); \
                      for (; page < last; page++) page_scores<T, HD, N, 1>(k, queries + i, scores + i, page); break;
        switch (n) { GO(1) GO(2) GO(3) GO(4) }
#undef GO
        i += n;
    }
}
template <class T, int HD>
static inline void row_fold(Query<HD>* queries, int heads, const pf (*scores)[CHUNK / PAGE], const T* const* v, int valid) {
    constexpr int GROUP = HD / VW <= 4 ? 3 : 2;
    int i = 0;
    for (; i + GROUP <= heads; i += GROUP) fold<T, HD, GROUP>(queries + i, scores + i, v, valid);
    for (; i < heads; i++) fold<T, HD, 1>(queries + i, scores + i, v, valid);
}

// Attention of an item's rows, which share passes over common pages.
template <class T, int HD, class O>
static void attend(const Rows& in, const Item<T>& item, int heads, const float* q, int64_t ldq, O* out, int64_t ldo) {
    constexpr int MAX_QUERIES = 32;
    static thread_local Query<HD> queries[MAX_QUERIES];
    static thread_local T copy_k[CHUNK / PAGE][HD * PAGE], copy_v[CHUNK / PAGE][HD * PAGE];
    pf scores[MAX_QUERIES][CHUNK / PAGE];
    float scale = 1.0f / std::sqrt(float(HD));
    const T *kc = item.k, *vc = item.v;
    const int32_t* table = item.table;
    const int64_t column = item.column;
    const int row = item.block.row, count = item.block.count;
    for (int r = 0; r < count; r++) {
        for (int h = 0; h < heads; h++) {
            Query<HD>& query = queries[r * heads + h];
            const float* src = q + (row + r) * ldq + column + h * HD;
            for (int d = 0; d < HD; d++) query.q[d] = src[d] * scale;
            query.best = -INFINITY;
            query.sum = 0;
            memset(query.acc, 0, sizeof query.acc);
        }
    }
    for (int start = 0; start < item.block.longest; start += CHUNK) {
        int shared = CHUNK / PAGE;  // pages of this chunk that every row may read in place
        for (int r = 0; r < count; r++) {
            int i = row + r, ancestors = in.ancestors_start[i + 1] - in.ancestors_start[i];
            int end = ancestors ? (in.context_len[i] / PAGE) * PAGE : ((in.context_len[i] + PAGE - 1) / PAGE) * PAGE;
            shared = std::min(shared, std::max(0, (end - start)) / PAGE);
        }
        const T *kp[CHUNK / PAGE], *vp[CHUNK / PAGE];
        for (int p = 0; p < shared; p++) {
            int64_t page = table[(start / PAGE) + p];
            kp[p] = kc + page * HD * PAGE;
            vp[p] = vc + page * HD * PAGE;
        }
        for (int r = 0; r < count; r++) {
            int i = row + r, context_len = in.context_len[i], ancestors = in.ancestors_start[i + 1] - in.ancestors_start[i];
            int valid = std::min(CHUNK, context_len + ancestors - start);
            if (valid <= 0) continue;
            for (int p = shared; p * PAGE < valid; p++) {
                int first = start + p * PAGE;
                if (first + PAGE <= context_len || (!ancestors && first < context_len)) {  // whole page in place
                    int64_t page = table[first / PAGE];
                    kp[p] = kc + page * HD * PAGE;
                    vp[p] = vc + page * HD * PAGE;
                } else {  // gather: the page mixes committed positions and tree nodes
                    for (int j = 0; j < PAGE; j++) {
                        int position = first + j;
                        if (position >= context_len + ancestors) {
                            for (int d = 0; d < HD; d++) copy_k[p][d * PAGE + j] = T(0);
                            continue;
                        }
                        int64_t slot = position < context_len ? int64_t(table[position / PAGE]) * PAGE + position % PAGE
                                                         : in.ancestors[in.ancestors_start[i] + position - context_len];
                        const T* ks = kc + (slot / PAGE) * HD * PAGE + slot % PAGE;
                        for (int d = 0; d < HD; d++) copy_k[p][d * PAGE + j] = ks[d * PAGE];
                        memcpy(&copy_v[p][j * HD], vc + slot * HD, HD * sizeof(T));
                    }
                    kp[p] = copy_k[p];
                    vp[p] = copy_v[p];
                }
            }
            row_scores<T, HD>(kp, queries + r * heads, heads, scores + r * heads, 0, (valid + PAGE - 1) / PAGE);
            row_fold<T, HD>(queries + r * heads, heads, scores + r * heads, vp, valid);
        }
    }
    for (int r = 0; r < count; r++)
        for (int h = 0; h < heads; h++) {
            const Query<HD>& query = queries[r * heads + h];
            O* dst = out + (row + r) * ldo + column + h * HD;
            float inverse = 1.0f / query.sum;
            for (int i = 0; i < HD / VW; i++) put(dst + i * VW, query.acc[i] * inverse);
        }
}

template <class T, int HD>
static void rope_and_store(const Rows& in, int row, float* qkv, int heads, int kv_heads, const float* q_norm,
                           const float* k_norm, float eps, T* kc, T* vc, int64_t pages) {
    const float *cs = in.cosine + in.position[row] * (HD / 2), *sn = in.sine + in.position[row] * (HD / 2);
    for (int h = 0; h < heads + kv_heads; h++) {
        float* x = qkv + h * HD;
        const float* norm = h < heads ? q_norm : k_norm;
        if (norm) rms_norm_row(x, norm, eps, HD, x);
        for (int d = 0; d < HD / 2; d++) {
            float a = x[d], b = x[d + HD / 2];
            x[d] = a * cs[d] - b * sn[d];
            x[d + HD / 2] = b * cs[d] + a * sn[d];
        }
    }
    const Order order(sizeof(T), HD);
    for (int h = 0; h < kv_heads; h++, kc += pages * PAGE * HD, vc += pages * PAGE * HD) {
        const float *k = qkv + (heads + h) * HD, *v = k + kv_heads * HD;
        T key[HD], value[HD];
        for (int d = 0; d < HD; d++) from_f32(k[d], key + d);
        for (int d = 0; d < HD; d++) from_f32(v[d], value + d);
        order.put_key(kc, in.slot_mapping[row], key);
        order.put_value(vc, in.slot_mapping[row], value);
    }
}
