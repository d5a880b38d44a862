// Dropout by counter: whether an element is kept follows from the seed, its row and its column, so a mask is never
// stored, and is the same for every instruction set, thread and split of the work. Included once per instruction set.
//
// The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). The element
// (row, col) uses the counter ((col / 128) * 16 + col % 16, row's low word, row's high word, 0) under the key
// (seed's low word, seed's high word). With j = (col / 16) % 8, it owns the low (j even) or high (j odd) half of the
// output word j / 2, and is kept where these 16 bits are no less than the threshold. So 16 counters give the 128
// columns of a chunk, each word in the order in which it is needed.
#pragma once
#include "vec.h"

namespace {

constexpr int kChunk = 128;  // columns that are drawn together

struct Dropout {
    uint32_t key[10][2];  // of each round
    int32_t below;        // the threshold less one
    float scale;          // of what is kept
};

// An element is dropped with the probability threshold / 65536, threshold < 65536.
INLINE Dropout make_dropout(uint64_t seed, uint32_t threshold) {
    Dropout d;
    for (uint32_t i = 0; i < 10; ++i) {
        d.key[i][0] = uint32_t(seed) + i * 0x9E3779B9u;
        d.key[i][1] = uint32_t(seed >> 32) + i * 0xBB67AE85u;
    }
    d.below = int32_t(threshold) - 1;
    d.scale = 65536.0f / float(65536 - threshold);
    return d;
}

// One word of W / 2 counters, each in the low half of 64 bits. What the high halves hold is never looked at: products
// need not be taken apart and put together again in every round.
typedef uint64_t VWide __attribute__((vector_size(W * 4)));
typedef uint32_t VWord __attribute__((vector_size(W * 4)));

INLINE VWide multiply_low(VWide a, uint32_t m) {
#if defined(REGROW_ISA_AVX512)
    return (VWide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(m));
#elif defined(REGROW_ISA_AVX2)
    return (VWide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#else
    return (a & 0xffffffffu) * uint64_t(m);
#endif
}

// (a >> 32) ^ b ^ key in the low halves.
INLINE VWide mix(VWide a, VWide b, uint32_t key) {
#if defined(REGROW_ISA_AVX512)
    return (VWide)_mm512_ternarylogic_epi32((__m512i)(a >> 32), (__m512i)b, _mm512_set1_epi32(int32_t(key)), 0x96);
#else
    return (a >> 32) ^ b ^ (VWide)(VWord{} + key);
#endif
}

// Ten rounds on counters (c[0], c[1], c[2], c[3]), in place.
INLINE void philox(const Dropout& d, VWide* c) {
    unroll<10>([&](auto round) LAMBDA {
        const VWide a = multiply_low(c[0], 0xD2511F53u), b = multiply_low(c[2], 0xCD9E8D57u);
        c[0] = mix(b, c[1], d.key[round][0]);
        c[1] = b;
        c[2] = mix(a, c[3], d.key[round][1]);
        c[3] = a;
    });
}

struct InterleaveMap {  // the low halves of two vectors of 64-bit lanes, in turn
    static constexpr int at(int lane) { return lane % 2 ? W + lane - 1 : lane; }
};

// The random numbers of one chunk of a row: word w of its 16 counters.
struct Draw {
    VWord word[4][16 / W];
};

alignas(64) constexpr uint64_t kEven[8] = {0, 2, 4, 6, 8, 10, 12, 14};

// Columns [128 * chunk, 128 * (chunk + 1)).
INLINE Draw draw(const Dropout& d, uint64_t row, uint32_t chunk) {
    Draw result;
    unroll<16 / W>([&](auto part) LAMBDA {
        const VWide first = *reinterpret_cast<const VWide*>(kEven) + uint64_t(uint32_t(chunk * 16 + part * W));
        const VWide low = VWide{} + uint64_t(uint32_t(row)), high = VWide{} + (row >> 32);
        VWide even[4] = {first, low, high, VWide{}}, odd[4] = {first + 1, low, high, VWide{}};
        philox(d, even);
        philox(d, odd);
        unroll<4>([&](auto w) LAMBDA { result.word[w][part] = (VWord)shuffle<InterleaveMap>((V)even[w], (V)odd[w]); });
    });
    return result;
}

// The factors, 0 or the scale, of the I-th vector of a chunk: columns [I * W, (I + 1) * W) of its 128. I is known at
// compile time (see unroll), so that the words stay in registers.
template <int I>
INLINE V keep_factor(const Dropout& d, const Draw& r, Int<I>) {
    constexpr int j = I * W / 16;
    const VWord word = r.word[j / 2][I * W % 16 / W];
    const VInt bits = (VInt)(j % 2 ? word >> 16 : word & 0xffffu);
#if defined(REGROW_ISA_AVX512)
    return _mm512_maskz_mov_ps(_mm512_cmpgt_epi32_mask((__m512i)bits, _mm512_set1_epi32(d.below)), splat(d.scale));
#else
    return (V)((bits > d.below) & (VInt)splat(d.scale));
#endif
}

// The same of a whole chunk, to out[128], aligned to a vector: for the end of a row.
INLINE void keep_factors(const Dropout& d, uint64_t row, uint32_t chunk, float* out) {
    const Draw r = draw(d, row, chunk);
    unroll<kChunk / W>([&](auto i) LAMBDA { store(out + i * W, keep_factor(d, r, i)); });
}

}  // namespace
