// Attention of a pass's tokens over the paged KV cache, and how their rows get there.
//
// Compiled by NVRTC after `dialect.cu` and `stored.cu` when a GPU first needs it, and, for the tests, by a C compiler after `on_host.c`.
//
// A block of threads takes a tile: some tokens of one sequence, one after the other, with all query heads of one KV head: at most ROWS
// rows of queries, which share each key and value that is read. It goes through the sequence in segments of SEGMENT positions; each has
// its softmax of its own, and they are joined in their order by their greatest scores (Milakov and Gimelshein, arXiv 1805.02867). Where
// a pass has few tokens, each segment is a block's, and `join_segments` joins them in the same order.
//
// Invariant: what comes of a row is the same bits whatever is in the pass beside it, however its prompt is cut, and whether its
// segments were joined by one block or by `join_segments`. Positions that a row does not see weigh nothing, and change no bit.

// Threads of a block, and positions that it looks at together.
#define THREADS 128
#define SEGMENT 512
#define ROWS 16
// Dimensions of a head that one thread sums: heads have at most WIDE * THREADS.
#define WIDE 2
#define NOTHING (-INFINITY)

// Eight numbers that lie at a multiple of 16 bytes: read in one piece or two.
#if defined(CACHE_F16)
typedef struct __attribute__((aligned(16))) { stored number[8]; } eight;
#else
typedef struct __attribute__((aligned(16))) { stored number[4]; } four;
typedef struct { four half[2]; } eight;
#endif

DEVICE void load_eight(const stored *from, float *to)
{
    const eight numbers = *(const eight *)from;
    UNROLL for (int i = 0; i < 8; i++) {
#if defined(CACHE_F16)
        to[i] = loaded(numbers.number[i]);
#else
        to[i] = numbers.half[i / 4].number[i % 4];
#endif
    }
}

DEVICE int least(int a, int b) { return a < b ? a : b; }
DEVICE int greatest(int a, int b) { return a > b ? a : b; }

// What a sum that was taken with `most` as its greatest score counts beside one of `now`.
DEVICE float share(float most, float now) { return most == NOTHING ? 0.0f : expf(most - now); }

// Of all 32 lanes of a warp.
DEVICE float warp_most(float value)
{
    UNROLL for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, OF_LANE(value, mask));
    return value;
}

DEVICE float warp_sum(float value)
{
    UNROLL for (int mask = 16; mask > 0; mask /= 2) value += OF_LANE(value, mask);
    return value;
}

// Where the row of a position of a sequence begins, for one KV head.
DEVICE long long row_at(const int *table, int position, int block_tokens, int kv_heads, int kv_head, int head_dim)
{
    const long long slot = (long long)table[position / block_tokens] * block_tokens + position % block_tokens;
    return (slot * kv_heads + kv_head) * head_dim;
}

// Rows `[tokens, width]` go to their slots. A block a token.
KERNEL append(stored *rows, const float *from, const int *slots, int width)
{
    const long long to = (long long)slots[BLOCK_X] * width;
    for (int i = THREAD; i < width; i += THREADS) rows[to + i] = rounded(from[(long long)BLOCK_X * width + i]);
}

// out: [tokens, heads, head_dim]; with more than one block along z `partial` instead: [tokens, heads, segments, head_dim + 2], of which
// the last two are the greatest score and the sum. q: [tokens, heads, head_dim]. keys, values: [slots, kv_heads, head_dim].
// tables: block tables, one after the other. tiles: [tiles, 4]: number of the first token, tokens, position of the first, where its
// sequence's table begins. Blocks: tiles, KV heads, and 1 or all segments.
// Shared memory: ROWS * (2 * head_dim + THREADS + 5) floats.
KERNEL attention(float *out, float *partial, const float *q, const stored *keys, const stored *values, const int *tables, const int *tiles,
                 int heads, int kv_heads, int head_dim, int block_tokens, int window, float scale, float cap)
{
    SHARED(shared);
    float *query = shared;                  // [ROWS, head_dim]
    float *other = query + ROWS * head_dim; // [ROWS, head_dim]
    float *weight = other + ROWS * head_dim; // [ROWS, THREADS]
    float *most = weight + ROWS * THREADS;  // of the segment, and so the next two
    float *sum = most + ROWS;
    float *factor = sum + ROWS;
    float *all_most = factor + ROWS;
    float *all_sum = all_most + ROWS;

    const int *tile = tiles + 4 * BLOCK_X;
    const int first = tile[0], tokens = tile[1], start = tile[2], end = start + tokens;
    const int *table = tables + tile[3];
    const int group = heads / kv_heads, rows = group * tokens, kv_head = BLOCK_Y;
    int segment = greatest(start - window + 1, 0) / SEGMENT, segments = (end + SEGMENT - 1) / SEGMENT;
    if (GRID_Z > 1) {
        segment = greatest(segment, BLOCK_Z);
        segments = least(segments, BLOCK_Z + 1);
    }

    for (int i = THREAD; i < rows * head_dim; i += THREADS) {
        const int row = i / head_dim, head = kv_head * group + row % group;
        query[i] = q[((long long)(first + row / group) * heads + head) * head_dim + i % head_dim] * scale;
    }
    if (THREAD < ROWS) {
        all_most[THREAD] = NOTHING;
        all_sum[THREAD] = 0.0f;
    }
    // Threads share a dimension where there are more of them; each takes every so manieth position then.
    const int parts = head_dim < THREADS ? THREADS / head_dim : 1;
    const int part = head_dim < THREADS ? THREAD / head_dim : 0;
    int dim[WIDE];
    UNROLL for (int w = 0; w < WIDE; w++) {
        dim[w] = head_dim < THREADS ? THREAD % head_dim : THREAD + w * THREADS;
        if (part >= parts || dim[w] >= head_dim || (head_dim < THREADS && w > 0)) dim[w] = -1;
    }
    float total[ROWS][WIDE], made[ROWS][WIDE];
    UNROLL for (int r = 0; r < ROWS; r++) {
        UNROLL for (int w = 0; w < WIDE; w++) total[r][w] = 0.0f;
    }
    // A block whose segment no row sees has no other.
    BARRIER();

    for (; segment < segments; segment++) {
        if (THREAD < ROWS) {
            most[THREAD] = NOTHING;
            sum[THREAD] = 0.0f;
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            UNROLL for (int w = 0; w < WIDE; w++) made[r][w] = 0.0f;
        }
        BARRIER();
        const int segment_end = least((segment + 1) * SEGMENT, end);
        for (int base = segment * SEGMENT; base < segment_end; base += THREADS) {
            // Scores: a position a thread.
            const int position = base + THREAD;
            float score[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++) score[r] = 0.0f;
            if (position < end) {
                const stored *key = keys + row_at(table, position, block_tokens, kv_heads, kv_head, head_dim);
                for (int d = 0; d < head_dim; d += 8) {
                    float number[8];
                    load_eight(key + d, number);
                    UNROLL for (int r = 0; r < ROWS; r++) {
                        if (r < rows) {
                            UNROLL for (int i = 0; i < 8; i++) score[r] += query[r * head_dim + d + i] * number[i];
                        }
                    }
                }
            }
            UNROLL for (int r = 0; r < ROWS; r++) {
                if (r < rows) {
                    const int at = start + r / group;
                    const int seen = position <= at && at - position < window;
                    const float capped = cap > 0.0f ? cap * tanhf(score[r] / cap) : score[r];
                    weight[r * THREADS + THREAD] = seen ? capped : NOTHING;
                }
            }
            BARRIER();
            // Softmax's numerators: a row a warp.
            for (int r = THREAD / 32; r < rows; r += THREADS / 32) {
                float *own = weight + r * THREADS + THREAD % 32;
                float top = NOTHING, added = 0.0f;
                UNROLL for (int i = 0; i < THREADS; i += 32) top = fmaxf(top, own[i]);
                const float before = most[r], now = fmaxf(before, warp_most(top));
                UNROLL for (int i = 0; i < THREADS; i += 32) {
                    own[i] = share(own[i], now);
                    added += own[i];
                }
                added = warp_sum(added);
                if (THREAD % 32 == 0) {
                    // Nothing seen yet and nothing seen now: what is summed is 0, whatever it is multiplied with.
                    factor[r] = share(before, now);
                    most[r] = now;
                    sum[r] = sum[r] * factor[r] + added;
                }
            }
            BARRIER();
            // Values: a dimension a thread.
            UNROLL for (int r = 0; r < ROWS; r++) {
                if (r < rows) {
                    UNROLL for (int w = 0; w < WIDE; w++) made[r][w] *= factor[r];
                }
            }
            const int count = least(THREADS, end - base);
            for (int i = part; i < count; i += parts) {
                const stored *value = values + row_at(table, base + i, block_tokens, kv_heads, kv_head, head_dim);
                UNROLL for (int w = 0; w < WIDE; w++) {
                    if (dim[w] >= 0) {
                        const float number = loaded(value[dim[w]]);
                        UNROLL for (int r = 0; r < ROWS; r++) {
                            if (r < rows) made[r][w] += weight[r * THREADS + i] * number;
                        }
                    }
                }
            }
            BARRIER();
        }
        for (int p = 1; p < parts; p++) {
            if (part == p && dim[0] >= 0) {
                UNROLL for (int r = 0; r < ROWS; r++) {
                    if (r < rows) other[r * head_dim + dim[0]] = made[r][0];
                }
            }
            BARRIER();
            if (part == 0) {
                UNROLL for (int r = 0; r < ROWS; r++) {
                    if (r < rows) made[r][0] += other[r * head_dim + dim[0]];
                }
            }
            BARRIER();
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            if (r < rows) {
                const float now = fmaxf(all_most[r], most[r]);
                const float old = share(all_most[r], now), own = share(most[r], now);
                UNROLL for (int w = 0; w < WIDE; w++) total[r][w] = total[r][w] * old + made[r][w] * own;
            }
        }
        BARRIER();
        if (THREAD < rows) {
            const float now = fmaxf(all_most[THREAD], most[THREAD]);
            all_sum[THREAD] = all_sum[THREAD] * share(all_most[THREAD], now) + sum[THREAD] * share(most[THREAD], now);
            all_most[THREAD] = now;
        }
        BARRIER();
    }

    if (part > 0) return;
    UNROLL for (int r = 0; r < ROWS; r++) {
        if (r < rows) {
            const long long row = (long long)(first + r / group) * heads + kv_head * group + r % group;
            UNROLL for (int w = 0; w < WIDE; w++) {
                if (dim[w] >= 0 && GRID_Z == 1) out[row * head_dim + dim[w]] = total[r][w] / all_sum[r];
                if (dim[w] >= 0 && GRID_Z > 1) partial[(row * GRID_Z + BLOCK_Z) * (head_dim + 2) + dim[w]] = total[r][w];
            }
            if (GRID_Z > 1 && THREAD == 0) {
                partial[(row * GRID_Z + BLOCK_Z) * (head_dim + 2) + head_dim] = all_most[r];
                partial[(row * GRID_Z + BLOCK_Z) * (head_dim + 2) + head_dim + 1] = all_sum[r];
            }
        }
    }
}

// What `attention` left of each segment becomes one. A block a row, of THREADS threads.
KERNEL join_segments(float *out, const float *partial, int segments, int head_dim)
{
    const float *own = partial + (long long)BLOCK_X * segments * (head_dim + 2);
    for (int d = THREAD; d < head_dim; d += THREADS) {
        float most = NOTHING, sum = 0.0f, total = 0.0f;
        for (int z = 0; z < segments; z++) {
            const float *segment = own + (long long)z * (head_dim + 2);
            const float now = fmaxf(most, segment[head_dim]);
            const float old = share(most, now), added = share(segment[head_dim], now);
            total = total * old + segment[d] * added;
            sum = sum * old + segment[head_dim + 1] * added;
            most = now;
        }
        out[(long long)BLOCK_X * head_dim + d] = total / sum;
    }
}
