// An answer as the router streams it, and its refusals as it says them.

import * as key from "./key.js";

/** What the router says where it does not answer. */
export class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** The refusal in a response. */
export async function refusal(response) {
  const told = await response.json().catch(() => ({}));
  const again = response.headers.get("retry-after");
  const message = told.error?.message ?? `the router answered ${response.status} ${response.statusText}`;
  return new Refused(again ? `${message} (in ${again} s)` : message, response.status);
}

/** Which models and nodes answer, from the header that says so in one line. */
function servedBy(line) {
  const [mode, , ...nodes] = line?.split(" ") ?? [];
  return mode && { mode, nodes };
}

/**
 * Asks, and yields what comes: `{ servedBy }` at once and at the end, `{ text }` for each token, `{ finish }`, `{ usage }`.
 * Throws `Refused` for what the router says.
 */
export async function* answer(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const headers = { "content-type": "application/json", ...key.header() };
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body, signal });
  if (!response.ok) throw await refusal(response);
  yield { servedBy: servedBy(response.headers.get("x-overfill-served-by")) };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refused("the answer broke off: its connection was closed");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      // Other lines are comments, which keep the connection open.
      const data = event
        .split("\n")
        .find((line) => line.startsWith("data:"))
        ?.slice("data:".length)
        .trim();
      if (!data) continue;
      if (data === "[DONE]") return;
      yield* pieces(JSON.parse(data));
    }
  }
}

function* pieces({ error, choices, usage, served_by: by }) {
  if (error) throw new Refused(error.message);
  const [choice] = choices ?? [];
  // The first says who speaks, and has no token.
  if (choice && !choice.delta.role && choice.delta.content !== undefined) yield { text: choice.delta.content };
  if (by) yield { servedBy: { mode: by.mode, nodes: [by.prefill_node, by.decode_node].filter(Boolean) } };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
  if (usage) yield { usage };
}
