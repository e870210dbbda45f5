// The chat: one prompt, an answer of each quality that is wanted, side by side. Each quality goes on with its own answers.

import { element, figure, write } from "./element.js";
import * as figures from "./figures.js";
import { answer, Refused } from "./stream.js";

const ENDED = { stop: "", length: "token limit reached", abort: "broken off" };

/** One answer on the page, and what is measured of it. */
class Column {
  constructor(quality) {
    this.quality = quality;
    this.text = "";
    this.tokens = 0;
    this.shown = element("p", { class: "text", "aria-live": "polite", "aria-busy": "true" });
    this.state = element("p", { class: "state", text: "waits" });
    this.by = element("p", { class: "by" });
    this.measured = { first: figure("first token", "–"), speed: figure("tokens/s", "–"), tokens: figure("tokens", "–") };
    const head = element("header", {}, element("h3", { text: quality }), this.state);
    const foot = element("footer", {}, element("dl", { class: "measured" }, ...Object.values(this.measured)), this.by);
    this.article = element(
      "article",
      { class: "answer", "data-quality": quality, "aria-label": `Answer of ${quality}` },
      head,
      this.shown,
      foot,
    );
  }

  /** Asks for the answer and shows it as it comes. Never throws. */
  async fill(request, signal, scrolled) {
    this.asked = performance.now();
    this.says("reads");
    try {
      for await (const piece of answer({ ...request, quality: this.quality }, signal)) {
        this.take(piece);
        scrolled();
      }
      this.says(ENDED[this.finish] ?? this.finish ?? "");
    } catch (error) {
      if (signal.aborted) this.says("stopped");
      else this.fails(error);
    }
    this.shown.normalize();
    this.shown.setAttribute("aria-busy", "false");
    scrolled();
  }

  /** It is not asked any more. */
  leaveOut() {
    this.says("left out");
    this.shown.setAttribute("aria-busy", "false");
  }

  take({ text, servedBy, finish, usage }) {
    const now = performance.now();
    if (text !== undefined) {
      this.tokens += 1;
      this.first ??= now;
      this.last = now;
      if (this.tokens === 1) {
        this.says("writes");
        this.measure("first", figures.span((this.first - this.asked) / 1000));
      }
      if (text) {
        this.text += text;
        this.shown.append(text);
      }
      this.measureSpeed();
    }
    if (servedBy) this.tellBy(servedBy);
    if (finish) this.finish = finish;
    if (usage) {
      // A token may have come without text, and text without a token.
      this.tokens = usage.completion_tokens;
      this.measureSpeed();
    }
  }

  measure(name, value) {
    write(this.measured[name].querySelector("dd"), value);
  }

  measureSpeed() {
    // Between the first token and the last: what reading took is told apart.
    if (this.tokens > 1 && this.last > this.first) this.measure("speed", figures.rate(this.tokens - 1, (this.last - this.first) / 1000));
    this.measure("tokens", figures.count(this.tokens));
  }

  tellBy({ mode, nodes }) {
    const other = mode !== this.quality;
    const way = element("span", { class: "way" });
    for (const [place, id] of nodes.entries()) way.append(place ? " → " : "", element("code", { text: figures.node(id), title: id }));
    this.by.replaceChildren(`served by ${mode}${other ? `, since nodes for ${this.quality} are missing` : ""}`, way);
    this.by.classList.toggle("other", other);
  }

  says(state) {
    write(this.state, state);
  }

  fails(error) {
    this.says("failed");
    this.article.classList.add("failed");
    const message = error instanceof Refused ? error.message : `the router is not reached: ${error.message}`;
    this.shown.after(element("p", { class: "error", role: "alert", text: message }));
  }
}

/** The whole conversation. */
export class Chat {
  /** Turns go into `list`, which scrolls within `transcript`. */
  constructor(list, transcript) {
    this.list = list;
    this.transcript = transcript;
    this.turns = [];
  }

  get running() {
    return this.stopping !== undefined;
  }

  /** What a quality has heard and said so far, and the prompt. */
  messages(quality, prompt) {
    const before = this.turns.filter((turn) => turn.said.get(quality));
    const said = before.flatMap((turn) => [
      { role: "user", content: turn.prompt },
      { role: "assistant", content: turn.said.get(quality) },
    ]);
    return [...said, { role: "user", content: prompt }];
  }

  /** Asks for an answer of each quality, at once or one after another, and waits for the last. */
  async ask(prompt, qualities, request, inTurn) {
    const columns = qualities.map((quality) => new Column(quality));
    const asked = element("p", { class: "asked" }, element("span", { class: "unseen", text: "You: " }), prompt);
    this.list.append(element("li", {}, asked, element("div", { class: "answers" }, ...columns.map((column) => column.article))));
    this.transcript.scrollTop = this.transcript.scrollHeight;
    this.stopping = new AbortController();
    const { signal } = this.stopping;
    const fill = (column) => column.fill({ ...request, messages: this.messages(column.quality, prompt) }, signal, () => this.follow());
    if (inTurn) {
      for (const column of columns) signal.aborted ? column.leaveOut() : await fill(column);
    } else {
      await Promise.all(columns.map(fill));
    }
    this.stopping = undefined;
    this.turns.push({ prompt, said: new Map(columns.map(({ quality, text }) => [quality, text])) });
  }

  stop() {
    this.stopping?.abort();
  }

  clear() {
    this.stop();
    this.turns = [];
    this.list.replaceChildren();
  }

  /** Keeps the end in sight, unless somebody reads further up. */
  follow() {
    const { scrollHeight, scrollTop, clientHeight } = this.transcript;
    if (scrollHeight - scrollTop - clientHeight < 120) this.transcript.scrollTop = scrollHeight;
  }
}
