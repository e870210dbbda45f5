// A number of the KV cache: compiled before what reads or writes it, once for each format (-DCACHE_F16 or -DCACHE_F32).

#ifdef CACHE_F16
typedef unsigned short stored;
DEVICE float loaded(stored number) { return from_half(number); }
DEVICE stored rounded(float number) { return to_half(number); }
#else
typedef float stored;
DEVICE float loaded(stored number) { return number; }
DEVICE stored rounded(float number) { return number; }
#endif

