// The next token of rows of logits, where it depends on logits, temperature and filters alone: what `sample.rs` does on a CPU.
//
// A block of CHOOSERS threads takes a row. Weights are whole numbers, UNIT times what they are beside the most likely token's, so that
// sums are the same in any order and a draw is the same whichever thread comes first. Filters find the least likely token that they keep
// digit by digit, from the first 8 bits of its logit to the last, without sorting.

#define CHOOSERS 512
#define DIGITS 256
// A token that weighs less than 2^-40 of the most likely one is never drawn.
#define UNIT 1099511627776.0f
#define EQUALS_ALL 0x7fffffff

typedef unsigned long long whole;

// How a row's token is chosen: `Draw` in choice.rs.
typedef struct {
    int row;
    float temperature, top_p, min_p;
    int top_k, unused;
    // In [0, 1).
    double drawn;
} draw;

// Ascends with the logit; 0 for not-a-number, which comes after all. -0 is 0.
DEVICE unsigned key_of(float logit)
{
    if (logit != logit) return 0;
    const unsigned bits = bits_of(logit + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

DEVICE float logit_of(unsigned key) { return of_bits(key >> 31 ? key & 0x7fffffffu : ~key); }

typedef struct {
    const float *logits;
    int vocabulary;
    float temperature, highest;
    // Kept are tokens above the key, and so many of those at it, in the order of their ids.
    unsigned key;
    int equals;
} filtered;

// Of a token, if it weighs at least this beside the most likely one.
DEVICE whole weight_of(const filtered *row, unsigned key, float least)
{
    if (key == 0) return 0;
    const float weight = expf((logit_of(key) - row->highest) / row->temperature);
    return weight > 0.0f && weight >= least ? (whole)(weight * UNIT) : 0;
}

// Moves the filter up: tokens are counted (`weighed` 0) or weighed from the most likely one down, until they come to `need`. What
// weighs less than `least` is passed over. `bins` is [DIGITS + 2], shared.
DEVICE void keep(filtered *row, int weighed, whole need, float least, whole *bins)
{
    whole *found = bins + DIGITS;
    unsigned key = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = THREAD; i < DIGITS; i += CHOOSERS) bins[i] = 0;
        BARRIER();
        for (int i = THREAD; i < row->vocabulary; i += CHOOSERS) {
            const unsigned own = key_of(row->logits[i]);
            // Of the first digit nothing is known yet (a shift by 32 would mean another thing on each machine).
            const int candidate = own >= row->key && (shift == 24 || own >> (shift + 8) == key >> (shift + 8));
            const whole amount = !candidate ? 0 : weighed ? weight_of(row, own, least) : 1;
            if (amount) ADD_SHARED(&bins[own >> shift & (DIGITS - 1)], amount);
        }
        BARRIER();
        if (THREAD == 0) {
            int digit = DIGITS - 1;
            for (; digit > 0 && bins[digit] < need; digit--) need -= bins[digit];
            found[0] = key | (unsigned)digit << shift;
            found[1] = need;
        }
        BARRIER();
        key = (unsigned)found[0];
        need = found[1];
        // `bins` is not read again before the next barrier, nor `found` written before the one after it.
    }
    BARRIER();
    // Fewer than were asked for: all that are numbers.
    if (key == 0) return;
    const whole each = weighed ? weight_of(row, key, 0.0f) : 1;
    const whole equals = each ? (need + each - 1) / each : 1;
    if (key > row->key || equals < (whole)row->equals) row->equals = equals < EQUALS_ALL ? (int)equals : EQUALS_ALL;
    row->key = key;
}

// What is kept weighs. `sum` is shared.
DEVICE whole weight_of_kept(const filtered *row, whole *sum)
{
    if (THREAD == 0) *sum = row->equals == EQUALS_ALL ? 0 : (whole)row->equals * weight_of(row, row->key, 0.0f);
    BARRIER();
    whole own = 0;
    for (int i = THREAD; i < row->vocabulary; i += CHOOSERS) {
        const unsigned key = key_of(row->logits[i]);
        if (key > row->key || (key == row->key && row->equals == EQUALS_ALL)) own += weight_of(row, key, 0.0f);
    }
    ADD_SHARED(sum, own);
    BARRIER();
    const whole total = *sum;
    BARRIER();
    return total;
}

// logits: [rows, vocabulary]. draws, chosen: [blocks]. Shared memory: 12 * CHOOSERS + 8 * (DIGITS + 2) bytes.
KERNEL choose(const float *logits, int vocabulary, const draw *draws, int *chosen)
{
    SHARED(shared);
    whole *sums = (whole *)shared;       // [CHOOSERS]
    whole *bins = sums + CHOOSERS;       // [DIGITS + 2]
    int *counts = (int *)(bins + DIGITS + 2); // [CHOOSERS]
    const draw *how = draws + BLOCK_X;
    filtered row = { logits + (long long)how->row * vocabulary, vocabulary, how->temperature, 0.0f, 1, EQUALS_ALL };

    // The greatest logit, of several the one with the lowest id.
    whole best = 0;
    for (int i = THREAD; i < vocabulary; i += CHOOSERS) {
        const whole own = (whole)key_of(row.logits[i]) << 32 | (0xffffffffu - (unsigned)i);
        best = own > best ? own : best;
    }
    sums[THREAD] = best;
    BARRIER();
    for (int half = CHOOSERS / 2; half > 0; half /= 2) {
        if (THREAD < half && sums[THREAD + half] > sums[THREAD]) sums[THREAD] = sums[THREAD + half];
        BARRIER();
    }
    best = sums[0];
    BARRIER();
    // Without a number among them it is token 0, as on a CPU.
    const int greatest_id = best >> 32 ? (int)(0xffffffffu - (unsigned)best) : 0;
    row.highest = logit_of((unsigned)(best >> 32));

    if (how->temperature > 0.0f) {
        if (how->top_k > 0 && how->top_k < vocabulary) keep(&row, 0, (whole)how->top_k, 0.0f, bins);
        if (how->top_p < 1.0f) {
            const whole total = weight_of_kept(&row, bins);
            const double enough = ceil((double)how->top_p * (double)total);
            // Tokens lighter than the average of what may be left out weigh less than that together: none of them is kept. Half of it,
            // so that rounding changes nothing.
            const float least = 0.5f * (1.0f - how->top_p) * ((float)total / UNIT) / (float)vocabulary;
            if (total > 0) keep(&row, 1, enough < 1.0 ? 1 : enough < (double)total ? (whole)enough : total, least, bins);
        }
    }

    // Each thread takes ids that follow each other; those of all threads are in the order of the threads.
    const int each = (vocabulary + CHOOSERS - 1) / CHOOSERS, first = THREAD * each;
    const int end = first + each < vocabulary ? first + each : vocabulary;
    whole sum = 0;
    int count = 0;
    if (how->temperature > 0.0f) {
        for (int i = first; i < end; i++) {
            const unsigned key = key_of(row.logits[i]);
            if (key > row.key || (key == row.key && row.equals == EQUALS_ALL)) sum += weight_of(&row, key, how->min_p);
            else if (key == row.key) count++;
        }
    }
    sums[THREAD] = sum;
    counts[THREAD] = count;
    BARRIER();
    if (THREAD > 0) return;
    if (how->temperature == 0.0f) {
        chosen[BLOCK_X] = greatest_id;
        return;
    }

    const whole of_equal = weight_of(&row, row.key, how->min_p);
    int left = row.equals, last = -1;
    whole total = 0;
    for (int i = 0; i < CHOOSERS; i++) {
        counts[i] = counts[i] < left ? counts[i] : left;
        left -= counts[i];
        sums[i] += (whole)counts[i] * of_equal;
        total += sums[i];
    }
    whole at = (whole)(how->drawn * (double)total);
    for (int i = 0; i < CHOOSERS && last < 0; i++) {
        if (at >= sums[i]) {
            at -= sums[i];
            continue;
        }
        const int from = i * each, to = from + each < vocabulary ? from + each : vocabulary;
        int equals = counts[i];
        for (int id = from; id < to; id++) {
            const unsigned key = key_of(row.logits[id]);
            whole own = 0;
            if (key > row.key || (key == row.key && row.equals == EQUALS_ALL)) own = weight_of(&row, key, how->min_p);
            else if (key == row.key && equals > 0) {
                equals--;
                own = of_equal;
            }
            if (own == 0) continue;
            if (at < own) {
                last = id;
                break;
            }
            at -= own;
        }
    }
    // Nothing weighs anything (all logits are alike infinite, or none is a number): the greatest.
    chosen[BLOCK_X] = last < 0 ? greatest_id : last;
}
