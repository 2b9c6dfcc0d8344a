// Attention of a layer, rotary positions, and the KV cache. A result does not depend on where in
// memory a key lies.

#include "attention.h"

#include "norm.h"
#include "page_attention.h"
#include "pair_attention.h"

namespace [[gnu::visibility("hidden")]] smart {

template <class T>
std::vector<QueryBlock> query_blocks(const Rows& in, const Layer& l) {
    const int heads = l.heads / l.kv_heads;
    const int size = std::max(
        1, lies_in_pairs(sizeof(T), l.head_dim) ? TILE / heads : std::min(4, MAX_QUERIES / heads));
    std::vector<QueryBlock> blocks;
    for (int g = 0; g < in.requests; g++)
        for (int row = in.query_start_loc[g]; row < in.query_start_loc[g + 1]; row += size) {
            QueryBlock block{g, row, std::min(size, in.query_start_loc[g + 1] - row)};
            for (int r = row; r < row + block.count; r++) {
                block.context_len = std::max(block.context_len, in.context_len[r]);
                const int all = in.context_len[r] + ancestor_count(in, r);
                block.longest = std::max(block.longest, all);
                block.shortest = std::min(block.shortest, all);
            }
            blocks.push_back(block);
        }
    return blocks;
}

// Attention of one layer, by a whole team. A job is a block of rows with one head of keys.
template <class T, int HD>
struct LayerAttention {
    typedef PairAttention<HD> Pairs;
    typedef PageAttention<T, HD> Pages;
    typedef std::conditional_t<lies_in_pairs(sizeof(T), HD), Pairs, Pages> Attention;

    const Layer& layer;
    const Rows& in;
    const std::vector<QueryBlock>& blocks;
    const float* q;
    int64_t ldq;
    const KvCache<T>& cache;
    float* out;
    const int kv = layer.kv_heads, heads = layer.heads / kv, jobs = int(blocks.size()) * kv,
              team = omp_get_num_threads();

    void run() const {
        static thread_local Attention kept;
        Attention& attention = kept;  // found once: looking a thread's own up takes a call
        const std::vector<Piece> pieces = pieces_to_share();
        if (pieces.empty())
            run_jobs(attention);
        else
            run_pieces(attention, pieces);
        barrier();
    }

private:
    struct Piece {
        int job, split;
    };

    AttentionItem<T> item(int job, int split) const {
        const QueryBlock& block = blocks[job / kv];
        const int64_t h = job % kv, plane = cache.pages * HD * PAGE;
        return {block,
                cache.keys + h * plane,
                cache.values + h * plane,
                in.block_tables + in.block_table_start[block.request],
                h * heads * HD,
                layer.window ? layer.window : INT32_MAX,
                split};
    }

    int splits(int job) const { return item(job, 0).splits(); }
    int64_t positions(int job) const { return blocks[job / kv].longest - item(job, 0).begin(); }
    int queries(int job) const { return blocks[job / kv].count * heads; }

    // The splits of all jobs, one job after another, where it pays to share them; none elsewhere.
    std::vector<Piece> pieces_to_share() const {
        int64_t longest = 0, all = 0;
        int most = 0;
        for (int job = 0; job < jobs; job += kv) {
            longest = std::max(longest, positions(job));
            all += positions(job) * kv;
            most = std::max(most, splits(job));
        }
        // Who takes whole jobs is done at most the longest one later than others.
        if (most < 2 || 8 * longest * team <= all) return {};
        std::vector<int64_t> work;
        for (int job = 0; job < jobs; job++) work.push_back(positions(job));
        const int64_t whole = makespan(work, team);
        if (!sharing_pays(whole, all / team, 0)) return {};
        std::vector<Piece> pieces;
        int64_t sums = 0;
        work.clear();
        for (int job = 0; job < jobs; job++)
            for (int split = 0; split < splits(job); split++) {
                pieces.push_back({job, split});
                work.push_back(item(job, split).positions());
                sums += queries(job);
            }
        if (!sharing_pays(whole, makespan(work, team), sums / team)) pieces.clear();
        return pieces;
    }

    void begin(Attention& attention, int job) const {
        attention.begin(blocks[job / kv], heads, q + item(job, 0).column, ldq);
    }

    void put_means(int job, const Softmaxes<HD>& sums, int query) const {
        const int64_t row = blocks[job / kv].row + query / heads,
                      head = job % kv * heads + query % heads;
        const float* sink = layer.sinks ? layer.sinks + head : nullptr;
        sums.put_means(query, sink, out + (row * layer.heads + head) * HD);
    }

    // A thread takes a whole job, then the next one that is left. That is most likely the one a
    // team further.
    void run_jobs(Attention& attention) const {
        alignas(64) float memory[2][Softmaxes<HD>::floats(MAX_QUERIES)];
        for (int job; (job = int(next_item())) < jobs;) {
            const Softmaxes<HD> sums(memory[0], queries(job)), next(memory[1], queries(job));
            const int count = splits(job);
            begin(attention, job);
            for (int split = 0; split < count; split++) {
                const bool last = split + 1 == count;
                const auto after =
                    last ? item(std::min(job + team, jobs - 1), 0) : item(job, split + 1);
                attention.run(in, item(job, split), after, heads, split ? next : sums);
                for (int i = 0; split && i < sums.count; i++) sums.combine(i, next);
            }
            attention.end();
            for (int i = 0; i < sums.count; i++) put_means(job, sums, i);
        }
    }

    // A thread takes a piece at a time. When all are done, the team combines each query's sums.
    void run_pieces(Attention& attention, const std::vector<Piece>& pieces) const {
        const int count = int(pieces.size());
        std::vector<int> starts(jobs + 1, count);  // of the jobs' pieces
        int most = 0;
        for (int i = count - 1; i >= 0; i--) starts[pieces[i].job] = i;
        for (int job = 0; job < jobs; job++) most = std::max(most, queries(job));
        const int64_t lines = Softmaxes<HD>::floats(most) * sizeof(float) / sizeof(CacheLine);
        CacheLine* memory = team_memory(lines * count);
        auto sums = [&](int i) {
            return Softmaxes<HD>((float*)(memory + lines * i), queries(pieces[i].job));
        };
        auto piece = [&](int i) { return item(pieces[i].job, pieces[i].split); };
        for (int i; (i = int(next_item())) < count;) {
            begin(attention, pieces[i].job);
            attention.run(in, piece(i), piece(std::min(i + team, count - 1)), heads, sums(i));
            attention.end();
        }
        barrier();
        for (int i; (i = int(next_item())) < jobs * most;) {
            const int job = i / most, query = i % most;
            if (query >= queries(job)) continue;
            const Softmaxes<HD> all = sums(starts[job]);
            for (int next = starts[job] + 1; next < starts[job + 1]; next++)
                all.combine(query, sums(next));
            put_means(job, all, query);
        }
    }
};

template <class T>
void attend(const Layer& l, const Rows& in, const std::vector<QueryBlock>& blocks, const float* q,
            int64_t ldq, const KvCache<T>& cache, float* out) {
    dispatch_head_dim(l.head_dim, [&](auto hd) {
        LayerAttention<T, hd>{l, in, blocks, q, ldq, cache, out}.run();
    });
}

template <int HD>
static inline void rope(float* x, const float* cosine, const float* sine) {
    for (int d = 0; d < HD / 2; d++) {
        float a = x[d], b = x[d + HD / 2];
        x[d] = a * cosine[d] - b * sine[d];
        x[d + HD / 2] = b * cosine[d] + a * sine[d];
    }
}

// Where keys lie in pairs, values that a row does not see are multiplied by its weights of 0, which
// a NaN or an infinity would survive. Such a position's value is 0, and its key tells who sees it.
template <class T, int HD>
static void contain(T* key, T* value) {
    int finite = 1;
    for (int d = 0; d < HD; d++) finite &= std::isfinite(to_f32(value[d]));
    if (finite) return;
    std::fill_n(value, HD, T(0));
    for (int d = 0; d < HD; d++) from_f32(NAN, key + d);
}

template <class T, int HD>
static void rope_and_store_row(const Layer& l, const Rows& in, int row, float* projected, int heads,
                               int kv_heads, const KvCache<T>& cache) {
    const int64_t angle = in.position[row] * in.angles + l.angle, plane = cache.pages * PAGE * HD;
    for (int h = 0; h < heads + kv_heads; h++) {
        float* x = projected + h * HD;
        const float* norm = h < heads ? l.q_norm : l.k_norm;
        if (norm) rms_norm_row(x, norm, l.eps, HD, x);
        rope<HD>(x, in.cosine + angle, in.sine + angle);
    }
    const PageOrder order(sizeof(T), HD);
    for (int h = 0; h < kv_heads; h++) {
        const float *k = projected + (heads + h) * HD, *v = k + kv_heads * HD;
        T key[HD], value[HD];
        for (int d = 0; d < HD; d++) from_f32(k[d], key + d);
        for (int d = 0; d < HD; d++) from_f32(v[d], value + d);
        if (order.pairs) contain<T, HD>(key, value);
        order.put_key(cache.keys + h * plane, in.slot_mapping[row], key);
        order.put_value(cache.values + h * plane, in.slot_mapping[row], value);
    }
}

template <class T>
void rope_and_store(const Layer& l, const Rows& in, int row, float* projected, int heads,
                    int kv_heads, const KvCache<T>& cache) {
    dispatch_head_dim(l.head_dim, [&](auto hd) {
        rope_and_store_row<T, hd>(l, in, row, projected, heads, kv_heads, cache);
    });
}

template std::vector<QueryBlock> query_blocks<bf16>(const Rows&, const Layer&);
template std::vector<QueryBlock> query_blocks<float>(const Rows&, const Layer&);
template void attend(const Layer&, const Rows&, const std::vector<QueryBlock>&, const float*,
                     int64_t, const KvCache<bf16>&, float*);
template void attend(const Layer&, const Rows&, const std::vector<QueryBlock>&, const float*,
                     int64_t, const KvCache<float>&, float*);
template void rope_and_store(const Layer&, const Rows&, int, float*, int, int,
                             const KvCache<bf16>&);
template void rope_and_store(const Layer&, const Rows&, int, float*, int, int,
                             const KvCache<float>&);

template <class T>
static void move_kv(T* keys, T* values, int64_t planes, int64_t pages, int head_dim,
                    const int32_t* from, const int32_t* to, int count) {
    const PageOrder order(sizeof(T), head_dim);
    const int64_t plane = pages * PAGE * head_dim;
    for (int64_t p = 0; p < planes; p++, keys += plane, values += plane)
        for (int i = 0; i < count; i++) {
            order.copy_key(keys, to[i], keys, from[i]);
            order.copy_value(values, to[i], values, from[i]);
        }
}

}  // namespace smart

using namespace smart;

extern "C" {

int32_t smart_page() { return PAGE; }

int32_t smart_attends_by_pairs(int32_t is_bf16, int32_t head_dim) {
    return lies_in_pairs(is_bf16 ? sizeof(bf16) : sizeof(float), head_dim);
}

void smart_move_kv(void* keys, void* values, int64_t planes, int64_t pages, int32_t head_dim,
                   int32_t bytes, const int32_t* from, const int32_t* to, int32_t count) {
    if (bytes == 2)
        move_kv((bf16*)keys, (bf16*)values, planes, pages, head_dim, from, to, count);
    else
        move_kv((float*)keys, (float*)values, planes, pages, head_dim, from, to, count);
}
}
