// The two kernels that the compiled programs call: attention over the paged KV cache, on every CPU, and the int4
// product, on x86-64 (on aarch64 that is KleidiAI's, through ATen).
//
// Built at export for the target CPU family and shipped beside the programs. They use the compiler's own vector types:
// sixteen float lanes are one register of AVX-512, two of AVX2, four of NEON. Every token is computed in an order that
// depends on nothing but itself, so results do not change, not by a bit, with what else is in the batch, with how a
// prompt is split, or with the number of threads. That matters: activations are rounded to 8 bits, and a difference in
// the seventh digit that tips one of them over changes what follows as much as any rounding does.
//
// Layouts. Keys of a page: [head dim][16 slots], so that one query element meets 16 slots in one instruction. Values of
// a page: [16 slots][head dim]. Both bfloat16. Int4: see struct Int4.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;  // outputs of a block, slots of a page
typedef float F32 __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t U32 __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t I32 __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint8_t U8 __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint16_t U16 __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

inline F32 load(const float* from) { return *reinterpret_cast<const F32*>(from); }
inline void store(float* to, F32 value) { *reinterpret_cast<F32*>(to) = value; }
inline F32 broadcast(float value) { return value - F32{}; }

inline F32 load(const uint16_t* bfloat16) {
    return reinterpret_cast<F32>(__builtin_convertvector(*reinterpret_cast<const U16*>(bfloat16), U32) << 16);
}

inline uint16_t to_bfloat16(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Memory of one thread that calls kernels, grown when needed and kept.
template <class T>
class Scratch {
    std::unique_ptr<T[]> memory;
    int64_t size = 0;

public:
    T* of(int64_t count) {
        if (count > size) {
            memory.reset(new T[count]);
            size = count;
        }
        return memory.get();
    }
};

// ------------------------------------------------------------------------------------------------------- int4 product

#if defined(__AVX2__)

// A packed weight [outputs, inputs], w = scale * nibble, two's complement, in blocks of 16 outputs:
//   nibbles  [blocks][inputs / 8][16 outputs][4]  byte j of output o: input j in the low nibble, input j + 4 in the high
//   scales   [blocks][groups][16 outputs]         bfloat16; float32 when a row is one group
//   sums     [blocks][16 outputs]                 float32: each row's sum of weights
struct Int4 {
    int64_t group, inputs, outputs, groups, blocks;
    const uint8_t *nibbles, *scales;
    const float* sums;

    Int4(const uint8_t* packed, int64_t group, int64_t inputs, int64_t outputs)
        : group(group), inputs(inputs), outputs(outputs), groups(inputs / group), blocks((outputs + LANES - 1) / LANES) {
        nibbles = packed;
        scales = nibbles + blocks * inputs * LANES / 2;
        sums = reinterpret_cast<const float*>(scales + blocks * groups * LANES * (groups == 1 ? 4 : 2));
    }

    F32 scale(int64_t block, int64_t g) const {
        if (groups == 1) return load(reinterpret_cast<const float*>(scales) + block * LANES);
        return load(reinterpret_cast<const uint16_t*>(scales) + (block * groups + g) * LANES);
    }
};

// 64 bytes of weights, and 16 running sums: `add_products` adds to each lane its four weights times four activations.
// Whole sums count in units of 1 / WEIGHT_UNIT.
#if defined(__AVX512VNNI__)
constexpr int TILE = 6;  // tokens that, times two blocks, fill the registers with sums
constexpr float WEIGHT_UNIT = 16;  // a nibble in the upper half of a byte is a signed byte already, 16 times itself
struct Bytes { __m512i all; };
struct Sums { __m512i all; };
inline Bytes load_bytes(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline Bytes high(Bytes b) { return {_mm512_and_si512(b.all, _mm512_set1_epi8(-16))}; }
inline Bytes low(Bytes b) { return high({_mm512_slli_epi16(b.all, 4)}); }
inline Sums zero() { return {_mm512_setzero_si512()}; }
inline Sums add_products(Sums s, Bytes weights, int32_t activations) {
    // Not the intrinsic, around which gcc 12 copies registers: 7 % of prefill.
    asm("vpdpbusd %2, %1, %0" : "+v"(s.all) : "v"(_mm512_set1_epi32(activations)), "v"(weights.all));
    return s;
}
inline F32 to_float(Sums a, Sums b) {
    const I32 whole = reinterpret_cast<I32>(_mm512_add_epi32(a.all, b.all));
    return __builtin_convertvector(whole, F32);
}
#else
constexpr int TILE = 2;
constexpr float WEIGHT_UNIT = 1;
struct Bytes { __m256i half[2]; };
struct Sums { __m256i half[2]; };
inline Bytes load_bytes(const uint8_t* from) {
    auto at = reinterpret_cast<const __m256i*>(from);
    return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
inline __m256i low(__m256i bytes) {
    const __m256i values = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,  //
                                            0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm256_shuffle_epi8(values, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
}
inline Bytes low(Bytes b) { return {{low(b.half[0]), low(b.half[1])}}; }
inline Bytes high(Bytes b) { return low({{_mm256_srli_epi16(b.half[0], 4), _mm256_srli_epi16(b.half[1], 4)}}); }
inline Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
inline __m256i add_products(__m256i sums, __m256i weights, __m256i activations) {  // 2 * 255 * 8 fits the 16 bits between
    const __m256i pairs = _mm256_maddubs_epi16(activations, weights);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Sums add_products(Sums s, Bytes weights, int32_t activations) {
    const __m256i all = _mm256_set1_epi32(activations);
    return {{add_products(s.half[0], weights.half[0], all), add_products(s.half[1], weights.half[1], all)}};
}
inline F32 to_float(Sums a, Sums b) {
    I32 whole;
    for (int i = 0; i < 2; i++) {
        const __m256i half = _mm256_add_epi32(a.half[i], b.half[i]);
        std::memcpy(reinterpret_cast<int32_t*>(&whole) + 8 * i, &half, sizeof half);
    }
    return __builtin_convertvector(whole, F32);
}
#endif

// Activations of some tokens in 8 bits: x = scale * (value - zero).
struct Quantized {
    const uint8_t* values;  // [tokens][inputs]
    const float *scale, *zero;

    Quantized from(int64_t token, const Int4& w) const { return {values + token * w.inputs, scale + token, zero + token}; }
};

// One token, as KleidiAI's qai8dx does it: asymmetric over the token's own range, zero exact; its values are signed, ours
// 128 more. Products are rounded before they are added to, as in the reference: otherwise ties, and with them whole steps,
// would fall differently.
__attribute__((optimize("fp-contract=off"))) void quantize(const float* x, const Int4& w, uint8_t* values, float* scale,
                                                           float* zero) {
    F32 leasts = {}, mosts = {}, faults = {};  // NaN where an activation is NaN or infinite, else 0
    for (int64_t i = 0; i < w.inputs; i += LANES) {
        const F32 here = load(x + i);
        faults += here - here;
        leasts = here < leasts ? here : leasts;
        mosts = here > mosts ? here : mosts;
    }
    float least = 0, most = 0, fault = 0;
    for (int i = 0; i < LANES; i++) {
        fault += faults[i];
        least = std::min(least, leasts[i]);
        most = std::max(most, mosts[i]);
    }
    const float factor = least == most ? 1.0f : 255.0f / (most - least);
    const float low = least * factor, high = most * factor;
    const float exact = (low - 128.0f) + (high + 127.0f) > 0 ? -128.0f - low : 127.0f - high;
    const float point = std::nearbyint(std::min(std::max(exact, -128.0f), 127.0f)) + 128.0f;
    for (int64_t i = 0; i < w.inputs; i += LANES) {
        F32 value = load(x + i) * factor;
        value = ((value + 12582912.0f) - 12582912.0f) + point;  // 1.5 * 2^23: rounds to nearest, ties to even
        value = value < 0.0f ? F32{} : value;
        value = value > 255.0f ? broadcast(255.0f) : value;
        *reinterpret_cast<U8*>(values + i) = __builtin_convertvector(__builtin_convertvector(value, I32), U8);
    }
    *scale = 1.0f / factor + fault;
    *zero = point;
}

inline int32_t four(const uint8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

// B blocks of outputs for M tokens. Two sums each where there are few, because one would wait for itself.
template <int B, int M>
void tile(const Int4& w, int64_t block, Quantized x, float* y) {
    constexpr int WAYS = B * M <= 4 ? 2 : 1;
    F32 total[B][M];
    for (auto& row : total)
        for (F32& sum : row) sum = F32{};
    const uint8_t* bytes = w.nibbles + block * w.inputs * LANES / 2;
    const int64_t stride = w.inputs * LANES / 2;
    for (int64_t g = 0; g < w.groups; g++) {
        Sums sums[WAYS][B][M];
        for (auto& way : sums)
            for (auto& row : way)
                for (auto& sum : row) sum = zero();
        for (int64_t i = g * w.group; i < (g + 1) * w.group; i += 8, bytes += 64) {
            Bytes both[B];
            for (int b = 0; b < B; b++) both[b] = load_bytes(bytes + b * stride);
            for (int m = 0; m < M; m++) {
                const int32_t values = four(x.values + m * w.inputs + i);
                for (int b = 0; b < B; b++) sums[0][b][m] = add_products(sums[0][b][m], low(both[b]), values);
            }
            for (int m = 0; m < M; m++) {
                const int32_t values = four(x.values + m * w.inputs + i + 4);
                Sums(&way)[B][M] = sums[WAYS - 1];
                for (int b = 0; b < B; b++) way[b][m] = add_products(way[b][m], high(both[b]), values);
            }
        }
        for (int b = 0; b < B; b++) {
            const F32 scale = w.scale(block + b, g);
            for (int m = 0; m < M; m++)
                total[b][m] += to_float(sums[0][b][m], WAYS == 2 ? sums[1][b][m] : zero()) * scale;
        }
    }
    for (int b = 0; b < B; b++) {
        const F32 row_sums = load(w.sums + (block + b) * LANES) * WEIGHT_UNIT;
        const int64_t first = (block + b) * LANES, count = std::min<int64_t>(LANES, w.outputs - first);
        for (int m = 0; m < M; m++) {
            // One product alone is subtracted, so that there is one way to fuse, and the same bits whatever B and M are.
            const F32 result = (total[b][m] - row_sums * x.zero[m]) * (x.scale[m] / WEIGHT_UNIT);
            float* out = y + m * w.outputs + first;
            if (count == LANES) store(out, result);
            else std::memcpy(out, &result, count * sizeof(float));
        }
    }
}

template <int M>
void tiles(const Int4& w, int64_t block, int64_t count, const Quantized& x, int64_t from, int64_t tokens, float* y) {
    for (; from + M <= tokens; from += M) {
        if (count == 2) tile<2, M>(w, block, x.from(from, w), y + from * w.outputs);
        else tile<1, M>(w, block, x.from(from, w), y + from * w.outputs);
    }
    if constexpr (M > 1) {
        if (from < tokens) tiles<(M > 4 ? 4 : M / 2)>(w, block, count, x, from, tokens, y);
    }
}

void int4_linear(const float* x, const uint8_t* packed, int64_t tokens, int64_t group, int64_t inputs, int64_t outputs,
                 float* y) {
    static thread_local Scratch<uint8_t> values_of;
    static thread_local Scratch<float> scales_of;
    const Int4 w(packed, group, inputs, outputs);
    uint8_t* values = values_of.of(tokens * inputs);
    float *scale = scales_of.of(2 * tokens), *zero = scale + tokens;
#pragma omp parallel for if (tokens > 4)
    for (int64_t t = 0; t < tokens; t++) quantize(x + t * inputs, w, values + t * inputs, scale + t, zero + t);
    const Quantized quantized{values, scale, zero};
    const int64_t step = tokens > 2 ? 2 : 1;  // few tokens wait for memory, which reads one stream best
#pragma omp parallel for
    for (int64_t block = 0; block < w.blocks; block += step)
        tiles<TILE>(w, block, std::min(step, w.blocks - block), quantized, 0, tokens, y);
}

#endif

// ---------------------------------------------------------------------------------------------------------- attention

// exp(x) for x <= 0, to 2 units in the last place: 2^n * p(r), Cephes' expf. The same bits on every CPU with FMA.
inline F32 exponential(F32 x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    const F32 n = __builtin_convertvector(__builtin_convertvector(x * 1.44269504f - 0.5f, I32), F32);
    const F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F32 p = broadcast(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = p * r + c;
    p = p * r * r + r + 1.0f;
    return p * reinterpret_cast<F32>((__builtin_convertvector(n, I32) + 127) << 23);
}

struct Attention {
    int64_t heads, kv_heads, dim;
    const float *qkv, *rotary;                // [T, heads + 2 kv_heads, dim], [positions, 2, dim]
    const int64_t *positions, *rows;          // [T]
    const int32_t* tables;                    // [sequences, width]: the pages of each sequence, in order
    int64_t width;
    uint16_t *keys, *values;                  // [pages, kv_heads, dim, 16], [pages, kv_heads, 16, dim]
    float* out;                               // [T, heads, dim]

    const float* head(int64_t token, int64_t index) const {
        return qkv + (token * (heads + 2 * kv_heads) + index) * dim;
    }
    int64_t page(int64_t token, int64_t index, int64_t kv_head) const {
        return (tables[rows[token] * width + index] * kv_heads + kv_head) * LANES * dim;
    }
    // Half-split rotary embedding of one head, times `scale`, into `to` [dim]. Of two products only one could be fused with
    // their sum; with none it is the same bits wherever this is inlined.
    __attribute__((optimize("fp-contract=off"))) void rotate(int64_t token, const float* x, float scale, float* to) const {
        const float *cos = rotary + positions[token] * 2 * dim, *sin = cos + dim;
        for (int64_t i = 0; i < dim / 2; i += LANES) {
            const int64_t j = i + dim / 2;
            const F32 first = load(x + i), second = load(x + j);
            store(to + i, (first * load(cos + i) - second * load(sin + i)) * scale);
            store(to + j, (second * load(cos + j) + first * load(sin + j)) * scale);
        }
    }
};

// Writes a token's keys and values into its slot.
void remember(const Attention& a, int64_t token) {
    static thread_local Scratch<float> scratch_of;
    float* key = scratch_of.of(a.dim);
    const int64_t position = a.positions[token], slot = position % LANES;
    for (int64_t h = 0; h < a.kv_heads; h++) {
        const int64_t page = a.page(token, position / LANES, h);
        const float* value = a.head(token, a.heads + a.kv_heads + h);
        a.rotate(token, a.head(token, a.heads + h), 1, key);
        for (int64_t i = 0; i < a.dim; i++) {
            a.keys[page + i * LANES + slot] = to_bfloat16(key[i]);
            a.values[page + slot * a.dim + i] = to_bfloat16(value[i]);
        }
    }
}

// In place: scores of the first `length` slots to probabilities, zero beyond, up to a whole page.
void softmax(float* scores, int64_t length, int64_t slots) {
    std::fill(scores + length, scores + slots, -INFINITY);
    F32 most = load(scores), sums = {};
    for (int64_t s = LANES; s < slots; s += LANES) {
        const F32 next = load(scores + s);
        most = next > most ? next : most;
    }
    float top = most[0], total = 0;
    for (int i = 1; i < LANES; i++) top = std::max(top, most[i]);
    for (int64_t s = 0; s < slots; s += LANES) {
        const F32 score = load(scores + s), shifted = score - top;
        const F32 weight = score == -INFINITY ? F32{} : exponential(shifted);
        store(scores + s, weight);
        if (s < length) sums += weight;
    }
    for (int i = 0; i < LANES; i++) total += sums[i];
    for (int64_t s = 0; s < slots; s += LANES) store(scores + s, load(scores + s) / total);
}

// R queries that share a key-value head and a sequence: `per_token` heads of each of R / per_token consecutive tokens.
template <int R>
void attend(const Attention& a, int64_t token, int64_t first_head, int64_t per_token, float* scratch) {
    constexpr int W = R <= 4 ? 4 : 1;  // sums side by side, because one would wait for itself when queries are few
    const int64_t kv_head = first_head / (a.heads / a.kv_heads);
    const int64_t pages = a.positions[token + R / per_token - 1] / LANES + 1, slots = pages * LANES;
    float *queries = scratch, *scores = scratch + R * a.dim;  // [R][dim], [R][slots]
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.dim));
    for (int r = 0; r < R; r++) {
        const int64_t own = token + r / per_token;
        a.rotate(own, a.head(own, first_head + r % per_token), scale, queries + r * a.dim);
    }
    for (int64_t page = 0; page < pages; page += W) {
        const uint16_t* keys[W];
        F32 sums[R][W];
        for (int w = 0; w < W; w++) {
            keys[w] = a.keys + a.page(token, std::min(page + w, pages - 1), kv_head);
            for (int r = 0; r < R; r++) sums[r][w] = F32{};
        }
        for (int64_t i = 0; i < a.dim; i++) {
            for (int w = 0; w < W; w++) {
                const F32 key = load(keys[w] + i * LANES);
                for (int r = 0; r < R; r++) sums[r][w] += queries[r * a.dim + i] * key;
            }
        }
        for (int w = 0; w < W && page + w < pages; w++)
            for (int r = 0; r < R; r++) store(scores + r * slots + (page + w) * LANES, sums[r][w]);
    }
    for (int r = 0; r < R; r++) softmax(scores + r * slots, a.positions[token + r / per_token] + 1, slots);
    for (int64_t i = 0; i < a.dim; i += W * LANES) {
        F32 sums[R][W];
        for (int w = 0; w < W; w++)
            for (int r = 0; r < R; r++) sums[r][w] = F32{};
        for (int64_t page = 0; page < pages; page++) {
            const uint16_t* values = a.values + a.page(token, page, kv_head);
            for (int64_t slot = 0; slot < LANES; slot++) {
                for (int w = 0; w < W; w++) {
                    const F32 value = load(values + slot * a.dim + std::min(i + w * LANES, a.dim - LANES));
                    for (int r = 0; r < R; r++) sums[r][w] += scores[r * slots + page * LANES + slot] * value;
                }
            }
        }
        for (int w = 0; w < W && i + w * LANES < a.dim; w++)
            for (int r = 0; r < R; r++) {
                float* out = a.out + ((token + r / per_token) * a.heads + first_head + r % per_token) * a.dim;
                store(out + i + w * LANES, sums[r][w]);
            }
    }
}

constexpr int MOST_QUERIES = 12;

template <int... R>
void attend(int queries, std::integer_sequence<int, R...>, const Attention& a, int64_t token, int64_t first_head,
            int64_t per_token, float* scratch) {
    ((queries == R + 1 ? attend<R + 1>(a, token, first_head, per_token, scratch) : void()), ...);
}

// How many tokens from `token` on are consecutive in one sequence, at most `most`.
int64_t run_length(const Attention& a, int64_t token, int64_t tokens, int64_t most) {
    int64_t count = 1;
    while (count < most && token + count < tokens && a.rows[token + count] == a.rows[token] &&
           a.positions[token + count] == a.positions[token] + count)
        count++;
    return count;
}

void attention(const Attention& a, int64_t tokens, int64_t threads) {
    static thread_local Scratch<int64_t> starts_of;
    const int64_t shared = a.heads / a.kv_heads;
    // Heads that share keys go together, and tokens too, unless that leaves a thread without work.
    const int64_t per_token = tokens * a.kv_heads < threads || shared > MOST_QUERIES ? 1 : shared;
    int64_t* starts = starts_of.of(tokens + 1);
    int64_t runs = 0, longest = 0;
    for (int64_t t = 0; t < tokens; t += run_length(a, t, tokens, MOST_QUERIES / per_token)) starts[runs++] = t;
    starts[runs] = tokens;
    for (int64_t t = 0; t < tokens; t++) longest = std::max(longest, a.positions[t]);
    const int64_t columns = a.heads / per_token;
    const int64_t work = tokens * a.heads * longest * a.dim;
#pragma omp parallel for if (tokens > 8)
    for (int64_t t = 0; t < tokens; t++) remember(a, t);
#pragma omp parallel for schedule(dynamic) if (work > 100000)
    for (int64_t task = runs * columns - 1; task >= 0; task--) {  // the longest first
        static thread_local Scratch<float> scratch_of;
        const int64_t run = task / columns, token = starts[run], head = task % columns * per_token;
        const int queries = static_cast<int>((starts[run + 1] - token) * per_token);
        float* scratch = scratch_of.of(MOST_QUERIES * (a.dim + longest + LANES));
        attend(queries, std::make_integer_sequence<int, MOST_QUERIES>(), a, token, head, per_token, scratch);
    }
}

}  // namespace

// -------------------------------------------------------------------------------------------------- what programs call

// torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h); nothing else of torch is needed to build this.
extern "C" {
typedef struct AtenTensorOpaque* Handle;
int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
int omp_get_max_threads();
}

namespace {

template <class T>
T* data(Handle tensor) {
    void* pointer = nullptr;
    aoti_torch_get_data_ptr(tensor, &pointer);
    return static_cast<T*>(pointer);
}

int64_t size(Handle tensor, int dimension) {
    int64_t* sizes = nullptr;
    aoti_torch_get_sizes(tensor, &sizes);
    return sizes[dimension];
}

Handle new_matrix(int64_t rows, int64_t columns) {
    const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
    Handle tensor = nullptr;
    aoti_torch_empty_strided(2, sizes, strides, /* float32 */ 6, /* CPU */ 0, 0, &tensor);
    return tensor;
}

}  // namespace

extern "C" {

// With plain pointers, for Python's ctypes.
#if defined(__AVX2__)
void emerald_int4_linear(const float* x, const uint8_t* packed, int64_t tokens, int64_t group, int64_t inputs,
                         int64_t outputs, float* y) {
    int4_linear(x, packed, tokens, group, inputs, outputs, y);
}

int32_t aoti_torch_cpu_int4_linear(Handle x, Handle packed, int64_t group, int64_t inputs, int64_t outputs, Handle* y) {
    const int64_t tokens = size(x, 0);
    *y = new_matrix(tokens, outputs);
    int4_linear(data<float>(x), data<uint8_t>(packed), tokens, group, inputs, outputs, data<float>(*y));
    return 0;
}
#endif

void emerald_paged_attention(const float* qkv, const float* rotary, const int64_t* positions, const int64_t* rows,
                             const int32_t* tables, uint16_t* keys, uint16_t* values, int64_t tokens, int64_t heads,
                             int64_t kv_heads, int64_t dim, int64_t width, float* out) {
    attention({heads, kv_heads, dim, qkv, rotary, positions, rows, tables, width, keys, values, out}, tokens,
              omp_get_max_threads());
}

int32_t aoti_torch_cpu_paged_attention(Handle qkv, Handle rotary, Handle positions, Handle rows, Handle tables,
                                       Handle keys, Handle values, Handle* out) {
    const int64_t tokens = size(qkv, 0), kv_heads = size(keys, 1), dim = size(keys, 2);
    const int64_t heads = size(qkv, 1) / dim - 2 * kv_heads;
    *out = new_matrix(tokens, heads * dim);
    emerald_paged_attention(data<float>(qkv), data<float>(rotary), data<int64_t>(positions), data<int64_t>(rows),
                            data<int32_t>(tables), data<uint16_t>(keys), data<uint16_t>(values), tokens, heads, kv_heads,
                            dim, size(tables, 1), data<float>(*out));
    return 0;
}

}
