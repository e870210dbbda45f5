"""ik_llama.cpp's engine, run by its own environment: `FILE THREADS PROMPT ANSWER CONTEXT`, a JSON object for each phase."""

import json
import sys
import time

from ik_llama_cpp._internals import IkContext, IkModel, make_batch, make_batch_single


def main():
    file, (threads, prompt, answer, context) = sys.argv[1], map(int, sys.argv[2:])
    model = IkModel(file)
    cache = IkContext(model, n_ctx=max(prompt, context + answer) + 8, n_threads=threads)

    def read(tokens):
        cache.kv_cache_clear()
        begun = time.perf_counter()
        cache.decode(make_batch([(7919 * n) % 40_000 for n in range(1, tokens + 1)]))
        cache.get_logits()
        return time.perf_counter() - begun

    read(prompt)
    print(json.dumps({"phase": "prefill", "rate": prompt / read(prompt)}))
    read(context)
    begun = time.perf_counter()
    for number in range(answer):
        cache.decode(make_batch_single((31 * number) % 40_000, context + number))
        cache.get_logits()
    print(json.dumps({"phase": "decode", "rate": answer / (time.perf_counter() - begun)}))


main()
