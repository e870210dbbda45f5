// The page's parts, put together.

import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import { element } from "./element.js";
import * as key from "./key.js";
import { refusal } from "./stream.js";

const at = (id) => document.getElementById(id);

function followTheme() {
  const kept = localStorage.getItem("overfill-theme") ?? "system";
  const set = (theme) => document.documentElement.setAttribute("data-theme", theme);
  at("theme").value = kept;
  set(kept);
  at("theme").addEventListener("change", ({ target }) => {
    localStorage.setItem("overfill-theme", target.value);
    set(target.value);
  });
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

/** Which models there are; where the router asks for a key, so does the page. */
async function listModels() {
  let response;
  try {
    response = await fetch("v1/models", { headers: key.header() });
  } catch {
    return; // The cluster's part says that the router has gone, and calls this when it is back.
  }
  at("send").disabled = !response.ok;
  if (!response.ok) {
    const refused = await refusal(response);
    if (refused.status === 401) at("key-row").hidden = false;
    notice(refused.status === 401 && !key.read() ? "This router asks for an API key." : refused.message);
    return;
  }
  notice("");
  const { data } = await response.json();
  at("model").replaceChildren(...data.map(({ id }) => element("option", { text: id, value: id })));
  at("model-row").hidden = data.length < 2;
}

function followKey() {
  at("key").value = key.read();
  at("key-row").hidden = !key.read();
  at("key").addEventListener("change", ({ target }) => {
    key.keep(target.value.trim());
    listModels();
  });
}

/** What the fields say. */
function wanted() {
  const qualities = [...document.querySelectorAll("[name=quality]:checked")].map(({ value }) => value);
  const request = { max_tokens: at("max-tokens").valueAsNumber || undefined };
  if (at("model").value) request.model = at("model").value;
  if (!Number.isNaN(at("temperature").valueAsNumber)) request.temperature = at("temperature").valueAsNumber;
  return { qualities, request, inTurn: at("in-turn").checked };
}

function followChat() {
  const chat = new Chat(at("turns"), at("transcript"));
  const prompt = at("prompt");
  const show = (running) => {
    at("send").hidden = running;
    at("stop").hidden = !running;
    at("intro").hidden = running || chat.turns.length > 0;
    at("clear").hidden = running || chat.turns.length === 0;
  };
  const ask = async (text) => {
    const { qualities, request, inTurn } = wanted();
    if (chat.running || !text) return;
    if (qualities.length === 0) {
      notice("Choose at least one quality that is to answer.");
      return;
    }
    notice("");
    prompt.value = "";
    show(true);
    await chat.ask(text, qualities, request, inTurn);
    show(false);
  };
  at("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(prompt.value.trim());
  });
  prompt.addEventListener("keydown", (event) => {
    // Not while a character is composed.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      if (!at("send").disabled) at("composer").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") chat.stop();
  });
  at("stop").addEventListener("click", () => {
    chat.stop();
    prompt.focus();
  });
  at("clear").addEventListener("click", () => {
    chat.clear();
    show(false);
    prompt.focus();
  });
  for (const example of document.querySelectorAll(".example")) {
    example.addEventListener("click", () => {
      prompt.focus();
      if (!at("send").disabled) ask(example.textContent);
    });
  }
  // Where a keyboard is at hand, and none would cover the page.
  if (matchMedia("(hover: hover) and (pointer: fine)").matches) prompt.focus();
}

followTheme();
followKey();
followChat();
new Cluster().watch(listModels);
