// How figures are written.

const whole = new Intl.NumberFormat("en");

/** A count. */
export const count = (n) => whole.format(n);

/** "1 token", "2 tokens". */
export const counted = (n, what) => `${count(n)}\u00a0${what}${n === 1 ? "" : "s"}`;

/** A part from 0 to 1. */
export const percent = (part) => `${Math.round(part * 100)}\u00a0%`;

/** A span in seconds, to be read as a measurement. */
export function span(seconds) {
  const ms = seconds * 1000;
  if (ms < 9.95) return `${ms.toFixed(1)}\u00a0ms`;
  return ms < 999.5 ? `${ms.toFixed(0)}\u00a0ms` : `${seconds.toFixed(2)}\u00a0s`;
}

/** How long ago, in seconds. */
export function ago(seconds) {
  if (seconds < 1) return "now";
  return seconds < 120 ? `${Math.floor(seconds)}\u00a0s ago` : `${Math.floor(seconds / 60)}\u00a0min ago`;
}

/** Bytes. */
export function bytes(n) {
  const power = n < 1000 ? 0 : Math.min(4, Math.floor(Math.log10(n) / 3));
  return `${(n / 1000 ** power).toPrecision(power === 0 ? 4 : 3).replace(/\.0+$/, "")}\u00a0${["B", "kB", "MB", "GB", "TB"][power]}`;
}

/** So many a second. */
export const rate = (n, seconds) => (n / seconds).toFixed(n / seconds < 100 ? 1 : 0);

/** A node's name, short enough for a line: of the random part that ends it, the beginning tells nodes apart. */
export const node = (id) => id.replace(/([0-9a-f]{8})-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/, "$1");
