// Rows of the cache out into `int8` of the wire, and back into the cache: what `crates/kv/src/wire.rs` does on a CPU, to the bit.
//
// A block of PACKERS threads has one head: along x the tokens, along y the KV heads, along z keys and values. Of keys, and then of
// values, there are scales [tokens, kv_heads] in 32-bit floats, little endian, then codes [tokens, kv_heads, head_dim].

#define PACKERS 128

typedef struct {
    stored *numbers;
    unsigned char *scale, *codes;
} head;

DEVICE head head_of(unsigned char *packed, stored *keys, stored *values, const int *slots, int tokens, int kv_heads, int head_dim)
{
    const long long heads = (long long)tokens * kv_heads, number = (long long)BLOCK_X * kv_heads + BLOCK_Y;
    unsigned char *half = packed + BLOCK_Z * heads * (4 + head_dim);
    stored *rows = BLOCK_Z ? values : keys;
    const head it = {
        rows + ((long long)slots[BLOCK_X] * kv_heads + BLOCK_Y) * head_dim,
        half + 4 * number,
        half + 4 * heads + number * head_dim,
    };
    return it;
}

// Shared memory: PACKERS floats.
KERNEL pack(unsigned char *packed, stored *keys, stored *values, const int *slots, int tokens, int kv_heads, int head_dim)
{
    SHARED(most);
    const head to = head_of(packed, keys, values, slots, tokens, kv_heads, head_dim);
    float own = 0.0f;
    for (int i = THREAD; i < head_dim; i += PACKERS) own = fmaxf(own, fabsf(loaded(to.numbers[i])));
    most[THREAD] = own;
    BARRIER();
    for (int half = PACKERS / 2; half > 0; half /= 2) {
        if (THREAD < half) most[THREAD] = fmaxf(most[THREAD], most[THREAD + half]);
        BARRIER();
    }
    const float scale = most[0] / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    if (THREAD < 4) to.scale[THREAD] = (unsigned char)(bits_of(scale) >> 8 * THREAD);
    for (int i = THREAD; i < head_dim; i += PACKERS) {
        const float code = rintf(loaded(to.numbers[i]) * inverse);
        // Infinity times 0 is no number, and code 0.
        to.codes[i] = code == code ? (unsigned char)(int)fminf(fmaxf(code, -128.0f), 127.0f) : 0;
    }
}

KERNEL unpack(unsigned char *packed, stored *keys, stored *values, const int *slots, int tokens, int kv_heads, int head_dim)
{
    const head from = head_of(packed, keys, values, slots, tokens, kv_heads, head_dim);
    unsigned bits = 0;
    for (int i = 0; i < 4; i++) bits |= (unsigned)from.scale[i] << 8 * i;
    const float scale = of_bits(bits);
    for (int i = THREAD; i < head_dim; i += PACKERS) from.numbers[i] = rounded((float)(signed char)from.codes[i] * scale);
}
