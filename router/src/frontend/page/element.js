// Elements of the page, made of text alone: nothing that a model or a router says is read as HTML.

/** An element with these attributes and children; `text` is its text. */
export function element(tag, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Sets an element's text where it differs: what stays is not read out, and not deselected. */
export function write(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

/** One entry of a list of names and values. */
export function figure(name, value, attributes = {}) {
  return element("div", attributes, element("dt", { text: name }), element("dd", { text: value }));
}
