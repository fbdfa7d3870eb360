// The kernels that the compiled programs call. The model's are attention over the paged KV cache, on every CPU, and the
// int4 product, on x86-64 (on aarch64 that is KleidiAI's, through ATen); the embedder's is the int8 product.
//
// Built at export for the target CPU family and shipped beside the programs. They use the compiler's own vector types.
// Every token is computed in an order that depends on nothing but itself, so results do not change, not by a bit, with
// what else is in the batch, with how a prompt is split, or with the number of threads. That matters: activations are
// rounded to 8 bits, and a difference in the seventh digit that tips one of them over changes what follows as much as any
// rounding does.
//
// On x86-64 more holds for the model's: every float32 result is the exact one, rounded once. Sums and attention are in
// double precision. So whoever else rounds once gets the same bits, on any CPU: the eager reference says the same, word
// for word. KleidiAI adds in single precision; beside it attention need not be more exact.
//
// Layouts. Keys of a page: [head dim][16 slots], so that one query element meets 16 slots in one instruction. Values of
// a page: [16 slots][head dim]. Both bfloat16. Weights: see struct Int4 and struct Int8.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

namespace {

constexpr int LANES = 16;  // outputs of a block, slots of a page

#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX2__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif

#if defined(__AVX2__)
typedef double Real;  // of sums
#else
typedef float Real;
#endif

template <class T, int COUNT>
struct Vector {
    typedef T type __attribute__((vector_size(COUNT * sizeof(T)), aligned(1), may_alias));
};
template <class T, int COUNT>
using Vec = typename Vector<T, COUNT>::type;

constexpr int WIDTH = REGISTER / sizeof(Real), FLOATS = REGISTER / sizeof(float);  // lanes of a register
typedef Vec<Real, WIDTH> Reals;
typedef Vec<float, FLOATS> Floats;

template <class To, class From>
inline To load_as(const From* from) {
    return *reinterpret_cast<const To*>(from);
}
inline Reals load(const Real* from) { return load_as<Reals>(from); }
inline void store(Real* to, Reals value) { *reinterpret_cast<Reals*>(to) = value; }
// gcc 12 makes two conversions of half a register each out of __builtin_convertvector.
#if defined(__AVX512F__)
inline Reals load(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
inline Reals load_bfloat16(const uint16_t* from) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
#elif defined(__AVX2__)
inline Reals load(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
inline Reals load_bfloat16(const uint16_t* from) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}
#else
inline Reals load_bfloat16(const uint16_t* from) {
    return reinterpret_cast<Reals>(__builtin_convertvector(load_as<Vec<uint16_t, WIDTH>>(from), Vec<uint32_t, WIDTH>) << 16);
}
#endif

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

// ------------------------------------------------------------------------------------------- products of whole numbers

// 64 bytes of weights, four for each of 16 outputs, and 16 running sums: `add_products` adds to each lane its four weights,
// -127..127, times four activations, LEAST..LEAST + 255: x86-64 multiplies unsigned by signed bytes.
#if defined(__AVX2__)
constexpr float LEAST = 0;
#else
constexpr float LEAST = -128;
#endif

#if defined(__AVX512VNNI__)
struct Bytes { __m512i all; };
struct Sums { __m512i all; };
inline Bytes load_bytes(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline Sums zero() { return {_mm512_setzero_si512()}; }
inline Sums add_products(Sums s, Bytes weights, int32_t activations) {
    // Not the intrinsic, around which gcc 12 copies registers: 7 % of prefill.
    asm("vpdpbusd %2, %1, %0" : "+v"(s.all) : "v"(_mm512_set1_epi32(activations)), "v"(weights.all));
    return s;
}
#elif defined(__AVX2__)
struct Bytes { __m256i half[2]; };
struct Sums { __m256i half[2]; };
inline Bytes load_bytes(const uint8_t* from) {
    auto at = reinterpret_cast<const __m256i*>(from);
    return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
inline Sums zero() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
// Two products have to fit the 16 bits between, so one of the factors has 4 bits.
inline __m256i add_products(__m256i sums, __m256i weights, __m256i activations, int16_t unit) {
    const __m256i pairs = _mm256_maddubs_epi16(activations, weights);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(unit)));
}
inline Sums add_products(Sums s, Bytes weights, int32_t activations) {
    const __m256i low = _mm256_set1_epi32(activations & 0x0f0f0f0f), high = _mm256_set1_epi32(activations >> 4 & 0x0f0f0f0f);
    for (int i = 0; i < 2; i++) {
        s.half[i] = add_products(s.half[i], weights.half[i], low, 1);
        s.half[i] = add_products(s.half[i], weights.half[i], high, 16);
    }
    return s;
}
#else
struct Bytes { int8x16_t quarter[4]; };
struct Sums { int32x4_t quarter[4]; };
inline Bytes load_bytes(const uint8_t* from) {
    Bytes b;
    for (int i = 0; i < 4; i++) b.quarter[i] = vreinterpretq_s8_u8(vld1q_u8(from + 16 * i));
    return b;
}
inline Sums zero() { return {}; }
inline Sums add_products(Sums s, Bytes weights, int32_t activations) {
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(activations));
    for (int i = 0; i < 4; i++) s.quarter[i] = vdotq_s32(s.quarter[i], weights.quarter[i], all);
    return s;
}
#endif

inline int32_t four(const uint8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

constexpr struct Partners {  // of each lane, that `step` away
    int32_t at[FLOATS / 2 + 1][FLOATS] = {};
    constexpr Partners() {
        for (int step = 1; step < FLOATS; step *= 2)
            for (int i = 0; i < FLOATS; i++) at[step][i] = i ^ step;
    }
} PARTNERS;

template <class Join>
inline float fold(Floats lanes, Join join) {
    for (int step = FLOATS / 2; step > 0; step /= 2)
        lanes = join(lanes, __builtin_shuffle(lanes, load_as<Vec<int32_t, FLOATS>>(PARTNERS.at[step])));
    return lanes[0];
}

// Some activations as KleidiAI's qai8dx does it: x = scale * (value - zero), asymmetric over their own range, zero exact.
// Products are rounded before they are added to, as in the reference: otherwise ties, and with them whole steps, would
// fall differently.
template <class T>
__attribute__((optimize("fp-contract=off"))) void quantize(const float* x, int64_t count, uint8_t* values, T* scale, T* zero) {
    const auto less = [](Floats a, Floats b) { return a < b ? a : b; };
    const auto more = [](Floats a, Floats b) { return a > b ? a : b; };
    Floats leasts = {}, mosts = {}, faults = {};  // NaN where an activation is NaN or infinite, else 0
    for (int64_t i = 0; i < count; i += FLOATS) {
        const Floats here = load_as<Floats>(x + i);
        faults += here - here;
        leasts = less(here, leasts);
        mosts = more(here, mosts);
    }
    const float least = fold(leasts, less), most = fold(mosts, more);
    const float fault = fold(faults, [](Floats a, Floats b) { return a + b; });
    const float factor = least == most ? 1.0f : 255.0f / (most - least);
    const float low = least * factor, high = most * factor;
    const float exact = (low - 128.0f) + (high + 127.0f) > 0 ? -128.0f - low : 127.0f - high;
    const float point = std::nearbyint(std::min(std::max(exact, -128.0f), 127.0f)) + 128.0f + LEAST;
    for (int64_t i = 0; i < count; i += FLOATS) {
        Floats value = load_as<Floats>(x + i) * factor;
        value = ((value + 12582912.0f) - 12582912.0f) + point;  // 1.5 * 2^23: rounds to nearest, ties to even
        value = value < LEAST ? Floats{} + LEAST : value;
        value = value > LEAST + 255.0f ? Floats{} + (LEAST + 255.0f) : value;
        const auto whole = __builtin_convertvector(value, Vec<int32_t, FLOATS>);
        *reinterpret_cast<Vec<uint8_t, FLOATS>*>(values + i) = __builtin_convertvector(whole, Vec<uint8_t, FLOATS>);
    }
    *scale = T(1) / factor + fault;
    *zero = point;
}

// ------------------------------------------------------------------------------------------------------- int4 product

#if defined(__AVX2__)

constexpr int PARTS = LANES / WIDTH;
struct Wide {  // sixteen lanes in double precision
    Reals part[PARTS];
};

// A packed weight [outputs, inputs], w = scale * nibble, two's complement, in blocks of 16 outputs:
//   nibbles  [blocks][inputs / 8][16 outputs][4]  byte j of output o: input j in the low nibble, input j + 4 in the high
//   scales   [blocks][groups][16 outputs]         bfloat16; float32 when a row is one group
//   sums     [blocks][16 outputs]                 float64: each row's sum of weights
struct Int4 {
    int64_t group, inputs, outputs, groups, blocks;
    const uint8_t *nibbles, *scales, *sums;

    Int4(const uint8_t* packed, int64_t group, int64_t inputs, int64_t outputs)
        : group(group), inputs(inputs), outputs(outputs), groups(inputs / group), blocks((outputs + LANES - 1) / LANES) {
        nibbles = packed;
        scales = nibbles + blocks * inputs * LANES / 2;
        sums = scales + blocks * groups * LANES * (groups == 1 ? 4 : 2);
    }

    Reals scale(int64_t block, int64_t g, int part) const {
        const int64_t at = (block * groups + g) * LANES + part * WIDTH;
        if (groups > 1) return load_bfloat16(reinterpret_cast<const uint16_t*>(scales) + at);
        return load(reinterpret_cast<const float*>(scales) + at);
    }
    Reals sum(int64_t block, int part) const {
        return load(reinterpret_cast<const double*>(sums) + block * LANES + part * WIDTH);
    }
};

// Nibbles as bytes, in units of 1 / WEIGHT_UNIT, and so are the sums of their products.
#if defined(__AVX512VNNI__)
constexpr int TILE = 8;  // tokens whose sums and totals fill the registers
constexpr float WEIGHT_UNIT = 16;  // a nibble in the upper half of a byte is a signed byte already, 16 times itself
inline Bytes high(Bytes b) { return {_mm512_and_si512(b.all, _mm512_set1_epi8(-16))}; }
inline Bytes low(Bytes b) { return high({_mm512_slli_epi16(b.all, 4)}); }
inline Sums add_nibbles(Sums s, Bytes weights, int32_t activations) { return add_products(s, weights, activations); }
inline Wide widen(Sums s) {
    return {{_mm512_cvtepi32_pd(_mm512_castsi512_si256(s.all)), _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(s.all, 1))}};
}
inline Sums operator+(Sums a, Sums b) { return {_mm512_add_epi32(a.all, b.all)}; }
#else
constexpr int TILE = 4;
constexpr float WEIGHT_UNIT = 1;
inline __m256i low(__m256i bytes) {
    const __m256i values = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1,  //
                                            0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm256_shuffle_epi8(values, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
}
inline Bytes low(Bytes b) { return {{low(b.half[0]), low(b.half[1])}}; }
inline Bytes high(Bytes b) { return low({{_mm256_srli_epi16(b.half[0], 4), _mm256_srli_epi16(b.half[1], 4)}}); }
inline Sums add_nibbles(Sums s, Bytes weights, int32_t activations) {
    const __m256i all = _mm256_set1_epi32(activations);
    return {{add_products(s.half[0], weights.half[0], all, 1), add_products(s.half[1], weights.half[1], all, 1)}};
}
#if defined(__AVX512F__)
inline Wide widen(Sums s) { return {_mm512_cvtepi32_pd(s.half[0]), _mm512_cvtepi32_pd(s.half[1])}; }
#else
inline Wide widen(Sums s) {
    return {_mm256_cvtepi32_pd(_mm256_castsi256_si128(s.half[0])), _mm256_cvtepi32_pd(_mm256_extracti128_si256(s.half[0], 1)),
            _mm256_cvtepi32_pd(_mm256_castsi256_si128(s.half[1])), _mm256_cvtepi32_pd(_mm256_extracti128_si256(s.half[1], 1))};
}
#endif
inline Sums operator+(Sums a, Sums b) {
    return {{_mm256_add_epi32(a.half[0], b.half[0]), _mm256_add_epi32(a.half[1], b.half[1])}};
}
#endif

// Activations of some tokens, each token's quantized together.
struct Quantized {
    const uint8_t* values;  // [tokens][inputs]
    const double *scale, *zero;

    Quantized from(int64_t token, const Int4& w) const { return {values + token * w.inputs, scale + token, zero + token}; }
};

// A block of outputs for M tokens. Two sums each where tokens are few, because one would wait for itself.
template <int M>
void tile(const Int4& w, int64_t block, Quantized x, float* y) {
    constexpr int WAYS = M <= 4 ? 2 : 1;
    Wide total[M] = {};
    const uint8_t* bytes = w.nibbles + block * w.inputs * LANES / 2;
    for (int64_t g = 0; g < w.groups; g++) {
        Sums sums[WAYS][M];
        for (auto& way : sums)
            for (auto& sum : way) sum = zero();
        for (int64_t i = g * w.group; i < (g + 1) * w.group; i += 8, bytes += 64) {
            const Bytes both = load_bytes(bytes);
            const uint8_t* values = x.values + i;
            for (int m = 0; m < M; m++)
                sums[0][m] = add_nibbles(sums[0][m], low(both), four(values + m * w.inputs));
            for (int m = 0; m < M; m++)
                sums[WAYS - 1][m] = add_nibbles(sums[WAYS - 1][m], high(both), four(values + m * w.inputs + 4));
        }
        Reals scale[PARTS];
        for (int part = 0; part < PARTS; part++) scale[part] = w.scale(block, g, part);
        for (int m = 0; m < M; m++) {
            const Wide whole = widen(WAYS == 2 ? sums[0][m] + sums[1][m] : sums[0][m]);
            for (int part = 0; part < PARTS; part++) total[m].part[part] += whole.part[part] * scale[part];
        }
    }
    const int64_t count = std::min<int64_t>(LANES, w.outputs - block * LANES);
    for (int m = 0; m < M; m++) {
        const double zero = x.zero[m] * WEIGHT_UNIT, scale = x.scale[m] / WEIGHT_UNIT;
        Vec<float, WIDTH> result[PARTS];
        for (int part = 0; part < PARTS; part++) {
            const Reals sum = (total[m].part[part] - w.sum(block, part) * zero) * scale;
            result[part] = __builtin_convertvector(sum, Vec<float, WIDTH>);
        }
        float* out = y + m * w.outputs + block * LANES;
        if (count == LANES) std::memcpy(out, result, sizeof result);
        else std::memcpy(out, result, count * sizeof(float));
    }
}

template <int M>
void tiles(const Int4& w, int64_t block, const Quantized& x, int64_t from, int64_t tokens, float* y) {
    for (; from + M <= tokens; from += M) tile<M>(w, block, x.from(from, w), y + from * w.outputs);
    if constexpr (M > 1) {
        if (from < tokens) tiles<M / 2>(w, block, x, from, tokens, y);
    }
}

void int4_linear(const float* x, const uint8_t* packed, int64_t tokens, int64_t group, int64_t inputs, int64_t outputs,
                 float* y) {
    static thread_local Scratch<uint8_t> values_of;
    static thread_local Scratch<double> scales_of;
    const Int4 w(packed, group, inputs, outputs);
    uint8_t* values = values_of.of(tokens * inputs);
    double *scale = scales_of.of(2 * tokens), *zero = scale + tokens;
#pragma omp parallel for if (tokens * inputs > 8000)
    for (int64_t t = 0; t < tokens; t++) quantize(x + t * inputs, inputs, values + t * inputs, scale + t, zero + t);
    const Quantized quantized{values, scale, zero};
#pragma omp parallel for
    for (int64_t block = 0; block < w.blocks; block++) tiles<TILE>(w, block, quantized, 0, tokens, y);
}

#endif

// ------------------------------------------------------------------------------------------------------- int8 product

constexpr int GROUP = 64;  // inputs that share a scale, of weights and of activations
#if defined(__AVX512VNNI__)
constexpr int MOST_TOKENS = 12;  // whose sums and totals fill the registers
#else
constexpr int MOST_TOKENS = 4;
#endif

constexpr int AHEAD = 6;  // groups to fetch before they are needed: a tenth to a sixth of a dozen tokens' products

// A group of inputs of 16 outputs, w = scale * value. A packed weight is [blocks of outputs][groups] of these.
struct Int8 {
    uint8_t values[GROUP / 4][LANES][4];
    float scale[LANES], sum[LANES];  // of each output's values
};

// A block of outputs for M tokens: values [M][inputs], scale and zero [M][groups], y [M][outputs]. Whole numbers of a group
// have 24 bits at most, so single precision is exact up to the scales.
template <int M>
void tile(const Int8* w, int64_t groups, const uint8_t* values, const float* scale, const float* zero, float* y,
          int64_t outputs, int64_t count) {
    constexpr int REGISTERS = LANES / FLOATS;
    Floats total[M][REGISTERS] = {};
    for (int64_t g = 0; g < groups; g++, w++) {
        Sums sums[M];
        for (auto& sum : sums) sum = ::zero();
        for (int i = 0; i < GROUP / 4; i++) {
            const Bytes weights = load_bytes(w->values[i][0]);
            __builtin_prefetch(w[AHEAD].values[i][0]);
            for (int m = 0; m < M; m++)
                sums[m] = add_products(sums[m], weights, four(values + (m * groups + g) * GROUP + 4 * i));
        }
        for (int m = 0; m < M; m++) {
            const float scale_m = scale[m * groups + g], zero_m = zero[m * groups + g];
            Vec<int32_t, FLOATS> whole[REGISTERS];
            std::memcpy(whole, sums + m, sizeof whole);
            for (int r = 0; r < REGISTERS; r++) {
                const Floats sum = load_as<Floats>(w->sum + r * FLOATS), unit = load_as<Floats>(w->scale + r * FLOATS);
                total[m][r] += (__builtin_convertvector(whole[r], Floats) - zero_m * sum) * (scale_m * unit);
            }
        }
    }
    for (int m = 0; m < M; m++) std::memcpy(y + m * outputs, total[m], count * sizeof(float));
}

template <int... M>
void tile(int64_t tokens, std::integer_sequence<int, M...>, const Int8* w, int64_t groups, const uint8_t* values,
          const float* scale, const float* zero, float* y, int64_t outputs, int64_t count) {
    ((tokens == M + 1 ? tile<M + 1>(w, groups, values, scale, zero, y, outputs, count) : void()), ...);
}

// On the calling thread alone: a question has some ten tokens, and the model beside it wants the other cores.
void int8_linear(const float* x, const uint8_t* packed, int64_t tokens, int64_t inputs, int64_t outputs, float* y) {
    static thread_local Scratch<uint8_t> values_of;
    static thread_local Scratch<float> scales_of;
    const int64_t groups = inputs / GROUP, tiles = (tokens + MOST_TOKENS - 1) / MOST_TOKENS;
    uint8_t* values = values_of.of(tokens * inputs);
    float *scale = scales_of.of(2 * tokens * groups), *zero = scale + tokens * groups;
    for (int64_t g = 0; g < tokens * groups; g++) quantize(x + g * GROUP, GROUP, values + g * GROUP, scale + g, zero + g);
    const Int8* w = reinterpret_cast<const Int8*>(packed);
    for (int64_t output = 0; output < outputs; output += LANES, w += groups) {
        const int64_t count = std::min<int64_t>(LANES, outputs - output);
        for (int64_t tile_at = 0, from = 0; tile_at < tiles; tile_at++) {
            const int64_t size = (tokens - from + tiles - tile_at - 1) / (tiles - tile_at);  // as even as they divide
            tile(size, std::make_integer_sequence<int, MOST_TOKENS>(), w, groups, values + from * inputs,
                 scale + from * groups, zero + from * groups, y + from * outputs + output, outputs, count);
            from += size;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- attention

// exp(x) for x <= 0 as 2^n * e^r, |r| <= ln(2) / 2, with the series of e^r as far as it matters.
inline Reals exponential(Reals x) {
    constexpr bool DOUBLE = sizeof(Real) == 8;
    constexpr int MANTISSA = DOUBLE ? 52 : 23, TERMS = DOUBLE ? 13 : 7;
    constexpr Real LEAST = DOUBLE ? -700 : -87, ROUND = 1.5 * (int64_t(1) << MANTISSA);  // adding it rounds to a whole n
    constexpr Real LN2_HIGH = 0.693359375, LN2_LOW = -2.12194440054690583e-4;
    typedef Vec<std::conditional_t<DOUBLE, int64_t, int32_t>, WIDTH> Bits;
    x = x < LEAST ? Reals{} + LEAST : x;
    const Reals shifted = x * Real(1.44269504088896341) + ROUND, n = shifted - ROUND;
    const Reals r = (x - n * LN2_HIGH) - n * LN2_LOW;
    Reals series = Reals{} + 1;
    for (int i = TERMS; i > 0; i--) series = series * (r * (1 / Real(i))) + 1;
    return reinterpret_cast<Reals>(reinterpret_cast<Bits>(series) + (reinterpret_cast<Bits>(shifted) << MANTISSA));
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
    // Half-split rotary embedding of one head into `to` [dim]. Products are rounded before they are added, as in the
    // reference; of the two only one could be fused.
    template <class T>
    __attribute__((optimize("fp-contract=off"))) void rotate(int64_t token, const float* x, T* to) const {
        const float *cos = rotary + positions[token] * 2 * dim, *sin = cos + dim;
        for (int64_t i = 0, j = dim / 2; j < dim; i++, j++) {
            const float first = x[i] * cos[i] - x[j] * sin[i], second = x[j] * cos[j] + x[i] * sin[j];
            to[i] = first;
            to[j] = second;
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
        a.rotate(token, a.head(token, a.heads + h), key);
        for (int64_t i = 0; i < a.dim; i++) {
            a.keys[page + i * LANES + slot] = to_bfloat16(key[i]);
            a.values[page + slot * a.dim + i] = to_bfloat16(value[i]);
        }
    }
}

// In place: scores of the first `length` slots to probabilities, zero beyond, up to a whole page.
void softmax(Real* scores, int64_t length, int64_t slots) {
    std::fill(scores + length, scores + slots, -INFINITY);
    Reals most = load(scores), sums = {};
    for (int64_t s = WIDTH; s < slots; s += WIDTH) {
        const Reals next = load(scores + s);
        most = next > most ? next : most;
    }
    Real top = most[0], total = 0;
    for (int i = 1; i < WIDTH; i++) top = std::max(top, most[i]);
    for (int64_t s = 0; s < slots; s += WIDTH) {
        const Reals score = load(scores + s);
        const Reals weight = score == -INFINITY ? Reals{} : exponential(score - top);
        store(scores + s, weight);
        if (s < length) sums += weight;
    }
    for (int i = 0; i < WIDTH; i++) total += sums[i];
    for (int64_t s = 0; s < slots; s += WIDTH) store(scores + s, load(scores + s) / total);
}

// R queries that share a key-value head and a sequence: `per_token` heads of each of R / per_token consecutive tokens.
template <int R>
void attend(const Attention& a, int64_t token, int64_t first_head, int64_t per_token, Real* scratch) {
    constexpr int W = R <= 4 ? 4 : 1;  // sums side by side, because one would wait for itself when queries are few
    const int64_t kv_head = first_head / (a.heads / a.kv_heads);
    const int64_t last = a.positions[token + R / per_token - 1], pages = last / LANES + 1, slots = pages * LANES;
    Real *queries = scratch, *scores = scratch + R * a.dim;  // [R][dim], [R][slots]
    const Real scale = 1 / std::sqrt(static_cast<Real>(a.dim));
    for (int r = 0; r < R; r++) {
        const int64_t own = token + r / per_token;
        a.rotate(own, a.head(own, first_head + r % per_token), queries + r * a.dim);
    }
    for (int64_t slot = 0; slot < slots; slot += W * WIDTH) {
        const uint16_t* keys[W];
        Reals sums[R][W];
        for (int w = 0; w < W; w++) {
            const int64_t at = std::min(slot + w * WIDTH, slots - WIDTH);
            keys[w] = a.keys + a.page(token, at / LANES, kv_head) + at % LANES;
            for (int r = 0; r < R; r++) sums[r][w] = Reals{};
        }
        for (int64_t i = 0; i < a.dim; i++) {
            for (int w = 0; w < W; w++) {
                const Reals key = load_bfloat16(keys[w] + i * LANES);
                for (int r = 0; r < R; r++) sums[r][w] += queries[r * a.dim + i] * key;
            }
        }
        for (int w = 0; w < W && slot + w * WIDTH < slots; w++)
            for (int r = 0; r < R; r++) store(scores + r * slots + slot + w * WIDTH, sums[r][w] * scale);
    }
    for (int r = 0; r < R; r++) softmax(scores + r * slots, a.positions[token + r / per_token] + 1, slots);
    for (int64_t i = 0; i < a.dim; i += W * WIDTH) {
        Reals sums[R][W];
        for (int w = 0; w < W; w++)
            for (int r = 0; r < R; r++) sums[r][w] = Reals{};
        for (int64_t page = 0; page < pages; page++) {
            const uint16_t* values = a.values + a.page(token, page, kv_head);
            // Beyond the last token a page holds what an ended sequence left, perhaps NaN, which times 0 is NaN.
            for (int64_t slot = 0; slot < std::min<int64_t>(LANES, last + 1 - page * LANES); slot++) {
                for (int w = 0; w < W; w++) {
                    const Reals value = load_bfloat16(values + slot * a.dim + std::min(i + w * WIDTH, a.dim - WIDTH));
                    for (int r = 0; r < R; r++) sums[r][w] += scores[r * slots + page * LANES + slot] * value;
                }
            }
        }
        for (int w = 0; w < W && i + w * WIDTH < a.dim; w++)
            for (int r = 0; r < R; r++) {
                float* out = a.out + ((token + r / per_token) * a.heads + first_head + r % per_token) * a.dim;
                *reinterpret_cast<Vec<float, WIDTH>*>(out + i + w * WIDTH) =
                    __builtin_convertvector(sums[r][w], Vec<float, WIDTH>);
            }
    }
}

constexpr int MOST_QUERIES = 12;

template <int... R>
void attend(int queries, std::integer_sequence<int, R...>, const Attention& a, int64_t token, int64_t first_head,
            int64_t per_token, Real* scratch) {
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
        static thread_local Scratch<Real> scratch_of;
        const int64_t run = task / columns, token = starts[run], head = task % columns * per_token;
        const int queries = static_cast<int>((starts[run + 1] - token) * per_token);
        Real* scratch = scratch_of.of(MOST_QUERIES * (a.dim + longest + LANES));
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

extern const char emerald_kernels[] = EMERALD_KERNELS;  // which version of this file: its SHA-256

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

void emerald_int8_linear(const float* x, const uint8_t* packed, int64_t tokens, int64_t inputs, int64_t outputs, float* y) {
    int8_linear(x, packed, tokens, inputs, outputs, y);
}

int32_t aoti_torch_cpu_int8_linear(Handle x, Handle packed, int64_t outputs, Handle* y) {
    const int64_t tokens = size(x, 0);
    *y = new_matrix(tokens, outputs);
    int8_linear(data<float>(x), data<uint8_t>(packed), tokens, size(x, 1), outputs, data<float>(*y));
    return 0;
}

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
