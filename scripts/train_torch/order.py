"""The order of examples, as `overfill train` has it: ChaCha8 from a 64-bit seed, and the shuffle of Rust's `rand` 0.9.

The same batches in the same order are what makes runs of the two programs comparable step by step.
"""

import struct

MASK = 0xFFFFFFFF


def rotated(x, n):
    return ((x << n) | (x >> (32 - n))) & MASK


def quarter(s, a, b, c, d):
    s[a] = (s[a] + s[b]) & MASK
    s[d] = rotated(s[d] ^ s[a], 16)
    s[c] = (s[c] + s[d]) & MASK
    s[b] = rotated(s[b] ^ s[c], 12)
    s[a] = (s[a] + s[b]) & MASK
    s[d] = rotated(s[d] ^ s[a], 8)
    s[c] = (s[c] + s[d]) & MASK
    s[b] = rotated(s[b] ^ s[c], 7)


class ChaCha8:
    """`ChaCha8Rng::seed_from_u64(seed)` on one of its streams."""

    def __init__(self, seed, stream):
        # A key of 32 bytes is made of the seed by PCG32, as `rand_core` does it.
        words, state = [], seed
        for _ in range(8):
            state = (state * 6364136223846793005 + 11634580027462260723) % 2**64
            xorshifted = (((state >> 18) ^ state) >> 27) & MASK
            rotation = state >> 59
            words.append(((xorshifted >> rotation) | (xorshifted << (-rotation & 31))) & MASK)
        self.key, self.stream, self.counter, self.words = words, stream, 0, []

    def block(self):
        constants = struct.unpack("<4I", b"expand 32-byte k")
        place = [self.counter & MASK, self.counter >> 32, self.stream & MASK, self.stream >> 32]
        begin = [*constants, *self.key, *place]
        s = list(begin)
        for _ in range(4):
            for a, b, c, d in [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]:
                quarter(s, a, b, c, d)
            for a, b, c, d in [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]:
                quarter(s, a, b, c, d)
        self.counter += 1
        return [(x + y) & MASK for x, y in zip(s, begin, strict=True)]

    def next(self):
        if not self.words:
            self.words = self.block()[::-1]
        return self.words.pop()

    def below(self, bound):
        """From 0 to `bound` - 1, for bounds of 32 bits (Lemire's way, with one more draw against the bias)."""
        product = self.next() * bound
        result, low = product >> 32, product & MASK
        if low > (-bound & MASK):
            result += (low + ((self.next() * bound) >> 32)) >> 32
        return result


def shuffle(items, rng):
    """Fisher and Yates, upwards; one draw serves for several places, as long as their product fits 32 bits."""
    chunk, remaining = 0, 1
    for i in range(len(items)):
        n = i + 1
        if remaining == 0:
            bound, factor = n, n + 1
            while bound * factor <= MASK:
                bound, factor = bound * factor, factor + 1
            chunk, remaining = rng.below(bound), factor - n
        remaining -= 1
        if remaining == 0:
            index = chunk
        else:
            chunk, index = divmod(chunk, n)
        items[i], items[index] = items[index], items[i]


def filled(lengths, order, tokens):
    """Batches of about `tokens` response tokens."""
    batches, room = [], 0
    for index in order:
        if batches and lengths[index] <= room:
            batches[-1].append(index)
        else:
            batches.append([index])
            room = tokens
        room = max(room - lengths[index], 0)
    return batches


def steps(lengths, tokens, accumulate, epochs, most, seed):
    """All steps of a run: for each its epoch and its batches."""
    all_steps = []
    for epoch in range(epochs):
        order = list(range(len(lengths)))
        shuffle(order, ChaCha8(seed, epoch))
        batches = filled(lengths, order, tokens)
        all_steps += [(epoch, batches[i : i + accumulate]) for i in range(0, len(batches), accumulate)]
    return all_steps[:most]


def cut_anywhere(prompt, response, seed, epoch, index):
    """Where the full model's reading ends under `--random-cutoff`."""
    rng = ChaCha8(seed ^ (epoch * 0x9E3779B97F4A7C15 % 2**64), index + 1)
    return 1 + rng.below(prompt + response - 2)


def on_policy(batch, share):
    """Whether a batch, counted over the whole run, is one of those that the decode model writes itself."""
    return int((batch + 1) * share) > int(batch * share)
