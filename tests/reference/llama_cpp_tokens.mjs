// What llama.cpp makes of texts with a GGUF file's vocabulary. Where `npm install node-llama-cpp` was done:
//
//     python3 tests/reference/tokenizer_kinds.py --texts /tmp/texts.json
//     node llama_cpp_tokens.mjs tests/fixtures/tokenizers/llama-2/vocabulary.gguf /tmp/texts.json /tmp/ids.json
//     python3 tests/reference/tokenizer_kinds.py --compare llama-2 /tmp/ids.json
import { readFileSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { getLlama } from "node-llama-cpp";

const [file, texts, out] = process.argv.slice(2);
const llama = await getLlama({ build: "never", gpu: false, logLevel: "error" });
const model = await llama.loadModel({ modelPath: resolve(file), vocabOnly: true });
const ids = JSON.parse(readFileSync(texts, "utf8")).map((text) => (text === "" ? [] : model.tokenize(text, true)));
writeFileSync(out, JSON.stringify(ids));
console.log(`llama.cpp ${llama.llamaCppRelease.release}: ${ids.length} texts`);
await model.dispose();
