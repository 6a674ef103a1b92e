// Attention of few new rows over a cache of rows (heads, capacity, size), by head.
#pragma once
#include <string.h>
#include "vector.h"

#define QUERIES 5 // rows whose sums over the values stay in registers
#define BLOCK 40  // rows whose scores are in memory at once

typedef struct {
    int32_t rows;              // new ones
    int32_t heads, key_heads;  // heads is a multiple of key_heads
    int32_t size;              // of a head, a multiple of 32
    int32_t half;              // cosines and sines are bf16, not float
    int32_t half_cache;        // keys and values are bf16
    const void *cos, *sin;     // (rows, 1 or heads + key_heads, size); the sign of the sine's first half is in it
    int64_t turn_row, turn_head; // elements from row to row and head to head; 0 between heads that share theirs
    void *cache;               // (key_heads keys, key_heads values; capacity; size)
    int32_t capacity;          // rows of the cache
    const int64_t *places;     // cache rows of the new rows
    int32_t first, last;       // visible cache rows: first ≤ row < last
    int32_t causal;            // without a mask: new row t sees rows < last - (rows - 1 - t)
    int32_t mask_kind;         // 0 none; 1 bytes, 1 = visible; 2 floats, 3 bf16, to add
    const void *mask;          // (rows, last - first)
    int64_t mask_row;          // elements from row to row
} Attention;

// Whether all rows lie in the cache.
INLINE int inside(const Attention *a) {
    int good = 0 <= a->first && a->first < a->last && a->last <= a->capacity;
    for (int t = 0; t < a->rows; t++) good &= 0 <= a->places[t] && a->places[t] < a->capacity;
    return good;
}

// Rotary position: to = from · cos + (halves of from swapped) · sin, times `gain`.
static void turn(const Attention *a, const float *from, int row, int head, float gain, float *to) {
    const size_t at = row * a->turn_row + head * a->turn_head;
    const int middle = a->size / 2;
    for (int d = 0; d < a->size; d += LANES) {
        __m512 x = _mm512_mul_ps(_mm512_loadu_ps(from + d), load(a->cos, at + d, a->half));
        __m512 other = _mm512_loadu_ps(from + (d < middle ? d + middle : d - middle));
        x = _mm512_fmadd_ps(other, load(a->sin, at + d, a->half), x);
        _mm512_storeu_ps(to + d, _mm512_mul_ps(x, _mm512_set1_ps(gain)));
    }
}

// Stores keys and values of one key head. qkv: (rows, heads + 2 · key_heads, size).
static void write_head(const Attention *a, const float *qkv, int head) {
    const int size = a->size, total = a->heads + 2 * a->key_heads;
    float turned[size];
    for (int t = 0; t < a->rows; t++) {
        const float *key = qkv + ((size_t)t * total + a->heads + head) * size;
        const float *value = key + (size_t)a->key_heads * size;
        turn(a, key, t, a->heads + head, 1, turned);
        const size_t to_key = ((size_t)head * a->capacity + a->places[t]) * size;
        const size_t to_value = to_key + (size_t)a->key_heads * a->capacity * size;
        for (int d = 0; d < size; d += LANES) {
            store(a->cache, to_key + d, a->half_cache, _mm512_loadu_ps(turned + d));
            store(a->cache, to_value + d, a->half_cache, _mm512_loadu_ps(value + d));
        }
    }
}

// Products of one query with 16 keys; past `count` the last one counts again.
INLINE __m512 products(const void *query, const void *keys, const int size, const int half, int count) {
    __m512 sum[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
        const size_t row = (size_t)(i < count ? i : count - 1) * size;
        sum[i] = _mm512_setzero_ps();
        if (half)
#pragma GCC unroll 4
            for (int d = 0; d < size; d += 2 * LANES)
                sum[i] = dot_bf16(sum[i], _mm512_loadu_si512((const bf16 *)query + d),
                                  _mm512_loadu_si512((const bf16 *)keys + row + d));
        else
#pragma GCC unroll 8
            for (int d = 0; d < size; d += LANES)
                sum[i] = _mm512_fmadd_ps(_mm512_loadu_ps((const float *)query + d),
                                         _mm512_loadu_ps((const float *)keys + row + d), sum[i]);
    }
    return sums_of_16(sum);
}

INLINE __m512 some_products(const void *query, const void *keys, int size, int half, int count) {
    if (size == 64 && count == LANES)
        return half ? products(query, keys, 64, 1, LANES) : products(query, keys, 64, 0, LANES);
    return products(query, keys, size, half, count);
}

// to[t] = Σ weights[t] · values over `parts` vectors of each value.
INLINE void weighted(const int rows, const int parts, const float *weights, size_t columns, const void *values,
                     size_t size, const int half, int count, float *to, size_t to_row) {
    __m512 sum[QUERIES][4];
#pragma GCC unroll 5
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int j = 0; j < parts; j++) sum[t][j] = _mm512_setzero_ps();
    for (int i = 0; i < count; i++) {
        __m512 value[4];
#pragma GCC unroll 4
        for (int j = 0; j < parts; j++) value[j] = load(values, i * size + j * LANES, half);
#pragma GCC unroll 5
        for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
            for (int j = 0; j < parts; j++)
                sum[t][j] = _mm512_fmadd_ps(_mm512_set1_ps(weights[t * columns + i]), value[j], sum[t][j]);
    }
#pragma GCC unroll 5
    for (int t = 0; t < rows; t++)
#pragma GCC unroll 4
        for (int j = 0; j < parts; j++) _mm512_storeu_ps(to + t * to_row + j * LANES, sum[t][j]);
}

static void weighted_values(int rows, int parts, const float *weights, size_t columns, const void *values, size_t size,
                            int half, int count, float *to, size_t to_row) {
#define CASE(n, p)                                                                                                     \
    case 8 * n + p:                                                                                                    \
        if (half) weighted(n, p, weights, columns, values, size, 1, count, to, to_row);                                \
        else weighted(n, p, weights, columns, values, size, 0, count, to, to_row);                                     \
        break;
    switch (8 * rows + parts) {
        CASE(1, 4) CASE(2, 4) CASE(3, 4) CASE(4, 4) CASE(5, 4)
        CASE(1, 2) CASE(2, 2) CASE(3, 2) CASE(4, 2) CASE(5, 2)
    }
#undef CASE
}

// Turns scores (count) into weights that sum to 1; all invisible: zeros.
static void softmax(float *scores, int count) {
    __m512 peaks = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < count; i += LANES) {
        const int some = left(count, i);
        __m512 x = load_some(scores, i, 0, some);
        peaks = _mm512_mask_max_ps(peaks, lanes(some), peaks, x);
    }
    const float peak = _mm512_reduce_max_ps(peaks);
    if (peak == -INFINITY) {
        memset(scores, 0, count * sizeof(float));
        return;
    }
    __m512 total = _mm512_setzero_ps();
    for (int i = 0; i < count; i += LANES) {
        const int some = left(count, i);
        __m512 x = exponential(_mm512_sub_ps(load_some(scores, i, 0, some), _mm512_set1_ps(peak)));
        total = _mm512_mask_add_ps(total, lanes(some), total, x);
        store_some(scores, i, 0, some, x);
    }
    const __m512 part = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
    for (int i = 0; i < count; i += LANES) {
        const int some = left(count, i);
        store_some(scores, i, 0, some, _mm512_mul_ps(load_some(scores, i, 0, some), part));
    }
}

// Floats that `attend_head` needs to work in.
INLINE size_t attention_room(const Attention *a) {
    const size_t rows = a->rows < BLOCK ? a->rows : BLOCK;
    return a->size + rows * (a->size + (size_t)(a->last - a->first) + LANES);
}

// Adds the mask to scores of new row t for `some` cache rows from `from` on.
INLINE __m512 masked(const Attention *a, int t, int from, int some, __m512 x) {
    const size_t at = t * a->mask_row + from;
    if (a->mask_kind == 1) {
        __m128i seen = _mm_maskz_loadu_epi8(lanes(some), (const uint8_t *)a->mask + at);
        return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), _mm_test_epi8_mask(seen, seen), x);
    }
    return a->mask_kind ? _mm512_add_ps(x, load_some(a->mask, at, a->mask_kind == 3, some)) : x;
}

// New rows from ≤ t < to of one query head over what is visible; the cache holds them already.
static void attend_block(const Attention *a, const float *qkv, int head, int from, int to, float *room, float *out) {
    const int size = a->size, half = a->half_cache, rows = to - from, all = a->last - a->first;
    const int count = a->causal ? all - (a->rows - to) : all; // what the newest of them sees
    const int total = a->heads + 2 * a->key_heads, key_head = head / (a->heads / a->key_heads);
    const size_t width = half ? sizeof(bf16) : sizeof(float), columns = (size_t)all + LANES;
    const char *keys = (const char *)a->cache + width * ((size_t)key_head * a->capacity + a->first) * size;
    const char *values = keys + width * a->key_heads * a->capacity * size;
    float *turned = room, *scores = room + size;
    char *queries = (char *)(scores + rows * columns); // in the cache's type
    const float gain = 1 / sqrtf(size);
    for (int t = 0; t < rows; t++) {
        turn(a, qkv + ((size_t)(from + t) * total + head) * size, from + t, head, gain, turned);
        for (int d = 0; d < size; d += LANES) store(queries, (size_t)t * size + d, half, _mm512_loadu_ps(turned + d));
    }
    for (int i = 0; i < count; i += LANES) {
        const int some = left(count, i);
        for (int t = 0; t < rows; t++) {
            __m512 x = some_products(queries + width * t * size, keys + width * i * size, size, half, some);
            _mm512_storeu_ps(scores + t * columns + i, masked(a, from + t, i, some, x));
        }
    }
    for (int t = 0; t < rows; t++) {
        const int seen = a->causal ? count - (rows - 1 - t) : count;
        softmax(scores + t * columns, seen);
        for (int i = seen; i < count; i++) scores[t * columns + i] = 0;
    }
    const int parts = size % 64 ? 2 : 4;
    for (int t = 0; t < rows; t += QUERIES)
        for (int d = 0; d < size; d += parts * LANES)
            weighted_values(rows - t < QUERIES ? rows - t : QUERIES, parts, scores + t * columns, columns,
                            values + width * d, size, half, count,
                            out + ((size_t)(from + t) * a->heads + head) * size + d, (size_t)a->heads * size);
}

// One query head of all new rows. out: (rows, heads, size).
static void attend_head(const Attention *a, const float *qkv, int head, float *room, float *out) {
    for (int from = 0; from < a->rows; from += BLOCK)
        attend_block(a, qkv, head, from, from + BLOCK < a->rows ? from + BLOCK : a->rows, room, out);
}
