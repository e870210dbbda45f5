// The router's page in Chromium: what somebody sees who asks it, by keyboard alone, in the dark, on a phone, and while a node dies.
// Started by the test `the_page_shows_answers_and_nodes`; by hand, against a cluster of one prefill node and two decode
// nodes, with the numbers of the processes of one of these and of the router:
//   apt-get install chromium && npm install playwright-core && node page.mjs http://127.0.0.1:8000 NODE ROUTER
// With SCREENSHOTS=FOLDER it leaves pictures there, with PROMPT='…' it asks that.
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const [address, node, router] = process.argv.slice(2);
const { SCREENSHOTS: pictures, PROMPT: prompt = "What is a volcano?", CHROMIUM: executablePath = "/usr/bin/chromium" } = process.env;
const PATIENCE = { timeout: 60_000 };

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });

/** A page at the router, in a browser of its own; what must not happen in it is collected. */
async function open(options = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 }, ...options });
  const page = await context.newPage();
  const wrong = [];
  page.on("console", (message) => ["error", "warning"].includes(message.type()) && wrong.push(`${message.type()}: ${message.text()}`));
  page.on("pageerror", (error) => wrong.push(`${error}`));
  page.on("request", (request) => new URL(request.url()).origin === new URL(address).origin || wrong.push(`asks ${request.url()}`));
  await page.goto(address);
  await page.waitForSelector("#standing .dot[data-tone=good]", PATIENCE);
  return { page, wrong };
}

/** What has the focus. */
const focused = (page) =>
  page.evaluate(() => document.activeElement.id || document.activeElement.textContent.trim() || document.activeElement.value);

/** The answers of the last turn, once they are whole. */
async function answers(page, turns) {
  await page.waitForFunction(
    (n) => document.querySelectorAll("#turns > li").length === n && !document.querySelector("[aria-busy=true]"),
    turns,
    PATIENCE,
  );
  return page.$$eval("#turns > li:last-child .answer", (articles) =>
    articles.map((article) => {
      const text = (where) => article.querySelector(where)?.textContent ?? "";
      const figures = [...article.querySelectorAll(".measured > div")].map((figure) => [
        figure.firstChild.textContent,
        figure.lastChild.textContent,
      ]);
      return {
        quality: article.dataset.quality,
        text: text(".text"),
        state: text(".state"),
        by: text(".by"),
        error: text(".error"),
        nodes: [...article.querySelectorAll(".by code")].map((node) => node.title),
        figures: Object.fromEntries(figures),
        left: article.getBoundingClientRect().left,
        top: article.getBoundingClientRect().top,
      };
    }),
  );
}

/** That nothing is wider than the screen, and nothing too small to read. */
async function fits(page) {
  const { width, screen, small } = await page.evaluate(() => {
    const sizes = [...document.querySelectorAll("body *")].filter(
      (of) => of.checkVisibility() && [...of.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()),
    );
    const small = sizes.filter((of) => parseFloat(getComputedStyle(of).fontSize) < 12).map((of) => of.outerHTML);
    return { width: document.documentElement.scrollWidth, screen: innerWidth, small };
  });
  assert.ok(width <= screen, `${width} pixels on a screen of ${screen}`);
  assert.deepEqual(small, []);
}

const picture = async (page, name) => pictures && (await page.screenshot({ path: `${pictures}/${name}.png` }));
/** Red, green and blue of an element's property. */
async function colour(page, where, property) {
  const value = await page.$eval(where, (of, property) => getComputedStyle(of)[property], property);
  return value.match(/[\d.]+/g).map(Number);
}
const light = ([red, green, blue]) => (red + green + blue) / 3 > 128;

const { page, wrong } = await open();
await page.fill("#max-tokens", "96");
// The same words in every run: a tiny model that draws its tokens may end an answer at once.
await page.fill("#temperature", "0");
await page.focus("#prompt");

// The nodes are there, and everything that can be operated has a name.
assert.equal(await page.$$eval("#prefill-nodes .node", (nodes) => nodes.length), 1);
const decodeNodes = await page.$$eval("#decode-nodes .node[data-condition=ready] .name", (names) => names.map((name) => name.title));
assert.equal(decodeNodes.length, 2);
const protocol = await page.context().newCDPSession(page);
const { nodes: tree } = await protocol.send("Accessibility.getFullAXTree");
const operated = ["button", "textbox", "checkbox", "combobox", "spinbutton", "link", "meter"];
const nameless = tree.filter(({ role, name, ignored }) => !ignored && operated.includes(role?.value) && !name?.value);
assert.deepEqual(
  nameless.map(({ role }) => role.value),
  [],
);

// By keyboard alone: from the prompt back to the top of the page, from there past everything to the prompt, ask, read.
assert.equal(await focused(page), "prompt");
const way = [];
while (way.at(-1) !== "To the prompt") {
  assert.ok(way.length < 20, `the top of the page is not reached: ${way}`);
  await page.keyboard.press("Shift+Tab");
  way.push(await focused(page));
}
assert.ok(way.includes("theme"), `${way}`);
await page.keyboard.press("Enter");
assert.equal(await focused(page), "prompt");
await page.keyboard.type(prompt);
await page.keyboard.press("Enter");
const three = await answers(page, 1);
assert.deepEqual(
  three.map(({ quality }) => quality),
  ["full", "overfill", "decode"],
);
assert.equal(new Set(three.map(({ top }) => top)).size, 1, "side by side");
assert.equal(new Set(three.map(({ left }) => left)).size, 3);
for (const { quality, text, by, nodes, figures, error } of three) {
  assert.equal(error, "");
  assert.ok(text.length > 3, `${quality} wrote '${text}'`);
  assert.ok(by.startsWith(`served by ${quality}`), by);
  assert.deepEqual(
    nodes.map((node) => node.split("-")[0]),
    { full: ["prefill"], overfill: ["prefill", "decode"], decode: ["decode"] }[quality],
  );
  assert.match(figures["first token"], /^[\d.]+\sm?s$/);
  assert.ok(Number(figures["tokens/s"]) > 0 && Number(figures.tokens) > 1, JSON.stringify(figures));
}
assert.equal(await focused(page), "prompt", "the next question can be typed");
await picture(page, "page-light");

// The handoff was seen, between the nodes that the answer names.
const overfill = three[1];
const handoff = await page.waitForSelector("#handoffs > li", PATIENCE);
assert.deepEqual(await handoff.$$eval("code", (codes) => codes.map((code) => code.title)), overfill.nodes);
assert.match(await handoff.textContent(), /\d+\stokens.*\s[kM]?B in [\d.]+\sm?s/);

// One quality less, one after another, and the chat goes on.
await page.click("label:has([value=decode])");
await page.check("#in-turn");
await page.fill("#prompt", "And then?");
await page.click("#send");
assert.deepEqual(
  (await answers(page, 2)).map(({ quality, error }) => [quality, error]),
  [
    ["full", ""],
    ["overfill", ""],
  ],
);

// What is not answered is stopped.
await page.route("**/v1/chat/completions", () => {});
await page.keyboard.press("Tab");
await page.fill("#prompt", "Wait");
await page.keyboard.press("Enter");
await page.waitForSelector("#stop:not([hidden])");
await page.keyboard.press("Escape");
assert.deepEqual(
  (await answers(page, 3)).map(({ state }) => state),
  ["stopped", "left out"],
);
await page.unroute("**/v1/chat/completions");

// In the dark, and the other way round by hand.
const night = await open({ colorScheme: "dark" });
assert.ok(!light(await colour(night.page, "body > header", "backgroundColor")) && light(await colour(night.page, "h1", "color")));
await night.page.fill("#max-tokens", "96");
await night.page.fill("#prompt", prompt);
await night.page.keyboard.press("Enter");
await answers(night.page, 1);
await picture(night.page, "page-dark");
await night.page.selectOption("#theme", "light");
assert.ok(light(await colour(night.page, "body > header", "backgroundColor")));

// On a phone.
const phone = await open({ viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true });
await fits(phone.page);
await phone.page.tap(".example");
const stacked = await answers(phone.page, 1);
assert.equal(new Set(stacked.map(({ left }) => left)).size, 1, "one under the other");
await fits(phone.page);
await phone.page.evaluate(() => scrollTo(0, 0));
await picture(phone.page, "page-phone");

// What the router refuses is said as the router says it. (Chromium itself writes the status to the console: not looked at.)
const refused = await open();
await refused.page.fill("#max-tokens", "99999");
await refused.page.fill("#prompt", prompt);
await refused.page.keyboard.press("Enter");
const body = JSON.stringify({ messages: [{ role: "user", content: prompt }], max_tokens: 99999 });
const told = await (
  await fetch(`${address}/v1/chat/completions`, { method: "POST", headers: { "content-type": "application/json" }, body })
).json();
for (const { error, state } of await answers(refused.page, 1)) assert.deepEqual([error, state], [told.error.message, "failed"]);

// A node is killed.
process.kill(Number(node), "SIGKILL");
const killed = performance.now();
const red = await page.waitForSelector("#decode-nodes .node[data-tone=bad]", { timeout: 3000 });
const took = performance.now() - killed;
assert.match(await red.$eval(".condition", (condition) => condition.textContent), /silent|lost/);
const [r, g, b] = await colour(page, ".node[data-tone=bad]", "borderTopColor");
assert.ok(r > 2 * g && r > 2 * b, `rgb(${r}, ${g}, ${b}) is red`);
assert.match(await page.textContent("#standing-text"), /1\snode down/);
assert.ok(decodeNodes.includes(await red.$eval(".name", (name) => name.title)));
await picture(page, "page-node-lost");
// It is gone from the view some seconds later, and told of still.
await page.waitForSelector("#decode-nodes .node[data-condition=lost]", PATIENCE);
assert.equal(await page.textContent("#decode-count"), "1 ready");
await page.uncheck("#in-turn");
await page.click("label:has([value=decode])");
await page.fill("#prompt", prompt);
await page.keyboard.press("Enter");
for (const { error } of await answers(page, 4)) assert.equal(error, "", "the other node serves");

// The router hangs, and is back: what it said last stays in sight, and nobody has to load the page anew.
process.kill(Number(router), "SIGSTOP");
await page.waitForSelector("#cluster.stale", { timeout: 10_000 });
assert.match(await page.textContent("#standing-text"), /does not answer/);
assert.equal(await page.$$eval("#prefill-nodes .node", (nodes) => nodes.length), 1);
process.kill(Number(router), "SIGCONT");
await page.waitForSelector("#cluster:not(.stale)", { timeout: 10_000 });

for (const { wrong: of } of [{ wrong }, night, phone]) assert.deepEqual(of, []);
await browser.close();
console.log(JSON.stringify({ red_after_ms: Math.round(took) }));
