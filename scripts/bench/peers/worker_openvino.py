"""OpenVINO GenAI's engine, run by its own environment: `FILE THREADS PROMPT ANSWER CONTEXT`, a JSON object for each phase."""

import json
import sys

import openvino_genai


def main():
    file, (threads, prompt, answer, context) = sys.argv[1], map(int, sys.argv[2:])
    pipeline = openvino_genai.LLMPipeline(file, "CPU", INFERENCE_NUM_THREADS=threads)
    settings = openvino_genai.GenerationConfig(max_new_tokens=answer, ignore_eos=True, do_sample=False)

    def told(words):
        """A word of this text is a token; how many the pipeline saw is asked of it."""
        return pipeline.generate([" word" * words], settings).perf_metrics

    told(context)
    long, short = told(prompt), told(context)
    print(json.dumps({"phase": "prefill", "rate": long.get_num_input_tokens() / long.get_ttft().mean * 1e3}))
    print(json.dumps({"phase": "decode", "rate": 1e3 / short.get_tpot().mean}))


main()
