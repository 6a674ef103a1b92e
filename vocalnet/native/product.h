// x Wᵀ + b for few rows, weights in bf16 or int8, read once from memory in the order in which they lie there.
#pragma once
#include "vector.h"

#define PANEL 64 // outputs that are computed side by side
#define TILE 6   // rows that share one reading of a panel from the cache: 24 sums, 4 weights

typedef struct {
    int32_t bits;        // of a weight: 16 (bf16) or 8
    int32_t in, out;     // in is a multiple of 4
    const void *weight;  // (panels, in / n, PANEL, n): n = 2 or 4 inputs side by side, a word of 32 bits
    const float *scale;  // (panels · PANEL) of int8 weights
    const int32_t *sums; // (panels · PANEL) sums of int8 weights over the inputs
    const float *bias;   // (panels · PANEL), or none
    float floor;         // the norm before divides by √(‖x‖² + floor²), its gain is in the weight; < 0: there is none
    int32_t block;       // of the Hadamard transform of the input; 0: there is none
} Linear;

INLINE int panels(const Linear *linear) { return (linear->out + PANEL - 1) / PANEL; }

// Bytes of a row that is ready for the product.
INLINE size_t row_bytes(const Linear *linear) { return (size_t)linear->in * linear->bits / 8; }

// Reads a row of floats or bf16, norms, mixes and rounds it. `wide` has room for the row in floats. Returns what the
// product is to be multiplied by; NaN if one of its elements is.
static float prepare(const Linear *linear, const void *row, size_t index, int half, float *wide, uint8_t *to) {
    const int in = linear->in;
    __m512 squares = _mm512_setzero_ps();
    for (int i = 0; i < in; i += LANES) {
        const int count = left(in, i);
        __m512 x = load_some(row, index + i, half, count);
        squares = _mm512_fmadd_ps(x, x, squares);
        store_some(wide, i, 0, count, x);
    }
    const float square = _mm512_reduce_add_ps(squares);
    float factor = isnan(square) ? NAN : 1;
    if (linear->floor >= 0) factor = 1 / sqrtf(square + linear->floor * linear->floor);
    if (linear->block) {
        hadamard(wide, in, linear->block);
        factor /= sqrtf(linear->block);
    }
    if (linear->bits == 16) {
        for (int i = 0; i < in; i += LANES) {
            const int count = left(in, i);
            store_some(to, i, 1, count, _mm512_mul_ps(load_some(wide, i, 0, count), _mm512_set1_ps(factor)));
        }
        return 1;
    }
    __m512 peaks = _mm512_set1_ps(1e-30f);
    for (int i = 0; i < in; i += LANES) {
        const int count = left(in, i);
        peaks = _mm512_max_ps(peaks, _mm512_abs_ps(load_some(wide, i, 0, count)));
    }
    const float peak = _mm512_reduce_max_ps(peaks);
    const __m512 times = _mm512_set1_ps(127 / peak);
    for (int i = 0; i < in; i += LANES) { // unsigned, as the instruction wants it: 128 is zero
        const int count = left(in, i);
        __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(load_some(wide, i, 0, count), times));
        q = _mm512_add_epi32(q, _mm512_set1_epi32(128));
        _mm_mask_storeu_epi8(to + i, lanes(count), _mm512_cvtepi32_epi8(q));
    }
    return factor * peak / 127;
}

// 4 bytes, in every lane.
INLINE __m512i word(const uint8_t *from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, 4);
    return _mm512_set1_epi32(bits);
}

// One panel of outputs for a constant number of rows and kind of weights. Sums of bf16 products are floats, in the same
// registers that hold the integers of int8.
INLINE void tile_of(const int rows, const int int8, const Linear *l, int panel, const uint8_t *x, size_t stride,
                    const float *factor, float (*to)[PANEL]) {
    const int words = (int)(row_bytes(l) / 4);
    const uint8_t *w = (const uint8_t *)l->weight + (size_t)panel * words * 4 * PANEL;
    __m512i sum[TILE][4];
    __m512 bias[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
        bias[j] = l->bias ? _mm512_loadu_ps(l->bias + panel * PANEL + j * LANES) : _mm512_setzero_ps();
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[m][j] = int8 ? _mm512_setzero_si512() : _mm512_castps_si512(bias[j]);
    for (int k = 0; k < words; k++, w += 4 * PANEL) {
        __m512i part[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) part[j] = _mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            __m512i given = word(x + m * stride + 4 * k);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[m][j] = int8 ? _mm512_dpbusd_epi32(sum[m][j], given, part[j])
                                 : _mm512_castps_si512(dot_bf16(_mm512_castsi512_ps(sum[m][j]), given, part[j]));
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const int at = panel * PANEL + j * LANES;
        __m512i shift = int8 ? _mm512_slli_epi32(_mm512_loadu_si512(l->sums + at), 7) : _mm512_setzero_si512();
        __m512 scale = int8 ? _mm512_loadu_ps(l->scale + at) : _mm512_setzero_ps();
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            __m512 y = _mm512_castsi512_ps(sum[m][j]);
            if (int8) {
                y = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum[m][j], shift));
                y = _mm512_mul_ps(y, _mm512_mul_ps(scale, _mm512_set1_ps(factor[m])));
                y = _mm512_add_ps(y, bias[j]);
            }
            _mm512_storeu_ps(to[m] + j * LANES, y);
        }
    }
}

// One panel of outputs for up to TILE rows that are `stride` bytes apart.
static void tile(const Linear *l, int panel, int rows, const uint8_t *x, size_t stride, const float *factor,
                 float (*to)[PANEL]) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        if (l->bits == 8) tile_of(n, 1, l, panel, x, stride, factor, to);                                              \
        else tile_of(n, 0, l, panel, x, stride, factor, to);                                                           \
        break;
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}
