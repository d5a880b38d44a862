// A vector of W floats for the instruction set this file is compiled for, and the few shuffles the
// kernels need. Everything has internal linkage (see table.h for why).
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>
#if defined(REGROW_ISA_AVX512) || defined(REGROW_ISA_AVX2)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define LAMBDA __attribute__((always_inline))

namespace {

#if defined(REGROW_ISA_AVX512)
constexpr int W = 16, kAccumulators = 24;
#elif defined(REGROW_ISA_AVX2)
constexpr int W = 8, kAccumulators = 12;
#else
constexpr int W = 4, kAccumulators = 12;
#endif

typedef float V __attribute__((vector_size(W * 4)));
typedef int32_t VInt __attribute__((vector_size(W * 4)));
typedef uint32_t VBits __attribute__((vector_size(W * 4)));
typedef float VAligned __attribute__((vector_size(W * 4), may_alias));
typedef float VAny __attribute__((vector_size(W * 4), may_alias, aligned(4)));

INLINE V load(const float* p) { return *reinterpret_cast<const VAligned*>(p); }
INLINE V load_any(const float* p) { return *reinterpret_cast<const VAny*>(p); }
INLINE void store(float* p, V v) { *reinterpret_cast<VAligned*>(p) = v; }
INLINE void store_any(float* p, V v) { *reinterpret_cast<VAny*>(p) = v; }

// Up to n floats, the rest zero.
INLINE V load_part(const float* p, int64_t n) {
    if (n >= W) return load_any(p);
    float line[W] __attribute__((aligned(64))) = {};
    memcpy(line, p, sizeof(float) * n);
    return load(line);
}
INLINE void store_part(float* p, V v, int64_t n) {
    if (n >= W) return store_any(p, v);
    float line[W] __attribute__((aligned(64)));
    store(line, v);
    memcpy(p, line, sizeof(float) * n);
}

// A store around the caches, to a place aligned to a vector: the line is not read from memory first.
// finish_streams() makes such stores visible to other threads.
INLINE void stream(float* p, V v) {
#if defined(REGROW_SANITIZE)
    store(p, v);  // sanitizers do not look into intrinsics
#elif defined(REGROW_ISA_AVX512)
    _mm512_stream_ps(p, v);
#elif defined(REGROW_ISA_AVX2)
    _mm256_stream_ps(p, v);
#else
    store(p, v);
#endif
}
INLINE void finish_streams() {
#if defined(REGROW_ISA_AVX512) || defined(REGROW_ISA_AVX2)
    _mm_sfence();
#endif
}

// Whether a thread should store its rows so, which begin at `places` (several addresses, or-ed): they are more than a
// private cache holds, and every vector of them is aligned.
constexpr int64_t kStreamFloats = 1 << 19;
INLINE bool streams(uintptr_t places, int64_t rows, int64_t width) {
    return rows * width > kStreamFloats && width % 16 == 0 && places % 64 == 0;
}
INLINE uintptr_t place(const float* p) { return reinterpret_cast<uintptr_t>(p); }

// unroll<N>(f) calls f(Int<0>), ..., f(Int<N-1>): the indices are constants, so arrays of V indexed by
// them stay in registers (a loop with an unroll pragma does not guarantee that).
template <int I>
struct Int {
    constexpr operator int() const { return I; }
};
template <class F, int... I>
INLINE void unroll_impl(F&& f, std::integer_sequence<int, I...>) {
    (f(Int<I>{}), ...);
}
template <int N, class F>
INLINE void unroll(F&& f) {
    unroll_impl(f, std::make_integer_sequence<int, N>{});
}

// out[lane] = (a, b)[Map::at(lane)], with Map known at compile time.
template <class Map, int... L>
INLINE V shuffle_impl(V a, V b, std::integer_sequence<int, L...>) {
    return __builtin_shufflevector(a, b, Map::at(L)...);
}
template <class Map>
INLINE V shuffle(V a, V b) {
    return shuffle_impl<Map>(a, b, std::make_integer_sequence<int, W>{});
}

INLINE V splat(float s) {
#if defined(REGROW_ISA_AVX512)
    return _mm512_set1_ps(s);
#elif defined(REGROW_ISA_AVX2)
    return _mm256_set1_ps(s);
#else
    return V{s, s, s, s};
#endif
}

// Lanes (r, t), t < G fastest: bcast gives p[t] (G floats repeated), expand gives p[r] (each float G times).
template <int G>
INLINE V bcast(const float* p) {
    if constexpr (G == 1) {
        return splat(*p);
    } else if constexpr (G == W) {
        return load(p);
    } else {
#if defined(REGROW_ISA_AVX512)
        if constexpr (G == 2) return _mm512_castpd_ps(_mm512_broadcastsd_pd(_mm_load_sd((const double*)p)));
        if constexpr (G == 4) return _mm512_broadcast_f32x4(_mm_load_ps(p));
        if constexpr (G == 8) return _mm512_broadcast_f32x8(_mm256_load_ps(p));
#elif defined(REGROW_ISA_AVX2)
        if constexpr (G == 2) return _mm256_castpd_ps(_mm256_broadcast_sd((const double*)p));
        if constexpr (G == 4) return _mm256_broadcast_ps((const __m128*)p);
#else
        return V{p[0], p[1], p[0], p[1]};
#endif
    }
}

template <int G>
struct ExpandMap {
    static constexpr int at(int lane) { return lane / G; }
};
template <int G>
INLINE V expand(const float* p) {
    if constexpr (G == 1) {
        return load_any(p);
    } else if constexpr (G == W) {
        return splat(*p);
    } else {
#if defined(REGROW_ISA_AVX512)
        V v;
        if constexpr (G == 2) v = _mm512_castps256_ps512(_mm256_loadu_ps(p));
        if constexpr (G == 4) v = _mm512_castps128_ps512(_mm_loadu_ps(p));
        if constexpr (G == 8) v = _mm512_castpd_ps(_mm512_castpd128_pd512(_mm_load_sd((const double*)p)));
        return shuffle<ExpandMap<G>>(v, v);
#elif defined(REGROW_ISA_AVX2)
        V v;
        if constexpr (G == 2) v = _mm256_castps128_ps256(_mm_loadu_ps(p));
        if constexpr (G == 4) v = _mm256_castps128_ps256(_mm_castpd_ps(_mm_load_sd((const double*)p)));
        return shuffle<ExpandMap<G>>(v, v);
#else
        return V{p[0], p[0], p[1], p[1]};
#endif
    }
}

// Lanes (r, t) <-> (t, r), where t < G and r < W / G.
template <int G>
struct TokenMajorMap {
    static constexpr int at(int lane) { return (lane % (W / G)) * G + lane / (W / G); }
};
template <int G>
struct FeatureMajorMap {
    static constexpr int at(int lane) { return (lane % G) * (W / G) + lane / G; }
};
template <int G>
INLINE V token_major(V v) {
    if constexpr (G == 1 || G == W) return v;
    return shuffle<TokenMajorMap<G>>(v, v);
}
template <int G>
INLINE V feature_major(V v) {
    if constexpr (G == 1 || G == W) return v;
    return shuffle<FeatureMajorMap<G>>(v, v);
}

// Transposes G vectors of lanes (c < G, k < W / G): v[t] lanes (c, k) -> v[c] lanes (t, k), by butterflies
// that exchange one bit of the vector's number with the same bit of the lane's piece.
template <int Bit>  // in lanes
struct LowMap {
    static constexpr int at(int lane) { return lane & Bit ? W + (lane ^ Bit) : lane; }
};
template <int Bit>
struct HighMap {
    static constexpr int at(int lane) { return lane & Bit ? W + lane : lane ^ Bit; }
};
template <int G, int S = 1>
INLINE void transpose(V* v) {
    if constexpr (S < G) {
        unroll<G>([&](auto i) LAMBDA {
            if constexpr ((i & S) == 0) {
                V a = v[i], b = v[i + S];
                v[i] = shuffle<LowMap<S * (W / G)>>(a, b);
                v[i + S] = shuffle<HighMap<S * (W / G)>>(a, b);
            }
        });
        transpose<G, S * 2>(v);
    }
}

// Sums over t: v[i], i < G, with lanes (j, t) -> one vector with lanes (j, i).
template <int Bit>
struct KeepMap {  // the lanes that already sit where they are wanted
    static constexpr int at(int lane) { return lane & Bit ? W + lane : lane; }
};
template <int Bit>
struct SwapMap {  // their partners
    static constexpr int at(int lane) { return lane & Bit ? W + (lane ^ Bit) : (lane ^ Bit); }
};
template <int G, int S = 1>
INLINE V sum_tokens(V* v) {
    if constexpr (S < G) {
        unroll<G>([&](auto i) LAMBDA {
            if constexpr (i % (2 * S) == 0) {
                v[i] = shuffle<KeepMap<S>>(v[i], v[i + S]) + shuffle<SwapMap<S>>(v[i], v[i + S]);
            }
        });
        return sum_tokens<G, S * 2>(v);
    }
    return v[0];
}

// exp(x) for x in [-87, 0], with a relative error below 2e-7.
INLINE V exp_negative(V x) {
    constexpr float kRound = 12582912.0f;  // adding 1.5 * 2^23 leaves an integer in the low bits
    const V shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    const V r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
    V p = r * 0.0013814611593261361f + 0.008368710055947304f;
    p = p * r + 0.04166838899254799f;
    p = p * r + 0.1666652113199234f;
    p = p * r + 0.4999999403953552f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return (V)((VBits)p + ((VBits)shifted << 23));  // times 2^n
}

// gelu(h) = h Phi(h) and its slope Phi(h) + h phi(h), with Phi and phi the normal distribution and its density.
// With E = exp(-h^2 / 2), the upper tail 1 - Phi(|h|) is E times a polynomial in 1 / (1 + 0.3 |h|), fitted to a
// relative error below 4e-7, and phi is E / sqrt(2 pi): one exponential serves both.
INLINE V gelu(V h, V& slope) {
    constexpr float kEnd = 13.0f;  // further out the tail is nothing, and E would leave the normal numbers
    V u = h < 0 ? -h : h;
    u = u > kEnd ? V{} + kEnd : u;
    const V square = u * u, e = exp_negative(square * -0.5f);
    const V t = 1.0f / (u * 0.3f + 1.0f);
    V p = t * 0.036088887602090836f - 0.15893392264842987f;
    p = p * t + 0.2093467116355896f;
    p = p * t - 0.05645039305090904f;
    p = p * t + 0.13003277778625488f;
    p = p * t + 0.099465012550354f;
    p = p * t + 0.12082632631063461f;
    p = p * t + 0.1196245402097702f;
    const V tail = p * t * e, bump = u * e * 0.39894228f;
    const V below = h < 0 ? tail : 1.0f - tail;
    slope = below + (h < 0 ? -bump : bump);
    return h * below;
}

// gelu(h) where no slope is wanted, without an exponential: 1/2 + u P(u^2) / Q(u^2) for Phi. As far from h Phi(h) as
// torch's own, 1e-6 at most.
INLINE V gelu(V h) {
    constexpr float kEnd = 5.6f;  // further down there is less than 6e-8 left
    V u = h > kEnd ? V{} + kEnd : h;
    u = u < -kEnd ? V{} - kEnd : u;
    const V s = u * u;
    V p = s * 2.171140778273184e-08f + 6.58988165014307e-06f;
    p = p * s + 0.00019011038239113986f;
    p = p * s + 0.004805148579180241f;
    p = p * s + 0.03584317862987518f;
    p = p * s + 0.39894190430641174f;
    V q = s * 1.1851251429106924e-06f + 8.099443948594853e-05f;
    q = q * s + 0.0020031058229506016f;
    q = q * s + 0.02980159781873226f;
    q = q * s + 0.2565082907676697f;
    q = q * s + 1.0f;
    const V below = u * p / q + 0.5f;
    return h < -kEnd ? V{} : h * below;
}

}  // namespace
