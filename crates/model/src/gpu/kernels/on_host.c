// Our kernels on a CPU, for tests: each thread of a block is a fiber, run in turn from barrier to barrier. What `dialect.cu` says on a GPU
// is said here.

#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define KERNEL static void
#define DEVICE static inline
#define SHARED(name) float *name = block.shared
#define THREAD (block.running)
#define BLOCK_X (block.x)
#define BLOCK_Y (block.y)
#define BLOCK_Z (block.z)
#define GRID_Z (block.of_z)
#define BARRIER() wait_at(OF_BLOCK)
#define OF_LANE(value, mask) of_lane(value, mask)
#define ADD_SHARED(address, value) (*(address) += (value))
#define UNROLL

#define MOST_THREADS 512
#define STACK (64 * 1024)

enum { RUNS, OF_WARP, OF_BLOCK, DONE };

static _Thread_local struct {
    int x, y, z, of_z, running;
    float *shared;
    float lanes[MOST_THREADS];
    int at[MOST_THREADS];
    ucontext_t turns, fiber[MOST_THREADS];
} block;

static void wait_at(int barrier)
{
    const int thread = block.running;
    block.at[thread] = barrier;
    swapcontext(&block.fiber[thread], &block.turns);
}

static float of_lane(float value, int mask)
{
    block.lanes[block.running] = value;
    wait_at(OF_WARP);
    value = block.lanes[block.running ^ mask];
    wait_at(OF_WARP);
    return value;
}

static inline unsigned bits_of(float value)
{
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float of_bits(unsigned bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// In integers, since not every C compiler has a type for it.
static inline float from_half(unsigned short bits)
{
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                        : exponent     ? ldexpf((float)(fraction + 1024), exponent - 25)
                                       : ldexpf((float)fraction, -24);
    return bits >> 15 ? -value : value;
}

// To the nearest, of two alike to the even one.
static inline unsigned short to_half(float number)
{
    const unsigned short sign = signbit(number) ? 0x8000 : 0;
    int exponent;
    if (isnan(number)) return sign | 0x7e00;
    if (isinf(number)) return sign | 0x7c00;
    frexpf(number, &exponent);
    // What a step of the fraction is worth; below the normal numbers always the same.
    const int step = exponent - 11 < -24 ? -24 : exponent - 11;
    const int units = (int)nearbyintf(ldexpf(fabsf(number), -step));
    if (units < 1024) return sign | units;
    // 2048 units carry into the exponent, and too large a number into infinity.
    const int coded = ((step + 24) << 10) + units;
    return sign | (coded < 0x7c00 ? coded : 0x7c00);
}

#include "stored.cu"
#include "attention.cu"
#include "choose.cu"
#include "wire.cu"

static _Thread_local void (*kernel)(const void *);
static _Thread_local const void *arguments;

static void fiber(void)
{
    kernel(arguments);
    block.at[block.running] = DONE;
}

// Whether all threads from `first` on wait at `barrier`, or have ended; they go on then.
static void pass(int first, int count, int barrier)
{
    for (int i = first; i < first + count; i++)
        if (block.at[i] != barrier && block.at[i] != DONE) return;
    for (int i = first; i < first + count; i++)
        if (block.at[i] == barrier) block.at[i] = RUNS;
}

// 0, or 1 where threads wait for each other at different barriers.
static int run(int threads, int blocks_x, int blocks_y, int blocks_z, size_t shared_bytes)
{
    char *stacks = malloc((size_t)threads * STACK);
    int stuck = 0;
    block.shared = malloc(shared_bytes);
    block.of_z = blocks_z;
    for (int number = 0; number < blocks_x * blocks_y * blocks_z && !stuck; number++) {
        block.x = number % blocks_x, block.y = number / blocks_x % blocks_y, block.z = number / blocks_x / blocks_y;
        // What was there before is no number to count on.
        memset(block.shared, 0xff, shared_bytes);
        for (int i = 0; i < threads; i++) {
            block.at[i] = RUNS;
            getcontext(&block.fiber[i]);
            block.fiber[i].uc_stack.ss_sp = stacks + (size_t)i * STACK;
            block.fiber[i].uc_stack.ss_size = STACK;
            block.fiber[i].uc_link = &block.turns;
            makecontext(&block.fiber[i], fiber, 0);
        }
        for (int ran = 1; ran;) {
            ran = 0;
            // From the first to the last in one block, from the last to the first in the next: where a barrier is missing, one of
            // them reads what is not there yet.
            for (int turn = 0; turn < threads; turn++) {
                const int i = number % 2 ? threads - 1 - turn : turn;
                if (block.at[i] != RUNS) continue;
                ran = 1;
                block.running = i;
                swapcontext(&block.turns, &block.fiber[i]);
            }
            for (int warp = 0; warp < threads; warp += 32) pass(warp, 32, OF_WARP);
            pass(0, threads, OF_BLOCK);
        }
        for (int i = 0; i < threads; i++) stuck |= block.at[i] != DONE;
    }
    free(block.shared);
    free(stacks);
    return stuck;
}

struct append_arguments {
    stored *rows;
    const float *from;
    const int *slots;
    int width;
};

static void call_append(const void *given)
{
    const struct append_arguments *a = given;
    append(a->rows, a->from, a->slots, a->width);
}

int host_append(stored *rows, const float *from, const int *slots, int tokens, int width)
{
    const struct append_arguments a = { rows, from, slots, width };
    kernel = call_append, arguments = &a;
    return run(THREADS, tokens, 1, 1, 4);
}

struct attention_arguments {
    float *out, *partial;
    const float *q;
    const stored *keys, *values;
    const int *tables, *tiles;
    int heads, kv_heads, head_dim, block_tokens, window;
    float scale, cap;
};

static void call_attention(const void *given)
{
    const struct attention_arguments *a = given;
    attention(a->out, a->partial, a->q, a->keys, a->values, a->tables, a->tiles, a->heads, a->kv_heads, a->head_dim, a->block_tokens,
              a->window, a->scale, a->cap);
}

int host_attention(const struct attention_arguments *a, int tiles, int segments, int shared_bytes)
{
    kernel = call_attention, arguments = a;
    return run(THREADS, tiles, a->kv_heads, segments, shared_bytes);
}

struct join_arguments {
    float *out;
    const float *partial;
    int segments, head_dim;
};

static void call_join(const void *given)
{
    const struct join_arguments *a = given;
    join_segments(a->out, a->partial, a->segments, a->head_dim);
}

int host_join(float *out, const float *partial, int rows, int segments, int head_dim)
{
    const struct join_arguments a = { out, partial, segments, head_dim };
    kernel = call_join, arguments = &a;
    return run(THREADS, rows, 1, 1, 4);
}

struct choose_arguments {
    const float *logits;
    int vocabulary;
    const draw *draws;
    int *chosen;
};

static void call_choose(const void *given)
{
    const struct choose_arguments *a = given;
    choose(a->logits, a->vocabulary, a->draws, a->chosen);
}

int host_choose(const float *logits, int vocabulary, const draw *draws, int *chosen, int rows, int shared_bytes)
{
    const struct choose_arguments a = { logits, vocabulary, draws, chosen };
    kernel = call_choose, arguments = &a;
    return run(CHOOSERS, rows, 1, 1, shared_bytes);
}

struct wire_arguments {
    unsigned char *packed;
    stored *keys, *values;
    const int *slots;
    int tokens, kv_heads, head_dim;
};

static void call_pack(const void *given)
{
    const struct wire_arguments *a = given;
    pack(a->packed, a->keys, a->values, a->slots, a->tokens, a->kv_heads, a->head_dim);
}

static void call_unpack(const void *given)
{
    const struct wire_arguments *a = given;
    unpack(a->packed, a->keys, a->values, a->slots, a->tokens, a->kv_heads, a->head_dim);
}

int host_wire(const struct wire_arguments *a, int packs)
{
    kernel = packs ? call_pack : call_unpack, arguments = a;
    return run(PACKERS, a->tokens, a->kv_heads, 2, 4 * PACKERS);
}
