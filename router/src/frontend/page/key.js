// The client's key: kept in this tab, sent to this router, shown to nobody.

const NAME = "overfill-key";

export const read = () => sessionStorage.getItem(NAME) ?? "";

export function keep(key) {
  if (key) sessionStorage.setItem(NAME, key);
  else sessionStorage.removeItem(NAME);
}

/** The header that a request carries it in; none where there is none. */
export const header = () => (read() ? { authorization: `Bearer ${read()}` } : {});
