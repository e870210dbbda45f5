// The cluster as the router tells it: asked for twice a second while the page is looked at.

import { element, figure, write } from "./element.js";
import * as figures from "./figures.js";
import * as key from "./key.js";
import { Refused, refusal } from "./stream.js";

const EVERY = 500;
/** And where it does not answer, or not so. */
const AGAIN = 2000;
/** A router that does not answer for so long is not there. */
const PATIENCE = 3000;
/** Over which time the speed is taken, in seconds. */
const LATELY = 5;
const SHOWN_HANDOFFS = 10;

const TONES = {
  ready: "good",
  new: "quiet",
  starting: "quiet",
  draining: "fair",
  suspected: "fair",
  failed: "bad",
  silent: "bad",
  lost: "bad",
  left: "quiet",
};
/** What a condition means to who looks at it. */
const MEANINGS = {
  new: "listed, and not heard yet",
  starting: "loads its model",
  draining: "finishes what it has, and takes nothing new",
  suspected: "failed a request, and is left alone for a moment",
  failed: "says that it cannot go on",
  silent: "is listed, and does not answer",
  lost: "has gone without leave",
  left: "has gone after a drain",
};
const ERRORS = { failed: "answer failed", refused: "request refused", attempts_failed: "attempt failed" };

const at = (id) => document.getElementById(id);

/** A node's place in its list. */
class Node {
  constructor({ id, address }) {
    this.name = element("code", { class: "name", text: figures.node(id), title: id });
    this.dot = element("span", { class: "dot" });
    this.condition = element("span", { class: "condition" });
    this.bar = element("span", { class: "bar" });
    this.meter = element(
      "span",
      { class: "meter", role: "meter", "aria-label": "KV cache", "aria-valuemin": "0", "aria-valuemax": "100" },
      this.bar,
    );
    this.kv = element("span", { class: "kv" });
    this.load = element("dl", { class: "load" });
    this.figures = new Map();
    const head = element("p", { class: "head" }, this.dot, this.name, element("span", { class: "address", text: address }), this.condition);
    this.item = element(
      "li",
      { class: "node" },
      head,
      element("p", { class: "fullness" }, element("span", { text: "KV" }), this.meter, this.kv),
      this.load,
    );
  }

  show({ role, models, condition, gone, heard, load }, severalModels) {
    this.item.dataset.condition = condition;
    this.item.dataset.tone = this.dot.dataset.tone = TONES[condition] ?? "quiet";
    this.item.title = MEANINGS[condition] ?? "";
    write(this.condition, gone === null ? this.now(condition, heard) : `${condition} ${figures.ago(gone)}`);
    this.item.classList.toggle("gone", gone !== null);
    const full = load && load.blocks ? load.blocks_held / load.blocks : 0;
    this.bar.style.inlineSize = `${full * 100}%`;
    this.meter.setAttribute("aria-valuenow", Math.round(full * 100));
    write(this.kv, load ? figures.percent(full) : "–");
    if (load) {
      this.figure("sequences", `${figures.count(load.sequences)}/${figures.count(load.sequences_most)}`);
      if (role === "prefill") this.figure("to read", figures.count(load.unread_tokens));
      else this.figure("preempted", figures.count(load.preempted));
      this.figure("prefix hits", load.prefix_queries ? figures.percent(load.prefix_hits / load.prefix_queries) : "–");
    }
    if (severalModels) this.figure("serves", models.join(", "));
  }

  now(condition, heard) {
    return condition === "silent" && heard >= 1 ? `silent for ${Math.floor(heard)}\u00a0s` : condition;
  }

  figure(name, value) {
    if (!this.figures.has(name)) {
      this.figures.set(name, figure(name, value));
      this.load.append(this.figures.get(name));
    }
    write(this.figures.get(name).querySelector("dd"), value);
  }
}

/** The part of the page that shows the cluster. */
export class Cluster {
  constructor() {
    this.nodes = new Map();
    this.down = new Set();
    this.newest = 0;
    this.samples = [];
  }

  /** Looks as long as the page is there; calls `reached` when a router answers, for the first time and after it did not. */
  async watch(reached) {
    for (;;) {
      const well = document.hidden || (await this.look(reached));
      await new Promise((later) => setTimeout(later, well ? EVERY : AGAIN));
    }
  }

  /** Whether all went well. */
  async look(reached) {
    try {
      const response = await fetch("cluster", { headers: key.header(), signal: AbortSignal.timeout(PATIENCE) });
      if (!this.there) reached();
      this.there = true;
      if (!response.ok) throw await refusal(response);
      this.show(await response.json());
      return true;
    } catch (error) {
      this.there = error instanceof Refused;
      this.stale(this.there ? error.message : "The router does not answer: what stands here is what it said last.");
      this.stand(this.there ? "quiet" : "bad", this.there ? "the cluster is not shown" : "the router does not answer");
      return false;
    }
  }

  stale(why) {
    at("cluster").classList.add("stale");
    write(at("cluster-notice"), why);
    at("cluster-notice").hidden = false;
  }

  stand(tone, text) {
    at("standing").querySelector(".dot").dataset.tone = tone;
    write(at("standing-text"), text);
  }

  show({ router, models, nodes, handoffs }) {
    at("cluster").classList.remove("stale");
    at("cluster-notice").hidden = true;
    // A router that was started anew counts anew.
    if (router.uptime < (this.uptime ?? 0)) {
      this.samples = [];
      this.newest = 0;
    }
    this.uptime = router.uptime;
    this.showTotals(router, models);
    this.showNodes(nodes, models.length > 1);
    this.showHandoffs(handoffs);
    this.showErrors(router);
    const down = nodes.filter(({ condition }) => TONES[condition] === "bad").length;
    if (router.unready !== null) this.stand("bad", router.unready);
    else if (router.discovery === false) this.stand("fair", "ready, discovery is away");
    else this.stand(down ? "fair" : "good", down ? `ready, ${figures.counted(down, "node")} down` : "ready");
  }

  showTotals({ waiting, uptime, failed, refused }, models) {
    const sum = (of) => models.reduce((all, model) => all + model[of], 0);
    this.samples.push([uptime, sum("generation_tokens")]);
    while (this.samples.length > 2 && uptime - this.samples[1][0] > LATELY) this.samples.shift();
    const [[since, before], [, now]] = [this.samples[0], this.samples.at(-1)];
    const read = sum("prompt_tokens");
    const told = [
      ["answers", figures.count(sum("running"))],
      ["waiting", figures.count(waiting)],
      ["tokens/s", uptime > since ? figures.count(Math.round((now - before) / (uptime - since))) : "–"],
      ["prefix hits", read ? figures.percent(sum("cached_tokens") / read) : "–"],
      ["finished", figures.count(sum("finished"))],
      ["errors", figures.count([...Object.values(failed), ...Object.values(refused)].reduce((all, n) => all + n, 0))],
    ];
    this.totals ??= told.map(([name]) => figure(name, "–"));
    if (!at("totals").firstChild) at("totals").append(...this.totals);
    for (const [place, [, value]] of told.entries()) write(this.totals[place].querySelector("dd"), value);
  }

  showNodes(nodes, severalModels) {
    const here = new Set(nodes.map(({ id }) => id));
    for (const [id, node] of this.nodes) {
      if (!here.has(id)) {
        node.item.remove();
        this.nodes.delete(id);
        this.down.delete(id);
      }
    }
    for (const role of ["prefill", "decode"]) {
      const of = nodes.filter((node) => node.role === role);
      const list = at(`${role}-nodes`);
      for (const [place, state] of of.entries()) {
        if (!this.nodes.has(state.id)) this.nodes.set(state.id, new Node(state));
        const node = this.nodes.get(state.id);
        node.show(state, severalModels);
        if (list.children[place] !== node.item) list.insertBefore(node.item, list.children[place] ?? null);
        this.tell(state);
      }
      const ready = of.filter(({ condition }) => condition === "ready").length;
      write(at(`${role}-count`), of.length === 0 ? "none" : `${ready} ready`);
    }
  }

  /** Says a node's fall once, to those who listen to the page. */
  tell({ id, role, condition }) {
    const down = TONES[condition] === "bad";
    if (down && !this.down.has(id)) write(at("cluster-news"), `${role} node ${id} is ${condition}`);
    if (down) this.down.add(id);
    else this.down.delete(id);
  }

  showHandoffs(handoffs) {
    const list = at("handoffs");
    const fresh = handoffs.filter(({ number }) => number > this.newest).slice(0, SHOWN_HANDOFFS);
    for (const handoff of fresh.toReversed()) list.prepend(this.handoff(handoff));
    while (list.children.length > SHOWN_HANDOFFS) list.lastChild.remove();
    const ages = new Map(handoffs.map(({ number, ago }) => [String(number), ago]));
    for (const item of list.children) {
      const age = ages.get(item.dataset.number);
      if (age === undefined) item.remove();
      else write(item.querySelector(".ago"), figures.ago(age));
    }
    if (handoffs.length) this.newest = handoffs[0].number;
    list.dataset.empty = handoffs.length ? "" : "none yet";
  }

  handoff({ number, from, to, attempt, prompt_tokens: tokens, cached_tokens: cached, held_tokens: held, bytes, transfer, tail }) {
    const code = (id) => element("code", { text: figures.node(id), title: id });
    const told = [figures.counted(tokens, "token")];
    if (cached) told.push(`${figures.count(cached)} cached`);
    if (held) told.push(`${figures.count(held)} not sent`);
    told.push(`${figures.bytes(bytes)} in ${figures.span(transfer)}`);
    if (attempt > 1) told.push(`attempt ${attempt}`);
    return element(
      "li",
      { "data-number": number, title: `whole ${figures.span(tail)} after the full model's last layer` },
      element("p", { class: "head" }, element("span", { class: "way" }, code(from), " → ", code(to)), element("span", { class: "ago" })),
      element("p", { class: "told", text: told.join(" · ") }),
    );
  }

  showErrors(router) {
    const told = Object.entries(ERRORS).flatMap(([field, name]) => {
      return Object.entries(router[field])
        .filter(([, n]) => n > 0)
        .map(([reason, n]) => [`${name}: ${reason.replaceAll("_", " ")}`, figures.count(n)]);
    });
    const key = JSON.stringify(told);
    if (key === this.errors) return;
    this.errors = key;
    at("errors").replaceChildren(...told.map(([name, n]) => figure(name, n)));
    at("errors").dataset.empty = told.length ? "" : "none";
  }
}
