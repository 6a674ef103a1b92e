// Vectors of 16 floats: conversions, exponential, sums, Hadamard transform.
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

// How many of `total` elements are left for a vector that begins at `at`, and the mask of so many lanes.
INLINE int left(int total, int at) { return total - at < LANES ? total - at : LANES; }
INLINE __mmask16 lanes(int count) { return (__mmask16)((1u << count) - 1); }

INLINE __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

// To the nearest, ties to even. NaN stays NaN unless its payload overflows, which no weight of ours does.
INLINE __m256i narrow(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    bits = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
}

// Element `index` onwards of an array of floats or bf16.
INLINE __m512 load(const void *from, size_t index, int half) {
    return half ? widen(_mm256_loadu_si256((const void *)((const bf16 *)from + index)))
                : _mm512_loadu_ps((const float *)from + index);
}

INLINE void store(void *to, size_t index, int half, __m512 x) {
    if (half) _mm256_storeu_si256((void *)((bf16 *)to + index), narrow(x));
    else _mm512_storeu_ps((float *)to + index, x);
}

// The same for the first `count` ≤ 16 elements only; the others read as 0.
INLINE __m512 load_some(const void *from, size_t index, int half, int count) {
    return half ? widen(_mm256_maskz_loadu_epi16(lanes(count), (const bf16 *)from + index))
                : _mm512_maskz_loadu_ps(lanes(count), (const float *)from + index);
}

INLINE void store_some(void *to, size_t index, int half, int count, __m512 x) {
    if (half) _mm256_mask_storeu_epi16((bf16 *)to + index, lanes(count), narrow(x));
    else _mm512_mask_storeu_ps((float *)to + index, lanes(count), x);
}

// a · b in pairs of bf16, added to 16 floats.
INLINE __m512 dot_bf16(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, high)),
                           _mm512_castsi512_ps(_mm512_and_si512(b, high)), sum);
#endif
}

// eˣ to about 2 units in the last place (Cody and Waite's reduction, Taylor's polynomial); below -87 it is 0. NaN stays.
INLINE __m512 exponential(__m512 x) {
    __mmask16 alive = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    f = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), f);
    __m512 p = _mm512_set1_ps(1.0f / 720);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 120));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 24));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f / 6));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(alive, p, n);
}

INLINE __m512 silu(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Lane i of the result is the sum of s[i].
INLINE __m512 sums_of_16(const __m512 *s) {
    __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(s[2 * i], s[2 * i + 1]), _mm512_unpackhi_ps(s[2 * i], s[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d low = _mm512_castps_pd(a[2 * i]), high = _mm512_castps_pd(a[2 * i + 1]);
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

// Swaps lanes i and i ^ step, and adds or subtracts: one stage of the transform.
INLINE __m512 butterfly(__m512 x, int step) {
    __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i other = _mm512_xor_si512(lane, _mm512_set1_epi32(step));
    __mmask16 second = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(step));
    __m512 swapped = _mm512_permutexvar_ps(other, x);
    return _mm512_mask_sub_ps(_mm512_add_ps(swapped, x), second, swapped, x);
}

// Hadamard transform of blocks of 16, 32 or 64 in place, without its factor block^-½.
INLINE void hadamard(float *x, int count, int block) {
    for (int at = 0; at < count; at += block) {
        __m512 v[4];
        const int parts = block / LANES;
        for (int i = 0; i < parts; i++) {
            v[i] = _mm512_loadu_ps(x + at + i * LANES);
#pragma GCC unroll 4
            for (int step = 1; step < LANES; step *= 2) v[i] = butterfly(v[i], step);
        }
        for (int half = 1; half < parts; half *= 2)
            for (int i = 0; i < parts; i++)
                if (!(i & half)) {
                    __m512 a = v[i], b = v[i + half];
                    v[i] = _mm512_add_ps(a, b);
                    v[i + half] = _mm512_sub_ps(a, b);
                }
        for (int i = 0; i < parts; i++) _mm512_storeu_ps(x + at + i * LANES, v[i]);
    }
}
