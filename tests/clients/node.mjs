// OpenAI's and Anthropic's SDKs for Node, unchanged, against a cluster by its address:
//   npm install openai @anthropic-ai/sdk && node node.mjs http://127.0.0.1:8000
import assert from "node:assert/strict";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const address = process.argv[2];
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "unused", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "What is the capital of France?" }];
const whole = (await client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0 })).choices[0].message.content;
let text = "";
for await (const chunk of await client.chat.completions.create({ model, messages, max_tokens: 24, temperature: 0, stream: true })) {
  text += chunk.choices[0]?.delta.content ?? "";
}
assert.equal(text, whole);
const response = await client.responses.create({ model, input: messages[0].content, max_output_tokens: 24, temperature: 0 });
assert.equal(response.output_text, whole);
await assert.rejects(client.chat.completions.create({ model, messages, top_p: 3 }), (error) => error.status === 400 && error.param === "top_p");

const anthropic = new Anthropic({ baseURL: address, apiKey: "unused", maxRetries: 0 });
const ask = { model, max_tokens: 24, messages };
const stream = anthropic.messages.stream(ask);
let streamed = "";
stream.on("text", (piece) => (streamed += piece));
const last = await stream.finalMessage();
assert.equal(last.content[0].text, streamed);
assert.ok((await anthropic.messages.countTokens({ model, messages })).input_tokens > 0);
console.log("as it should be");
