// Steps of Llama layers over a cache, for few rows at a time: `vocalnet_layers` runs whole layers, `vocalnet_linear` one
// product, `vocalnet_attend` the attention alone. Each is one parallel region; work is handed out piece by piece, so
// that a thread that was put off does not hold up the others for longer than its piece. Every row is computed by the
// same operations in the same order however many rows there are.
#include <omp.h>
#include <pthread.h>
#include <stdlib.h>

#include "attention.h"
#include "product.h"

typedef struct {
    int32_t width, ffn;
    Linear qkv, output, gate_up, down; // a panel of gate_up is 32 gates and their 32 ups
} Layer;

// Memory that a thread keeps between calls, and gives back when it ends.
typedef struct {
    void *own, *common; // to work in alone; what it shares with its team
    size_t own_size, common_size;
} Rooms;

#define KEPT ((size_t)8 << 20) // bytes; larger rooms are given back at once

static pthread_key_t rooms_key;
static __thread Rooms *rooms;

static void give_back(void *given) {
    Rooms *all = given;
    free(all->own);
    free(all->common);
    free(all);
}

__attribute__((constructor)) static void make_key(void) { pthread_key_create(&rooms_key, give_back); }

static Rooms *my_rooms(void) {
    if (!rooms && (rooms = calloc(1, sizeof(Rooms)))) pthread_setspecific(rooms_key, rooms);
    return rooms;
}

// At least `size` bytes, on a cache line; NULL: there are none.
static void *room_of(void **kept, size_t *held, size_t size) {
    if (*held < size) {
        free(*kept);
        *held = 0;
        *kept = aligned_alloc(64, (size + 63) / 64 * 64);
        if (*kept) *held = size;
    }
    return *kept;
}

static void *own_room(size_t size) {
    Rooms *mine = my_rooms();
    return mine ? room_of(&mine->own, &mine->own_size, size) : NULL;
}

static void *common_room(size_t size) {
    Rooms *mine = my_rooms();
    return mine ? room_of(&mine->common, &mine->common_size, size) : NULL;
}

static void leave_room(void **kept, size_t *held) {
    if (*held <= KEPT) return;
    free(*kept);
    *kept = NULL;
    *held = 0;
}

static void leave_own_room(void) {
    if (rooms) leave_room(&rooms->own, &rooms->own_size);
}

INLINE int next(int *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

// What a thread needs to run products over `rows` rows: prepared rows, their factors, one row in floats.
typedef struct {
    uint8_t *rows;
    float *factor, *wide;
} Prepared;

INLINE size_t rows_room(int rows, int in) { return ((size_t)rows * in * 2 + 63) / 64 * 64; }

static size_t prepared_room(int rows, int in) {
    return rows_room(rows, in) + sizeof(float) * ((size_t)rows + LANES + in + LANES);
}

static Prepared prepared_in(char *room, int rows, int in) {
    float *factor = (float *)(room + rows_room(rows, in));
    return (Prepared){(uint8_t *)room, factor, factor + (rows + LANES)};
}

static void prepare_rows(const Linear *l, const void *x, int half, int rows, Prepared to) {
    for (int t = 0; t < rows; t++)
        to.factor[t] = prepare(l, x, (size_t)t * l->in, half, to.wide, to.rows + t * row_bytes(l));
}

typedef void (*Finish)(const void *job, int row, int panel, const float *outputs);

// Computes panels of all rows until none is left; `finish` gets PANEL outputs of a row at a time.
INLINE void product(const Linear *l, Prepared x, int rows, int *counter, Finish finish, const void *job) {
    const size_t stride = row_bytes(l);
    const int tiles = (rows + TILE - 1) / TILE;
    float to[TILE][PANEL];
    for (int panel; (panel = next(counter)) < panels(l);)
        for (int i = 0; i < tiles; i++) {
            const int from = rows * i / tiles, count = rows * (i + 1) / tiles - from;
            tile(l, panel, count, x.rows + from * stride, stride, x.factor + from, to);
            for (int m = 0; m < count; m++) finish(job, from + m, panel, to[m]);
        }
}

typedef struct {
    const void *base; // what is added, or none
    void *to;
    int32_t out, half_base, half;
} Sum;

// to = base + outputs
INLINE void finish_sum(const void *given, int row, int panel, const float *outputs) {
    const Sum *job = given;
    for (int j = 0; j < PANEL; j += LANES) {
        const int some = left(job->out, panel * PANEL + j);
        if (some <= 0) return;
        const size_t at = (size_t)row * job->out + panel * PANEL + j;
        __m512 x = _mm512_loadu_ps(outputs + j);
        if (job->base) x = _mm512_add_ps(x, load_some(job->base, at, job->half_base, some));
        store_some(job->to, at, job->half, some, x);
    }
}

typedef struct {
    float *to;
    int32_t ffn;
} Gate;

// to = SiLU(gate) · up
INLINE void finish_gate(const void *given, int row, int panel, const float *outputs) {
    const Gate *job = given;
    for (int j = 0; j < PANEL / 2; j += LANES) {
        const int some = left(job->ffn, panel * PANEL / 2 + j);
        if (some <= 0) return;
        __m512 x = _mm512_mul_ps(silu(_mm512_loadu_ps(outputs + j)), _mm512_loadu_ps(outputs + PANEL / 2 + j));
        store_some(job->to, (size_t)row * job->ffn + panel * PANEL / 2 + j, 0, some, x);
    }
}

INLINE int largest(int a, int b, int c) { return a > b ? (a > c ? a : c) : (b > c ? b : c); }

// What the functions return.
enum { DONE, NO_MEMORY, OUTSIDE };

// Buffers of a step that all threads share, in floats.
typedef struct {
    float *qkv, *seen, *middle, *gated;
} Shared;

// One thread's part of a layer: x (rows, width) → y (rows, width), which may be the same memory; floats or bf16, as
// a->half says. `counters` are six zeros. All threads must have come here; some leave before others.
static void layer_step(const Layer *l, const Attention *a, const void *x, void *y, Shared shared, char *room, int widest,
                       int *counters) {
    const int rows = a->rows, total = (a->heads + 2 * a->key_heads) * a->size;
    const Prepared prepared = prepared_in(room, rows, widest);
    prepare_rows(&l->qkv, x, a->half, rows, prepared);
    product(&l->qkv, prepared, rows, counters, finish_sum, &(Sum){NULL, shared.qkv, total, 0, 0});
#pragma omp barrier
    for (int head; (head = next(counters + 1)) < a->key_heads;) write_head(a, shared.qkv, head);
#pragma omp barrier
    for (int head; (head = next(counters + 2)) < a->heads;)
        attend_head(a, shared.qkv, head, (float *)room, shared.seen);
#pragma omp barrier
    prepare_rows(&l->output, shared.seen, 0, rows, prepared);
    product(&l->output, prepared, rows, counters + 3, finish_sum, &(Sum){x, shared.middle, l->width, a->half, 0});
#pragma omp barrier
    prepare_rows(&l->gate_up, shared.middle, 0, rows, prepared);
    product(&l->gate_up, prepared, rows, counters + 4, finish_gate, &(Gate){shared.gated, l->ffn});
#pragma omp barrier
    prepare_rows(&l->down, shared.gated, 0, rows, prepared);
    product(&l->down, prepared, rows, counters + 5, finish_sum, &(Sum){shared.middle, y, l->width, 0, a->half});
}

// `count` layers of one shape, each with its cache: x (rows, width) → y (rows, width), floats or bf16 as a->half says.
// a->cache is not read.
int vocalnet_layers(const Layer *const *layers, void *const *caches, int count, const Attention *a, const void *x,
                    void *y, int threads) {
    if (!inside(a)) return OUTSIDE;
    const int rows = a->rows, attended = a->heads * a->size, total = attended + 2 * a->key_heads * a->size;
    const int width = layers[0]->width, ffn = layers[0]->ffn, widest = largest(width, ffn, attended);
    float *common = common_room(sizeof(float) * (size_t)rows * (total + attended + width + ffn));
    int *counters = calloc(6 * (size_t)count, sizeof(int));
    int failed = common && counters ? DONE : NO_MEMORY;
    const size_t scores = sizeof(float) * attention_room(a), products = prepared_room(rows, widest);
    Shared shared = {common, NULL, NULL, NULL};
    if (common) {
        shared.seen = shared.qkv + (size_t)rows * total;
        shared.middle = shared.seen + (size_t)rows * attended;
        shared.gated = shared.middle + (size_t)rows * width;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *room = own_room(scores > products ? scores : products);
        if (!room) __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
#pragma omp barrier
        if (!failed) {
            Attention own = *a;
            for (int i = 0; i < count; i++) {
                own.cache = caches[i];
                layer_step(layers[i], &own, i ? y : x, y, shared, room, widest, counters + 6 * i);
#pragma omp barrier
            }
        }
        leave_own_room();
    }
    if (rooms) leave_room(&rooms->common, &rooms->common_size);
    free(counters);
    return failed;
}

// Attention alone: qkv (rows, heads + 2 · key_heads, size) → to (rows, heads, size), floats.
int vocalnet_attend(const Attention *a, const float *qkv, float *to, int threads) {
    if (!inside(a)) return OUTSIDE;
    const size_t need = sizeof(float) * attention_room(a);
    int counters[2] = {0}, failed = DONE;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *room = own_room(need);
        if (!room) __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
        for (int head; (head = next(counters)) < a->key_heads;) write_head(a, qkv, head);
#pragma omp barrier
        if (!failed)
            for (int head; (head = next(counters + 1)) < a->heads;) attend_head(a, qkv, head, (float *)room, to);
        leave_own_room();
    }
    return failed;
}

// One product: x (rows, in), floats or bf16 → y (rows, out) in floats.
int vocalnet_linear(const Linear *l, const void *x, int half, int rows, float *y, int threads) {
    const size_t need = prepared_room(rows, l->in);
    int counter = 0, failed = DONE;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *room = own_room(need);
        if (!room) __atomic_store_n(&failed, NO_MEMORY, __ATOMIC_RELAXED);
        else {
            const Prepared prepared = prepared_in(room, rows, l->in);
            prepare_rows(l, x, half, rows, prepared);
            product(l, prepared, rows, &counter, finish_sum, &(Sum){NULL, y, l->out, 0, 0});
        }
        leave_own_room();
    }
    return failed;
}
