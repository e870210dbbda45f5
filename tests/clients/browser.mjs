// A page of another origin in Chromium asks a cluster, and one of an origin that is not allowed gets nothing:
//   apt-get install chromium && npm install playwright-core
//   overfill serve --cors-origins http://127.0.0.1:9001 & node browser.mjs http://127.0.0.1:8000 9001
// With --keys: KEY=… before it. Last run: see docs/api.md.
import assert from "node:assert/strict";
import { createServer } from "node:http";
import { chromium } from "playwright-core";

const [address, port] = process.argv.slice(2);
const key = process.env.KEY ?? "unused";

/** A server of an empty page; gives its origin. */
function serve(at) {
  const server = createServer((_, response) => response.setHeader("content-type", "text/html").end("<!doctype html><title>page</title>"));
  return new Promise((listening) => server.listen(at, "127.0.0.1", () => listening({ server, origin: `http://127.0.0.1:${server.address().port}` })));
}

/** In the page: asks, and tells what a script there may see of the answer. */
async function ask({ url, key, body, type = "application/json" }) {
  const authorization = key === null ? {} : { authorization: `Bearer ${key}` };
  try {
    const response = await fetch(url, body ? { method: "POST", headers: { "content-type": type, ...authorization }, body: JSON.stringify(body) } : { headers: authorization });
    const pieces = [];
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let read = await reader.read(); !read.done; read = await reader.read()) pieces.push(read.value);
    return { status: response.status, trace: response.headers.get("x-trace-id"), text: pieces.join(""), pieces: pieces.length };
  } catch (error) {
    return { refused: String(error) };
  }
}

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });
const [allowed, other] = [await serve(Number(port)), await serve(0)];
const [page, stranger] = [await browser.newPage(), await browser.newPage()];
await page.goto(allowed.origin);
await stranger.goto(other.origin);

const preflights = [];
const protocol = await page.context().newCDPSession(page);
await protocol.send("Network.enable");
protocol.on("Network.requestWillBeSent", (event) => event.initiator.type === "preflight" && preflights.push(event.request.method));

const chat = (more) => ({ messages: [{ role: "user", content: "What is the capital of France?" }], max_tokens: 24, temperature: 0, ...more });
const url = `${address}/v1/chat/completions`;

const whole = await page.evaluate(ask, { url, key, body: chat() });
assert.equal(whole.status, 200, JSON.stringify(whole));
assert.ok(preflights.includes("OPTIONS"), "the browser asked first");
assert.ok(whole.trace, "the trace's id may be read");
const said = JSON.parse(whole.text).choices[0].message.content;

const stream = await page.evaluate(ask, { url, key, body: chat({ stream: true }) });
const events = stream.text.split("\n\n").filter((event) => event.startsWith("data: ")).map((event) => event.slice("data: ".length));
assert.equal(events.pop(), "[DONE]");
assert.equal(events.map((event) => JSON.parse(event).choices[0]?.delta.content ?? "").join(""), said);
assert.ok(stream.pieces > 1, "it comes as it is written");

for (const [path, body, status, param] of [
  ["/v1/chat/completions", chat({ top_p: 3 }), 400, "top_p"],
  ["/v1/responses", { input: 5 }, 400, "input"],
  ["/v1/nowhere", chat(), 404, null],
]) {
  const failed = await page.evaluate(ask, { url: address + path, key, body });
  assert.equal(failed.status, status, `${path}: ${JSON.stringify(failed)}`);
  assert.equal(JSON.parse(failed.text).error.param, param);
}
assert.equal((await page.evaluate(ask, { url: `${address}/v1/models`, key })).status, 200);
if (process.env.KEY) {
  const unknown = await page.evaluate(ask, { url, key: "wrong", body: chat() });
  assert.equal(unknown.status, 401, "that the key is wrong may be read");
}

// With a preflight, and without one: a text is what forms send too, which browsers let through and keep the answer of.
for (const request of [{ url, key, body: chat() }, { url, key: null, body: chat(), type: "text/plain" }, { url: `${address}/v1/models`, key: null }]) {
  assert.match((await stranger.evaluate(ask, request)).refused ?? "an answer", /Failed to fetch/);
}

await browser.close();
allowed.server.close();
other.server.close();
console.log("as it should be");
